"""A rendered body as pictures, in the colours that ControlNets and champ's guidance encoders were trained on. Ours.

ControlNet: a depth picture as depth estimators draw it, near bright, and normals as the ControlNet 1.1 "normal" model
reads them (red is left, green is up, blue is front). champ (arXiv 2403.14781): read off the materials and compositor of
its own renderer, scripts/data_processors/smpl/blend/smpl_rendering.blend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truepose_core.body.render import BodyMaps, relative_depth
from truepose_core.errors import TruePoseError

CONTROLNET, CHAMP = "ControlNet", "champ"
CONVENTIONS = (CONTROLNET, CHAMP)
REACH = 1.1
"""Coordinates are drawn from -REACH to REACH metres; no body is wider or taller from its pelvis."""

_HAND, _BALL = 0.77, 0.11
"""Where at rest the mean generic body's hand and the ball of its foot are, metres to the side and to the front."""

# champ colours a vertex by the joint with its largest skinning weight: matplotlib's viridis at 10 times SMPL's number.
_VIRIDIS = (
    (68, 1, 84), (71, 16, 99), (72, 29, 111), (71, 42, 122), (69, 55, 129), (65, 66, 135), (61, 78, 138), (56, 89, 140),
    (51, 99, 141), (46, 109, 142), (42, 118, 142), (39, 128, 142), (35, 137, 142), (32, 146, 140), (30, 156, 137),
    (33, 165, 133), (40, 174, 128), (53, 183, 121), (70, 192, 111), (90, 200, 100), (112, 207, 87), (137, 213, 72),
    (162, 218, 55), (189, 223, 38),
)  # fmt: skip


def depth_picture(maps: BodyMaps, convention: str = CONTROLNET) -> Tensor:
    """Depth [N, 3, H, W] in [0, 1], 1 at each body's nearest point, 0 where nobody is. The farthest visible point is
    0.2 for ControlNets, which keeps it apart from the background, and 0 for champ, which does not."""
    _check(convention)
    depth = relative_depth(maps)
    if convention == CHAMP:
        depth = ((depth - 0.2) / 0.8).clamp(min=0) * maps.mask
    return depth.expand(-1, 3, -1, -1)


def normal_picture(maps: BodyMaps, convention: str = CONTROLNET) -> Tensor:
    """Normals [N, 3, H, W] in [0, 1], 0.5 + 0.5 times each of three axes. ControlNet: left, up, front of the picture,
    on a wall that faces the camera. champ: right, up, front, on black."""
    _check(convention)
    if convention == CHAMP:
        return (0.5 + 0.5 * maps.normal) * maps.mask
    flipped = maps.normal * maps.normal.new_tensor([-1, 1, 1])[:, None, None]
    wall = maps.normal.new_tensor([0, 0, 1])[:, None, None] * (1 - maps.mask)
    return 0.5 + 0.5 * (flipped + wall)


def semantic_picture(maps: BodyMaps) -> Tensor:
    """Each body part in champ's colour for it [N, 3, H, W] in [0, 1], on black."""
    table = maps.depth.new_tensor([*_VIRIDIS, (0, 0, 0)]) / 255
    return table[_smpl_parts(maps)].permute(0, 3, 1, 2)


def _smpl_parts(maps: BodyMaps) -> Tensor:
    """Parts as SMPL's skin is divided [N, H, W]: the generic body's fingers hang on wrists, its toes on ankles."""
    if maps.face is not None:
        return maps.part
    beyond = {20: maps.rest[:, 0] > _HAND, 21: maps.rest[:, 0] < -_HAND, 7: maps.rest[:, 2] > _BALL}
    beyond[8] = beyond[7]
    part = maps.part
    for joint, further in beyond.items():
        # The next joint of the limb: 20 to 22, 7 to 10.
        part = torch.where((maps.part == joint) & further, joint + (2 if joint > 19 else 3), part)
    return part


def coordinate_picture(maps: BodyMaps) -> Tensor:
    """Places on the body at rest [N, 3, H, W] in [0, 1], on black: x to the person's left, y up, z to the front, from
    -REACH to REACH metres around the pelvis."""
    return (0.5 + maps.rest / (2 * REACH)).clamp(0, 1) * maps.mask


CHAMP_MAPS = {
    "depth": lambda maps: depth_picture(maps, CHAMP),
    "normal": lambda maps: normal_picture(maps, CHAMP),
    "semantic_map": semantic_picture,
}
"""champ's names of the maps that a body gives -> what draws them."""


def _check(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise TruePoseError(f"the convention is {convention!r}; expected one of {', '.join(CONVENTIONS)}")
