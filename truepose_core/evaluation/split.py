"""What each pair of the test split shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truepose_core.mannequin.split import TEST_SEED

if TYPE_CHECKING:
    from truepose_core.mannequin import PairBatch
FRONT, BACK = 50.0, 132.5
"""A person turned by less than FRONT degrees is seen from the front, by more than BACK from behind."""


def views(theta: Tensor) -> list[str]:
    """How each person is seen: "front", "side" or "back". theta: axis-angle [N, 24, 3], the root's first."""
    from truepose_core.mannequin import axis_angle_to_matrix

    ahead = axis_angle_to_matrix(theta[:, 0].cpu())[:, :, 2]
    turn = torch.rad2deg(torch.atan2(ahead[:, 0], ahead[:, 2]).abs())
    return ["front" if t < FRONT else "side" if t < BACK else "back" for t in turn.tolist()]


def pose_distances(pairs: PairBatch) -> Tensor:
    """Mean angle between the joints of source and target [N], radians."""
    from truepose_core.alignment.recurrent import pose_distance
    from truepose_core.body.pose import BodyPose

    source, target = (BodyPose(x.theta, x.beta, x.camera) for x in (pairs.source, pairs.target))
    return pose_distance(source, target)


def groups(pairs: PairBatch) -> dict[str, list[str]]:
    """What each pair shows: {"view": ["front to back", ...], "top": [pattern, ...], "bottom": [pattern, ...]}."""
    from truepose_core.mannequin import BOTTOM_PATTERNS, TOP_PATTERNS, sample_identities
    from truepose_core.mannequin.world import split_seed

    people = sample_identities(pairs.identity, split_seed("test", TEST_SEED))
    seen = zip(views(pairs.source.theta), views(pairs.target.theta), strict=True)
    return {
        "view": [f"{source} to {target}" for source, target in seen],
        "top": [TOP_PATTERNS[i] for i in people.top_pattern.tolist()],
        "bottom": [BOTTOM_PATTERNS[i] for i in people.bottom_pattern.tolist()],
    }
