"""The pose interaction field: how far a pose is from the valid ones.

RePoseDM (arXiv 2310.16074) guides with fields "which output the distance from the valid pose manifold given a predicted
pose as input". Learning such a distance from noised poses over joint rotations follows Pose-NDF (arXiv 2207.13807); the
distance, the network and its sizes are ours.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from truepose_core.body.arrays import read_npz
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import axis_angle_to_matrix

if TYPE_CHECKING:
    from truepose_core.body import BodyPose

KIND = "field"
LOCAL = 23
"""Joints whose rotation in their parent's frame counts: all but the first, the global orientation, which is free."""
_SHORTEST = 24 * 3


WIDTH, DEPTH = 256, 3


class PoseField(nn.Module):
    """f: joint rotations -> distance to the valid poses in radians (`pose_distance`), >= 0, smooth."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH):
        """width: of the hidden layers. depth: how many there are."""
        super().__init__()
        self.sizes = {"width": width, "depth": depth}
        widths = [6 * LOCAL] + [width] * depth
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, rotations: Tensor) -> Tensor:
        """rotations: [N, 24, 3, 3] each in its parent's frame (the first, global one is not read), or [N, 23, 3, 3]
        without it -> [N]. Raises TruePoseError for another shape."""
        if tuple(rotations.shape[1:]) not in ((24, 3, 3), (LOCAL, 3, 3)):
            raise TruePoseError(
                f"rotations are {tuple(rotations.shape)}; expected [N, 24, 3, 3], or "
                "[N, 23, 3, 3] without the global one"
            )
        # Two columns say a rotation, without the jumps of angles (Zhou et al., arXiv 1812.07035).
        local = rotations[:, -LOCAL:, :, :2] - torch.eye(3, 2).to(rotations)
        return nn.functional.softplus(self.net(local.flatten(1))[:, 0], beta=20)

    def distance(self, pose: BodyPose) -> Tensor:
        """The field at N people: [N] radians."""
        return self(axis_angle_to_matrix(pose.theta))


def pose_distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square over the joints of the angle between two rotations, in radians, 0..pi.

    a, b: rotations [..., J, 3, 3] -> [...]. A metric on products of SO(3), scaled so that all joints off by x give x.
    """
    # atan2 of sine and cosine: the arc cosine alone has no digits left near 0.
    turn = a.mT @ b
    cosine = (turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    skew = torch.stack(
        [turn[..., 2, 1] - turn[..., 1, 2], turn[..., 0, 2] - turn[..., 2, 0], turn[..., 1, 0] - turn[..., 0, 1]], -1
    )
    return torch.atan2(skew.norm(dim=-1) / 2, cosine).square().mean(-1).sqrt()


def load_field(path: str | Path | None = None) -> PoseField:
    """A field that `truepose train --row field` wrote; None for the one that ships, which knows the mannequin world.
    Raises TruePoseError for a file that is none."""
    from truepose_core.weights.small import load_small
    from truepose_core.weights.strict import bundled_path

    return load_small(path or bundled_path("field"), KIND, PoseField)


def read_poses(paths: list[str | Path] | tuple[str | Path, ...], every: int = 1) -> Tensor:
    """Poses of AMASS-style npz files, as axis-angle [N, 24, 3].

    A file holds `poses` [T, >= 72] in radians, the first 72 numbers in SMPL's order (hands of SMPL-H and SMPL-X beyond
    them are not read). every: takes each such frame, for motions that hardly change from one to the next.

    Raises TruePoseError as `read_npz`, and for other shapes, NaN and degrees.
    """
    found = []
    for path in paths:
        poses = read_npz(Path(path), ("poses",), f"the pose file {path}").get("poses")
        if poses is None:
            raise TruePoseError(f"the pose file {path} holds no `poses`; expected `poses` [T, {_SHORTEST}] in radians")
        if poses.ndim != 2 or poses.shape[1] < _SHORTEST or not len(poses) or poses.dtype.kind != "f":
            raise TruePoseError(
                f"`poses` in {path} is {poses.dtype} {tuple(poses.shape)}; expected floats [T, >= {_SHORTEST}]"
            )
        theta = torch.from_numpy(poses[::every, :_SHORTEST].astype(np.float32)).unflatten(1, (24, 3))
        if not bool(theta.isfinite().all()):
            raise TruePoseError(f"`poses` in {path} holds NaN or infinite values")
        # The global orientation may have wound up over several turns; a joint cannot.
        longest = theta[:, 1:].norm(dim=-1).max().item()
        if longest > 2 * math.pi + 0.1:
            raise TruePoseError(
                f"`poses` in {path} has a joint's axis-angle vector of length {longest:.1f}; expected radians, at most "
                "2 pi. These look like degrees"
            )
        found.append(theta)
    if not found:
        raise TruePoseError("no pose file was given; expected at least one npz with `poses` [T, 72]")
    return torch.cat(found)
