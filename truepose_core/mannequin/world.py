"""Pairs of pictures of one person in two poses, and prerendered training caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

from .body import BodyPoses
from .hard import HARD, busy, cross_arm, one_colour
from .identity import Identities, as_indices, sample_identities
from .poses import sample_poses
from .render import LIGHT, Rendering, render
from .scene import make_scene
from .shifted import LIGHT as SHIFTED_LIGHT
from .shifted import shift_people
from .twins import hide_faces, twin_poses

__all__ = ["SPLITS", "PairBatch", "render_people", "render_twins", "sample_pairs"]

SPLITS = ("train", "test")
WORLDS = ("usual", "shifted", *HARD)
"""The usual world; one of other garments, builds and light (`shifted`); and hard cases of the usual one (`hard`)."""
# Pose number k of person i has index i * _STRIDE + k; this is the most poses a person can have.
_STRIDE = 1 << 20


@dataclass(frozen=True)
class PairBatch:
    """N pairs: ``source`` and ``target`` show the same person in two poses.

    identity: the people's indices [N] in their split, int64. world: one of `WORLDS`.
    """

    source: Rendering
    target: Rendering
    identity: Tensor
    world: str = "usual"

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
    kind: str = "usual",
    light: tuple[float, float, float] | None = None,
) -> Rendering:
    """People [N] in K poses each, as one Rendering of N * K; row i * K + k is person i, pose k.

    Person i's pose k is the same for every batch and every K. `sample_pairs` uses poses 0 and 1.
    kind: of world, one of `WORLDS`; only the usual one is trained on. Hard cases change a person's pose 0, the source.
    light: where it comes from, (right, up, towards the viewer), if not from where the world has it.

    Raises:
        TruePoseError: for an unknown split or kind or fewer than 1 pose per person.
    """
    if kind not in WORLDS:
        raise TruePoseError(f"the world is {kind!r}; expected one of {', '.join(WORLDS)}.")
    if not 1 <= poses_per_person <= _STRIDE:
        raise TruePoseError(f"poses_per_person is {poses_per_person}; expected at least 1.")
    index = as_indices(identity_indices)
    world = split_seed(split, seed)
    which = (index[:, None] * _STRIDE + torch.arange(poses_per_person)).flatten()
    people = people_of(index, split, seed, kind)
    people = people.select(torch.arange(len(index)).repeat_interleave(poses_per_person))
    poses = sample_poses(which, world, view)
    first = torch.arange(0, len(which), poses_per_person)
    if kind == "crossed-arm":
        crossed = cross_arm(poses.select(first), index, world)
        poses = BodyPoses(poses.theta.index_copy(0, first, crossed.theta), poses.camera)
    if light is None:
        light = SHIFTED_LIGHT if kind == "shifted" else LIGHT
    made = render(people, poses, height, width, supersample, device, chunk, light=light)
    if kind == "busy":
        source = made.select(first)
        scene = busy(source.image, source.parsing, people.select(first), index, world)
        made = replace(made, image=made.image.index_copy(0, first.to(made.image.device), scene))
    return made


def people_of(index: Tensor, split: str, seed: int = 0, kind: str = "usual") -> Identities:
    """The people [N] of a split, by their indices, as they look in this kind of world."""
    people = sample_identities(index, split_seed(split, seed))
    return {"shifted": shift_people, "one-colour": one_colour}.get(kind, lambda same: same)(people)


def render_twins(
    identity_indices: Sequence[int] | Tensor,
    pairs_per_person: int,
    share: float,
    split: str = "train",
    seed: int = 0,
    height: int = 64,
    width: int = 48,
    device: torch.device | str | None = None,
) -> tuple[Rendering, Tensor]:
    """People [N] in 1 + 2 K poses each, as one Rendering: row i (1 + 2 K) is person i in a pose of its own, and K pairs
    follow. Also which pairs are twins [N, K] bool, with the same keypoints and another depth (`twins`): `share` of
    them. Poses are those of `render_people`, but for the twins'.

    Raises TruePoseError for an unknown split or fewer than 1 pair per person.
    """
    if not 1 <= 2 * pairs_per_person < _STRIDE:
        raise TruePoseError(f"pairs_per_person is {pairs_per_person}; expected at least 1.")
    index = as_indices(identity_indices)
    world, count = split_seed(split, seed), 1 + 2 * pairs_per_person
    which = index[:, None] * _STRIDE + torch.arange(count)
    people = sample_identities(index, world).select(torch.arange(len(index)).repeat_interleave(count))
    poses = sample_poses(which.flatten(), world)
    paired = torch.arange(len(people)).view(-1, count)[:, 1:].flatten()
    changed, twin, hidden = twin_poses(poses.select(paired), which[:, 1:].flatten(), world, share)
    theta, framing = poses.theta.clone(), poses.camera.clone()
    theta[paired], framing[paired] = changed.theta, changed.camera
    camera = make_scene(people, BodyPoses(theta, framing), width / height).camera
    # The frame is fitted to the first of two twins and kept for the second.
    camera[paired[1::2][twin]] = camera[paired[::2][twin]]
    faceless = torch.zeros(len(people), dtype=torch.bool)
    faceless[paired] = hidden
    made = render(people, BodyPoses(theta, framing), height, width, device=device, camera=camera)
    return replace(made, keypoints=hide_faces(made.keypoints, faceless)), twin.view(-1, pairs_per_person)


def sample_pairs(
    indices: int | Sequence[int] | Tensor,
    split: str,
    seed: int = 0,
    height: int = 64,
    width: int = 48,
    supersample: int = 2,
    device: torch.device | str | None = None,
    chunk: int | None = None,
    kind: str = "usual",
) -> PairBatch:
    """Pairs ``indices`` (an int n means 0 .. n - 1) of a split.

    Pair i depends on (split, seed, i) only. Each pair is a person of its own, in two poses
    and views drawn independently. kind: of world, as in `render_people`.

    Raises:
        TruePoseError: for an unknown split or kind or indices that are not whole numbers.
    """
    index = torch.arange(indices) if isinstance(indices, int) else as_indices(indices)
    both = render_people(index, 2, split, seed, height, width, supersample, device, chunk, kind=kind)
    order = torch.arange(len(index)) * 2
    return PairBatch(
        both.select(order.to(both.image.device)),
        both.select((order + 1).to(both.image.device)),
        index,
        kind,
    )
