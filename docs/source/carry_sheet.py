"""docs/carry.png: scikit-image's astronaut on poses of the gallery, as far as the photograph shows her.

PYTHONPATH=.:tests/core python docs/source/carry_sheet.py docs/carry.png
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import photo
import torch
from torch.nn.functional import interpolate, pad

from truepose_core.body.person import carry_person
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import load_image, save_image
from truepose_core.pictures.sheet import labelled_sheet
from truepose_core.pose import body_tensor, read_pose
from truepose_core.pose.gallery import gallery_pose

POSES = ("three-quarter", "waving", "hands on hips", "arms crossed")
SIZE = (512, 416)
ZOOM, NECK = 1.8, (0.5, 0.37)
"""The photograph ends at the hips, so the poses are shown to the hips."""


def targets() -> torch.Tensor:
    """The poses [N, 18, 3], enlarged about the neck."""
    bodies = torch.cat([body_tensor(gallery_pose(name, SIZE[1], SIZE[0]).people) for name in POSES])
    bodies[..., :2] = (bodies[..., :2] - bodies[:, 1:2, :2]) * ZOOM + torch.tensor(NECK)
    return bodies * (bodies[..., 2:] > 0)


def main(out: Path) -> None:
    """Write the sheet."""
    with tempfile.TemporaryDirectory() as folder:
        picture, labels, pose, _ = photo.make(Path(folder))
        image, parsing = load_image(picture), HumanParsing.from_label_image(labels)
        keypoints = body_tensor(read_pose(pose)[0].people)
    made = carry_person(image, parsing, keypoints, targets(), SIZE)
    source = interpolate(image, (SIZE[1], SIZE[1]), mode="bicubic", antialias=True).clamp(0, 1)
    edge = SIZE[0] - SIZE[1]
    source = pad(source, (0, 0, edge // 2, edge - edge // 2), value=1.0)
    columns = {
        "source": source.expand(len(POSES), -1, -1, -1),
        "carried": made.picture,
        "seen": made.seen.expand(-1, 3, -1, -1),
        "depth": made.depth,
        "parsing": made.parsing.preview(),
    }
    sheet = labelled_sheet(columns, POSES)
    half = [side // 2 for side in sheet.shape[2:]]
    save_image(interpolate(sheet, half, mode="area"), out, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
