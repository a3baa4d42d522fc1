"""Where a picture's grid cells are on the body's surface, for HPFA's body match and for the region prior P."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from truepose_core.body.carry import carried_parsing, correspond
from truepose_core.body.lift import FEWEST, lift_each
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyModel, GenericBody, surface_tokens
from truepose_core.parsing import HumanParsing

_log = logging.getLogger(__name__)

TORSO = 0.5
"""Metres from neck to pelvis of the body at rest. Places are in torso lengths, as on the skeleton, so that a gamma
means the same on both."""
_FINEST, _COARSEST = 256, 96
"""Heights in pixels: more than the first says nothing more of a grid, less than the second misses arms."""


def _render_size(height: int, width: int) -> tuple[int, int]:
    """The size at which a body is drawn for a grid of height x width cells: several rays through a cell."""
    times = max(1, min(4, _FINEST // max(height, 1)))
    while height * times < _COARSEST:
        times += 1
    return height * times, width * times


@dataclass(frozen=True, eq=False)
class SurfacePlaces:
    """S source people on their bodies. body: their keypoints [S, 18, 3], from which they are lifted when they are first
    asked for. aspect: width / height of their pictures. given: their bodies, where they are known. model: what they
    are drawn with."""

    body: Tensor
    aspect: float
    given: BodyPose | None = None
    model: BodyModel = field(default_factory=GenericBody)
    # The last rendering: grids of several sizes are often taken from the same one.
    _last: list = field(default_factory=list, init=False, repr=False)

    @cached_property
    def bodies(self) -> BodyPose:
        """The source people, one each."""
        return lift_each(self.body.float().cpu(), self.aspect) if self.given is None else self.given

    @classmethod
    def of_keypoints(cls, body: Tensor, aspect: float, given: BodyPose | None = None) -> SurfacePlaces | None:
        """Of keypoints [S, 18, 3]. given: their bodies, where they are known. None, said in the log, where a person
        shows too few of them."""
        if given is not None:
            return cls(body, aspect, given)
        return cls(body, aspect) if _shows_enough(body, "the source", "places are taken from the skeleton") else None

    def target(self, body: Tensor, aspect: float) -> BodyPose | None:
        """The same people [T] in the poses of keypoints [T, 18, 3], T a multiple of S, or one pose for all (of the
        first one's shape); None, said in the log, where a pose shows too few of them."""
        if not _shows_enough(body, "a target pose", "it goes without body match, and regions go by the skeleton"):
            return None
        shape = self.bodies.beta
        shape = shape.repeat_interleave(max(1, len(body) // len(shape)), 0)[: len(body)]
        return lift_each(body.float().cpu(), aspect, shape)

    def repeated(self, times: int) -> SurfacePlaces:
        """Each person `times` times, in a row."""
        given = self.bodies.repeat(times)
        return replace(self, body=self.body.repeat_interleave(times, 0), given=given)

    def tokens(self, bodies: BodyPose, height: int, width: int, aspect: float) -> Tensor:
        """Places of a height x width grid over pictures of these bodies: [N, height * width, 4], the place at rest in
        torso lengths and 1 on the body."""
        size = _render_size(height, width)
        # The tracer's pixels are square; a grid whose cells are not is drawn at the picture's own shape.
        square = (size[0], max(8, round(size[0] * aspect)))
        if not self._last or self._last[0] is not bodies or self._last[1].size != square:
            self._last[:] = bodies, self.model.render(bodies, *square)
        return in_torsos(surface_tokens(self._last[1], height, width))

    def carry_parsing(self, parsing: HumanParsing, targets: BodyPose, size: tuple[int, int]) -> HumanParsing:
        """The sources' regions on the target bodies [T], T a multiple of S: P [T, 7, height, width]."""
        times = len(targets) // len(self.bodies)
        sources = self.bodies.repeat(times)
        masks = parsing.masks.float().cpu().repeat_interleave(times, 0)
        maps = self.model.render(sources, *_within(parsing.size))
        target = self.model.render(targets, *_render_size(*size))
        found = correspond(sources, targets, maps, target, self.model)
        person = found.sample(masks[:, 1:].sum(1, keepdim=True))
        carried = carried_parsing(found, masks, found.seen * (person > 0.5))
        pooled = adaptive_avg_pool2d(carried.masks, size)
        return HumanParsing(pooled / pooled.sum(1, keepdim=True))


def _shows_enough(body: Tensor, whose: str, instead: str) -> bool:
    """Whether keypoints [N, 18, 3] can all be lifted; where not, the log says so, and what is done instead."""
    fewest = int((body[..., 2] > 0).sum(1).min())
    if fewest < FEWEST:
        _log.warning("%s has %d visible body keypoints, a body needs %d: %s", whose, fewest, FEWEST, instead)
    return fewest >= FEWEST


def places_of(match: str, body: Tensor | None, aspect: float, given: BodyPose | None = None) -> SurfacePlaces | None:
    """What a model that goes by `match` ("skeleton" or "surface") needs to know of its sources' keypoints, or of their
    bodies where they are given."""
    return None if body is None or match != "surface" else SurfacePlaces.of_keypoints(body, aspect, given)


def in_torsos(tokens: Tensor) -> Tensor:
    """Places [N, P, 4] in metres at rest -> torso lengths."""
    return torch.cat([tokens[..., :3] / TORSO, tokens[..., 3:]], -1)


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """The size at most `_FINEST` high, of the same shape."""
    shrink = min(1.0, _FINEST / size[0])
    return max(8, round(size[0] * shrink)), max(8, round(size[1] * shrink))
