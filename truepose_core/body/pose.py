"""`BodyPose`: people as joint rotations, shape and camera, in SMPL's joint order.

The convention is SMPL's (Loper et al. 2015): 24 joints, each with an axis-angle rotation in its parent's frame, a
T-pose at rest that faces the camera, x to the viewer's right, y up, z towards the camera. The camera is orthographic
(weak perspective), as in HMR (Kanazawa et al., arXiv 1712.06584).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

JOINTS, SHAPE, CAMERA = 24, 10, 3
HEIGHT = 1.75
"""Of a person, metres, where tolerances are shares of it: times the camera's scale it is in frame heights."""
_DEGREES = 2 * math.pi + 0.1
"""No axis-angle vector of a joint needs to be longer than a full turn; one that is holds degrees."""
_FAR = 50.0
"""Camera numbers are in frame heights: one beyond this shows nobody."""


@dataclass(frozen=True, eq=False)
class BodyPose:
    """N people. Stored as float32; checked once, here.

    theta: [N, 24, 3] axis-angle in radians, joint 0 the global orientation. beta: [N, 10] shape numbers of the body
    model in use. camera: [N, 3] (scale > 0, x, y) in units of the frame height H: a point (X, Y, .) in metres from the
    pelvis is seen at x / H = W / (2 H) + scale X + x and y / H = 1 / 2 - scale Y + y, W being the frame's width.

    Raises TruePoseError for other shapes, NaN, rotations that can only be degrees, and impossible cameras.
    """

    theta: Tensor
    beta: Tensor
    camera: Tensor

    def __post_init__(self) -> None:
        for name, shape in (("theta", (JOINTS, 3)), ("beta", (SHAPE,)), ("camera", (CAMERA,))):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32)
            if tuple(value.shape[1:]) != shape or value.ndim != len(shape) + 1 or not len(value):
                expected = ", ".join(str(side) for side in ("N", *shape))
                raise TruePoseError(f"{name} of a body is {tuple(value.shape)}; expected [{expected}], N at least 1")
            if not torch.isfinite(value).all():
                raise TruePoseError(f"{name} of a body holds NaN or infinite values")
            object.__setattr__(self, name, value)
        if not len(self.theta) == len(self.beta) == len(self.camera):
            raise TruePoseError(
                f"a body has {len(self.theta)} poses, {len(self.beta)} shapes and {len(self.camera)} cameras; expected "
                "as many of each"
            )
        longest = self.theta.norm(dim=-1).max().item()
        if longest > _DEGREES:
            raise TruePoseError(
                f"a joint's axis-angle vector is {longest:.1f} long; expected radians, at most {_DEGREES:.2f}. These "
                "look like degrees: multiply by pi / 180"
            )
        scale, shift = self.camera[:, 0], self.camera[:, 1:].abs().max().item()
        if scale.min() <= 0 or scale.max() > _FAR or shift > _FAR:
            raise TruePoseError(
                f"the camera of a body has a scale of {scale.min().item():g} to {scale.max().item():g} and shifts up "
                f"to {shift:g}; expected a scale above 0 and at most {_FAR:g} and shifts within {_FAR:g}, in frame "
                "heights"
            )

    def __len__(self) -> int:
        return self.theta.shape[0]

    def select(self, index: Tensor | Sequence[int]) -> BodyPose:
        """The people at `index` (positions in this batch, repeats allowed)."""
        index = torch.as_tensor(index, device=self.theta.device)
        return BodyPose(self.theta[index], self.beta[index], self.camera[index])

    def repeat(self, times: int) -> BodyPose:
        """Each person `times` times, in a row."""
        return self.select(torch.arange(len(self)).repeat_interleave(times))

    def to(self, device: torch.device | str) -> BodyPose:
        """The same people on another device."""
        return BodyPose(self.theta.to(device), self.beta.to(device), self.camera.to(device))
