"""Patches as GeoJSON that QuPath opens (File > Import objects): the kept ones as annotations, all of them as tiles.

It follows RFC 7946, except that coordinates are level-0 pixels, x to the right and y down, as in QuPath. They start at
the corner of the bounds that a slide states (`Image.qupath_origin`), to which QuPath crops it. Properties are those
that QuPath (0.4 and later) writes itself. An object has the same id in every file for an image, so that it is known as
the same when it is imported again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from keyhole.report.predicted import Predicted

KEPT_CLASS = "kept patch", (255, 127, 14)
"""The class of kept patches in QuPath, which has one colour for a class whatever the image."""
TILES_AT_ONCE = 10_000
"""Number of patches whose boxes are computed and written at once."""


def kept_geojson(prediction: Predicted) -> dict[str, Any]:
    """Return a FeatureCollection with one annotation per kept patch, best first, all of the class `KEPT_CLASS`.

    The label is that of the whole image, so it is not the class of a patch: `predicted TASK` in the metadata has it.

    Patches without a place, such as stored features without coordinates, are left out.

    The measurements of an annotation, by which QuPath can filter and colour, are its rank (1 is best), its selection
    score, and per task its attention weight, as it is and times M, which is 1 for an equal share.
    """
    name, color = KEPT_CLASS
    said = {f"predicted {task.name}": prediction.label[task.name] for task in prediction.tasks}
    features, m = [], len(prediction.kept)
    for rank, patch in enumerate(prediction.kept.rows(), start=1):
        if not patch["box"][2] * patch["box"][3]:
            continue
        properties = {
            "objectType": "annotation",
            "name": f"kept {rank}",
            "classification": {"name": name, "color": list(color)},
            "isLocked": True,
            "measurements": {"rank": rank, "selection score": patch["score"]}
            | {f"attention {task}": weight for task, weight in patch["attention"].items()}
            | {f"attention {task} times M": weight * m for task, weight in patch["attention"].items()},
            "metadata": said,
        }
        features.append(_feature(prediction, patch["box"], "", properties))
    return {"type": "FeatureCollection", "features": features}


def tile_lines(prediction: Predicted) -> Iterator[str]:
    """Yield a FeatureCollection with one tile per patch that was scored, line by line: memory does not grow with them.

    The measurements of a tile are its score times N, which is 1 for an equal share, over all tasks and per task.
    QuPath colours tiles by them: Measure > Show measurement maps. Patches without a place are left out.
    """
    scores = prediction.scores
    assert scores is not None, "the score of every patch was not kept"
    columns = {"score times N": scores.score}
    if len(scores.per_task) > 1:
        columns |= {f"score {task} times N": score for task, score in scores.per_task.items()}
    between = ""
    yield '{"type": "FeatureCollection", "features": [\n'
    for start in range(0, len(scores), TILES_AT_ONCE):
        some = slice(start, start + TILES_AT_ONCE)
        boxes = scores.boxes(scores.index[some]).tolist()
        values = zip(*((column[some] * len(scores)).tolist() for column in columns.values()), strict=True)
        arrived = [True] * len(boxes) if scores.arrived is None else scores.arrived[some].tolist()
        for box, measured, here in zip(boxes, values, arrived, strict=True):
            if here and box[2] * box[3]:
                said = {name: float(f"{value:.6g}") for name, value in zip(columns, measured, strict=True)}
                tile = _feature(prediction, box, "tile:", {"objectType": "tile", "measurements": said})
                yield between + json.dumps(tile, allow_nan=False)
                between = ",\n"
    yield "\n]}\n"


def _feature(prediction: Predicted, box: list[int], kind: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    x, y, width, height = box
    x, y = x - prediction.origin[0], y - prediction.origin[1]
    # Exterior rings turn counter-clockwise in the axes of the RFC and end where they begin.
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"keyhole:{kind}{prediction.name!a}:{box}")),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }
