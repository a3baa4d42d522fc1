"""docs/path.png: people of the test split on their way from pose to pose, four steps of recurrent alignment.

PYTHONPATH=. python docs/source/path_sheet.py docs/path.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from truepose_core.alignment.recurrent import align, align_net
from truepose_core.body.lift import lift_each
from truepose_core.mannequin.split import split_pairs
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import save_image
from truepose_core.pictures.sheet import labelled_sheet

PAIRS = (2, 3, 7, 9)
SIZE, STEPS, ENLARGED = (128, 96), 4, 2


def main(out: Path) -> None:
    """Write the sheet."""
    pairs = split_pairs(torch.tensor(PAIRS), SIZE)
    aspect = SIZE[1] / SIZE[0]
    source = lift_each(pairs.source.keypoints, aspect)
    target = lift_each(pairs.target.keypoints, aspect, source.beta)
    image, parsing = pairs.source.image, HumanParsing(pairs.source.parsing)
    with torch.no_grad():
        path = align(align_net(), image, parsing, source, target, pairs.target.keypoints, STEPS)
    columns = {"source": image}
    columns |= {f"step {k + 1}": step.picture.clamp(0, 1) for k, step in enumerate(path)}
    columns["truth"] = pairs.target.image
    large = {name: interpolate(x, scale_factor=ENLARGED, mode="nearest") for name, x in columns.items()}
    save_image(labelled_sheet(large, [f"pair {i}" for i in PAIRS]), out, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
