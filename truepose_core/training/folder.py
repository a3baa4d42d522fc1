"""Training pairs from a folder of photographs, in the shape of `MannequinPool`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from truepose_core.datasets.pairs import read_pairs
from truepose_core.datasets.shards import Shards, is_prepared
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
        names, shown = self.chosen(sources, targets, rank)
        a = [torch.stack(x) for x in zip(*map(self.load, names), strict=True)]
        b = [torch.stack(x) for x in zip(*map(self.load, shown), strict=True)]
        return TrainingBatch(a[0], HumanParsing(a[1]), a[2], b[0], HumanParsing(b[1]), b[2])

    def chosen(self, sources: int, targets: int, rank: int) -> tuple[list[str], list[str]]:
        """The names of the current step's sources, and of their targets one after the other."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 4099 + rank)
        names = [self.sources[i] for i in torch.randint(len(self.sources), (sources,), generator=generator)]
        return names, [shown for name in names for shown in _targets(self.targets[name], targets, generator)]

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1


class ShardPairs(FolderPairs):
    """The training pairs of a data set that `truepose data prepare` made.

    Processes read without overlap: a step takes the next `sources` x `processes` sources of a shuffled epoch, each
    process its own part of them, so that several processes see together what one sees with as many more sources.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], seed: int = 0, step: int = 0, processes: int = 1):
        self.folder, self.size, self.seed, self.step, self.processes = Path(folder), size, seed, step, processes
        self.shards = Shards(self.folder)
        self.targets = {}
        for source, target in self.shards.pairs():
            self.targets.setdefault(source, []).append(target)
        self.sources = sorted(self.targets)

    def load(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(image [3, H, W], parsing masks [7, H, W], keypoints [18, 3]) at the training size."""
        from truepose_core.pose import body_tensor

        sample = self.shards.load(name)
        frame = fit(tuple(sample.image.shape[-2:]), self.size)
        body = frame.apply_keypoints(body_tensor([sample.person]))
        return frame.apply(sample.image)[0], frame.apply_parsing(sample.parsing).masks[0], body[0]

    def chosen(self, sources: int, targets: int, rank: int) -> tuple[list[str], list[str]]:
        """As `FolderPairs.chosen`, from the epoch's order."""
        first = (self.step * self.processes + rank) * sources
        names, shown = [], []
        for place in range(first, first + sources):
            epoch, at = divmod(place, len(self.sources))
            name = self.sources[self._order(epoch)[at]]
            # Of the place alone, whichever process has it.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) * 4099)
            names.append(name)
            shown += _targets(self.targets[name], targets, generator)
        return names, shown

    def _order(self, epoch: int) -> list[int]:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(len(self.sources), generator=generator).tolist()
        return self._epoch[1]

    _epoch: tuple[int, list[int]] | None = None


def pairs_of(folder: str, size: tuple[int, int], seed: int, step: int, processes: int) -> FolderPairs:
    """The pairs of a folder: prepared shards, or pictures beside pairs.csv."""
    if is_prepared(folder):
        return ShardPairs(folder, size, seed, step, processes)
    return FolderPairs(folder, size, seed, step)


def _targets(names: list[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` of these names, with repetition where there are fewer."""
    return [names[i % len(names)] for i in torch.randperm(max(len(names), count), generator=generator)[:count]]
