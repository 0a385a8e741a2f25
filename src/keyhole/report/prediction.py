"""A prediction: what a model says about one image, which can be written as JSON and show itself."""

from __future__ import annotations

from typing import Any

from keyhole.report.kept_sheet import kept_sheet
from keyhole.report.overlay import overlay
from keyhole.report.predicted import BOX as BOX
from keyhole.report.predicted import KeptPatches as KeptPatches
from keyhole.report.predicted import Pictures as Pictures
from keyhole.report.predicted import Predicted
from keyhole.report.predicted import Scores as Scores
from keyhole.report.shown import Shown, image_element
from keyhole.util.version import VERSION
from keyhole.util.wording import must_be_one_of


class Prediction(Predicted):
    """What a model predicts for one image. It can be pickled, also to another process."""

    def __repr__(self) -> str:
        """Return for example `Prediction('red/1.png', label: red 0.90, kept 4 of 16 patches)`."""
        said = []
        for task, label in self.label.items():
            share = self.probability[task].get(label)
            said.append(f"{task}: {label or '(none)'}" + ("" if share is None else f" {share:.2f}"))
        of = "" if self.scores is None else f" of {len(self.scores)}"
        return f"Prediction({self.name!r}, {', '.join(said)}, kept {len(self.kept)}{of} patches)"

    def show(self, task: str | None = None) -> Shown:
        """Show the prediction in Jupyter: image, scores and kept patches, as `keyhole predict --overlay` draws them.

        Args:
            task: Name of the task that is shown; default is all.

        Returns:
            What Jupyter renders as pictures, and what prints elsewhere as the line of this prediction. A prediction
            without pictures (`pictures=False`, `predict_many`) has only the line.

        Raises:
            ValueError: There is no such task.

        Example:
            >>> keyhole.load("runs/one", device="cpu").predict("photos/red/1.png").show()
            Prediction('photos/red/1.png', label: red ..., kept 4 of 16 patches)
        """
        shown = [each for each in self.tasks if task in (None, each.name)]
        if not shown:
            raise ValueError(must_be_one_of("task", task, (each.name for each in self.tasks)))
        if self.pictures is None:
            return Shown(f"{self!r}; no pictures")
        figures = []
        for each in shown:
            what = f"{self.name}, {each.name}: {self.label[each.name] or 'none'}"
            figures.append(
                image_element(overlay(self, each), f"{what}; the kept patches, and the score of every patch")
            )
            figures.append(image_element(kept_sheet(self, each), f"{what}; the kept patches by attention weight"))
        return Shown(repr(self), figures)

    def to_json(self) -> dict[str, Any]:
        """Convert the prediction to what JSON can hold.

        Returns:
            Everything except the score of every patch and the pictures.
        """
        return {
            "keyhole": VERSION,
            "model": self.model,
            "name": self.name,
            "image": str(self.image),
            "size": {"width": self.size.width, "height": self.size.height},
            "mpp": self.mpp,
            "file_mpp": self.file_mpp,
            "qupath_origin": list(self.origin),
            "tasks": {
                task.name: {
                    "kind": task.kind,
                    "classes": list(task.classes),
                    "label": self.label[task.name],
                    "threshold": dict(self.threshold.get(task.name, {})),
                    "probability": dict(self.probability[task.name]),
                }
                for task in self.tasks
            },
            "patch": dict(self.patch),
            "notes": list(self.notes),
            "unreadable": [] if self.unreadable is None else self.unreadable.tolist(),
            "kept": {"box_order": list(BOX), "box_unit": "level-0 pixels", "patches": list(self.kept.rows())},
            "scores": None
            if self.scores is None
            else {"rows": self.scores.rows, "columns": self.scores.columns, "patches": len(self.scores)},
        }
