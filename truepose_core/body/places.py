"""Where a picture's grid cells are on the body's surface, for HPFA's body match and for the region prior P."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from truepose_core.body.carry import carried_parsing, correspond
from truepose_core.body.lift import FEWEST, lift
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyMaps, BodyModel, GenericBody, surface_tokens
from truepose_core.parsing import HumanParsing

_log = logging.getLogger(__name__)

TORSO = 0.5
"""Metres from neck to pelvis of the body at rest. Places are in torso lengths, as on the skeleton, so that a gamma
means the same on both."""
_FINEST, _COARSEST = 256, 96


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

    @cached_property
    def bodies(self) -> BodyPose:
        """The source people, one each."""
        return lift(self.body.float().cpu(), self.aspect).bodies if self.given is None else self.given

    @classmethod
    def of_keypoints(cls, body: Tensor, aspect: float) -> SurfacePlaces | None:
        """Of keypoints [S, 18, 3]. None, said in the log, where a person shows too few of them."""
        fewest = int((body[..., 2] > 0).sum(1).min())
        if fewest < FEWEST:
            _log.warning(
                "a pose has %d visible body keypoints, a body needs %d: places are taken from the skeleton",
                fewest,
                FEWEST,
            )
            return None
        return cls(body, aspect)

    def target(self, body: Tensor, aspect: float) -> BodyPose | None:
        """The same people [T] in the poses of keypoints [T, 18, 3], T a multiple of S; None, said in the log, where a
        pose shows too few of them."""
        if int((body[..., 2] > 0).sum(1).min()) < FEWEST:
            _log.warning(
                "a target pose has fewer than %d visible body keypoints: places are taken from the skeleton", FEWEST
            )
            return None
        shape = self.bodies.beta
        shape = shape.repeat_interleave(max(1, len(body) // len(shape)), 0)[: len(body)]
        return lift(body.float().cpu(), aspect, shape=shape).bodies

    def tokens(self, bodies: BodyPose, height: int, width: int, aspect: float) -> Tensor:
        """Places of a height x width grid over pictures of these bodies: [N, height * width, 4], the place at rest in
        torso lengths and 1 on the body."""
        size = _render_size(height, width)
        # The tracer's pixels are square; a grid whose cells are not is drawn at the picture's own shape.
        square = (size[0], max(8, round(size[0] * aspect)))
        return in_torsos(surface_tokens(self.model.render(bodies, *square), height, width))

    def carry_parsing(self, parsing: HumanParsing, targets: BodyPose, size: tuple[int, int]) -> HumanParsing:
        """The sources' regions on the target bodies [T], T a multiple of S: P [T, 7, height, width]."""
        times = len(targets) // len(self.bodies)
        sources = self.bodies.repeat(times)
        masks = parsing.masks.float().cpu().repeat_interleave(times, 0)
        maps = self.model.render(sources, *_within(parsing.size))
        target: BodyMaps = self.model.render(targets, *_render_size(*size))
        found = correspond(sources, targets, maps, target, self.model)
        person = found.sample(masks[:, 1:].sum(1, keepdim=True))
        carried = carried_parsing(found, masks, found.seen * (person > 0.5))
        pooled = torch.nn.functional.adaptive_avg_pool2d(carried.masks, size)
        return HumanParsing(pooled / pooled.sum(1, keepdim=True))


def places_of(match: str, body: Tensor | None, aspect: float) -> SurfacePlaces | None:
    """What a model that goes by `match` ("skeleton" or "surface") needs to know of its sources' keypoints."""
    return None if body is None or match != "surface" else SurfacePlaces.of_keypoints(body, aspect)


def in_torsos(tokens: Tensor) -> Tensor:
    """Places [N, P, 4] in metres at rest -> torso lengths."""
    return torch.cat([tokens[..., :3] / TORSO, tokens[..., 3:]], -1)


def _within(size: tuple[int, int]) -> tuple[int, int]:
    """The size at most `_FINEST` high, of the same shape."""
    shrink = min(1.0, _FINEST / size[0])
    return max(8, round(size[0] * shrink)), max(8, round(size[1] * shrink))
