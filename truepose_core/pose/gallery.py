"""A gallery of ready poses, made from the joint angles and contacts of a body model; all numbers are ours.

`assets/poses.json` holds them as OpenPose-18 keypoints in statures: x to the right from the middle of the body, y down
from the ground, so that the eyes of somebody who stands are at about y = -0.93. `python -m
truepose_core.mannequin.gallery SHEET.png` makes the file anew and draws all poses on one sheet.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np

from truepose_core.errors import TruePoseError
from truepose_core.pose.keypoints import Person, Pose

FILE = Path(__file__).resolve().parents[1] / "assets" / "poses.json"
FILL = 0.9
"""Share of the canvas's height that somebody who stands takes, from sole to crown."""


@lru_cache(maxsize=1)
def _stored() -> dict[str, np.ndarray]:
    poses = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: np.array(points, dtype=np.float64) for name, points in poses.items()}


NAMES: tuple[str, ...] = tuple(_stored())


def gallery_pose(name: str, width: int, height: int, fill: float = FILL) -> Pose:
    """A pose of the gallery on a canvas of width x height pixels.

    name: one of `NAMES`. fill: the share of the canvas's height that the person takes when standing, above 0; less if
    arms or legs would reach further. Poses of one size stand on the same ground. Raises `TruePoseError` for an unknown
    name, or a fill or a canvas that is not above 0.
    """
    if name not in NAMES:
        raise TruePoseError(f"there is no pose {name!r} in the gallery; expected one of {', '.join(NAMES)}")
    if not (math.isfinite(fill) and fill > 0):
        raise TruePoseError(f"fill is {fill}; expected a number above 0")
    empty = Pose(width, height)
    points = _stored()[name]
    seen = points[:, 2] > 0
    aspect = empty.width / empty.height
    low, high = points[seen, 0].min(), points[seen, 0].max()
    tall = max(1.0, -points[seen, 1].min())
    size = min(fill / tall, fill * aspect / (high - low))
    x = 0.5 + (points[:, 0] - (low + high) / 2) * size / aspect
    y = (1 + size * tall) / 2 + points[:, 1] * size
    return Pose(empty.width, empty.height, (Person(np.stack([x, y, seen], 1) * seen[:, None]),))
