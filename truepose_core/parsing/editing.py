"""Editing one region of a parsing: grow or shrink it, blur its edge, fill its holes, put a mask in its place.

Every edit makes a new mask of the region and settles with the others: what the region gains comes from all of them in
proportion; what it gives up goes to those around it. So rows keep summing to 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing.human_parsing import HumanParsing
from truepose_core.regions import Region, to_region

MAX_GROW = 512
MAX_BLUR = 64.0
MASK_MODES = ("replace", "add", "remove")

_TINY = 1e-6


def grow_region(parsing: HumanParsing, region: Region | str, pixels: int) -> HumanParsing:
    """Grow a region outwards by `pixels`, or shrink it where they are negative.

    Soft masks grow with their softness. The shape that is added is an octagon, within 8 % of a circle; the picture's
    border is no edge, so a region that leaves the picture does not shrink there. Raises `TruePoseError` for more than
    `MAX_GROW` pixels.
    """
    if not isinstance(pixels, int) or abs(pixels) > MAX_GROW:
        raise TruePoseError(f"a region cannot grow by {pixels!r} pixels; expected -{MAX_GROW} to {MAX_GROW}")
    region = to_region(region)
    if pixels == 0:
        return parsing
    masks = parsing.masks.float()
    if pixels > 0:
        return _with_region(parsing, region, _dilate(masks[:, region : region + 1], pixels)[:, 0])
    around = _average(_others(masks, region), -pixels)
    shrunk = 1 - _dilate(1 - masks[:, region : region + 1], -pixels)[:, 0]
    return _with_region(parsing, region, shrunk, around)


def blur_region(parsing: HumanParsing, region: Region | str, sigma: float) -> HumanParsing:
    """Soften a region's edge by a Gaussian of `sigma` pixels. Raises `TruePoseError` outside 0 to `MAX_BLUR`."""
    if not 0 <= sigma <= MAX_BLUR:
        raise TruePoseError(f"a region cannot be blurred by {sigma!r} pixels; expected 0 to {MAX_BLUR:g}")
    region = to_region(region)
    if sigma == 0:
        return parsing
    blurred = _gaussian(parsing.masks.float(), sigma)
    return _with_region(parsing, region, blurred[:, region], _others(blurred, region))


def fill_region(parsing: HumanParsing, region: Region | str) -> HumanParsing:
    """Give a region everything that it encloses: what cannot reach the picture's border without crossing it (where its
    share is at least one half; diagonal gaps do not count as ways out)."""
    region = to_region(region)
    mask = parsing.masks[:, region].float()
    free = mask < 0.5
    holes = free & ~_reaches_border(free)
    if not bool(holes.any()):
        return parsing
    # The soft rim of a hole closes with it.
    near = _dilate(holes[:, None].float(), 2)[:, 0] > 0
    return _with_region(parsing, region, torch.where(holes | (near & ~free), torch.ones_like(mask), mask))


def mask_region(parsing: HumanParsing, region: Region | str, mask: Tensor, mode: str = "replace") -> HumanParsing:
    """Override a region with a mask: [B, H, W] or [1, H, W] in [0, 1], of the parsing's size.

    mode: "replace" makes the region the mask; "add" adds it to the region; "remove" takes it away. What the region
    gives up goes to the regions that are there already, else to the background. Raises `TruePoseError` for another
    size, batch or mode, and for values outside [0, 1].
    """
    region = to_region(region)
    if mode not in MASK_MODES:
        raise TruePoseError(f"mask mode {mode!r}; expected {', '.join(MASK_MODES)}")
    mask = mask[None] if mask.dim() == 2 else mask
    if mask.dim() != 3 or tuple(mask.shape[1:]) != parsing.size:
        raise TruePoseError(
            f"the mask is {'x'.join(str(side) for side in mask.shape[:0:-1])} and the parsing "
            f"{parsing.size[1]}x{parsing.size[0]} (width x height); make the mask from the same image"
        )
    if mask.shape[0] != parsing.batch and 1 not in (mask.shape[0], parsing.batch):
        raise TruePoseError(f"{mask.shape[0]} masks for a parsing of {parsing.batch} pictures; expected 1 or as many")
    if not (mask.amin() >= -_TINY and mask.amax() <= 1 + _TINY):
        raise TruePoseError("the mask has values outside 0..1")
    mask = mask.to(parsing.masks.device).float().clamp(0, 1)
    own = parsing.masks[:, region].float()
    wanted = {"replace": mask.expand_as(own) if mask.shape[0] == 1 else mask, "add": torch.maximum(own, mask)}
    if len(mask) > parsing.batch:
        parsing = HumanParsing(parsing.masks.expand(len(mask), -1, -1, -1))
    return _with_region(parsing, region, wanted[mode] if mode in wanted else torch.minimum(own, 1 - mask))


def soften_mask(mask: Tensor, grow: int, sigma: float) -> Tensor:
    """A mask [B, H, W] in [0, 1] grown by `grow` pixels (shrunk below 0) and blurred by a Gaussian of `sigma` pixels.

    Raises `TruePoseError` for more than `MAX_GROW` pixels or a sigma outside 0 to `MAX_BLUR`.
    """
    if abs(grow) > MAX_GROW or not 0 <= sigma <= MAX_BLUR:
        raise TruePoseError(
            f"a mask cannot grow by {grow!r} and be blurred by {sigma!r} pixels; expected at most {MAX_GROW} either "
            f"way and 0 to {MAX_BLUR:g}"
        )
    mask = mask.float()[:, None]
    if grow:
        mask = _dilate(mask, grow) if grow > 0 else 1 - _dilate(1 - mask, -grow)
    return (_gaussian(mask, sigma) if sigma else mask)[:, 0]


def _with_region(parsing: HumanParsing, region: Region, wanted: Tensor, around: Tensor | None = None) -> HumanParsing:
    """The parsing with a region's mask [B, H, W] replaced. around: [B, 7, H, W], 0 at the region, who takes what it
    gives up, by default the others as they are."""
    masks = parsing.masks.float()
    wanted = wanted.clamp(0, 1)
    own = masks[:, region]
    others = _others(masks, region)
    if around is None:
        around = others.clone()
    # Where nobody else is, the rest is background; or skin, where the background itself gives way.
    heir = Region.BACKGROUND if region is not Region.BACKGROUND else Region.SKIN
    around[:, heir] += _TINY
    lost = (own - wanted).clamp(min=0)
    kept = torch.where(wanted > own, (1 - wanted) / (1 - own).clamp(min=_TINY), torch.ones_like(own))
    rows = others * kept[:, None] + around * (lost / around.sum(1))[:, None]
    rows[:, region] = wanted
    return HumanParsing((rows / rows.sum(1, keepdim=True)).to(parsing.masks.dtype))


def _others(masks: Tensor, region: Region) -> Tensor:
    others = masks.clone()
    others[:, region] = 0
    return others


def _dilate(masks: Tensor, pixels: int) -> Tensor:
    """The largest value within an octagon of that radius: [B, C, H, W]."""
    # A square, then steps of a cross: their sum is the regular octagon.
    steps = round(pixels * (2 - math.sqrt(2)))
    side = pixels - steps
    if side:
        masks = F.max_pool2d(masks, (1, 2 * side + 1), 1, (0, side))
        masks = F.max_pool2d(masks, (2 * side + 1, 1), 1, (side, 0))
    for _ in range(steps):
        across, down = (F.max_pool2d(masks, kernel, 1, pad) for kernel, pad in (((1, 3), (0, 1)), ((3, 1), (1, 0))))
        masks = torch.maximum(across, down)
    return masks


def _average(masks: Tensor, pixels: int) -> Tensor:
    """The mean over a square of that radius, which holds the octagon: [B, C, H, W]."""
    masks = F.avg_pool2d(masks, (1, 2 * pixels + 1), 1, (0, pixels), count_include_pad=False)
    return F.avg_pool2d(masks, (2 * pixels + 1, 1), 1, (pixels, 0), count_include_pad=False)


def _gaussian(masks: Tensor, sigma: float) -> Tensor:
    """Gaussian blur that keeps constants constant, also at the border: [B, C, H, W]."""
    radius = max(1, math.ceil(3 * sigma))
    at = torch.arange(-radius, radius + 1, dtype=torch.float32, device=masks.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = masks.flatten(0, 1)[:, None]
    for shape, edges in (((1, 1, 1, -1), (radius, radius, 0, 0)), ((1, 1, -1, 1), (0, 0, radius, radius))):
        flat = F.conv2d(F.pad(flat, edges, mode="replicate"), kernel.view(shape))
    return flat.view_as(masks)


def _reaches_border(free: Tensor) -> Tensor:
    """Which free pixels are joined to the border by free pixels side by side: bool [B, H, W] -> bool [B, H, W].

    Each sweep carries the answer along whole runs of free pixels, in rows and then in columns, so the number of sweeps
    is that of the corners on the way, not of the pixels.
    """
    reached = torch.zeros_like(free)
    reached[:, 0], reached[:, -1], reached[:, :, 0], reached[:, :, -1] = True, True, True, True
    reached &= free
    while True:
        before = reached.sum()
        reached = _along_rows(reached, free)
        reached = _along_rows(reached.mT, free.mT).mT
        if reached.sum() == before:
            return reached


def _along_rows(reached: Tensor, free: Tensor) -> Tensor:
    """Every run of free pixels in a row that is reached somewhere is reached everywhere."""
    starts = ~free
    starts[..., 0] = True
    run = starts.flatten().cumsum(0) - 1
    hit = torch.zeros(int(run[-1]) + 1, dtype=torch.bool, device=free.device)
    hit[run[(reached & free).flatten()]] = True
    return hit[run].view(free.shape) & free
