"""Rows that carry the source along a body, without an image network, and how their geometry is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truepose_core.body.carry import Carried, Correspondence, carry, correspond
from truepose_core.body.lift import fit_bodies, lift, lift_net
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyModel, GenericBody
from truepose_core.evaluation.metrics import masked_psnr
from truepose_core.mannequin.body import axis_angle_to_matrix, matrix_to_axis_angle
from truepose_core.mannequin.split import TEST_SEED
from truepose_core.mannequin.world import people_of
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import carry as carry_along_skeleton
from truepose_core.parsing.carry import region_colors, region_prior

if TYPE_CHECKING:
    from truepose_core.mannequin import PairBatch, Rendering

EXACT = "+parsing"
"""Behind a row's name: hidden places take the region colours of the TRUE target parsing, not of the carried one."""
REFERENCE_HEIGHT = 768
"""Keypoint noise is given in pixels of a picture of this height (512x768), whatever size is measured."""


@dataclass(frozen=True)
class Difficulty:
    """What makes the geometry harder than the world's own truth. noise: standard deviation of keypoints in pixels of a
    512x768 picture. missing: share of each person's keypoints that are left out. angle: standard deviation of given
    joint rotations, degrees; refit: whether bodies given so are fitted to the keypoints."""

    noise: float = 0.0
    missing: float = 0.0
    angle: float = 0.0
    refit: bool = False


@dataclass(frozen=True, eq=False)
class Drawn:
    """A row's pictures [B, 3, H, W] in [0, 1], and where it looked its pixels up, if it did: grid [B, H, W, 2] in
    [-1, 1] and seen [B, 1, H, W] in [0, 1]."""

    images: Tensor
    grid: Tensor | None = None
    seen: Tensor | None = None


@dataclass
class BodyRows:
    """The body rows share what they lift and render of a batch; `rows` gives their draw functions."""

    difficulty: Difficulty = field(default_factory=Difficulty)
    _batch: PairBatch | None = field(init=False, default=None, repr=False)
    _carried: dict[str, Carried] = field(init=False, default_factory=dict, repr=False)

    def _keypoints(self, side: Rendering, seed: int, identity: Tensor) -> Tensor:
        body = side.keypoints
        d = self.difficulty
        if not d.noise and not d.missing:
            return body
        height, width = side.image.shape[-2:]
        made = []
        for points, person in zip(body, identity.tolist(), strict=True):
            generator = torch.Generator().manual_seed(2 * person + seed)
            shift = d.noise / REFERENCE_HEIGHT * torch.randn(18, 2, generator=generator)
            points = points.clone()
            points[:, :2] += shift * torch.tensor([height / width, 1.0]) * (points[:, 2:] > 0)
            seen = (points[:, 2] > 0).nonzero().flatten()
            left_out = seen[torch.randperm(len(seen), generator=generator)[: round(d.missing * len(seen))]]
            points[left_out] = 0
            made.append(points)
        return torch.stack(made)

    def _given(self, side: Rendering, seed: int, identity: Tensor, keypoints: Tensor) -> BodyPose:
        d = self.difficulty
        if not d.angle:
            return BodyPose(side.theta, side.beta, side.camera)
        shifts = []
        for person in identity.tolist():
            generator = torch.Generator().manual_seed(2 * person + seed)
            # An angle of that standard deviation about a random axis.
            axis = torch.nn.functional.normalize(torch.randn(24, 3, generator=generator), dim=-1)
            shifts.append(axis * math.radians(d.angle) * torch.randn(24, 1, generator=generator))
        rotation = axis_angle_to_matrix(side.theta) @ axis_angle_to_matrix(torch.stack(shifts))
        if not d.refit:
            return BodyPose(matrix_to_axis_angle(rotation), side.beta, side.camera)
        aspect = side.image.shape[-1] / side.image.shape[-2]
        rotation, beta, camera, _ = fit_bodies(
            rotation, side.beta, keypoints, aspect, covariance=lift_net().covariance, shape=side.beta
        )
        return BodyPose(matrix_to_axis_angle(rotation), beta, camera)

    def bodies(self, kind: str, pairs: PairBatch) -> tuple[BodyPose, BodyPose, BodyModel]:
        """Source and target bodies of a row, and what they are drawn with."""
        source, target = pairs.source, pairs.target
        aspect = source.image.shape[-1] / source.image.shape[-2]
        a = self._keypoints(source, 0, pairs.identity)
        b = self._keypoints(target, 1, pairs.identity)
        if kind == "body-lifted":
            first = lift(a, aspect).bodies
            return first, lift(b, aspect, shape=first.beta).bodies, GenericBody()
        if kind == "body-given":
            first = self._given(source, 0, pairs.identity, a)
            return first, self._given(target, 1, pairs.identity, b), GenericBody()
        return _true_bodies(pairs)

    def draw(self, kind: str, exact: bool, pairs: PairBatch) -> Drawn:
        """The row `kind`; exact: with the true target parsing's colours where nothing was seen."""
        source = pairs.source
        parsing = HumanParsing(source.parsing)
        if self._batch is not pairs:
            self._batch, self._carried = pairs, {}
        if kind not in self._carried:
            first, second, model = self.bodies(kind, pairs)
            self._carried[kind] = carry(source.image, parsing, first, second, model=model)
        made = self._carried[kind]
        colors, _ = region_colors(source.image, parsing)
        regions = pairs.target.parsing if exact else made.parsing.masks
        flat = torch.einsum("brc,brhw->bchw", colors, regions)
        images = (made.seen * made.picture + (1 - made.seen) * flat).clamp(0, 1)
        return Drawn(images, made.correspondence.grid, made.seen)

    def rows(self) -> dict[str, Callable[[PairBatch], Drawn]]:
        """Name -> draw."""

        def row(kind: str, exact: bool) -> Callable[[PairBatch], Drawn]:
            return lambda pairs: self.draw(kind, exact, pairs)

        return {kind + (EXACT if exact else ""): row(kind, exact) for exact in (False, True) for kind in BODY_ROWS}


BODY_ROWS = ("body-lifted", "body-given", "surface")
"""Bodies lifted from keypoints; true parameters on the generic body; the true person's own surface."""


def skeleton_correspondence(pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """Where the skeleton warp looks each target pixel up, [B, H, W, 2], and what it takes for seen [B, 1, H, W]."""
    source, target = pairs.source, pairs.target
    height, width = target.image.shape[-2:]
    grid, certain = carry_along_skeleton(source.keypoints, target.keypoints, height, width)
    prior = region_prior(HumanParsing(source.parsing), source.keypoints, target.keypoints, height, width)
    person = 1 - prior.masks[:, :1]
    return grid, (certain[:, None] > 0.75) * person


def _true_bodies(pairs: PairBatch) -> tuple[BodyPose, BodyPose, BodyModel]:
    """The people of the test split themselves, as their pictures show them."""
    people = people_of(pairs.identity, "test", TEST_SEED, pairs.world)
    source, target = (BodyPose(x.theta, x.beta, x.camera) for x in (pairs.source, pairs.target))
    return source, target, GenericBody(people=people)


def true_correspondence(pairs: PairBatch) -> Correspondence:
    """Where each target pixel really was in the source, by the true person's own surface."""
    source, target, model = _true_bodies(pairs)
    size = tuple(pairs.target.image.shape[-2:])
    return correspond(source, target, model.render(source, *size), model.render(target, *size), model)


PLACES = ("shown_psnr", "hidden_psnr")


def place_columns(images: Tensor, target: Tensor, truth: Correspondence) -> dict[str, Tensor]:
    """{"shown_psnr": PSNR in dB over the places of the true person that the source really shows [B], "hidden_psnr":
    over those that it hides [B]}. images, target: [B, 3, H, W]. NaN where there are too few such pixels."""
    person, seen = truth.target.mask[:, 0] > 0, truth.seen[:, 0] > 0.5
    places = (person & seen, person & ~seen)
    return {name: masked_psnr(images, target, where) for name, where in zip(PLACES, places, strict=True)}


def geometry_columns(drawn: Drawn, truth: Correspondence) -> dict[str, Tensor]:
    """{"endpoint": mean distance in pixels between where pixels were looked up and where they were, over target pixels
    that the source really shows and that the row took from it [B]; "seen": the share of the true person that the row
    took from the source [B]}. NaN where there is no such pixel or the row looks nothing up."""
    count = len(drawn.images)
    if drawn.grid is None:
        nothing = torch.full((count,), torch.nan, dtype=torch.float64)
        return {"endpoint": nothing, "seen": nothing}
    height, width = drawn.images.shape[-2:]
    off = (drawn.grid - truth.grid) * drawn.grid.new_tensor([width / 2, height / 2])
    miss = off.square().sum(-1).sqrt()[:, None].double()
    both = (truth.seen * (drawn.seen > 0.5)).double()
    total = both.flatten(1).sum(1)
    endpoint = (miss * both).flatten(1).sum(1) / total.clamp(min=1)
    person = truth.target.mask.double()
    seen = (drawn.seen.double() * person).flatten(1).sum(1) / person.flatten(1).sum(1).clamp(min=1)
    return {"endpoint": endpoint.masked_fill(total == 0, torch.nan), "seen": seen}
