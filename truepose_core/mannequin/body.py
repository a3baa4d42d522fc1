"""The mannequin's skeleton: SMPL joint order, axis-angle, forward kinematics.

World axes: x to the viewer's right, y up, z towards the camera, metres, pelvis at the origin. At
rest the mannequin stands in a T-pose and faces the camera, so the person's left is at +x (as in
SMPL, Loper et al. 2015). The body model itself is ours and needs no SMPL files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "JOINTS",
    "PARENTS",
    "SWAPPED",
    "BodyPoses",
    "axis_angle_to_matrix",
    "chain_rotations",
    "forward_kinematics",
    "matrix_to_axis_angle",
    "mirror_poses",
    "openpose_points",
    "project",
    "rest_joints",
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
SWAPPED = (0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22)
"""The joint on the other side of the body."""


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
