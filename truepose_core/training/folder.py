"""Training pairs from a folder of photographs, in the shape of `MannequinPool`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from truepose_core.datasets.pairs import read_pairs
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fit
from truepose_core.parsing import HumanParsing
from truepose_core.training.data import TrainingBatch

_SHOWN = 200
"""Characters of a path that an error shows."""


def _is_file(path: Path) -> bool:
    # A name may be longer than any file's.
    try:
        return path.is_file()
    except OSError:
        return False


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(path.name)} characters)"


class FolderPairs:
    """A folder with `pairs.csv` (columns `from` and `to`: names of pictures of one person), and for every name
    `images/NAME`, `parsing/STEM.png` (a label map) and `poses/STEM.json` (OpenPose keypoints).

    Every file that pairs.csv names must exist; that is checked before training starts. Pictures are fitted to `size`
    without distortion. The batch of a step depends on (seed, step, rank) alone.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], seed: int = 0, step: int = 0):
        self.folder, self.size, self.seed, self.step = Path(folder), size, seed, step
        table = self.folder / "pairs.csv"
        pairs = read_pairs(table)
        missing = [p for name in {n for pair in pairs for n in pair} for p in self._files(name) if not _is_file(p)]
        if missing:
            raise TruePoseError(
                f"{len(missing)} files that {table} needs do not exist: "
                f"{', '.join(_shortened(p) for p in sorted(missing)[:4])}"
            )
        self.targets: dict[str, list[str]] = {}
        for source, target in pairs:
            self.targets.setdefault(source, []).append(target)
        self.sources = sorted(self.targets)

    def _files(self, name: str) -> tuple[Path, Path, Path]:
        stem = Path(name).stem
        return (
            self.folder / "images" / name,
            self.folder / "parsing" / f"{stem}.png",
            self.folder / "poses" / f"{stem}.json",
        )

    def load(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(image [3, H, W], parsing masks [7, H, W], keypoints [18, 3]) at the training size."""
        from truepose_core.pictures.files import load_image
        from truepose_core.pose import body_tensor, read_pose

        picture, labels, keypoints = self._files(name)
        image = load_image(picture)
        height, width = image.shape[-2:]
        frame = fit((height, width), self.size)
        parsing = frame.apply_parsing(HumanParsing.from_label_image(labels, size=(height, width)))
        pose = read_pose(keypoints, canvas=(width, height))[0]
        body = frame.apply_keypoints(body_tensor([pose.person()]))
        return frame.apply(image)[0], parsing.masks[0], body[0]

    def batch(self, sources: int, targets: int, rank: int = 0) -> TrainingBatch:
        """The batch of the current step: `sources` pictures with `targets` targets each (with repetition where a source
        has fewer)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 4099 + rank)
        chosen = [self.sources[i] for i in torch.randint(len(self.sources), (sources,), generator=generator)]
        shown = []
        for name in chosen:
            mine = self.targets[name]
            shown += [
                mine[i % len(mine)] for i in torch.randperm(max(len(mine), targets), generator=generator)[:targets]
            ]
        a = [torch.stack(x) for x in zip(*map(self.load, chosen), strict=True)]
        b = [torch.stack(x) for x in zip(*map(self.load, shown), strict=True)]
        return TrainingBatch(a[0], HumanParsing(a[1]), a[2], b[0], HumanParsing(b[1]), b[2])

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1
