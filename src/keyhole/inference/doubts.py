"""What makes predictions doubtful: another resolution, features of unknown origin, or too many unreadable patches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from keyhole.data.resolution import Resolution
from keyhole.engine import Inference
from keyhole.errors import KeyholeError
from keyhole.loading.unreadable import Ledger
from keyhole.patches.sources import PatchSource
from keyhole.report.prediction import Prediction
from keyhole.util.progress import say


@dataclass
class Doubts:
    """Notes what is doubtful about the predictions of one call, and warns about each doubt once.

    Attributes:
        resolution: At which the model was trained.
        told: Doubts about features that the user has been warned about.
        silent: Warn about nothing.
    """

    resolution: Resolution
    told: set[str]
    silent: bool
    _unlike: int = field(default=0, init=False)

    def warn_about_features(self, done: Inference) -> None:
        for source in done.batch.sources:
            for text in self._of_features(source):
                if source is not None and not self.silent and text not in self.told:
                    self.told.add(text)
                    say(f"warning: {source.name}: {text}")

    def noted(self, prediction: Prediction, source: PatchSource | None) -> Prediction:
        """Return the prediction with its doubts as notes."""
        mpp = prediction.patch["mpp"]
        stated = mpp is not None or "features" not in prediction.patch  # files of features need not state it
        doubt = self.resolution.doubt(mpp) if stated else ""
        if doubt:
            self._unlike += 1
            if self._unlike == 1 and not self.silent:
                say(f"warning: {prediction.name}: {doubt}")
        return replace(prediction, notes=(*self._of_features(source), *filter(None, [doubt])))

    def finish(self, images: int) -> None:
        """Warn how many of the images have another resolution."""
        if self._unlike > 1 and not self.silent:
            told = f"{self._unlike} of {images} images have another resolution than the model learned at"
            say(f"warning: {told} ({self.resolution} um per pixel), or none")

    def _of_features(self, source: PatchSource | None) -> list[str]:
        return [] if source is None else source.doubts()


def too_damaged(done: Inference, allowed: float) -> dict[int, KeyholeError]:
    """Return, by row of the batch, the images with a larger share of unreadable patches than `allowed`."""
    found: dict[int, KeyholeError] = {}
    for row, reasons in done.batch.unreadable.items():
        source = done.batch.sources[row]
        assert source is not None
        ledger, index = Ledger(len(source), allowed), list(reasons)
        ledger.add(done.batch.names[row], source.boxes(index), index, list(reasons.values()))
        try:
            ledger.check()
        except KeyholeError as error:
            found[row] = error
    return found
