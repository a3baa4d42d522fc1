"""The mannequin's skeleton and poses: SMPL joint order, axis-angle, forward kinematics.

World axes: x to the viewer's right, y up, z towards the camera, metres, pelvis at the origin. At
rest the mannequin stands in a T-pose and faces the camera, so the person's left is at +x (as in
SMPL, Loper et al. 2015). The body model itself is ours and needs no SMPL files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

from .identity import as_indices, uniform

__all__ = [
    "JOINTS",
    "PARENTS",
    "POSE_KINDS",
    "SWAPPED",
    "VIEWS",
    "BodyPoses",
    "axis_angle_to_matrix",
    "chain_rotations",
    "forward_kinematics",
    "matrix_to_axis_angle",
    "mirror_poses",
    "openpose_points",
    "project",
    "ready_poses",
    "rest_joints",
    "sample_poses",
]

JOINTS = (
    "pelvis",
    "left_hip",
    "right_hip",
    "spine1",
    "left_knee",
    "right_knee",
    "spine2",
    "left_ankle",
    "right_ankle",
    "spine3",
    "left_foot",
    "right_foot",
    "neck",
    "left_collar",
    "right_collar",
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hand",
    "right_hand",
)
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
VIEWS = ("front", "side", "back")
SWAPPED = (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22)
"""The joint on the other side of the body."""

# Pose parameters in degrees. Arms and legs are given for the left side; the right side is mirrored.
# down: upper arm below the horizontal. forward: swing to the front. twist: about the upper arm (90
# turns a bent elbow inwards). flex: thigh to the front. spread: thigh outwards. turn: toes out.
_TRUNK = ("bend", "tilt", "twist", "nod", "head_tilt", "look", "pitch")
_ARM = ("down", "forward", "roll", "elbow")
_LEG = ("flex", "spread", "turn", "knee")
_SIDE = _ARM + _LEG
_NAMES = _TRUNK + tuple(f"l_{n}" for n in _SIDE) + tuple(f"r_{n}" for n in _SIDE)
_LIMITS = {
    "bend": (-15, 50),
    "tilt": (-30, 30),
    "twist": (-40, 40),
    "nod": (-25, 25),
    "head_tilt": (-18, 18),
    "look": (-35, 35),
    "pitch": (-15, 25),
    "down": (-85, 84),
    "forward": (-45, 110),
    "roll": (-95, 100),
    "elbow": (0, 140),
    "flex": (-35, 100),
    "spread": (0, 45),
    "turn": (-15, 35),
    "knee": (0, 130),
}
_REST = {
    "l_down": 79,
    "r_down": 79,
    "l_elbow": 14,
    "r_elbow": 14,
    "l_spread": 3,
    "r_spread": 3,
    "l_turn": 8,
    "r_turn": 8,
    "l_knee": 3,
    "r_knee": 3,
}
_SPREAD = {
    "bend": 4,
    "tilt": 4,
    "twist": 8,
    "nod": 7,
    "head_tilt": 6,
    "look": 14,
    "pitch": 2,
    "down": 9,
    "forward": 10,
    "roll": 14,
    "elbow": 12,
    "flex": 5,
    "spread": 4,
    "turn": 6,
    "knee": 4,
}
# kind -> (weight, values that differ from _REST)
_KINDS: dict[str, tuple[float, dict[str, float]]] = {
    "stand": (2.0, {}),
    "contrapposto": (1.0, {"tilt": 7, "l_flex": 14, "l_knee": 24, "l_spread": 9, "r_spread": 2}),
    "walk": (
        1.6,
        {"l_forward": 26, "r_forward": -22, "l_flex": -18, "l_knee": 14, "r_flex": 24, "r_knee": 10}
        | {"l_elbow": 26, "r_elbow": 20},
    ),
    "run": (
        0.7,
        {"bend": 10, "l_forward": 48, "r_forward": -30, "l_elbow": 95, "r_elbow": 80}
        | {"l_flex": -18, "l_knee": 60, "r_flex": 52, "r_knee": 55},
    ),
    "arms up": (1.0, {"l_down": -58, "r_down": -58, "l_elbow": 22, "r_elbow": 22}),
    "wave": (1.0, {"l_down": 8, "l_elbow": 86, "l_roll": -88}),
    "spread": (1.0, {"l_down": 18, "r_down": 18, "l_elbow": 12, "r_elbow": 12, "l_spread": 13}),
    "akimbo": (
        1.1,
        {"l_down": 46, "r_down": 46, "l_roll": 78, "r_roll": 78, "l_elbow": 96, "r_elbow": 96}
        | {"l_spread": 6, "r_spread": 6, "l_forward": -8, "r_forward": -8},
    ),
    "one hand on hip": (
        1.1,
        {"l_down": 46, "l_roll": 78, "l_elbow": 96, "l_forward": -8, "tilt": 5, "r_flex": 10} | {"r_knee": 18},
    ),
    "lean": (0.8, {"tilt": 18, "l_down": 62, "r_down": 50, "l_spread": 10, "r_spread": 10}),
    "bow": (0.5, {"bend": 30, "pitch": 12, "l_forward": 25, "r_forward": 25, "nod": -8}),
    "sit": (
        0.7,
        {"l_flex": 78, "r_flex": 78, "l_knee": 84, "r_knee": 84, "l_forward": 30, "r_forward": 30}
        | {"l_elbow": 34, "r_elbow": 34, "l_spread": 9, "r_spread": 9},
    ),
    "lunge": (
        0.6,
        {"l_flex": 58, "l_knee": 70, "r_flex": -22, "r_knee": 26, "l_down": 52, "r_down": 52},
    ),
    "kick": (
        0.7,
        {"l_flex": 58, "l_knee": 16, "l_down": 30, "r_down": 28, "r_knee": 6, "bend": -6},
    ),
    "side kick": (0.5, {"l_spread": 40, "tilt": -14, "l_down": 26, "r_down": 40}),
    "think": (
        0.6,
        {"l_down": 76, "l_forward": 24, "l_elbow": 122, "l_roll": 28, "r_elbow": 74, "r_roll": 50},
    ),
    "reach": (0.7, {"l_down": 80, "l_forward": 78, "l_elbow": 14, "r_forward": 10}),
}
POSE_KINDS = tuple(_KINDS)

# Ready poses: yaw in degrees and the values that differ from _REST.
_READY: dict[str, tuple[float, dict[str, float]]] = {
    "stand": (0, {"look": 4}),
    "turn": (-32, {"look": 22, "l_flex": 8, "l_knee": 12, "r_elbow": 24}),
    "akimbo": (8, _KINDS["akimbo"][1]),
    "wave": (-10, _KINDS["wave"][1] | {"tilt": -4, "head_tilt": 6}),
    "walk": (35, _KINDS["walk"][1]),
    "arms up": (0, _KINDS["arms up"][1] | {"l_spread": 7, "r_spread": 7}),
    "kick": (28, _KINDS["kick"][1]),
    "side": (88, {"l_forward": 14, "r_forward": -10, "l_elbow": 24}),
    "back": (172, _KINDS["one hand on hip"][1]),
    "sit": (40, _KINDS["sit"][1]),
}


@dataclass(frozen=True)
class BodyPoses:
    """N poses, independent of who takes them.

    Attributes:
        theta: axis-angle per joint in SMPL order [N, 24, 3], radians. Joint 0 is the global
            orientation.
        camera: framing [N, 3]: zoom (1 fits the body into 94 % of the frame), and the shift to the
            right and down as a fraction of the free margin, -1..1. It is relative because the
            fit depends on the body; `Rendering.camera` holds the absolute camera.
    """

    theta: Tensor
    camera: Tensor

    def __len__(self) -> int:
        return self.theta.shape[0]

    def select(self, index: Tensor | Sequence[int]) -> BodyPoses:
        """The poses at ``index`` (positions in this batch, repeats allowed)."""
        index = torch.as_tensor(index, device=self.theta.device)
        return BodyPoses(self.theta[index], self.camera[index])

    def to(self, device: torch.device | str) -> BodyPoses:
        """The same poses on another device."""
        return BodyPoses(self.theta.to(device), self.camera.to(device))


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of axis-angle vectors [..., 3] in radians (Rodrigues)."""
    angle = axis_angle.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    x, y, z = (axis_angle / angle).unbind(-1)
    angle = angle[..., 0]
    c, s = angle.cos(), angle.sin()
    t = 1 - c
    rows = [
        c + x * x * t,
        x * y * t - z * s,
        x * z * t + y * s,
        x * y * t + z * s,
        c + y * y * t,
        y * z * t - x * s,
        x * z * t - y * s,
        y * z * t + x * s,
        c + z * z * t,
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """Axis-angle vectors [..., 3], length 0..pi, of rotation matrices [..., 3, 3].

    Goes through the unit quaternion with the largest component taken from the diagonal, which stays
    accurate near 0 and near pi.
    """
    m = matrix
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    four = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], -1)
    a, b, c = m[..., 2, 1], m[..., 0, 2], m[..., 1, 0]
    d, e, f = m[..., 1, 2], m[..., 2, 0], m[..., 0, 1]
    rows = torch.stack(
        [
            torch.stack([four[..., 0], a - d, b - e, c - f], -1),
            torch.stack([a - d, four[..., 1], c + f, b + e], -1),
            torch.stack([b - e, c + f, four[..., 2], a + d], -1),
            torch.stack([c - f, b + e, a + d, four[..., 3]], -1),
        ],
        -2,
    )
    best = four.argmax(-1)[..., None, None].expand(*four.shape[:-1], 1, 4)
    q = rows.gather(-2, best)[..., 0, :]
    q = q / q.norm(dim=-1, keepdim=True)
    q = torch.where(q[..., :1] < 0, -q, q)
    size = q[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(size, q[..., :1])
    scale = torch.where(size > 1e-7, angle / size.clamp_min(1e-7), torch.full_like(size, 2.0))
    return q[..., 1:] * scale


def _rotation(axis: int, degrees: Tensor) -> Tensor:
    angle = torch.zeros(*degrees.shape, 3, dtype=degrees.dtype, device=degrees.device)
    angle[..., axis] = degrees * (math.pi / 180)
    return axis_angle_to_matrix(angle)


def rest_joints(beta: Tensor) -> Tensor:
    """Joint positions of the T-pose [N, 24, 3] in metres, pelvis at 0, from beta [N, 10]."""
    n = beta.shape[0]
    joints = beta.new_zeros(n, 24, 3)
    grow = 1 + 0.03 * beta[:, 0]
    shoulder = grow * (1 + 0.06 * beta[:, 2])
    hip = grow * (1 + 0.06 * beta[:, 3])
    leg = grow * (1 + 0.04 * beta[:, 4])
    arm = grow * (1 + 0.03 * beta[:, 5])
    torso = grow * (1 + 0.035 * beta[:, 6])
    neck = grow * (1 + 0.08 * beta[:, 9])
    one = torch.ones_like(grow)

    def place(joint: int, x: Tensor | float, y: Tensor | float, z: float = 0.0) -> None:
        offset = torch.stack([one * x, one * y, one * z], -1)
        joints[:, joint] = joints[:, PARENTS[joint]] + offset

    place(3, 0.0, 0.10 * torso)
    place(6, 0.0, 0.13 * torso)
    place(9, 0.0, 0.07 * torso)
    place(12, 0.0, 0.20 * torso)
    place(15, 0.0, 0.10 * neck)
    for side, sign in ((0, 1.0), (1, -1.0)):
        place(1 + side, sign * 0.085 * hip, -0.07 * torso)
        place(4 + side, sign * 0.006, -0.42 * leg)
        place(7 + side, sign * 0.0, -0.42 * leg)
        place(10 + side, sign * 0.0, -0.05, 0.11)
        place(13 + side, sign * 0.06 * shoulder, 0.13 * torso)
        place(16 + side, sign * 0.11 * shoulder, 0.02 * torso)
        place(18 + side, sign * 0.27 * arm, 0.0)
        place(20 + side, sign * 0.25 * arm, 0.0)
        place(22 + side, sign * 0.08 * arm, 0.0)
    return joints


def _levels() -> tuple[tuple[list[int], list[int]], ...]:
    """(joints, their parents) of each level of the tree below the root."""
    depth = [0] * len(PARENTS)
    for joint, parent in enumerate(PARENTS[1:], 1):
        depth[joint] = depth[parent] + 1
    levels = [[j for j, d in enumerate(depth) if d == level] for level in range(1, max(depth) + 1)]
    return tuple((joints, [PARENTS[j] for j in joints]) for joints in levels)


_LEVELS = _levels()
# Where each joint stands when the joints are lined up level by level.
_ORDER = [0, *(joint for joints, _ in _LEVELS for joint in joints)]
_BACK = [_ORDER.index(joint) for joint in range(len(PARENTS))]


def chain_rotations(local: Tensor, joints: Tensor) -> tuple[Tensor, Tensor]:
    """Global rotation [N, 24, 3, 3] and position [N, 24, 3] of every joint, differentiable.

    Args:
        local: rotation of each joint in its parent's frame [N, 24, 3, 3]. joints: rest positions [N, 24, 3].
    """
    rotation, position = [local[:, :1]], [joints[:, :1]]
    before = [0]
    # Level by level: nine small products instead of twenty-three.
    for level, parents in _LEVELS:
        place = [before.index(parent) for parent in parents]
        up, base = rotation[-1][:, place], position[-1][:, place]
        offset = joints[:, level] - joints[:, parents]
        rotation.append(up @ local[:, level])
        position.append(base + (up @ offset[..., None])[..., 0])
        before = level
    return torch.cat(rotation, 1)[:, _BACK], torch.cat(position, 1)[:, _BACK]


def forward_kinematics(theta: Tensor, joints: Tensor) -> tuple[Tensor, Tensor]:
    """Global rotation [N, 24, 3, 3] and position [N, 24, 3] of every joint.

    Args:
        theta: axis-angle [N, 24, 3]. joints: rest positions [N, 24, 3] (see `rest_joints`).
    """
    return chain_rotations(axis_angle_to_matrix(theta), joints)


# Face points of OpenPose in the head's frame, metres: place, the direction it looks, and how far that may turn away.
_FACE_POINTS = (
    ((0.0, 0.082, 0.14), (0.0, 0.0, 1.0), -0.3),
    ((-0.038, 0.112, 0.112), (-0.5, 0.0, 0.87), 0.0),
    ((0.038, 0.112, 0.112), (0.5, 0.0, 0.87), 0.0),
    ((-0.104, 0.1, 0.003), (-1.0, 0.0, 0.0), -0.35),
    ((0.104, 0.1, 0.003), (1.0, 0.0, 0.0), -0.35),
)
OPENPOSE_JOINTS = [17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7]


def openpose_points(rotation: Tensor, position: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """OpenPose's 18 body points of posed bodies: (metres [N, 18, 3], seen [N, 18] bool), differentiable.

    A face point counts as seen when its side of the head is turned to the camera; all others always do.
    rotation, position: from `chain_rotations`. beta: [N, 10].
    """
    turn, head = rotation[:, 15], 1 + 0.03 * beta[:, 8:9]
    places = position.new_tensor([place for place, _, _ in _FACE_POINTS])
    face = position[:, 15, None] + (head[..., None] * places) @ turn.transpose(-1, -2)
    neck = (position[:, 16:17] + position[:, 17:18]) / 2
    points = torch.cat([face[:, :1], neck, position[:, OPENPOSE_JOINTS], face[:, 1:]], 1)
    normals = position.new_tensor([normal for _, normal, _ in _FACE_POINTS])
    least = position.new_tensor([limit for _, _, limit in _FACE_POINTS])
    facing = turn[:, 2] @ normals.T > least
    seen = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    seen[:, [0, 14, 15, 16, 17]] = facing
    return points, seen


def project(points: Tensor, camera: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """(x / width, y / height), each [N, ...], of points [N, ..., 3] in metres. camera: absolute [N, 3]; aspect:
    width / height of the frame."""
    scale, right, down = (c.view(-1, *(1 for _ in points.shape[2:])) for c in camera.unbind(-1))
    x = 0.5 + (scale * points[..., 0] + right) / aspect
    return x, 0.5 - scale * points[..., 1] + down


def mirror_poses(poses: BodyPoses) -> BodyPoses:
    """The poses seen in a mirror (the plane x = 0): left and right change places."""
    flip = poses.theta.new_tensor([1.0, -1.0, -1.0])
    theta = poses.theta[:, list(SWAPPED)] * flip
    return BodyPoses(theta, poses.camera * poses.camera.new_tensor([1.0, -1.0, 1.0]))


def _table(values: dict[str, float]) -> list[float]:
    merged = {**_REST, **values}
    return [float(merged.get(name, 0.0)) for name in _NAMES]


def _limit(name: str) -> tuple[float, float]:
    return _LIMITS[name if name in _LIMITS else name[2:]]


def _theta(parameters: Tensor, yaw: Tensor) -> Tensor:
    """Axis-angle [N, 24, 3] from pose parameters [N, 23] in degrees and yaw [N] in degrees."""
    low = parameters.new_tensor([_limit(n)[0] for n in _NAMES])
    high = parameters.new_tensor([_limit(n)[1] for n in _NAMES])
    value = dict(zip(_NAMES, parameters.clamp(low, high).unbind(-1), strict=True))
    n = parameters.shape[0]
    matrix = torch.eye(3).expand(n, 24, 3, 3).clone()
    matrix[:, 0] = _rotation(1, yaw) @ _rotation(0, value["pitch"])
    third = 1 / 3
    spine = (
        _rotation(1, value["twist"] * third)
        @ _rotation(2, -value["tilt"] * third)
        @ _rotation(0, value["bend"] * third)
    )
    matrix[:, 3], matrix[:, 6], matrix[:, 9] = spine, spine, spine
    head = (
        _rotation(1, value["look"] * 0.5) @ _rotation(2, -value["head_tilt"] * 0.5) @ _rotation(0, value["nod"] * 0.5)
    )
    matrix[:, 12], matrix[:, 15] = head, head
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    for side, prefix in ((0, "l_"), (1, "r_")):
        down, forward, roll, elbow, flex, spread, turn, knee = (value[prefix + name] for name in _SIDE)
        # A low arm takes the collar bone down with it, a raised arm up.
        collar = -down * 0.12
        parts = {
            13: _rotation(2, collar),
            16: _rotation(0, -forward) @ _rotation(2, -down - collar) @ _rotation(0, roll),
            18: _rotation(1, -elbow),
            1: _rotation(0, -flex) @ _rotation(2, spread) @ _rotation(1, turn),
            4: _rotation(0, knee),
            # The foot tends back to the ground as far as an ankle can.
            7: _rotation(0, (flex - knee).clamp(-25, 20)),
        }
        for joint, turned in parts.items():
            matrix[:, joint + side] = flip @ turned @ flip if side else turned
    return matrix_to_axis_angle(matrix)


def sample_poses(indices: Sequence[int] | Tensor, seed: int, view: str | None = None) -> BodyPoses:
    """Plausible poses within joint limits; pose i depends only on (seed, i, view).

    Args:
        indices: whole numbers, N of them.
        seed: any whole number.
        view: "front" (yaw within 40 degrees), "side" (60 to 120), "back" (145 to 215), or None for
            a mix of 70 % front, 15 % side and 15 % back.

    Raises:
        TruePoseError: for an unknown view or indices that are not whole numbers.
    """
    if view is not None and view not in VIEWS:
        raise TruePoseError(f"view is {view!r}; expected one of {VIEWS} or None for a mix.")
    index = as_indices(indices)
    u = uniform(index, seed, 3, 16)
    noise = uniform(index, seed, 4, len(_NAMES)) * 2 - 1

    weights = torch.tensor([weight for weight, _ in _KINDS.values()])
    edges = (weights.cumsum(0) / weights.sum())[:-1]
    kind = torch.bucketize(u[:, 0].contiguous(), edges, right=True)
    mean = torch.tensor([_table(values) for _, values in _KINDS.values()])[kind]
    spread = torch.tensor([float(_SPREAD[n if n in _SPREAD else n[2:]]) for n in _NAMES])
    parameters = mean + noise * spread * 1.25

    # Half of the poses are mirrored, so neither hand is special.
    mirrored = u[:, 1] < 0.5
    swapped = parameters.clone()
    trunk, side = len(_TRUNK), len(_SIDE)
    for name in ("tilt", "twist", "head_tilt", "look"):
        swapped[:, _NAMES.index(name)] *= -1
    swapped[:, trunk : trunk + side] = parameters[:, trunk + side :]
    swapped[:, trunk + side :] = parameters[:, trunk : trunk + side]
    parameters = torch.where(mirrored[:, None], swapped, parameters)

    if view is None:
        which = (u[:, 2] >= 0.7).long() + (u[:, 2] >= 0.85).long()
    else:
        which = torch.full((len(index),), VIEWS.index(view))
    swing = u[:, 3] * 2 - 1
    sign = torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    yaw = torch.stack([40 * swing, sign * (90 + 30 * swing), 180 + 35 * swing], -1)
    yaw = yaw.gather(1, which[:, None])[:, 0]

    zoom = 0.94 + 0.06 * u[:, 5]
    shift = (u[:, 6:8] * 2 - 1) * torch.tensor([0.35, 0.45])
    return BodyPoses(_theta(parameters, yaw), torch.cat([zoom[:, None], shift], 1))


def ready_poses() -> dict[str, BodyPoses]:
    """Named poses for demos, each a BodyPoses of one."""
    result = {}
    for name, (yaw, values) in _READY.items():
        theta = _theta(torch.tensor([_table(values)]), torch.tensor([float(yaw)]))
        result[name] = BodyPoses(theta, torch.tensor([[0.98, 0.0, 0.0]]))
    return result
