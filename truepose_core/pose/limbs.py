"""Limbs of a person from keypoints: frames that move with them, and coordinates on the body.

A limb is a bone with a width. A point near it has limb coordinates (t, d): t runs along the bone from 0 to 1,
d is the distance to the side the person calls left, in limb widths. The same (limb, t, d) in another pose is
the same place on the body; `body_coordinates` is that place in one fixed rest pose, for HPFA's body match.

Lengths are in image heights. Keypoints are [B, 18, 3]: x/width, y/height, confidence (0 = missing).
The construction is ours (design: pose alignment by a skeleton prior).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from truepose_core.pose.keypoints import (
    FACE_POINTS,
    L_ANKLE,
    L_ELBOW,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    L_WRIST,
    NECK,
    R_ANKLE,
    R_ELBOW,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    R_WRIST,
)

MID_HIP, HEAD = 18, 19
"""Two joints of our own behind the 18: between the hips, and the middle of the head."""

LIMB_ENDS = (
    (NECK, HEAD),
    (NECK, MID_HIP),
    (R_SHOULDER, R_ELBOW),
    (R_ELBOW, R_WRIST),
    (L_SHOULDER, L_ELBOW),
    (L_ELBOW, L_WRIST),
    (R_HIP, R_KNEE),
    (R_KNEE, R_ANKLE),
    (L_HIP, L_KNEE),
    (L_KNEE, L_ANKLE),
)
HEAD_LIMB, TORSO_LIMB = 0, 1
# Half width in torso lengths, and how far past its ends a limb reaches (in bone lengths): hands and feet
# belong to the forearm and the shin.
LIMB_WIDTH = (0.30, 0.36, 0.13, 0.10, 0.13, 0.10, 0.19, 0.15, 0.19, 0.15)
LIMB_RANGE = (
    (0.0, 2.0),
    (-0.05, 1.1),
    (-0.15, 1.0),
    (0.0, 1.45),
    (-0.15, 1.0),
    (0.0, 1.45),
    (-0.15, 1.0),
    (0.0, 1.25),
    (-0.15, 1.0),
    (0.0, 1.25),
)
ON_BODY, OFF_BODY = 1.0, 1.4
"""A point is on the body up to ON_BODY limb widths from the bone and off it from OFF_BODY on."""


@dataclass(frozen=True)
class LimbFrames:
    """start, axis, side: [B, 10, 2] in image heights; width: [B, 10]; valid: [B, 10] bool; facing: [B] (1 the
    front is seen, -1 the back). `side` is a unit vector towards the person's left."""

    start: Tensor
    axis: Tensor
    side: Tensor
    width: Tensor
    valid: Tensor
    facing: Tensor


def limb_frames(body: Tensor, aspect: float) -> LimbFrames:
    """Frames of the ten limbs. body: [B, 18, 3] normalised keypoints; aspect: image width / height."""
    xy = body[..., :2] * body.new_tensor([aspect, 1.0])
    seen = body[..., 2] > 0
    mid_hip = (xy[:, R_HIP] + xy[:, L_HIP]) / 2
    mid_hip_seen = seen[:, R_HIP] & seen[:, L_HIP]
    torso = torch.where((mid_hip_seen & seen[:, NECK])[:, None], mid_hip - xy[:, NECK], body.new_tensor([0.0, 0.3]))
    shoulders = xy[:, L_SHOULDER] - xy[:, R_SHOULDER]
    shoulders_seen = seen[:, L_SHOULDER] & seen[:, R_SHOULDER]
    # A torso seen from above or bent forward is short on the image; shoulders keep the scale honest then.
    scale = torch.maximum(torso.norm(dim=-1), 1.1 * shoulders.norm(dim=-1) * shoulders_seen).clamp(min=1e-3)
    # Left of the torso's own "up to down" axis is where the left shoulder is when the back is seen.
    cross = torso[:, 0] * shoulders[:, 1] - torso[:, 1] * shoulders[:, 0]
    facing = torch.where(shoulders_seen & (cross > 0), -1.0, 1.0).to(body)
    face_seen = seen[:, FACE_POINTS].to(body)
    face = (xy[:, FACE_POINTS] * face_seen[..., None]).sum(1) / face_seen.sum(1, keepdim=True).clamp(min=1)
    up = xy[:, NECK] - 0.5 * torso / torso.norm(dim=-1, keepdim=True).clamp(min=1e-6) * scale[:, None]
    head = torch.where(face_seen.sum(1, keepdim=True) > 0, face, up)
    joints = torch.cat([xy, mid_hip[:, None], head[:, None]], 1)
    valid = torch.cat([seen, mid_hip_seen[:, None], seen[:, NECK : NECK + 1]], 1)
    ends = torch.tensor(LIMB_ENDS, device=body.device)
    start, axis = joints[:, ends[:, 0]], joints[:, ends[:, 1]] - joints[:, ends[:, 0]]
    unit = axis / axis.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    left = torch.stack([unit[..., 1], -unit[..., 0]], -1) * facing[:, None, None]
    # The head points up where the others point down.
    left = torch.cat([-left[:, :1], left[:, 1:]], 1)
    width = body.new_tensor(LIMB_WIDTH) * scale[:, None]
    return LimbFrames(start, axis, left, width, valid[:, ends[:, 0]] & valid[:, ends[:, 1]], facing)


def to_limbs(frames: LimbFrames, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Limb coordinates of points [B, P, 2] (image heights) in all ten limbs: (t, d, distance), each [B, P, 10].
    `distance` is in limb widths, infinite where the limb is missing."""
    offset = points[:, :, None] - frames.start[:, None]
    axis, width = frames.axis[:, None], frames.width[:, None]
    length = axis.norm(dim=-1)
    # A limb that points at the camera has no length on the image: its own width keeps t finite.
    t = (offset * axis).sum(-1) / torch.maximum(length, 0.5 * width).square()
    d = (offset * frames.side[:, None]).sum(-1) / width
    low, high = points.new_tensor(LIMB_RANGE).unbind(-1)
    beyond = (t - t.clamp(low, high)).abs() * length / width
    distance = (d.square() + beyond.square()).sqrt()
    return t, d, distance.masked_fill(~frames.valid[:, None], torch.inf)


def from_limbs(frames: LimbFrames, limb: Tensor, t: Tensor, d: Tensor) -> Tensor:
    """The points [B, P, 2] (image heights) with coordinates t, d [B, P] on limb [B, P]."""

    def pick(x: Tensor) -> Tensor:
        return torch.gather(x, 1, limb[..., None].expand(-1, -1, x.shape[-1]))

    across = d[..., None] * pick(frames.width[..., None]) * pick(frames.side)
    return pick(frames.start) + t[..., None] * pick(frames.axis) + across


@lru_cache(maxsize=8)
def _centres(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).reshape(1, -1, 2)


def _nearest(frames: LimbFrames, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(limb, t, d, distance), each [B, P], of the nearest limb."""
    t, d, distance = to_limbs(frames, points)
    distance, limb = distance.min(-1)
    pick = limb[..., None]
    return limb, t.gather(-1, pick)[..., 0], d.gather(-1, pick)[..., 0], distance


def _on_body(distance: Tensor) -> Tensor:
    return ((OFF_BODY - distance) / (OFF_BODY - ON_BODY)).clamp(0, 1)


# The rest pose: a T, seen from the front, in torso lengths. (x to the right of the image = the person's left.)
_REST = (
    (0.0, -0.5),
    (0.0, 0.0),
    (-0.4, 0.0),
    (-1.0, 0.0),
    (-1.55, 0.0),
    (0.4, 0.0),
    (1.0, 0.0),
    (1.55, 0.0),
    (-0.22, 1.0),
    (-0.32, 1.85),
    (-0.4, 2.7),
    (0.22, 1.0),
    (0.32, 1.85),
    (0.4, 2.7),
    (-0.08, -0.56),
    (0.08, -0.56),
    (-0.16, -0.5),
    (0.16, -0.5),
)
_REST_CENTRE = (0.0, 1.0)


@lru_cache(maxsize=8)
def _rest_frames(device: torch.device, dtype: torch.dtype) -> LimbFrames:
    body = torch.tensor([(x, y, 1.0) for x, y in _REST], device=device, dtype=dtype)[None]
    return limb_frames(body, 1.0)


def body_coordinates(body: Tensor, height: int, width: int, aspect: float | None = None) -> Tensor:
    """Body coordinates of every cell centre of a height x width grid -> [B, height * width, 3].

    The first two are the place in the rest pose, in torso lengths from its middle (x in about -2.3 .. 2.3, the
    person's left positive; y from -2 at the head's top to 2 at the feet). The third is 1 on the body and 0 off it.
    body: [B, 18, 3]. aspect: width / height of the image that the grid covers, by default that of the grid.
    """
    aspect = width / height if aspect is None else aspect
    frames = limb_frames(body, aspect)
    points = _centres(height, width, body.device, body.dtype) * body.new_tensor([aspect, 1.0])
    limb, t, d, distance = _nearest(frames, points.expand(body.shape[0], -1, -1))
    rest = _rest_frames(body.device, body.dtype)
    rest = LimbFrames(*(x.expand(body.shape[0], *x.shape[1:]) for x in vars(rest).values()))
    on_body = _on_body(distance)
    place = from_limbs(rest, limb, t.clamp(-1, 3), d.clamp(-2, 2)) - body.new_tensor(_REST_CENTRE)
    return torch.cat([place * (on_body > 0)[..., None], on_body[..., None]], -1)
