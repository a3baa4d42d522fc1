"""Carrying: what a source picture shows of a body's surface, brought to the same surface in another pose.

For every pixel of the target body the same surface point is looked up on the source body, and from there in the source
picture. A depth test says whether the source showed that point at all. Nothing is learned here. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, one_hot

from truepose_core.body.pose import HEIGHT, BodyPose
from truepose_core.body.render import MIRRORS, BodyMaps, BodyModel, GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

DEPTH_TOLERANCE = 0.03
"""How far before or behind the surface that the source shows a point may lie and still count as shown, as a share of
a person's height."""


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Where the target's pixels were in the source.

    grid: [B, H, W, 2] in [-1, 1] for `grid_sample` with align_corners=False; zeros off the body. seen: [B, 1, H, W],
    1 where the source shows that surface point. target: the target body's maps, of the same size. facing: how squarely
    the source's surface faces the camera there [B, 1, H, W], 0..1.
    """

    grid: Tensor
    seen: Tensor
    facing: Tensor
    target: BodyMaps

    def sample(self, values: Tensor, mode: str = "bilinear") -> Tensor:
        """Source values [B, C, h, w], of any grid over the source picture, at the target's pixels [B, C, H, W]; 0 off
        the body. Hidden places take what lies there in the source: see `seen`."""
        carried = grid_sample(values, self.grid.to(values), mode=mode, padding_mode="border", align_corners=False)
        return carried * self.target.mask.to(values)


@dataclass(frozen=True, eq=False)
class Carried:
    """picture: [B, C, H, W], what arrives, 0 where nothing was seen. seen: [B, 1, H, W] in [0, 1]. parsing: the
    source's regions on the target body. correspondence: where all of it came from."""

    picture: Tensor
    seen: Tensor
    parsing: HumanParsing
    correspondence: Correspondence


@torch.no_grad()
def correspond(
    source: BodyPose,
    target: BodyPose,
    source_maps: BodyMaps,
    target_maps: BodyMaps,
    model: BodyModel | None = None,
    mirror: str = "none",
) -> Correspondence:
    """The target's pixels in the source, with a depth test.

    source, target: B bodies of the same people (same shape). source_maps, target_maps: their renderings by `model`
    (default: the generic body), each of any size. mirror: look up the look-alike on the other side or face of the
    body instead (`render.MIRRORS`). Raises TruePoseError for unequal counts or an unknown mirror.
    """
    if mirror not in MIRRORS:
        raise TruePoseError(f"mirror is {mirror!r}; expected one of {', '.join(MIRRORS)}")
    if not len(source) == len(target) == len(source_maps) == len(target_maps):
        raise TruePoseError(f"there are {len(source)} source bodies and {len(target)} target bodies; expected as many")
    model = GenericBody() if model is None else model
    found = model.locate(target_maps, source, mirror)
    # `locate` answers for a frame of the target's shape; both frames are as high, and the middle is the middle.
    (height, width), (source_height, source_width) = target_maps.size, source_maps.size
    wider = width * source_height / (height * source_width)
    grid = ((2 * found[:, :2] - 1) * found.new_tensor([wider, 1.0])[:, None, None]).permute(0, 2, 3, 1)
    # Nearest, not bilinear: between two parts a mean of depths is nobody's depth.
    shown = torch.cat([source_maps.depth, source_maps.mask, source_maps.normal[:, 2:]], 1)
    at = grid_sample(shown, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    near = (found[:, 2:] - at[:, :1]).abs() < DEPTH_TOLERANCE * HEIGHT * source.camera[:, :1, None, None]
    seen = (near & (at[:, 1:2] > 0)).to(grid) * target_maps.mask
    return Correspondence(grid * target_maps.mask[:, 0, ..., None], seen, at[:, 2:].clamp(0, 1) * seen, target_maps)


@torch.no_grad()
def carry(
    image: Tensor,
    parsing: HumanParsing,
    source: BodyPose,
    target: BodyPose,
    size: tuple[int, int] | None = None,
    *,
    model: BodyModel | None = None,
    mirror: str = "none",
) -> Carried:
    """The source picture on the target body.

    image: [B, C, h, w], a picture or features on a grid over it. parsing: the source picture's. source, target: bodies;
    there are B of one side and B or 1 of the other. size: (height, width) of the target picture, by default the source
    parsing's. model: the body both are drawn with (default: the generic one), of B people or of one. mirror: see
    `correspond`.

    A pixel was seen when the depth test holds and the source's parsing says that a person is there. Raises
    TruePoseError for counts that do not match or a body outside its picture.
    """
    model = GenericBody() if model is None else model
    size = parsing.size if size is None else size
    if len(source) != image.shape[0] or parsing.batch != image.shape[0]:
        raise TruePoseError(
            f"there are {image.shape[0]} pictures, {parsing.batch} parsings and {len(source)} source bodies; expected "
            "one of each per person"
        )
    count = max(len(source), len(target))
    if not {len(source), len(target)} <= {1, count}:
        raise TruePoseError(
            f"there are {len(source)} source bodies and {len(target)} target bodies; expected as many, or 1 of either"
        )
    # One source is rendered once, however many poses it is carried to.
    source_maps = model.render(source, *parsing.size).select(_repeats(len(source), count))
    source, target = source.select(_repeats(len(source), count)), target.select(_repeats(len(target), count))
    target_maps = model.render(target, *size)
    found = correspond(source, target, source_maps, target_maps, model, mirror)
    image, masks = image.expand(count, -1, -1, -1), parsing.masks.to(image).expand(count, -1, -1, -1)
    regions = found.sample(masks)
    person = regions[:, 1:].sum(1, keepdim=True)
    seen = found.seen.to(image) * (person > 0.5)
    return Carried(found.sample(image) * seen, seen, carried_parsing(found, masks, seen), found)


def _repeats(of: int, count: int) -> Tensor:
    return torch.arange(of).repeat(count // of)


def carried_parsing(found: Correspondence, masks: Tensor, seen: Tensor) -> HumanParsing:
    """The source's regions on the target body, P of HPFA.

    Where the source shows the surface, its own parsing [B, 7, h, w]; where it hides it, the region that most of the
    same part shows elsewhere in the source; parts that the source does not show at all take the body's own wardrobe.
    Off the body: background.
    """
    target = found.target
    carried = found.sample(masks)
    batch, _, height, width = carried.shape
    person = carried[:, 1:].sum(1, keepdim=True).clamp(min=1e-6)
    whole = torch.cat([torch.zeros_like(person), carried[:, 1:] / person], 1)
    # Mean regions of each part where it was seen: [B, 25, 7]; part 0 is nobody.
    part = (target.part + 1).flatten(1)
    weight = seen.flatten(1)
    sums = masks.new_zeros((batch, 25, len(Region)))
    sums.scatter_add_(1, part[..., None].expand(-1, -1, len(Region)), (whole * seen).flatten(2).transpose(1, 2))
    counts = masks.new_zeros((batch, 25)).scatter_add_(1, part, weight)
    own = one_hot(target.region, len(Region)).permute(0, 3, 1, 2).to(masks)
    # A handful of pixels is no evidence for a whole part.
    known = counts >= 0.15 * masks.new_zeros((batch, 25)).scatter_add_(1, part, torch.ones_like(weight)).clamp(min=4)
    mean = sums / counts.clamp(min=1e-6)[..., None]
    index = part[..., None].expand(-1, -1, len(Region))
    usual = mean.gather(1, index).transpose(1, 2).unflatten(2, (height, width))
    is_known = known.gather(1, part).unflatten(1, (height, width))[:, None]
    hidden = torch.where(is_known & (target.region[:, None] != Region.HAIR), usual, own)
    hidden = hidden / hidden.sum(1, keepdim=True).clamp(min=1e-6)
    inside = torch.where(seen > 0, whole, hidden)
    nobody = torch.zeros_like(inside)
    nobody[:, Region.BACKGROUND] = 1
    mask = target.mask.to(masks)
    result = inside * mask + nobody * (1 - mask)
    return HumanParsing(result / result.sum(1, keepdim=True))
