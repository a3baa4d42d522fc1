"""A person's figure from 18 keypoints: limbs, trunk, head and the hair around it, as shapes and distances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.pose.keypoints import (
    ANKLES,
    EARS,
    ELBOWS,
    EYES,
    HIPS,
    KNEES,
    NECK,
    NOSE,
    SHOULDERS,
    WRISTS,
)
from truepose_core.regions import N_REGIONS, Region

ARMS = tuple(zip(SHOULDERS, ELBOWS, WRISTS, strict=True))
LEGS = tuple(zip(HIPS, KNEES, ANKLES, strict=True))

# Distances between keypoints in torso lengths (neck to middle of the hips).
_LENGTHS: tuple[tuple[int, int, float], ...] = (
    (*SHOULDERS, 0.78),
    *((shoulder, elbow, 0.62) for shoulder, elbow, _ in ARMS),
    *((elbow, wrist, 0.56) for _, elbow, wrist in ARMS),
    *((hip, knee, 0.9) for hip, knee, _ in LEGS),
    *((knee, ankle, 0.9) for _, knee, ankle in LEGS),
    (*EARS, 0.34),
    (*EYES, 0.15),
    (NECK, NOSE, 0.5),
)
_FAR = 3.0
"""Distances are not looked at beyond this many half widths."""


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
