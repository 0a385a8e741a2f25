"""The kept patches as GeoJSON that QuPath opens: File > Import objects, or drop the file on the image.

Structure after RFC 7946, except that coordinates are level-0 pixels, x to the right and y down, as QuPath has it:
counted from the corner of the bounds that a slide states (`Image.qupath_origin`), to which QuPath crops it. Properties
are those that QuPath (0.4 and later) writes itself.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keyhole.report.prediction import Prediction

PALETTE = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (255, 127, 14),
    (148, 103, 189),
    (23, 190, 207),
    (227, 119, 194),
    (140, 86, 75),
    (188, 189, 34),
    (127, 127, 127),
)
"""Colours of classes in index order, over again where there are more."""


def kept_geojson(prediction: Prediction) -> dict[str, Any]:
    """A FeatureCollection with one polygon per kept patch, best first, classified as the first task's label.

    Patches without a place, as of stored features without coordinates, are not in it.

    Every polygon carries its rank (1 is best), its selection score and its attention weight per task as measurements,
    by which QuPath can filter and colour; the weight also against the one that all would have if they were equal, 1/M.
    """
    task = prediction.tasks[0]
    label = prediction.label[task.name]
    name = task.group_name(label)
    color = PALETTE[task.classes.index(label) % len(PALETTE)] if label in task.classes else PALETTE[0]
    said = {f"predicted {task.name}": prediction.label[task.name] for task in prediction.tasks}
    features, m = [], len(prediction.kept)
    for rank, patch in enumerate(prediction.kept.rows(), start=1):
        x, y, width, height = patch["box"]
        if not width * height:
            continue
        x, y = x - prediction.origin[0], y - prediction.origin[1]
        # Exterior rings turn counter-clockwise in the axes of the RFC and end where they begin.
        ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        features.append(
            {
                "type": "Feature",
                # From image and place, so that importing the file twice does not double the objects.
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"keyhole:{prediction.name!a}:{patch['box']}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"kept {rank}",
                    "classification": {"name": name, "color": list(color)},
                    "isLocked": True,
                    "measurements": {"rank": rank, "selection score": patch["score"]}
                    | {f"attention {task}": weight for task, weight in patch["attention"].items()}
                    | {f"attention {task} times 1/M": weight * m for task, weight in patch["attention"].items()},
                    "metadata": said,
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}
