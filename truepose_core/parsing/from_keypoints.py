"""Human parsing without a network: shapes on the skeleton, garment lengths from colour, edges from GrabCut.

Each part of the body is a shape with a half width on a bone; a pixel's distance to it is 0 on the bone and 1 at the
outline. How far sleeves and trousers reach is where the colour along the limbs turns into the face's skin colour.
Then every pixel takes the region that its place and its colour agree on, and GrabCut (Rother et al., SIGGRAPH 2004)
finds the person's outline. The construction is ours; half widths are those of an adult, in torso lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing.human_parsing import N_REGIONS, HumanParsing
from truepose_core.pose import N_BODY
from truepose_core.regions import Region

WORK_SIDE = 400
"""The longest side, in pixels, of what is looked at, the person with some room; larger ones are made smaller first."""

NOSE, NECK = 0, 1
SHOULDERS, ELBOWS, WRISTS = (2, 5), (3, 6), (4, 7)
HIPS, KNEES, ANKLES = (8, 11), (9, 12), (10, 13)
EYES, EARS = (14, 15), (16, 17)
ARMS = tuple(zip(SHOULDERS, ELBOWS, WRISTS, strict=True))
LEGS = tuple(zip(HIPS, KNEES, ANKLES, strict=True))

# Distances between keypoints in torso lengths (neck to middle of the hips).
_LENGTHS: tuple[tuple[int, int, float], ...] = (
    (2, 5, 0.78),
    (2, 3, 0.62),
    (5, 6, 0.62),
    (3, 4, 0.56),
    (6, 7, 0.56),
    (8, 9, 0.9),
    (11, 12, 0.9),
    (9, 10, 0.9),
    (12, 13, 0.9),
    (16, 17, 0.34),
    (14, 15, 0.15),
    (1, 0, 0.5),
)
_FAR = 3.0
"""Distances are not looked at beyond this many half widths."""
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


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise TruePoseError(
            "GrabCut needs OpenCV, which is not installed: pip install opencv-python-headless"
        ) from error
    return cv2


# The skeleton, in pixels of the picture that is looked at.


@dataclass(frozen=True)
class _Skeleton:
    """xy: [18, 2] pixels. seen: [18] bool. scale: the torso's length in pixels. neck, hip: ends of the spine. up: unit
    vector from the hips to the head. head: the head's middle or None. head_scale: torso length that fits the head.
    forward: where the person is turned to on the picture, -1 (left) to 1 (right), 0 to the front or the back."""

    xy: np.ndarray
    seen: np.ndarray
    scale: float
    neck: np.ndarray
    hip: np.ndarray
    up: np.ndarray
    head: np.ndarray | None
    head_up: np.ndarray
    head_scale: float
    forward: float

    def middle(self, points: tuple[int, ...]) -> np.ndarray | None:
        """The mean of those that are seen."""
        there = [i for i in points if self.seen[i]]
        return self.xy[there].mean(0) if there else None


def _unit(vector: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    length = float(np.hypot(*vector))
    return vector / length if length > 1e-6 else fallback


def _skeleton(points: np.ndarray, unmeasured: float, index: int) -> _Skeleton:
    """points: [18, 3] in pixels. unmeasured: the scale where no length can be measured."""
    xy, seen = points[:, :2], points[:, 2] > 0

    def mean(indices: tuple[int, ...]) -> np.ndarray | None:
        there = [i for i in indices if seen[i]]
        return xy[there].mean(0) if there else None

    neck = xy[NECK] if seen[NECK] else (mean(SHOULDERS) if seen[list(SHOULDERS)].all() else None)
    hip = mean(HIPS) if seen[list(HIPS)].all() else None
    head = _head_middle(xy, seen, neck)
    if neck is None and hip is None and head is None and not seen[[*SHOULDERS, *HIPS]].any():
        raise TruePoseError(
            f"picture {index} shows nobody: neither head, shoulders nor hips are among its keypoints. "
            "Give the pose of a detected person"
        )
    # Foreshortening only shortens, so the largest estimate is the nearest to the truth.
    lengths = [np.hypot(*(xy[a] - xy[b])) / share for a, b, share in _LENGTHS if seen[a] and seen[b]]
    one_hip = mean(HIPS)
    if neck is not None and one_hip is not None:
        lengths.append(np.hypot(*(one_hip - neck)))
    scale = max(lengths, default=unmeasured)
    scale = scale if scale > 1 else unmeasured
    down = np.array([0.0, 1.0])
    if neck is None and hip is None:
        anchor = mean(SHOULDERS)
        neck = anchor
        if neck is None:
            neck = head + 0.5 * scale * down if head is not None else one_hip - scale * down
    if neck is None:
        above = head if head is not None else hip - down
        neck = hip + scale * _unit(above - hip, -down)
    if hip is None:
        hip = neck + scale * (_unit(one_hip - neck, down) if one_hip is not None else _below(xy, seen, neck, head))
    up = _unit(neck - hip, -down)
    head_up = _unit(head - neck, up) if head is not None else up
    head_scale = scale
    if head is not None:
        marks = [np.hypot(*(xy[a] - xy[b])) / share for a, b, share in _LENGTHS[-3:-1] if seen[a] and seen[b]]
        marks.append(np.hypot(*(head - neck)) / 0.55)
        head_scale = float(np.clip(max(marks), 0.7 * scale, 1.15 * scale))
    elif seen[NECK]:
        head = neck + 0.5 * scale * up
    forward = 0.0
    if seen[NOSE] and head is not None:
        forward = float(np.clip((xy[NOSE] - head)[0] / (0.2 * head_scale), -1, 1))
        if seen[list(SHOULDERS)].all():
            # Feet point where the shoulders are turned to, not where the head is.
            wide = abs((xy[SHOULDERS[0]] - xy[SHOULDERS[1]]) @ np.array([-up[1], up[0]]))
            forward *= max(0.0, 1 - wide / (0.6 * scale))
    return _Skeleton(xy, seen, float(scale), neck, hip, up, head, head_up, head_scale, forward)


def _head_middle(xy: np.ndarray, seen: np.ndarray, neck: np.ndarray | None) -> np.ndarray | None:
    """Between the ears; with one ear the face is turned, and the middle lies between it and the eyes."""
    eyes, ears = [xy[i] for i in EYES if seen[i]], [xy[i] for i in EARS if seen[i]]
    if len(ears) == 2:
        return (ears[0] + ears[1]) / 2
    if len(ears) == 1:
        if not eyes and neck is not None:
            # Seen from behind, an ear is at the head's edge.
            return np.array([(ears[0][0] + neck[0]) / 2, ears[0][1]])
        return (ears[0] + np.mean(eyes, 0)) / 2 if len(eyes) == 2 else ears[0]
    if eyes:
        return np.mean(eyes, 0)
    return xy[NOSE] if seen[NOSE] else None


def _below(xy: np.ndarray, seen: np.ndarray, neck: np.ndarray, head: np.ndarray | None) -> np.ndarray:
    """Where the hips are when none is seen: square to the shoulders, away from the head."""
    down = _unit(neck - head, np.array([0.0, 1.0])) if head is not None else np.array([0.0, 1.0])
    if not seen[list(SHOULDERS)].all():
        return down
    across = xy[SHOULDERS[1]] - xy[SHOULDERS[0]]
    square = _unit(np.array([-across[1], across[0]]), down)
    return square if square @ down >= 0 else -square


# Shapes.


@dataclass(frozen=True)
class _Shape:
    """A part: from start to end, of half widths w0 and w1, over t = low .. high (in lengths), with rounded ends of cap
    pixels. floor: what its distance is at least, so that parts in front of it win."""

    region: Region
    start: np.ndarray
    end: np.ndarray
    w0: float
    w1: float
    low: float = 0.0
    high: float = 1.0
    cap: float | None = None
    floor: float = 0.0


def _ellipse(
    region: Region, middle: np.ndarray, up: np.ndarray, half_width: float, half_height: float, floor: float
) -> _Shape:
    """An upright ellipse as a shape of no length whose cap is its half height."""
    return _Shape(region, middle, middle + 1e-3 * up, half_width, half_width, 0, 1, half_height, floor)


@dataclass(frozen=True)
class _Lengths:
    """How far garments reach: sleeves and legs along their two bones (0 the shoulder or hip, 1 the elbow or knee, 2 the
    wrist or ankle), waist along the torso. barefoot, dress: what else the colours say."""

    sleeve: float = 2.0
    leg: float = 2.0
    waist: float = 0.95
    barefoot: bool = False
    dress: bool = False


def _shapes(s: _Skeleton, lengths: _Lengths) -> Iterator[_Shape]:
    """All parts of the person, in no order."""
    scale, seen = s.scale, s.seen
    below = Region.UPPER if lengths.dress else Region.LOWER
    side = np.array([-s.up[1], s.up[0]])

    def half(points: tuple[int, int], least: float, more: float) -> float:
        if not seen[list(points)].all():
            return (least + 0.05) * scale
        return max(least * scale, abs((s.xy[points[0]] - s.xy[points[1]]) @ side) / 2 + more * scale)

    shoulder, hip = half(SHOULDERS, 0.24, 0.06), half(HIPS, 0.26, 0.15)
    torso_seen = seen[[*SHOULDERS, *HIPS, NECK]].any()
    if torso_seen:
        end = s.neck + lengths.waist * (s.hip - s.neck)
        waist = shoulder + lengths.waist * (hip - shoulder)
        yield _Shape(Region.UPPER, s.neck, end, shoulder, waist, -0.02, 1.0, 0.1 * scale, 0.6)
        yield _Shape(below, end, s.neck + 1.12 * (s.hip - s.neck), waist, hip, 0.0, 1.0, 0.12 * scale, 0.6)
        if seen[list(SHOULDERS)].all():
            ends = s.xy[list(SHOULDERS)]
            yield _Shape(Region.UPPER, *ends, 0.11 * scale, 0.11 * scale, floor=0.6)
        yield from _dangling(s, below)
    yield from _head(s)
    for shoulder_i, elbow, wrist in ARMS:
        if seen[shoulder_i] and seen[elbow]:
            a, b = s.xy[shoulder_i], s.xy[elbow]
            yield from _sleeve(Region.UPPER, Region.SKIN, a, b, 0.135 * scale, 0.105 * scale, lengths.sleeve)
        if seen[elbow] and seen[wrist]:
            a, b = s.xy[elbow], s.xy[wrist]
            yield from _sleeve(Region.UPPER, Region.SKIN, a, b, 0.11 * scale, 0.075 * scale, lengths.sleeve - 1)
            along = _unit(b - a, -s.up)
            yield _Shape(Region.SKIN, b + 0.02 * scale * along, b + 0.24 * scale * along, 0.09 * scale, 0.07 * scale)
    feet = Region.SKIN if lengths.barefoot else Region.ACCESSORY
    for hip_i, knee, ankle in LEGS:
        if seen[hip_i] and seen[knee]:
            a, b = s.xy[hip_i], s.xy[knee]
            yield from _sleeve(below, Region.SKIN, a, b, 0.21 * scale, 0.155 * scale, lengths.leg)
        if seen[knee] and seen[ankle]:
            a, b = s.xy[knee], s.xy[ankle]
            yield from _sleeve(below, Region.SKIN, a, b, 0.155 * scale, 0.1 * scale, lengths.leg - 1)
            along = _unit(b - a, -s.up)
            toe = b + 0.14 * scale * along + np.array([0.28 * scale * s.forward, 0.0])
            yield _Shape(feet, b + 0.06 * scale * along, toe, 0.11 * scale, 0.1 * scale, floor=0.1)


def _dangling(s: _Skeleton, below: Region) -> Iterator[_Shape]:
    """Stumps where the shoulder or hip is seen and nothing after it: arms and legs cut by the picture's edge."""
    for first, second, _ in ARMS:
        if s.seen[first] and not s.seen[second]:
            yield _Shape(Region.UPPER, s.xy[first], s.xy[first] - 0.15 * s.scale * s.up, 0.13 * s.scale, 0.13 * s.scale)
    for first, second, _ in LEGS:
        if s.seen[first] and not s.seen[second]:
            yield _Shape(below, s.xy[first], s.xy[first] - 0.2 * s.scale * s.up, 0.2 * s.scale, 0.19 * s.scale)


def _sleeve(
    cover: Region, bare: Region, a: np.ndarray, b: np.ndarray, w0: float, w1: float, reach: float
) -> Iterator[_Shape]:
    """A bone in two: covered up to t = reach, bare beyond."""
    reach = float(np.clip(reach, 0, 1))
    if reach > 0:
        yield _Shape(cover, a, b, w0, w1, 0, reach)
    if reach < 1:
        yield _Shape(bare, a, b, w0, w1, reach, 1)


def _head(s: _Skeleton) -> Iterator[_Shape]:
    if s.head is None:
        return
    size, up = s.head_scale, s.head_up
    middle = _face_middle(s)
    yield _Shape(Region.SKIN, s.neck, s.head, 0.14 * size, 0.12 * size, 0.1, 0.7, 0.05 * size, 0.8)
    yield _ellipse(
        Region.HAIR, s.head + 0.04 * size * up, up, 0.2 * size, 0.27 * size, 0.8 if middle is not None else 0.4
    )
    if middle is not None:
        yield _ellipse(Region.FACE, middle - 0.04 * size * up, up, 0.155 * size, 0.2 * size, 0.0)


def _face_middle(s: _Skeleton) -> np.ndarray | None:
    """Between the eyes and the nose; None where neither is seen: the head is seen from behind."""
    eyes = s.middle(EYES)
    nose = s.xy[NOSE] if s.seen[NOSE] else None
    if eyes is None and nose is None:
        return None
    if eyes is None:
        return nose + 0.06 * s.head_scale * s.head_up
    if nose is None:
        return eyes - 0.05 * s.head_scale * s.head_up
    front = (eyes + nose) / 2 if s.seen[list(EYES)].all() else 0.6 * (0.6 * nose + 0.4 * eyes) + 0.4 * s.head
    return front - 0.02 * s.head_scale * s.head_up


def _distances(shapes: Iterator[_Shape], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The distance of every pixel to the nearest shape of each region, in half widths, at most `_FAR`: [7, H, W]; and
    to the person on the whole, without the shapes' floors: [H, W]."""
    height, width = size
    field, person = torch.full((N_REGIONS, height, width), _FAR), torch.full((height, width), _FAR)
    for shape in shapes:
        axis = shape.end - shape.start
        length = max(float(np.hypot(*axis)), 1e-6)
        cap = max(shape.w0, shape.w1) if shape.cap is None else shape.cap
        ends = shape.start + np.array([[shape.low], [shape.high]]) * axis
        reach = _FAR * max(shape.w0, shape.w1, cap)
        left, top = np.clip(np.floor(ends.min(0) - reach), 0, (width, height)).astype(int)
        right, bottom = np.clip(np.ceil(ends.max(0) + reach), 0, (width, height)).astype(int)
        if left >= right or top >= bottom:
            continue
        unit = axis / length
        x = torch.arange(left, right) + (0.5 - shape.start[0])
        y = torch.arange(top, bottom)[:, None] + (0.5 - shape.start[1])
        along = x * unit[0] + y * unit[1]
        across = (x * -unit[1] + y * unit[0]).abs()
        inside = along.clamp(shape.low * length, shape.high * length)
        half = shape.w0 + (shape.w1 - shape.w0) * (inside / length).clamp(0, 1)
        distance = torch.hypot(across / half, (along - inside) / cap)
        for whole in (person, field[shape.region]):
            part = whole[top:bottom, left:right]
            torch.minimum(part, distance, out=part)
            distance.clamp_(min=shape.floor)
    # Off the body by as much as a part is on it: even at the outline.
    field[Region.BACKGROUND] = (2 - person).clamp(min=0)
    return field, person


# Colours.


def _lab(image: Tensor) -> Tensor:
    """sRGB [3, H, W] in [0, 1] as CIE L*a*b* (D65), L with half its weight: light varies more than what it falls on."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    matrix = image.new_tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) / image.new_tensor([[0.9505], [1.0], [1.089]])
    xyz = torch.einsum("ij,jhw->ihw", matrix, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([0.5 * (116 * f[1] - 16), 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


_SKIN_EDGE = 5.0
"""Colours up to this squared Mahalanobis distance count as skin."""


@dataclass(frozen=True)
class _Skin:
    """The skin's colour: a Gaussian in the colours of `_lab`."""

    mean: np.ndarray
    inverse: np.ndarray

    def distance(self, colors: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of colours [..., 3]."""
        off = colors - self.mean
        return np.einsum("...i,ij,...j->...", off, self.inverse, off)


def _like_skin(lab: Tensor, skin: _Skin) -> Tensor:
    """How much each pixel looks like skin, in the units of `_likelihood`: [H, W]."""
    off = lab - torch.as_tensor(skin.mean, dtype=lab.dtype)[:, None, None]
    inverse = torch.as_tensor(skin.inverse, dtype=lab.dtype)
    return (_SKIN_EDGE - (torch.einsum("cd,dhw->chw", inverse, off) * off).sum(0)).clamp_(-4, 4)


def _skin(lab: Tensor, s: _Skeleton) -> _Skin | None:
    """Skin from the middle of the face, or of the hands where no face is seen."""
    middle = _face_middle(s)
    if middle is not None:
        # Below the eyes: cheeks and nose.
        spots = [(middle - 0.02 * s.head_scale * s.head_up, 0.075 * s.head_scale)]
    else:
        spots = [
            (s.xy[w] + 0.12 * s.scale * _unit(s.xy[w] - s.xy[e], -s.up), 0.04 * s.scale)
            for _, e, w in ARMS
            if s.seen[e] and s.seen[w]
        ]
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2), -1).reshape(-1, 2)
    samples = [_sample(lab, spot + radius * grid) for spot, radius in spots]
    colors = np.concatenate(samples) if samples else np.zeros((0, 3))
    colors = colors[np.isfinite(colors[:, 0])]
    if len(colors) < 9:
        return None
    # Eyes, nostrils and glasses are no skin: keep the half that is nearest to the median.
    off = np.abs(colors - np.median(colors, 0)).sum(1)
    colors = colors[off <= np.median(off)]
    # Limbs are lit unlike the face: at least this spread in half L, a and b.
    spread = np.cov(colors.T) + np.diag([8.0, 4.0, 5.0]) ** 2
    return _Skin(colors.mean(0), np.linalg.inv(spread))


def _sample(lab: Tensor, points: np.ndarray) -> np.ndarray:
    """Colours at points [..., 2] in pixels -> [..., 3]; NaN outside of the picture."""
    height, width = lab.shape[-2:]
    x, y = np.floor(points[..., 0]).astype(int), np.floor(points[..., 1]).astype(int)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    colors = lab.numpy()[:, y.clip(0, height - 1), x.clip(0, width - 1)]
    return np.where(inside[..., None], np.moveaxis(colors, 0, -1), np.nan)


_STEPS = 24
"""Steps along a chain of two bones."""


def _chain(lab: Tensor, s: _Skeleton, joints: tuple[int, int, int], half: float) -> np.ndarray:
    """Colours at `_STEPS` steps along two bones, 5 across: [_STEPS, 5, 3], NaN where a bone is missing."""
    colors = np.full((_STEPS, 5, 3), np.nan)
    t = (np.arange(_STEPS // 2) + 0.5) / (_STEPS // 2)
    for bone in range(2):
        first, second = joints[bone], joints[bone + 1]
        if s.seen[first] and s.seen[second]:
            a, b = s.xy[first], s.xy[second]
            unit = _unit(b - a, -s.up)
            across = np.linspace(-half, half, 5)[:, None] * np.array([-unit[1], unit[0]])
            points = (a + t[:, None] * (b - a))[:, None] + across
            colors[bone * _STEPS // 2 : (bone + 1) * _STEPS // 2] = _sample(lab, points)
    return colors


def _cloth(lab: Tensor, s: _Skeleton, low: float, high: float) -> np.ndarray:
    """The colour in the middle of the torso between t = low and high: [3], NaN outside of the picture."""
    side = np.array([-s.up[1], s.up[0]])
    across = np.linspace(-0.12, 0.12, 9)[:, None] * s.scale * side
    colors = _sample(lab, (s.neck + np.linspace(low, high, 9)[:, None] * (s.hip - s.neck))[:, None] + across)
    colors = colors[np.isfinite(colors[..., 0])]
    return np.median(colors, 0) if len(colors) else np.full(3, np.nan)


def _cover(
    lab: Tensor, s: _Skeleton, skin: _Skin, limbs: tuple[tuple[int, int, int], ...], half: float, cloth: np.ndarray
) -> float | None:
    """How far both limbs are covered, 0 to 2 (see `_Lengths`): where skin begins, best told by the two together.

    half: half the width that is looked at. cloth: the garment's colour on the torso; what is nearer to it than to the
    skin is covered. None when nothing of the limbs is seen.
    """
    score = np.zeros(_STEPS)
    known = np.zeros(_STEPS, bool)
    for joints in limbs:
        colors = _chain(lab, s, joints, half)
        there = np.isfinite(colors[..., 0])
        # Above 0 where it looks like skin. The bounds keep one fold or one print from deciding.
        far = skin.distance(colors)
        like = _SKIN_EDGE - far
        if np.isfinite(cloth[0]):
            like = np.minimum(like, skin.distance(colors - cloth + skin.mean) - far)
        like = np.clip(like, -5, 5)
        step = there.any(1)
        score[step] += np.nanmedian(np.where(there, like, np.nan)[step], axis=1)
        known |= step
    if not known.any():
        return None
    # Bare from step k on: skin after it and none before.
    before = np.concatenate([[0], np.cumsum(score)])
    gain = (before[-1] - before) - before
    best = int(np.flatnonzero(gain >= gain.max() - 1e-9)[-1])
    if best == 0 or not known[:best].any():
        return 0.0
    if best > int(np.flatnonzero(known)[-1]):
        return 2.0
    reach = best / _STEPS * 2
    return reach if reach < 1.85 else 2.0


_WAIST = 0.95
_WAIST_RANGE = (0.62, 1.3)
_WAIST_STEPS, _WAIST_ROWS = 28, 5
_SAME_CLOTH = 7.0
"""Colours of `_lab` that differ by less than this are one garment's."""


def _waist(lab: Tensor, s: _Skeleton) -> tuple[float, bool]:
    """(where the upper garment ends along the torso, whether the cloth changes there)."""
    t = np.linspace(*_WAIST_RANGE, _WAIST_STEPS)
    axis = s.hip - s.neck
    side = np.array([-s.up[1], s.up[0]])
    across = np.linspace(-0.14, 0.14, 7)[:, None] * s.scale * side
    colors = _sample(lab, (s.neck + t[:, None] * axis)[:, None] + across)
    rows = np.isfinite(colors[..., 0]).all(1)
    if rows.sum() < 2 * _WAIST_ROWS:
        return _WAIST, False
    t, line = t[rows], np.median(colors[rows], 1)
    count = np.arange(1, len(line))
    total = np.cumsum(line, 0)
    above = total[:-1] / count[:, None]
    below = (total[-1] - total[:-1]) / (len(line) - count)[:, None]
    gap = ((above - below) ** 2).sum(1)
    gap[: _WAIST_ROWS - 1], gap[len(gap) - _WAIST_ROWS + 1 :] = 0, 0
    at = (t[1:] + t[:-1]) / 2
    gain = count * (len(line) - count) / len(line) * gap * np.exp(-(((at - _WAIST) / 0.3) ** 2))
    best = int(gain.argmax())
    if gap[best] < _SAME_CLOTH**2:
        return _WAIST, False
    return float(at[best]), True


def _lengths(lab: Tensor, s: _Skeleton, skin: _Skin | None) -> _Lengths:
    waist, changes = _waist(lab, s)
    if skin is None:
        return _Lengths(waist=waist)
    sleeve = _cover(lab, s, skin, ARMS, 0.05 * s.scale, _cloth(lab, s, 0.3, 0.7))
    leg = _cover(lab, s, skin, LEGS, 0.07 * s.scale, _cloth(lab, s, 0.98, 1.1))
    feet = [
        _sample(lab, s.xy[a] + np.linspace(0.05, 0.15, 5)[:, None] * s.scale * _unit(s.xy[a] - s.xy[k], -s.up))
        for _, k, a in LEGS
        if s.seen[k] and s.seen[a]
    ]
    colors = np.concatenate(feet) if feet else np.zeros((0, 3))
    colors = colors[np.isfinite(colors[:, 0])]
    barefoot = leg is not None and leg < 1.7 and len(colors) > 3 and float(np.median(skin.distance(colors))) < 3
    dress = not changes and leg is not None and 0 < leg < 1.7 and s.seen[list(HIPS)].all() and s.seen[NECK]
    return _Lengths(2.0 if sleeve is None else sleeve, 2.0 if leg is None else leg, waist, barefoot, bool(dress))


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
