"""The skeleton prior: every pixel in the frame of its nearest limb, no weights needed.

A limb is a bone with a width. A point near it has limb coordinates (t, d): t runs along the bone from 0 to 1,
d is the distance to the side the person calls left, in limb widths. The same (limb, t, d) in another pose is
the same place on the body. Three things follow:

* `body_coordinates`: that place in one fixed rest pose, for HPFA's body match;
* `carry`: where in the source a target pixel came from, as a sampling grid;
* `region_prior` and `warp`: the source's parsing and pixels carried to the target pose.

Lengths are in image heights. Keypoints are [B, 18, 3]: x/width, y/height, confidence (0 = missing).
The construction is ours (design: pose alignment by a skeleton prior).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

NOSE, NECK = 0, 1
R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST = 2, 3, 4, 5, 6, 7
R_HIP, R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE = 8, 9, 10, 11, 12, 13
FACE_POINTS = (0, 14, 15, 16, 17)
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


def carry(
    source_body: Tensor,
    target_body: Tensor,
    height: int,
    width: int,
    aspect: float | None = None,
    source_aspect: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Where each target cell was in the source: (grid [B, height, width, 2] in [-1, 1] for `grid_sample` with
    align_corners=False, certainty [B, height, width] in [0, 1]).

    source_body, target_body: [B, 18, 3]. aspect: width / height of the target image, by default that of the grid;
    source_aspect: of the source image, by default the same.

    Certainty is 0 off the body, where the limb is missing in the source and outside the source image; it is
    halved where one pose shows the front and the other the back.
    """
    aspect = width / height if aspect is None else aspect
    source_aspect = aspect if source_aspect is None else source_aspect
    source, target = limb_frames(source_body, source_aspect), limb_frames(target_body, aspect)
    batch = target_body.shape[0]
    centres = _centres(height, width, target_body.device, target_body.dtype).expand(batch, -1, -1)
    limb, t, d, distance = _nearest(target, centres * target_body.new_tensor([aspect, 1.0]))
    place = from_limbs(source, limb, t, d) / target_body.new_tensor([source_aspect, 1.0])
    certain = _on_body(distance) * source.valid.gather(1, limb)
    certain = certain * ((place > 0) & (place < 1)).all(-1)
    certain = certain * torch.where(source.facing == target.facing, 1.0, 0.5)[:, None]
    grid = torch.where((certain > 0)[..., None], place, centres) * 2 - 1
    return grid.reshape(batch, height, width, 2), certain.reshape(batch, height, width)


def region_prior(
    parsing: HumanParsing,
    source_body: Tensor,
    target_body: Tensor,
    height: int,
    width: int,
    aspect: float | None = None,
) -> HumanParsing:
    """The source's parsing carried to the target pose: P of HPFA where nothing better is known.

    parsing: the source's, [B, 7, H, W]. Result [B, 7, height, width]. aspect: width / height of the target image, by
    default that of the grid. Off the body it says background; on a limb that the source does not show, what the
    source's person is on the whole; a head seen from behind shows hair where the source shows its face.
    """
    masks = parsing.masks
    source_aspect = masks.shape[-1] / masks.shape[-2]
    aspect = width / height if aspect is None else aspect
    grid, certain = carry(source_body, target_body, height, width, aspect, source_aspect)
    carried = grid_sample(masks, grid.to(masks), padding_mode="border", align_corners=False)
    back = limb_frames(target_body, aspect).facing < limb_frames(source_body, source_aspect).facing
    face, hair = carried[:, Region.FACE], carried[:, Region.HAIR]
    turned = carried.clone()
    turned[:, Region.HAIR], turned[:, Region.FACE] = face + hair, torch.zeros_like(face)
    carried = torch.where(back[:, None, None, None], turned, carried)
    on_body = body_coordinates(target_body, height, width, aspect)[..., 2].reshape(-1, 1, height, width) > 0
    person = masks.sum((2, 3), keepdim=True)
    person = torch.cat([torch.zeros_like(person[:, :1]), person[:, 1:]], 1)
    nobody = torch.zeros_like(person)
    nobody[:, Region.BACKGROUND] = 1
    whole = torch.where(person.sum(1, keepdim=True) > 0, person / person.sum(1, keepdim=True).clamp(min=1e-6), nobody)
    carried = torch.where((certain > 0)[:, None], carried, torch.where(on_body, whole, nobody))
    return HumanParsing(carried / carried.sum(1, keepdim=True))


def region_colors(image: Tensor, parsing: HumanParsing) -> tuple[Tensor, Tensor]:
    """Mean colour of each region: ([B, 7, 3] in [0, 1], seen [B, 7] bool). Unseen regions get the person's mean.

    image: [B, 3, H, W]; parsing of the same size.
    """
    weight = parsing.masks.flatten(2)
    total = weight.sum(-1)
    colors = torch.einsum("brp,bcp->brc", weight, image.flatten(2)) / total.clamp(min=1e-6)[..., None]
    person = 1 - weight[:, Region.BACKGROUND]
    mean = (image.flatten(2) * person[:, None]).sum(-1) / person.sum(-1, keepdim=True).clamp(min=1e-6)
    seen = total > 0.5
    return torch.where(seen[..., None], colors, mean[:, None]), seen


def warp(image: Tensor, parsing: HumanParsing, source_body: Tensor, target_body: Tensor) -> tuple[Tensor, Tensor]:
    """The source image carried to the target pose, without a network: ([B, 3, H, W] in [0, 1], certain [B, 1, H, W]).

    Where the prior is uncertain (certain <= 0.75) the region's mean colour is used. image and parsing: the source's, of
    the same size.
    """
    height, width = image.shape[-2:]
    grid, certain = carry(source_body, target_body, height, width)
    pixels = grid_sample(image, grid.to(image), padding_mode="border", align_corners=False)
    prior = region_prior(parsing, source_body, target_body, height, width)
    colors, _ = region_colors(image, parsing)
    flat = torch.einsum("brc,brhw->bchw", colors, prior.masks)
    person = 1 - prior.masks[:, Region.BACKGROUND : Region.BACKGROUND + 1]
    certain = certain.to(image)[:, None]
    mix = (certain > 0.75).to(image) * person
    return (mix * pixels + (1 - mix) * flat).clamp(0, 1), certain
