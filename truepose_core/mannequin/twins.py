"""Bodies with the same keypoints and another depth: what no 2D pose can tell apart.

The camera is orthographic, so a body part whose bones are mirrored in depth, Z = diag(1, 1, -1), lies on the same
keypoints. A part with the global rotations R gets the proper rotations Z R N instead, N a mirror that leaves the
part's bones at rest where they are; in its own joints' axis-angle vectors that is a change of signs. Ours.

* an arm (bones along x, N = diag(1, -1, 1)) goes before the trunk or behind it, about its shoulder, and its elbow bends
  as it did;
* the whole body (all bones but the feet in the plane z = 0, N = Z) turns to the other side. Knees and elbows then bend
  the other way, and its face points would tell; they are left out.

OpenPose names left and right, so a body seen from the front and one seen from behind are no such pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truepose_core.pose.keypoints import FACE_POINTS

from .body import BodyPoses, axis_angle_to_matrix, chain_rotations, matrix_to_axis_angle, rest_joints
from .identity import as_indices, uniform

__all__ = ["ARMS", "TWINS", "hide_faces", "mirror_arm", "mirror_body", "twin_poses"]

ARMS = {"left": (13, 16, (18, 20, 22)), "right": (14, 17, (19, 21, 23))}
"""Side -> its collar, its shoulder and the joints below it."""
TWINS = ("body", "left arm", "right arm", "both arms")
"""What `twin_poses` mirrors."""
_STREAM = 11


def mirror_arm(theta: Tensor, side: str) -> Tensor:
    """theta [N, 24, 3] with the arm of a side ("left", "right") mirrored in depth about its shoulder."""
    collar, shoulder, below = ARMS[side]
    local = axis_angle_to_matrix(theta)
    # Rotations alone: where the joints are does not matter here.
    world, _ = chain_rotations(local, rest_joints(theta.new_zeros(len(theta), 10)))
    depth, own = theta.new_tensor([1.0, 1.0, -1.0]), theta.new_tensor([1.0, -1.0, 1.0])
    turned = world[:, collar].mT @ (depth[:, None] * world[:, shoulder] * own)
    mirrored = theta.clone()
    mirrored[:, shoulder] = matrix_to_axis_angle(turned)
    mirrored[:, list(below)] *= -own
    return mirrored


def mirror_body(theta: Tensor) -> Tensor:
    """theta [N, 24, 3] of the bodies mirrored in depth. Face points and toes alone show it in the plane."""
    return theta * theta.new_tensor([-1.0, -1.0, 1.0])


def hide_faces(keypoints: Tensor, faceless: Tensor) -> Tensor:
    """Keypoints [N, 18, 3] without face points where faceless [N] is True."""
    hidden = torch.zeros(18, dtype=torch.bool, device=keypoints.device)
    hidden[list(FACE_POINTS)] = True
    return keypoints * ~(faceless.to(keypoints.device)[:, None] & hidden)[..., None]


def twin_poses(
    poses: BodyPoses, indices: Sequence[int] | Tensor, seed: int, share: float
) -> tuple[BodyPoses, Tensor, Tensor]:
    """N poses in pairs, rows 2 i and 2 i + 1, of which `share` become twins: the second is then the first, mirrored in
    a way of `TWINS`, each as often as another. indices: the poses' own, N of them.

    Returns the poses; which pairs are twins [N / 2] bool; and whose face points have to go [N] bool, where the whole
    body is mirrored. Twins need one absolute camera: that of the first. A pure function of (seed, indices).
    """
    u = uniform(as_indices(indices)[::2], seed, _STREAM, 2)
    chosen = u[:, 0] < share
    kind = (u[:, 1] * len(TWINS)).long().clamp(max=len(TWINS) - 1)
    first, second = poses.theta[::2], poses.theta[1::2]
    mirrored = torch.stack(
        [
            mirror_body(first),
            mirror_arm(first, "left"),
            mirror_arm(first, "right"),
            mirror_arm(mirror_arm(first, "left"), "right"),
        ]
    )[kind, torch.arange(len(first))]
    twin = chosen[:, None]
    theta = torch.stack([first, torch.where(twin[..., None], mirrored, second)], 1).flatten(0, 1)
    framing = torch.stack([poses.camera[::2], torch.where(twin, poses.camera[::2], poses.camera[1::2])], 1)
    faceless = (chosen & (kind == 0)).repeat_interleave(2)
    return BodyPoses(theta, framing.flatten(0, 1)), chosen, faceless
