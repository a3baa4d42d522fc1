"""Human parsing without a network: shapes on the skeleton, garment lengths from colour, edges from GrabCut.

Each part of the body is a shape with a half width on a bone; a pixel's distance to it is 0 on the bone and 1 at the
outline. How far sleeves and trousers reach is where the colour along the limbs turns into the face's skin colour.
Then every pixel takes the region that its place and its colour agree on, and GrabCut (Rother et al., SIGGRAPH 2004)
finds the person's outline. The construction is ours; half widths are those of an adult, in torso lengths.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing.figure import _distances, _Lengths, _shapes, _Skeleton, _skeleton
from truepose_core.parsing.garments import _lab, _lengths, _like_skin, _skin
from truepose_core.parsing.human_parsing import HumanParsing
from truepose_core.pose.keypoints import N_BODY
from truepose_core.regions import N_REGIONS, Region

WORK_SIDE = 400
"""The longest side, in pixels, of what is looked at, the person with some room; larger ones are made smaller first."""
_SURE = 0.5
"""Up to this distance a pixel is the person's, whatever its colour."""
_HOLE = 0.015
"""Holes in the person up to this size, in square torso lengths, are closed."""
_ROOM = 0.35
"""What is looked at around the shapes, in torso lengths: hair, wide clothes, and the background's colours."""


def parse_from_keypoints(image: Tensor, body: Tensor, *, refine: bool = True) -> HumanParsing:
    """The regions of one person per picture, from keypoints and colours alone.

    image: float [B, 3, H, W] in [0, 1]. body: [B, 18, 3], the person's OpenPose-18 keypoints, x / W, y / H and a
    confidence, where 0 means missing (or [1, 18, 3] for all pictures). refine: find the person's outline with OpenCV's
    GrabCut; without it the outline is that of the shapes. Returns soft masks [B, 7, H, W] on the image's device.

    A limb with a missing keypoint ends at its last one seen; a torso without hips or shoulders is continued from what
    is there. Shoes are accessory, the neck is skin; other accessories are not found. What is guessed may be wrong: a
    parser knows more.

    Raises TruePoseError for other shapes, for a picture whose person shows neither torso nor head, and, with refine,
    without OpenCV.
    """
    body = _checked(image, body)
    cv2 = _opencv() if refine else None
    height, width = image.shape[-2:]
    masks = torch.zeros(len(image), N_REGIONS, height, width)
    masks[:, Region.BACKGROUND] = 1
    for i, points in enumerate(body):
        pixels = points * (width, height, 1.0)
        scale = 0.1 * max(height, width)
        left, top, right, bottom = _window(_skeleton(pixels, scale, i), (height, width), i)
        factor = min(1.0, WORK_SIDE / max(right - left, bottom - top))
        size = max(1, round((bottom - top) * factor)), max(1, round((right - left) * factor))
        picture = image[i : i + 1, :, top:bottom, left:right].detach().to("cpu", torch.float32)
        picture = _resized(picture, size)[0]
        skeleton = _skeleton((pixels - (left, top, 0)) * (factor, factor, 1), factor * scale, i)
        masks[i, :, top:bottom, left:right] = _resized(
            _parse(picture, skeleton, cv2)[None], (bottom - top, right - left)
        )
    return HumanParsing(masks.to(image.device))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", antialias=size[0] < maps.shape[-2])


def _window(s: _Skeleton, size: tuple[int, int], index: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the person with some room, in whole pixels of a picture of (height, width)."""
    height, width = size
    ends, reach = [], []
    for shape in _shapes(s, _Lengths()):
        ends += [shape.start, shape.end]
        reach += 2 * [max(shape.w0, shape.w1, shape.cap or 0) + _ROOM * s.scale]
    ends, reach = np.array(ends), np.array(reach)[:, None]
    left, top = np.clip(np.floor((ends - reach).min(0)), 0, (width, height)).astype(int).tolist()
    right, bottom = np.clip(np.ceil((ends + reach).max(0)), 0, (width, height)).astype(int).tolist()
    if left >= right or top >= bottom:
        raise TruePoseError(
            f"the person of picture {index} is outside of it; expected keypoints of this picture, from 0 to 1"
        )
    return left, top, right, bottom


def _checked(image: Tensor, body: Tensor) -> np.ndarray:
    """The keypoints as float64 [B, 18, 3], or TruePoseError."""
    if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point() or 0 in image.shape:
        raise TruePoseError(f"the image is {image.dtype} {tuple(image.shape)}; expected float [B, 3, H, W] in 0..1")
    if tuple(body.shape) not in ((image.shape[0], N_BODY, 3), (1, N_BODY, 3)):
        raise TruePoseError(
            f"the body keypoints are {tuple(body.shape)} and the image {tuple(image.shape)}; "
            f"expected [{image.shape[0]}, {N_BODY}, 3]: one person for each picture"
        )
    points = body.detach().cpu().double().numpy()
    if not np.isfinite(points).all():
        raise TruePoseError("the body keypoints hold NaN or infinite values")
    return np.broadcast_to(points, (image.shape[0], N_BODY, 3))


def has_opencv() -> bool:
    """Whether outlines can be refined here."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise TruePoseError(
            f"GrabCut needs OpenCV, which is not installed: {sys.executable} -m pip install opencv-python-headless"
        ) from error
    return cv2


_BINS = 16
_SEED = 0.7
"""Pixels nearer than this to a region's shapes show its colours."""
_FEW = 20
"""With fewer such pixels nothing is said about a region's colours."""


def _seeds(distance: Tensor, like_skin: Tensor | None) -> Tensor:
    """Whose colours each pixel shows: a region, or 7 where that is not sure: [H, W]."""
    nearest, owner = distance[1:].min(0)
    owner += 1
    sure = nearest < _SEED
    hair = (owner == Region.HAIR) & (nearest < 1)
    # Hair is where the head is no face, so its shape says little.
    sure |= hair
    if like_skin is not None:
        sure &= ~(hair & (like_skin >= 0))
    owner[~sure] = N_REGIONS
    owner[distance[Region.BACKGROUND] < 0.4] = Region.BACKGROUND
    return owner


def _likelihood(image: Tensor, distance: Tensor, like_skin: Tensor | None) -> Tensor:
    """log p(colour | region) minus log p(colour): [7, H, W] in -4..4, 0 where a region is missing.

    Smoothed colour histograms, of the pixels that are near a region's shapes; of background, of those far from all.
    """
    cells = (image * (_BINS - 1e-3)).to(torch.int32).clamp_(0, _BINS - 1)
    index = (cells[0] * _BINS + cells[1]) * _BINS + cells[2]
    owner = _seeds(distance, like_skin).to(torch.int32)
    counts = torch.bincount((owner * _BINS**3 + index).flatten(), minlength=(N_REGIONS + 1) * _BINS**3)
    counts = counts.reshape(-1, _BINS, _BINS, _BINS)[:N_REGIONS].float()
    there = counts.flatten(1).sum(1) >= _FEW
    density = _smooth(counts, (1, 2, 3)).flatten(1)
    density = density / density.sum(1, keepdim=True).clamp(min=1)
    density = density + 0.02 * density.mean(0) + 1e-5
    ratio = (density / density[there].mean(0)).log().clamp(-4, 4) * there[:, None]
    found = ratio[:, index]
    if like_skin is not None:
        for region in (Region.FACE, Region.SKIN):
            found[region] = (found[region] + like_skin) / 2
    return _smooth(_smooth(found))


# Putting it together.

_PLACE = 2.5
_COLOR = 0.6
"""How much a pixel's place and its colour say about its region."""


def _parse(picture: Tensor, skeleton: _Skeleton, cv2: Any) -> Tensor:
    """The soft masks [7, H, W] of one picture [3, H, W]."""
    size = tuple(picture.shape[-2:])
    lab = _lab(picture)
    skin = _skin(lab, skeleton)
    distance, person = _distances(_shapes(skeleton, _lengths(lab, skeleton, skin)), size)
    like_skin = None if skin is None else _like_skin(lab, skin)
    score = _COLOR * _likelihood(picture, distance, like_skin) - _PLACE * distance.square()
    if cv2 is not None:
        inside = torch.from_numpy(_grab_cut(cv2, picture, person.numpy(), skeleton.scale))
        score[Region.BACKGROUND] = torch.where(inside, -1e4, 1e4)
    masks = (score == score.amax(0)).float()
    # Edges without stairs; dividing shares a pixel between regions that tie.
    return _smooth(masks / masks.sum(0))


def _grab_cut(cv2: Any, picture: Tensor, person: np.ndarray, scale: float) -> np.ndarray:
    """Whether each pixel shows the person: bool [H, W]."""
    state = np.full(person.shape, cv2.GC_BGD, np.uint8)
    state[person < 1.9] = cv2.GC_PR_BGD
    state[person < 1.0] = cv2.GC_PR_FGD
    state[person < _SURE] = cv2.GC_FGD
    pixels = (picture * 255).round().clamp(0, 255).byte()
    pixels = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()[..., ::-1])
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, state, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    cut = ((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)).astype(np.uint8)
    # Keep what hangs together with the person, and close holes as small as a button.
    _, pieces = cv2.connectedComponents(cut)
    cut = (cut > 0) & np.isin(pieces, np.unique(pieces[(person < _SURE) & (cut > 0)]))
    _, pieces, stats, _ = cv2.connectedComponentsWithStats((~cut).astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < _HOLE * scale**2
    return cut | small[pieces]


def _smooth(maps: Tensor, dims: tuple[int, ...] = (1, 2)) -> Tensor:
    """Maps [C, H, W] blurred by (1, 2, 1) / 4 along the axes; edges are repeated outside."""
    for dim in dims:
        size = maps.shape[dim]
        if size > 1:
            pairs = maps.narrow(dim, 0, size - 1) + maps.narrow(dim, 1, size - 1)
            ends = 2 * maps.narrow(dim, 0, 1), 2 * maps.narrow(dim, size - 1, 1)
            pairs = torch.cat([ends[0], pairs, ends[1]], dim)
            maps = (pairs.narrow(dim, 0, size) + pairs.narrow(dim, 1, size)).mul_(0.25)
    return maps
