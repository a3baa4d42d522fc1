"""Skeletons as the public OpenPose ControlNets were trained on them, at any size, antialiased.

Colours and widths are those of the annotator of ControlNet 1.1 (Zhang et al., arXiv 2302.05543),
drawn at 512 pixels: 17 limbs as ellipses at 0.6 of their colour, 18 joints as discs in full colour,
hands as lines with blue discs, faces as white discs. Here each shape is a signed distance to its
outline, so any size is smooth.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.pose.keypoints import HAND_EDGES, LIMBS, Person, Pose

# One colour per body keypoint; limb i of `LIMBS` is drawn in colour i at `LIMB_BRIGHTNESS`. ControlNets and our own
# pose encoders were trained on these.
BODY_COLORS: tuple[tuple[int, int, int], ...] = (
    (255, 0, 0),
    (255, 85, 0),
    (255, 170, 0),
    (255, 255, 0),
    (170, 255, 0),
    (85, 255, 0),
    (0, 255, 0),
    (0, 255, 85),
    (0, 255, 170),
    (0, 255, 255),
    (0, 170, 255),
    (0, 85, 255),
    (0, 0, 255),
    (85, 0, 255),
    (170, 0, 255),
    (255, 0, 255),
    (255, 0, 170),
    (255, 0, 85),
)
LIMB_BRIGHTNESS = 0.6

# Half widths in pixels at a short side of 512, as they come out in the training pictures: OpenCV
# fills a polygon with its outline, so limbs of nominally 4 measure 4.5 and lines of 2 measure 3.
LIMB_RADIUS = 4.5
JOINT_RADIUS = 4.0
HAND_LINE_RADIUS = 1.5
HAND_POINT_RADIUS = 4.0
FACE_POINT_RADIUS = 3.0

# The thinnest that still reads, in pixels at any size: limbs and joints, details of hand and face.
BODY_FLOOR = 1.2
DETAIL_FLOOR = 0.5

# Above this many pixels a batch is painted image by image: boxes of one image are small.
_SHARED_BOX_PIXELS = 128 * 128


def draw_skeleton(body: Tensor, height: int, width: int) -> Tensor:
    """Draw one body per image.

    body: [B, 18, 3] float, x and y normalised to 0..1 over the canvas (outside is cut off), third
    > 0 where the keypoint is visible. A limb with a missing end is not drawn.
    Returns float32 [B, 3, height, width] in [0, 1], black behind, on the device of `body`. Raises
    `TruePoseError` for another shape, NaN, or a size below 1.
    """
    if body.dim() != 3 or body.shape[1:] != (18, 3):
        raise TruePoseError(f"body keypoints are {tuple(body.shape)}; expected [B, 18, 3]")
    if height < 1 or width < 1:
        raise TruePoseError(f"cannot draw a skeleton at {width}x{height}; expected at least 1x1")
    body = body.detach().float()
    if not bool(body.isfinite().all()):
        raise TruePoseError("body keypoints hold NaN or infinite values")
    canvas = body.new_zeros(body.shape[0], 3, height, width)
    _paint_limbs(canvas, body)
    _paint_joints(canvas, body)
    return canvas


def draw_pose(pose: Pose, height: int, width: int, hands: bool = True, face: bool = True) -> Tensor:
    """Draw all people of a pose, with their hands and faces where known.

    Returns float32 [1, 3, height, width] in [0, 1]. As in the annotator all limbs lie under all
    joints, then come hands, then faces.
    """
    canvas = draw_skeleton(torch.zeros(1, 18, 3), height, width)
    people = [_person_tensors(person) for person in pose.people]
    for body, _, _ in people:
        _paint_limbs(canvas, body)
    for body, _, _ in people:
        _paint_joints(canvas, body)
    if hands:
        for _, keypoints, _ in people:
            for hand in keypoints:
                _paint_hand(canvas, hand)
    if face:
        for _, _, keypoints in people:
            if keypoints is not None:
                _paint_face(canvas, keypoints)
    return canvas


def _person_tensors(person: Person) -> tuple[Tensor, list[Tensor], Tensor | None]:
    hands = [torch.tensor(h)[None] for h in (person.hand_left, person.hand_right) if h is not None]
    face = None if person.face is None else torch.tensor(person.face)[None]
    return torch.tensor(person.body)[None], hands, face


def _radius(canvas: Tensor, at_512: float, floor: float) -> float:
    return max(at_512 * min(canvas.shape[2:]) / 512, floor)


def _colors(canvas: Tensor, colors: tuple, brightness: float = 1.0) -> Tensor:
    return canvas.new_tensor(colors) * (brightness / 255)


def _paint_limbs(canvas: Tensor, body: Tensor) -> None:
    colors = _colors(canvas, BODY_COLORS[: len(LIMBS)], LIMB_BRIGHTNESS)
    radius = _radius(canvas, LIMB_RADIUS, BODY_FLOOR)
    paint_segments(canvas, body, LIMBS, colors, radius, _ellipse_distance)


def _paint_joints(canvas: Tensor, body: Tensor) -> None:
    radius = _radius(canvas, JOINT_RADIUS, BODY_FLOOR)
    _paint_points(canvas, body, _colors(canvas, BODY_COLORS), radius)


def _paint_hand(canvas: Tensor, hand: Tensor) -> None:
    hues = [colorsys.hsv_to_rgb(i / len(HAND_EDGES), 1.0, 1.0) for i in range(len(HAND_EDGES))]
    radius = _radius(canvas, HAND_LINE_RADIUS, DETAIL_FLOOR)
    paint_segments(canvas, hand, HAND_EDGES, canvas.new_tensor(hues), radius, capsule_distance)
    blue = canvas.new_tensor((0.0, 0.0, 1.0)).expand(hand.shape[1], 3)
    _paint_points(canvas, hand, blue, _radius(canvas, HAND_POINT_RADIUS, DETAIL_FLOOR))


def _paint_face(canvas: Tensor, face: Tensor) -> None:
    white = canvas.new_ones(face.shape[1], 3)
    _paint_points(canvas, face, white, _radius(canvas, FACE_POINT_RADIUS, DETAIL_FLOOR))


def _paint_points(canvas: Tensor, points: Tensor, colors: Tensor, radius: float) -> None:
    pairs = tuple((i, i) for i in range(points.shape[1]))
    paint_segments(canvas, points, pairs, colors, radius, capsule_distance)


# (along, across, half length, radius) in pixels -> signed distance to the outline, < 0 inside.
_Distance = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _ellipse_distance(along: Tensor, across: Tensor, half: Tensor, radius: float) -> Tensor:
    """Distance, to first order at the outline, to an ellipse with semi-axes (half, radius)."""
    # An ellipse shorter than it is wide would stick out sideways: it becomes a disc.
    half = half.clamp_min(radius)
    along, across = along / half, across / radius
    # The small terms give the centre, where both lengths vanish, its distance -radius.
    k0 = torch.hypot(along, across) + 1e-6
    k1 = torch.hypot(along / half, across / radius) + 1e-6 / radius
    return k0 * (k0 - 1) / k1


def capsule_distance(along: Tensor, across: Tensor, half: Tensor, radius: float) -> Tensor:
    """Exact distance to a segment with round ends; a disc when `half` is 0."""
    return torch.hypot((along.abs() - half).clamp_min(0), across) - radius


def paint_segments(
    canvas: Tensor,
    points: Tensor,
    pairs: tuple[tuple[int, int], ...],
    colors: Tensor,
    radius: float,
    distance: _Distance,
) -> None:
    """Paint one shape per pair of points over `canvas` [B, 3, H, W], in place and in order.

    points: [B, N, 3] normalised; colors: [len(pairs), 3]. A pixel is covered by 0.5 - distance,
    clipped to [0, 1]: a ramp of one pixel, centred on the outline.
    """
    batch, _, height, width = canvas.shape
    if batch > 1 and height * width > _SHARED_BOX_PIXELS:
        for i in range(batch):
            one = slice(i, i + 1)
            paint_segments(canvas[one], points[one], pairs, colors, radius, distance)
        return
    first, second = (list(ends) for ends in zip(*pairs, strict=True))
    xy = points[..., :2] * points.new_tensor((width, height))
    a, b = xy[:, first], xy[:, second]
    visible = (points[:, first, 2] > 0) & (points[:, second, 2] > 0)
    centre, half = (a + b) / 2, torch.linalg.vector_norm(b - a, dim=-1) / 2
    angle = torch.atan2(b[..., 1] - a[..., 1], b[..., 0] - a[..., 0])
    cos, sin = angle.cos(), angle.sin()
    boxes = _boxes(a, b, visible, radius + 1, height, width)
    # Pixel i covers [i, i + 1): its centre is at i + 0.5.
    xs = torch.arange(width, device=canvas.device) + 0.5
    ys = torch.arange(height, device=canvas.device) + 0.5
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        if x0 >= x1 or y0 >= y1:
            continue
        dx = xs[None, None, x0:x1] - centre[:, k, 0, None, None]
        dy = ys[None, y0:y1, None] - centre[:, k, 1, None, None]
        c, s = cos[:, k, None, None], sin[:, k, None, None]
        along, across = dx * c + dy * s, dy * c - dx * s
        inside = 0.5 - distance(along, across, half[:, k, None, None], radius)
        cover = inside.clamp(0, 1) * visible[:, k, None, None]
        target = canvas[:, :, y0:y1, x0:x1]
        target.lerp_(colors[k, :, None, None].expand_as(target), cover[:, None].expand_as(target))


def _boxes(a: Tensor, b: Tensor, visible: Tensor, margin: float, height: int, width: int) -> list[list[int]]:
    """Per pair the pixels that any image of the batch paints: [x0, y0, x1, y1), cut to the canvas.

    A pair that no image shows has an empty box.
    """
    far = float(2**24)
    low = (torch.minimum(a, b) - margin).masked_fill(~visible[..., None], far).amin(0).floor()
    high = (torch.maximum(a, b) + margin).masked_fill(~visible[..., None], -far).amax(0).ceil()
    limit = low.new_tensor((width, height))
    boxes = torch.cat((low.clamp_min(0), torch.minimum(high, limit)), -1)
    return boxes.to(torch.int64).tolist()
