"""Pairs of pictures of one person in two poses, and prerendered training caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

from .body import sample_poses
from .identity import as_indices, sample_identities
from .render import Rendering, render
from .twins import ambiguous_poses, hide_faces

__all__ = ["SPLITS", "PairBatch", "render_people", "sample_pairs"]

SPLITS = ("train", "test")
# Pose number k of person i has index i * _STRIDE + k; this is the most poses a person can have.
_STRIDE = 1 << 20


@dataclass(frozen=True)
class PairBatch:
    """N pairs: ``source`` and ``target`` show the same person in two poses.

    identity: the people's indices [N] in their split, int64.
    """

    source: Rendering
    target: Rendering
    identity: Tensor

    def __len__(self) -> int:
        return self.identity.shape[0]


def split_seed(split: str, seed: int) -> int:
    """The world's seed of a split. Splits share no seed, so they share no person and no pose."""
    if split not in SPLITS:
        raise TruePoseError(f"split is {split!r}; expected one of {SPLITS}.")
    return 2 * int(seed) + SPLITS.index(split)


def render_people(
    identity_indices: Sequence[int] | Tensor,
    poses_per_person: int,
    split: str = "train",
    seed: int = 0,
    height: int = 64,
    width: int = 48,
    supersample: int = 2,
    device: torch.device | str | None = None,
    chunk: int | None = None,
    view: str | None = None,
    ambiguous: float = 0.0,
) -> Rendering:
    """People [N] in K poses each, as one Rendering of N * K; row i * K + k is person i, pose k.

    Person i's pose k is the same for every batch and every K. `sample_pairs` uses poses 0 and 1. ambiguous: share of
    the poses, 0 to 1, whose keypoints do not tell their depth (see `twins`).

    Raises:
        TruePoseError: for an unknown split or fewer than 1 pose per person.
    """
    if not 1 <= poses_per_person <= _STRIDE:
        raise TruePoseError(f"poses_per_person is {poses_per_person}; expected at least 1.")
    index = as_indices(identity_indices)
    world = split_seed(split, seed)
    which = (index[:, None] * _STRIDE + torch.arange(poses_per_person)).flatten()
    people = sample_identities(index, world)
    people = people.select(torch.arange(len(index)).repeat_interleave(poses_per_person))
    poses = sample_poses(which, world, view)
    if ambiguous == 0:
        return render(people, poses, height, width, supersample, device, chunk)
    poses, faceless = ambiguous_poses(poses, which, world, ambiguous)
    made = render(people, poses, height, width, supersample, device, chunk)
    return replace(made, keypoints=hide_faces(made.keypoints, faceless))


def sample_pairs(
    indices: int | Sequence[int] | Tensor,
    split: str,
    seed: int = 0,
    height: int = 64,
    width: int = 48,
    supersample: int = 2,
    device: torch.device | str | None = None,
    chunk: int | None = None,
) -> PairBatch:
    """Pairs ``indices`` (an int n means 0 .. n - 1) of a split.

    Pair i depends on (split, seed, i) only. Each pair is a person of its own, in two poses
    and views drawn independently.

    Raises:
        TruePoseError: for an unknown split or indices that are not whole numbers.
    """
    index = torch.arange(indices) if isinstance(indices, int) else as_indices(indices)
    both = render_people(index, 2, split, seed, height, width, supersample, device, chunk)
    order = torch.arange(len(index)) * 2
    return PairBatch(
        both.select(order.to(both.image.device)),
        both.select((order + 1).to(both.image.device)),
        index,
    )
