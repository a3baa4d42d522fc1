"""The mannequin's body and clothes as primitives: sweeps of ellipsoids fixed to joints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .body import rest_joints
from .identity import Identities

__all__ = ["Parts", "body_parts"]

# Materials: who paints the part.
TORSO, SLEEVE, HIP, LEG, SKIN, HEAD, EAR, HAIR, SHOE = range(9)


@dataclass(frozen=True)
class Parts:
    """P primitives of N bodies at rest; positions relative to their joint."""

    joint: Tensor  # [P]
    material: Tensor  # [P]
    side: Tensor  # [P] +1 left, -1 right, 0 middle
    start: Tensor  # [N, P, 3]
    end: Tensor  # [N, P, 3]
    radius: Tensor  # [N, P, 2], 0 where the part is not worn
    shape: Tensor  # [N, P, 3] semi-axes per unit of radius
    cut: Tensor  # [P, 2] open ends: no rounded cap there


def body_parts(people: Identities) -> Parts:
    beta = people.beta
    rest = rest_joints(beta)
    one = torch.ones_like(beta[:, 0])
    grow = 1 + 0.03 * beta[:, 0]
    girth = grow * (1 + 0.05 * beta[:, 1])
    wide = (grow + girth) / 2 * (1 + 0.045 * beta[:, 2])
    hips = (grow + girth) / 2 * (1 + 0.05 * beta[:, 3])
    deep = girth * (1 + 0.05 * beta[:, 7])
    head = 1 + 0.03 * beta[:, 8]
    torso = grow * (1 + 0.035 * beta[:, 6])
    long_sleeve = people.sleeve_long.to(beta.dtype)
    long_legs = people.bottom_long.to(beta.dtype)
    medium = (people.hair_length >= 1).to(beta.dtype)
    longer = (people.hair_length == 2).to(beta.dtype)

    rows: list[tuple] = []

    def add(
        joint: int,
        material: int,
        start: tuple,
        end: tuple,
        r0: Tensor | float,
        r1: Tensor | float,
        shape: tuple = (1.0, 1.0, 1.0),
        cut: tuple[bool, bool] = (False, False),
        side: float = 0.0,
    ) -> None:
        def stack(values: tuple) -> Tensor:
            return torch.stack([one * v for v in values], -1)

        rows.append((joint, material, side, stack(start), stack(end), stack((r0, r1)), stack(shape), cut))

    y_spine1, y_chest = rest[:, 3, 1], rest[:, 9, 1]
    y_shoulder = rest[:, 16, 1] - y_chest
    x_shoulder = rest[:, 16, 0]

    # Trunk. The shirt hangs open over the hips; the neckline is the open top of a cone.
    add(
        0,
        HIP,
        (-0.05 * hips, -0.055 * torso, -0.008),
        (0.05 * hips, -0.055 * torso, -0.008),
        0.104 * hips,
        0.104 * hips,
        (1.0, 1.0, deep / hips * 0.98),
    )
    lean = deep / wide
    add(
        3,
        TORSO,
        (0.0, -0.035 * torso - y_spine1, 0.0),
        (0.0, 0.2 * torso - y_spine1, 0.0),
        0.116 * hips,
        0.107 * wide,
        (1.43, 1.0, lean),
        (True, False),
    )
    add(
        9,
        TORSO,
        (0.0, 0.17 * torso - y_chest, 0.002),
        (0.0, 0.365 * torso - y_chest, 0.0),
        0.105 * wide,
        0.112 * wide,
        (1.47, 1.0, lean),
    )
    add(
        9,
        TORSO,
        (-0.84 * x_shoulder, y_shoulder - 0.012, -0.004),
        (0.84 * x_shoulder, y_shoulder - 0.012, -0.004),
        0.064 * girth,
        0.064 * girth,
        (1.0, 1.0, 1.14),
    )
    y_neck = rest[:, 12, 1] - y_chest
    add(
        9,
        TORSO,
        (0.0, y_shoulder - 0.03, -0.004),
        (0.0, y_neck - 0.004, -0.004),
        0.104 * girth,
        0.068 * girth,
        (1.06, 1.0, 0.9),
        (False, True),
    )
    neck = rest[:, 15, 1] - rest[:, 12, 1]
    add(12, SKIN, (0.0, -0.03, -0.004), (0.0, neck, 0.0), 0.053 * girth, 0.05 * girth)

    # Head: skull, jaw, nose, ears.
    h = head
    add(
        15,
        HEAD,
        (0.0, 0.108 * h, 0.01),
        (0.0, 0.108 * h, 0.01),
        0.116 * h,
        0.116 * h,
        (0.88, 1.07, 1),
    )
    add(
        15,
        HEAD,
        (0.0, 0.075 * h, 0.03 * h),
        (0.0, 0.022 * h, 0.05 * h),
        0.084 * h,
        0.052 * h,
        (0.98, 1.0, 1.0),
    )
    add(
        15,
        EAR,
        (0.0, 0.1 * h, 0.121 * h),
        (0.0, 0.077 * h, 0.13 * h),
        0.012 * h,
        0.0185 * h,
        (0.9, 0.9, 1.0),
    )
    for sign in (1.0, -1.0):
        add(
            15,
            EAR,
            (sign * 0.1 * h, 0.112 * h, 0.0),
            (sign * 0.096 * h, 0.082 * h, 0.008),
            0.024 * h,
            0.016 * h,
            (0.6, 1.0, 0.8),
            side=sign,
        )
    # Hair: a cap behind the hairline, and for medium and long hair a fall behind and two locks.
    add(
        15,
        HAIR,
        (0.0, 0.12 * h, -0.008 * h),
        (0.0, 0.12 * h, -0.008 * h),
        0.122 * h,
        0.122 * h,
        (0.9, 1.05, 1.0),
    )
    drop = -0.005 - 0.15 * longer
    add(
        15,
        HAIR,
        (0.0, 0.11 * h, -0.05 * h),
        (0.0, drop * h, -0.062 * h),
        0.094 * h * medium,
        (0.07 - 0.006 * longer) * h * medium,
        (1.14, 1.0, 0.72),
    )
    for sign in (1.0, -1.0):
        add(
            15,
            HAIR,
            (sign * 0.086 * h, 0.13 * h, 0.005 * h),
            (sign * 0.092 * h, (drop + 0.01) * h, -0.006),
            0.03 * h * medium,
            0.017 * h * medium,
            (0.75, 1.0, 1.7),
            side=sign,
        )

    for left in (True, False):
        sign = 1.0 if left else -1.0
        o = 0 if left else 1
        upper = rest[:, 18 + o, 0].sub(rest[:, 16 + o, 0]).abs()
        fore = rest[:, 20 + o, 0].sub(rest[:, 18 + o, 0]).abs()
        thigh = rest[:, 1 + o, 1] - rest[:, 4 + o, 1]
        shin = rest[:, 4 + o, 1] - rest[:, 7 + o, 1]
        # Arms: skin inside, a wider sleeve that ends open.
        add(
            16 + o,
            SKIN,
            (0.0, 0.0, 0.0),
            (sign * upper, 0.0, 0.0),
            0.047 * girth,
            0.039 * girth,
            side=sign,
        )
        add(
            18 + o,
            SKIN,
            (0.0, 0.0, 0.0),
            (sign * fore, 0.0, 0.0),
            0.039 * girth,
            0.028 * girth,
            side=sign,
        )
        add(
            20 + o,
            SKIN,
            (sign * 0.01, 0.0, 0.0),
            (sign * 0.075, 0.0, 0.002),
            0.033 * girth,
            0.037 * girth,
            (1.0, 0.62, 1.0),
            side=sign,
        )
        add(
            20 + o,
            SKIN,
            (sign * 0.085, -0.002, 0.0),
            (sign * 0.145, -0.012, 0.0),
            0.035 * girth,
            0.022 * girth,
            (1.0, 0.6, 1.0),
            side=sign,
        )
        add(
            20 + o,
            SKIN,
            (sign * 0.03, -0.006, 0.022),
            (sign * 0.075, -0.012, 0.05),
            0.016 * girth,
            0.012 * girth,
            side=sign,
        )
        reach = 0.66 + 0.34 * long_sleeve
        add(
            16 + o,
            SLEEVE,
            (-sign * 0.012, 0.0, 0.0),
            (sign * upper * reach, 0.0, 0.0),
            0.061 * girth,
            (0.058 - 0.008 * long_sleeve) * girth,
            side=sign,
            cut=(False, True),
        )
        # The elbow of a long sleeve is the rounded start of its lower part.
        add(
            18 + o,
            SLEEVE,
            (0.0, 0.0, 0.0),
            (sign * fore * 0.93, 0.0, 0.0),
            0.051 * girth * long_sleeve,
            0.042 * girth * long_sleeve,
            side=sign,
            cut=(False, True),
        )
        # Legs.
        add(
            1 + o,
            SKIN,
            (0.0, -0.05, 0.0),
            (sign * 0.006, -thigh, 0.0),
            0.08 * girth,
            0.056 * girth,
            side=sign,
        )
        add(
            4 + o,
            SKIN,
            (0.0, 0.0, 0.0),
            (0.0, -shin, -0.004),
            0.056 * girth,
            0.037 * girth,
            side=sign,
        )
        span = 0.82 + 0.18 * long_legs
        add(
            1 + o,
            LEG,
            (0.0, -0.02, 0.0),
            (sign * 0.006, -thigh * span, 0.0),
            0.09 * hips,
            (0.083 - 0.015 * long_legs) * girth,
            side=sign,
            cut=(False, False),
        )
        add(
            4 + o,
            LEG,
            (0.0, 0.0, 0.0),
            (0.0, -shin * 0.94, -0.002),
            0.068 * girth * long_legs,
            0.057 * girth * long_legs,
            side=sign,
            cut=(False, True),
        )
        add(
            7 + o,
            SHOE,
            (0.0, -0.035, -0.022),
            (0.0, -0.048, 0.118),
            0.052 * grow,
            0.04 * grow,
            (0.98, 1.0, 1.0),
            side=sign,
        )
    # Shorts end open, long trousers bend at a rounded knee; the cut of a part is one flag for all
    # bodies, so the knee of long trousers is the rounded start of the lower leg.
    joint, material, side, start, end, radius, shape, cut = zip(*rows, strict=True)
    cuts = [(c[0], True) if m == LEG else c for c, m in zip(cut, material, strict=True)]
    make = beta.new_tensor
    return Parts(
        joint=torch.tensor(joint, device=beta.device),
        material=torch.tensor(material, device=beta.device),
        side=make(side),
        start=torch.stack(start, 1),
        end=torch.stack(end, 1),
        radius=torch.stack(radius, 1),
        shape=torch.stack(shape, 1),
        cut=torch.tensor(cuts, device=beta.device),
    )
