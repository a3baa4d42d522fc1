"""`truepose eval --field`: the pose field's distance against the true one, on poses and noise training never saw."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from truepose_core.alignment.field import LOCAL, PoseField, load_field
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import axis_angle_to_matrix
from truepose_core.training.field import (
    HELD_OUT_LEVELS,
    LEVELS,
    NearestPoses,
    labelled_poses,
    mannequin_poses,
    mix_poses,
)

POSES = 6000
VALID = 50_000
"""Valid poses of the test split that distances are measured to."""
_LEFT = (0, 3, 6, 9, 12, 15, 17, 19, 21)
"""Places of the left joints among the 23; each has the right one behind it."""
_DESCENT_STEPS = 20


@dataclass(frozen=True)
class FieldReport:
    """The result of `evaluate_field`. Distances in radians, the root mean square over joints.

    levels: noise -> {"true", "predicted": mean distance, "error": mean absolute error, "spearman": within the level}.
    spearman: of all held-out levels together. valid: mean predicted distance of valid poses. mixed, swapped:
    the same columns for other kinds of invalid poses: the legs of one person under the trunk of another, every rotation
    half as far again; and left and right joints' rotations exchanged, which training never saw.
    descent: mean true distance of poses with noise 0.35 {"before", "after"} they were moved down the field.
    poses, nearest_of: how many were measured, and to how many valid ones.
    """

    levels: dict[str, dict[str, float]]
    spearman: float
    valid: float
    mixed: dict[str, float]
    swapped: dict[str, float]
    descent: dict[str, float]
    poses: int
    nearest_of: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def markdown(self) -> str:
        """The table."""
        rows = [*self.levels.items(), ("mixed", self.mixed), ("swapped", self.swapped)]
        lines = [
            "| noise | true | predicted | error | Spearman |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {name} | {x['true']:.3f} | {x['predicted']:.3f} | {x['error']:.3f} | {x['spearman']:.3f} |"
                for name, x in rows
            ),
            "",
            f"All held-out levels together: Spearman {self.spearman:.4f}. Valid poses have a mean distance of "
            f"{self.valid:.3f}. {_DESCENT_STEPS} steps down the field take poses from {self.descent['before']:.3f} to "
            f"{self.descent['after']:.3f} of true distance.",
            "",
            f"{self.poses} noised poses of the test split, distances in radians (root mean square over joints) to the "
            f"nearest of {self.nearest_of} valid test poses. Noise is radians per axis; trained on "
            f"{', '.join(f'{x:g}' for x in LEVELS)}. Mixed: no noise, but the legs of one and the trunk of another "
            "person, every rotation half as far again. Swapped: left and right joints' rotations exchanged, a kind "
            "that training never saw.",
        ]
        return "\n".join(lines) + "\n"


def evaluate_field(
    poses: int = POSES, field: PoseField | None = None, seed: int = 0, valid: int = VALID
) -> FieldReport:
    """Measure a field (None: the one that ships) on `poses` noised poses of the test split.

    seed: of the noise. valid: how many valid test poses to measure to. Raises TruePoseError for fewer than 2 poses a
    noise level, and without SciPy or torchmetrics.
    """
    if poses < 2 * len(HELD_OUT_LEVELS):
        raise TruePoseError(f"poses is {poses}; expected at least {2 * len(HELD_OUT_LEVELS)}, 2 for each noise level")
    field = load_field() if field is None else field
    known = mannequin_poses(valid, "test")
    nearest = NearestPoses(known)
    noised, true, level = labelled_poses(known, nearest, poses, HELD_OUT_LEVELS, seed)
    found = predicted(field, noised)
    generator = torch.Generator().manual_seed(seed)
    count = poses // len(HELD_OUT_LEVELS)
    one, other = (known[torch.randint(len(known), (count,), generator=generator)] for _ in range(2))
    mixed, swapped = mix_poses(one, other, torch.full((count, 2), 1.5)), swap_sides(one)
    start = noised[level == level.new_tensor(0.35)][:400]
    return FieldReport(
        levels={
            f"{x:g}": _columns(found[level == level.new_tensor(x)], true[level == level.new_tensor(x)])
            for x in HELD_OUT_LEVELS
        },
        spearman=spearman(found, true),
        valid=predicted(field, mannequin_poses(min(poses, valid), "test", first=valid)).mean().item(),
        mixed=_columns(predicted(field, mixed), nearest.distance(mixed)),
        swapped=_columns(predicted(field, swapped), nearest.distance(swapped)),
        descent={
            "before": nearest.distance(start).mean().item(),
            "after": nearest.distance(descend(field, start)).mean().item(),
        },
        poses=poses,
        nearest_of=valid,
    )


@torch.no_grad()
def predicted(field: PoseField, rotations: Tensor) -> Tensor:
    """The field at rotations [N, 23, 3, 3]: [N]."""
    return torch.cat([field(part) for part in rotations.split(4096)])


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of [N] and [N]: torchmetrics'. Raises TruePoseError without it."""
    try:
        from torchmetrics.functional import spearman_corrcoef
    except ImportError as error:
        raise TruePoseError(
            'the evaluation needs torchmetrics; install it with: pip install "comfyui-truepose[eval]"'
        ) from error
    return spearman_corrcoef(a.float(), b.float()).item()


def _columns(found: Tensor, true: Tensor) -> dict[str, float]:
    return {
        "true": true.mean().item(),
        "predicted": found.mean().item(),
        "error": (found - true).abs().mean().item(),
        "spearman": spearman(found, true),
    }


def swap_sides(rotations: Tensor) -> Tensor:
    """Poses [N, 23, 3, 3] in which left joints turn as the right ones did and the other way round, not mirrored: elbows
    and knees bend where none can."""
    order = list(range(LOCAL))
    for left in _LEFT:
        order[left], order[left + 1] = left + 1, left
    return rotations[:, order]


def descend(field: PoseField, rotations: Tensor, steps: int = _DESCENT_STEPS) -> Tensor:
    """Poses moved down the field's gradient by its own distance, a fifth of the way at each step: [N, 23, 3, 3]."""
    for _ in range(steps):
        turn = rotations.new_zeros(len(rotations), LOCAL, 3, requires_grad=True)
        value = field(rotations @ axis_angle_to_matrix(turn))
        (gradient,) = torch.autograd.grad(value.sum(), turn)
        slope = gradient.square().sum((1, 2)).clamp(min=1e-6)
        way = -(0.2 * value.detach() / slope)[:, None, None] * gradient
        rotations = rotations @ axis_angle_to_matrix(way)
    return rotations
