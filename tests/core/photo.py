"""scikit-image's astronaut as an input of `truepose transfer`: the photograph, a parsing from masks, two poses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Pixels of the 512 x 512 picture; hips lie just below it.
KEYPOINTS = {
    0: (222, 118), 1: (222, 215), 2: (120, 262), 3: (62, 372), 4: (120, 490), 5: (322, 262), 6: (352, 350),
    14: (201, 100), 15: (247, 102), 16: (172, 112), 17: (272, 112), 8: (160, 505), 11: (280, 505),
}  # fmt: skip


def pose_json(path: Path, shift: float = 0.0) -> Path:
    """An OpenPose file with the astronaut's keypoints, the right arm moved up by `shift` pixels."""
    flat = []
    for i in range(18):
        x, y = KEYPOINTS.get(i, (0, 0))
        seen = float(i in KEYPOINTS)
        flat += [float(x), float(y) - (shift if i in (3, 4) else 0.0), seen]
    frame = {"canvas_width": 512, "canvas_height": 512, "people": [{"pose_keypoints_2d": flat}]}
    path.write_text(json.dumps(frame))
    return path


def make(folder: Path) -> tuple[Path, Path, Path, Path]:
    """(photograph, label map, source pose, target pose) as files in the folder."""
    from skimage import data

    photo = folder / "astronaut.png"
    Image.fromarray(data.astronaut()).save(photo)
    labels = Image.new("L", (512, 512), 0)
    draw = ImageDraw.Draw(labels)
    draw.polygon([(20, 512), (40, 260), (120, 215), (320, 215), (365, 300), (365, 512)], fill=3)
    draw.ellipse([150, 15, 302, 130], fill=2)
    draw.ellipse([176, 70, 272, 190], fill=1)
    draw.ellipse([280, 345, 500, 512], fill=6)
    path = folder / "parsing.png"
    Image.fromarray(np.asarray(labels)).save(path)
    return photo, path, pose_json(folder / "pose.json"), pose_json(folder / "target.json", 120)
