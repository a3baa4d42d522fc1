"""Hard cases of the usual world, to measure what HPFA and CAA are for (ours): the same people, poses and targets, with
one thing made hard in the source.

* "one-colour": top and trousers share their colours and differ in pattern alone: colour does not tell which is which;
* "busy": the person stands before cells of strong colours, so most of what the source shows is not the person;
* "crossed-arm": an arm lies across the trunk and hides a part of the top.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from truepose_core.regions import Region

from .body import BodyPoses
from .identity import BOTTOM_PATTERNS, TOP_PATTERNS, Identities, uniform

HARD = ("one-colour", "busy", "crossed-arm")
CELLS = (16, 12)
"""Rows and columns of a busy background."""
_STREAM = 13
_SHOULDER, _ELBOW = {"left": 16, "right": 17}, {"left": 18, "right": 19}
# A hanging right arm whose forearm lies across the trunk, before it: axis-angle in the joints' own frames, radians.
_UPPER_ARM, _FOREARM = (0.0, 0.4, 1.25), (0.3, 1.5, 1.2)


def one_colour(people: Identities) -> Identities:
    """The same people with trousers of the top's two colours and of another pattern than the top's."""
    same = torch.tensor([[BOTTOM_PATTERNS[b] == top for b in range(len(BOTTOM_PATTERNS))] for top in TOP_PATTERNS])
    clash = same[people.top_pattern, people.bottom_pattern]
    other = (people.bottom_pattern + 1) % len(BOTTOM_PATTERNS)
    return replace(
        people,
        bottom_a=people.top_a,
        bottom_b=people.top_b,
        bottom_pattern=torch.where(clash, other, people.bottom_pattern),
    )


def cross_arm(poses: BodyPoses, index: Tensor, seed: int) -> BodyPoses:
    """Poses [N] with the left or the right arm across the trunk, before it; which one depends on (seed, index)."""
    theta = poses.theta.clone()
    left = uniform(index, seed, _STREAM, 1)[:, 0] < 0.5
    # A left arm is a right one seen in a mirror: rotations about y and z change their sign.
    mirror = theta.new_tensor([1.0, -1.0, -1.0])
    for side, chosen in (("left", left), ("right", ~left)):
        for joint, angles in ((_SHOULDER[side], _UPPER_ARM), (_ELBOW[side], _FOREARM)):
            turned = theta.new_tensor(angles) * (mirror if side == "left" else 1.0)
            theta[:, joint] = torch.where(chosen[:, None], turned, theta[:, joint])
    return BodyPoses(theta, poses.camera)


def busy(image: Tensor, parsing: Tensor, people: Identities, index: Tensor, seed: int) -> Tensor:
    """Pictures [N, 3, H, W] of people before cells of random colours. parsing: [N, 7, H, W]."""
    rows, columns = CELLS
    cells = uniform(index, seed, _STREAM + 1, 3 * rows * columns).view(-1, 3, rows, columns)
    scene = torch.nn.functional.interpolate(cells, image.shape[-2:], mode="nearest").to(image)
    ends = people.background.to(image).transpose(1, 2)[..., None, None]
    fall = (torch.arange(image.shape[-2], device=image.device) + 0.5)[:, None] / image.shape[-2]
    backdrop = ends[:, :, 0] + (ends[:, :, 1] - ends[:, :, 0]) * fall
    around = parsing[:, Region.BACKGROUND, None]
    return (image + around * (scene - backdrop)).clamp(0, 1)
