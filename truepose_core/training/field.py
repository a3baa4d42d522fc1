"""`truepose train --row field`: the pose interaction field, from noised poses and how far the nearest valid one is.

The nearest valid pose is looked for among the neighbours that a k-d tree (SciPy) gives and the pose that the noised one
was made from; all of them are compared by the exact `pose_distance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from truepose_core.alignment.field import DEPTH, KIND, LOCAL, WIDTH, PoseField, pose_distance, read_poses
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import axis_angle_to_matrix, matrix_to_axis_angle, sample_poses
from truepose_core.mannequin.world import split_seed
from truepose_core.training.small import SmallConfig, SmallTrainer

LEVELS = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
"""Noise of the training poses: standard deviation of a joint's rotation vector, per axis, in radians."""
HELD_OUT_LEVELS = (0.02, 0.045, 0.09, 0.18, 0.35, 0.7)
"""Noise of the test poses: none of `LEVELS`."""
_AXES = 24
"""Numbers a pose is looked up by: they hold 99 % of the mannequin poses' variance, and more makes a k-d tree slow."""
_NEIGHBOURS = 16
_CHUNK = 4096


@dataclass(frozen=True)
class FieldConfig(SmallConfig):
    """data: "mannequin", or a folder of AMASS-style npz files, whose poses are the valid ones then, every `every`-th
    frame. valid: how many valid poses are drawn from the mannequin world's train split. noised: labelled poses that the
    steps draw from, a quarter of them mixed instead (`mix_poses`). width, depth: of the hidden layers."""

    steps: int = 12_000
    batch: int = 512
    learning_rate: float = 2e-3
    save_every: int = 2000
    width: int = WIDTH
    depth: int = DEPTH
    valid: int = 50_000
    noised: int = 120_000
    data: str = "mannequin"
    every: int = 10


class NearestPoses:
    """Looks up the nearest of M valid poses. rotations: [M, 23, 3, 3]."""

    def __init__(self, rotations: Tensor):
        try:
            from scipy.spatial import cKDTree
        except ImportError as error:
            raise TruePoseError(
                'distances to the nearest pose need SciPy; install it with: pip install "comfyui-truepose[train]"'
            ) from error
        self.rotations = rotations
        flat = rotations.flatten(1).double()
        self.mean = flat.mean(0)
        # Between matrices the straight distance grows with the angle, and a rotation of space keeps straight distances.
        few = (flat - self.mean)[:: max(1, len(flat) // 20_000)]
        self.axes = torch.linalg.svd(few, full_matrices=False)[2][:_AXES].T
        self.tree = cKDTree(((flat - self.mean) @ self.axes).numpy())

    def distance(self, rotations: Tensor, also: Tensor | None = None, *, quiet: bool = True) -> Tensor:
        """`pose_distance` to the nearest valid pose: [N] for rotations [N, 23, 3, 3]. also: a valid pose for each.
        quiet: no progress bar."""
        from tqdm.auto import tqdm

        parts = []
        for first in tqdm(range(0, len(rotations), _CHUNK), "labelling poses", disable=quiet, leave=False):
            some = rotations[first : first + _CHUNK]
            where = ((some.flatten(1).double() - self.mean) @ self.axes).numpy()
            _, found = self.tree.query(where, k=min(_NEIGHBOURS, len(self.rotations)))
            found = torch.as_tensor(found).reshape(len(some), -1)
            near = pose_distance(some[:, None], self.rotations[found]).amin(1)
            if also is not None:
                near = torch.minimum(near, pose_distance(some, also[first : first + _CHUNK]))
            parts.append(near)
        return torch.cat(parts)


def mannequin_poses(count: int, split: str, first: int = 0, seed: int = 0) -> Tensor:
    """Valid poses of a split of the mannequin world, without the global orientation: rotations [count, 23, 3, 3]."""
    theta = sample_poses(range(first, first + count), split_seed(split, seed)).theta
    return axis_angle_to_matrix(theta[:, 1:])


def noise_poses(rotations: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Every joint turned by a random rotation vector; half of the poses in a few of their joints only.

    rotations: [N, 23, 3, 3]. level: [N] standard deviation per axis in radians.
    """
    count = len(rotations)
    turn = torch.randn((count, LOCAL, 3), generator=generator) * level[:, None, None]
    share = torch.rand((count, 1), generator=generator) * 0.4
    few = torch.rand((count, 1), generator=generator) < 0.5
    kept = ~few | (torch.rand((count, LOCAL), generator=generator) < share)
    return rotations @ axis_angle_to_matrix(turn * kept[..., None])


_LEGS = (0, 1, 3, 4, 6, 7, 9, 10)
"""Places of the legs' joints among the 23."""


def mix_poses(one: Tensor, other: Tensor, stretch: Tensor) -> Tensor:
    """The legs of one pose under the trunk of another, their rotations `stretch` times as far: [N, 23, 3, 3].

    one, other: [N, 23, 3, 3]. stretch: [N, 2], of the legs and of the rest. Such poses are invalid in another way than
    noised ones: smooth, and too far or ill-matched.
    """
    legs = torch.zeros(LOCAL, dtype=torch.bool)
    legs[list(_LEGS)] = True
    turn = matrix_to_axis_angle(torch.where(legs[:, None, None], one, other))
    return axis_angle_to_matrix(turn * torch.where(legs, stretch[:, :1], stretch[:, 1:])[..., None])


def labelled_poses(
    valid: Tensor, nearest: NearestPoses, count: int, levels: tuple[float, ...], seed: int, *, quiet: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised poses [count, 23, 3, 3], their distance [count] to the nearest valid one, and their noise [count].

    valid: poses to start from, which need not be among those of `nearest`.
    """
    generator = torch.Generator().manual_seed(seed)
    start = valid[torch.randint(len(valid), (count,), generator=generator)]
    level = torch.tensor(levels)[torch.randint(len(levels), (count,), generator=generator)]
    noised = noise_poses(start, level, generator)
    return noised, nearest.distance(noised, start, quiet=quiet), level


def pose_files(folder: str | Path) -> list[Path]:
    """The npz files in a folder and below it, but for AMASS's shape.npz and other files of a subject. Raises
    TruePoseError where there is none."""
    found = [p for p in sorted(Path(folder).rglob("*.npz")) if "shape" not in p.stem]
    if not found:
        raise TruePoseError(
            f"--data {folder}: there is no npz file with poses; expected mannequin, or a folder of those"
        )
    return found


class FieldTrainer(SmallTrainer):
    """The run of `--row field`."""

    kind: ClassVar[str] = KIND
    config: FieldConfig

    def build(self) -> PoseField:
        c = self.config
        if c.data == "mannequin":
            valid = mannequin_poses(c.valid, "train", seed=c.seed)
        else:
            valid = axis_angle_to_matrix(read_poses(pose_files(c.data), c.every)[:, 1:])
        nearest = NearestPoses(valid)
        mixed = c.noised // 4
        noised, distances, _ = labelled_poses(valid, nearest, c.noised - mixed, LEVELS, c.seed, quiet=self.quiet)
        generator = torch.Generator().manual_seed(c.seed + 1)
        one, other = (valid[torch.randint(len(valid), (mixed,), generator=generator)] for _ in range(2))
        strange = mix_poses(one, other, 0.5 + 1.5 * torch.rand((mixed, 2), generator=generator))
        self.noised = torch.cat([noised, strange])
        self.distances = torch.cat([distances, nearest.distance(strange, quiet=self.quiet)])
        return PoseField(c.width, c.depth)

    def describe(self) -> dict[str, Any]:
        return dict(self.net.sizes)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Relative error of the distance; the absolute one within some degrees of the valid poses."""
        index = torch.randint(len(self.noised), (self.config.batch,), generator=self.generator(step))
        wanted = self.distances[index].to(self.config.device)
        found = self.net(self.noised[index].to(self.config.device))
        error = (found - wanted).abs()
        return (error / (wanted + 0.05)).mean(), {"radians": error.mean().item()}
