"""The poses that mannequins take: a table of kinds, poses drawn at random around them, and ready ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

from .body import BodyPoses, axis_angle_to_matrix, matrix_to_axis_angle
from .identity import as_indices, uniform

__all__ = ["POSE_KINDS", "VIEWS", "ready_poses", "sample_poses"]

VIEWS = ("front", "side", "back")

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


def _rotation(axis: int, degrees: Tensor) -> Tensor:
    angle = torch.zeros(*degrees.shape, 3, dtype=degrees.dtype, device=degrees.device)
    angle[..., axis] = degrees * (math.pi / 180)
    return axis_angle_to_matrix(angle)


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
