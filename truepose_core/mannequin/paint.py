"""Colours, regions and shading slopes of surface points, from T-pose coordinates.

A pattern is a function of the place on the garment at rest, so it moves with the cloth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from truepose_core.regions import Region

from .identity import Identities
from .solids import EAR, HAIR, HEAD, HIP, LEG, SHOE, SKIN, SLEEVE, TORSO, Parts

__all__ = ["paint", "soften"]


def soften(
    people: Identities,
    joints: Tensor,
    parts: Parts,
    person: Tensor,
    primitive: Tensor,
    rest: list[Tensor],
    slope: list[Tensor],
) -> list[Tensor]:
    """Shading slopes of trunk and head, blended with those of one smooth shape.

    Trunk and head are several parts each; shaded as they are, the joins would show. Only the light
    changes: hits, labels and depth do not.
    """
    material = parts.material[primitive]
    slope = torch.stack(slope)
    slope = slope * (slope * slope).sum(0).clamp_min(1e-20).rsqrt()
    for kind, share in ((TORSO, 0.8), (HIP, 0.8), (HEAD, 0.75)):
        chosen = (material == kind).nonzero()[:, 0]
        who = person[chosen]
        x, y, z = (r[chosen] for r in rest)
        if kind == HEAD:
            size = 1 + 0.03 * people.beta[:, 8][who]
            lift = y - joints[:, 15, 1][who] - 0.085 * size
            wanted = torch.stack([x / 0.95, lift / 1.7, z - 0.01])
        elif kind == TORSO:
            # Upright below the chest, turning up over the shoulders.
            lift = (y - joints[:, 16, 1][who] + 0.1).clamp_min(0)
            wanted = torch.stack([x / 2.1, lift, z])
        else:
            wanted = torch.stack([x / 2.1, 0 * y, z])
        wanted = wanted * (wanted * wanted).sum(0).clamp_min(1e-20).rsqrt()
        slope[:, chosen] = slope[:, chosen] * (1 - share) + wanted * share
    return list(slope)


def paint(
    people: Identities,
    joints: Tensor,
    parts: Parts,
    person: Tensor,
    primitive: Tensor,
    rest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Colour [3, K] and region [K] of surface points, from T-pose coordinates [3, K] only."""
    albedo = torch.empty_like(rest)
    label = torch.empty_like(person)
    material = parts.material[primitive]
    side = parts.side[primitive]
    painters: dict[int, Callable[..., tuple[Tensor, Tensor | int]]] = {
        TORSO: _paint_torso,
        SLEEVE: _paint_sleeve,
        HIP: _paint_hip,
        LEG: _paint_leg,
        SKIN: _paint_skin,
        HEAD: _paint_head,
        EAR: _paint_ear,
        HAIR: _paint_hair,
        SHOE: _paint_shoe,
    }
    for kind, painter in painters.items():
        chosen = (material == kind).nonzero()[:, 0]
        if not chosen.numel():
            continue
        who = person[chosen]
        colour, region = painter(people, joints, who, rest[:, chosen], side[chosen])
        albedo[:, chosen] = colour
        label[chosen] = region
    return albedo, label


def _take(values: Tensor, who: Tensor) -> Tensor:
    """Colours [N, 3] of the people [K] as [3, K]."""
    return values.t().contiguous().index_select(1, who)


def _cloth(pattern: Tensor, length: Tensor, turns: Tensor, period: Tensor, phase: Tensor, count: Tensor) -> Tensor:
    """Where the second colour is: stripes (1), vertical stripes (2), checks (3), on a limb.

    length: metres along the limb. turns: angle around it in turns. count: around the limb.
    """
    across = length / period + phase
    stripe = (across - across.floor()) < 0.5
    around = turns * count + 0.25
    vertical = (around - around.floor()) < 0.5
    cell = (2 * across).floor() + (turns * count).floor()
    check = cell.remainder(2) < 0.5
    return ((pattern == 1) & stripe) | ((pattern == 2) & vertical) | ((pattern == 3) & check)


def _logo(shape: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outer and inner mask of an emblem in a unit circle."""

    def form(x: Tensor, y: Tensor) -> Tensor:
        ax, ay = x.abs(), y.abs()
        radius = (x * x + y * y).sqrt()
        # A five-pointed star in polar form; the factor blends its tips into notches.
        angle = torch.atan2(x, y) * (5 / (2 * math.pi))
        tip = (angle - angle.round()).abs() * 2
        masks = [
            radius < 0.95,
            (ax < 0.86) & (ay < 0.86),
            ((ax < 0.36) & (ay < 1)) | ((ay < 0.36) & (ax < 1)),
            ax + ay < 1.12,
            radius < 1.12 - 0.62 * tip,
        ]
        result = torch.zeros_like(masks[0])
        for value, mask in enumerate(masks):
            result |= (shape == value) & mask
        return result

    return form(x, y), form(x * 2.3, y * 2.3)


def _paint_torso(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    pattern = people.top_pattern[who]
    a, b = _take(people.top_a, who), _take(people.top_b, who)
    turns = torch.atan2(p[0] / 1.45, p[2]) / (2 * math.pi)
    second = _cloth(
        pattern,
        p[1],
        turns,
        people.top_period[who],
        people.top_phase[who],
        people.top_count[who].to(p.dtype),
    )
    colour = torch.where(second, b, a)
    size = people.logo_size[who] / 2
    chest = rest[:, 9, 1][who]
    outer, inner = _logo(people.logo_shape[who], p[0] / size, (p[1] - chest - 0.015) / size)
    shown = (pattern == 4) & (p[2] > 0)
    colour = torch.where(shown & outer, b, colour)
    colour = torch.where(shown & inner, _take(people.top_accent, who), colour)
    # A collar in the second colour.
    collar = (p[1] > rest[:, 12, 1][who] - 0.021) & (p[0] ** 2 + p[2] ** 2 < 0.085**2)
    colour = torch.where(collar, torch.where(pattern == 0, a * 0.8, b), colour)
    return colour, int(Region.UPPER)


def _paint_sleeve(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    pattern = people.top_pattern[who]
    a, b = _take(people.top_a, who), _take(people.top_b, who)
    shoulder = rest[:, 16][who]
    length = p[0] * side - shoulder[:, 0]
    turns = torch.atan2(p[1] - shoulder[:, 1], p[2]) / (2 * math.pi)
    count = torch.where(pattern == 3, 4.0, 3.0)
    # Along the sleeve the pattern runs on from the shoulder seam.
    second = _cloth(pattern, length, turns, people.top_period[who], people.top_phase[who], count)
    return torch.where(second, b, a), int(Region.UPPER)


def _bottom(
    people: Identities, who: Tensor, height: Tensor, turns: Tensor, count: float, width: float
) -> tuple[Tensor, int]:
    pattern = people.bottom_pattern[who]
    a, b = _take(people.bottom_a, who), _take(people.bottom_b, who)
    around = torch.full_like(turns, count)
    check = _cloth(
        torch.full_like(pattern, 3),
        height,
        turns,
        people.bottom_period[who],
        people.bottom_phase[who],
        around,
    )
    second = ((pattern == 1) & ((turns - 0.25).abs() < width)) | ((pattern == 2) & check)
    return torch.where(second, b, a), int(Region.LOWER)


def _paint_hip(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    turns = torch.atan2(p[0].abs() / 1.4, p[2]) / (2 * math.pi)
    return _bottom(people, who, p[1], turns, 10.0, 0.055)


def _paint_leg(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    hip = rest[:, 1, 0][who]
    turns = torch.atan2(p[0] * side - hip, p[2]) / (2 * math.pi)
    return _bottom(people, who, p[1], turns, 6.0, 0.095)


def _paint_skin(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    return _take(people.skin, who), int(Region.SKIN)


def _head_point(people: Identities, rest: Tensor, who: Tensor, p: Tensor) -> Tensor:
    """Coordinates of the head [3, K], from the head joint, for a head of size 1."""
    return (p - rest[:, 15].t()[:, who]) / (1 + 0.03 * people.beta[who, 8])


def _paint_head(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    x, y, z = _head_point(people, rest, who, p)
    skin, hair, eyes = (_take(c, who) for c in (people.skin, people.hair, people.eyes))
    front = z > 0.03
    ax = x.abs()
    colour = skin
    # Cheeks and lips: the skin with more red; brows: the hair, darkened towards the skin.
    cheek = (-(((ax - 0.055) / 0.024) ** 2 + ((y - 0.06) / 0.02) ** 2)).exp() * front * 0.22
    flush = skin * skin.new_tensor([1.03, 0.78, 0.76])[:, None]
    colour = colour + (flush - colour) * cheek
    # The mouth curves up a little towards its corners.
    rise = y - 0.034 - 5.0 * x * x
    lips = front & ((x / 0.032) ** 2 + (rise / 0.0088) ** 2 < 1)
    lip = skin * skin.new_tensor([0.88, 0.58, 0.57])[:, None] + 0.02
    colour = torch.where(lips, lip, colour)
    colour = torch.where(lips & (rise.abs() < 0.0013), lip * 0.62, colour)
    brow = front & ((ax - 0.041).abs() < 0.023)
    brow &= (y - (0.1385 - 8.0 * (ax - 0.036) ** 2)).abs() < 0.0046
    colour = torch.where(brow, hair * 0.7 + skin * 0.15, colour)
    # Eyes: almond-shaped white, iris, pupil, a glint, and a dark line of lashes above.
    ex, ey = ax - 0.04, y - 0.109
    edge = 1 - (ex / 0.0225) ** 2
    eye = front & (edge > 0) & (ey < 0.0125 * edge) & (ey > -0.0105 * edge)
    lash = front & ~eye & ((ex / 0.0265) ** 2 < 1) & (ey > 0)
    lash &= ey < 0.0165 * (1 - (ex / 0.0265) ** 2)
    colour = torch.where(lash, skin * 0.25, colour)
    colour = torch.where(eye, torch.full_like(colour, 0.94), colour)
    iris = ex * ex + ey * ey
    colour = torch.where(eye & (iris < 0.0116**2), eyes, colour)
    colour = torch.where(eye & (iris < 0.0052**2), torch.full_like(colour, 0.05), colour)
    glint = (x - 0.004 - torch.where(x > 0, 0.04, -0.04)) ** 2 + (y - 0.1135) ** 2
    colour = torch.where(eye & (glint < 0.0026**2), torch.full_like(colour, 0.98), colour)
    # Hairline: higher at the front, down to the nape behind the ears.
    tilt = people.hair_tilt[who]
    fringe = 0.172 + 0.16 * tilt * x
    scalp = (y > fringe) | ((z < 0.012) & (y > 0.075)) | ((z < -0.03) & (y > 0.01))
    colour = torch.where(scalp, hair, colour)
    region = torch.where(z > -0.01, int(Region.FACE), int(Region.SKIN))
    return colour, torch.where(scalp, int(Region.HAIR), region)


def _paint_ear(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    skin = _take(people.skin, who)
    # Ears and the tip of the nose are a little redder than the rest.
    return skin * skin.new_tensor([1.0, 0.93, 0.92])[:, None], int(Region.FACE)


def _paint_hair(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    x, _, z = _head_point(people, rest, who, p)
    # Strands: a faint variation around the head.
    strand = torch.sin(torch.atan2(x, z + 0.02) * 23.0) * 0.06 + 1.0
    return _take(people.hair, who) * strand, int(Region.HAIR)


def _paint_shoe(people: Identities, rest: Tensor, who: Tensor, p: Tensor, side: Tensor) -> tuple[Tensor, int]:
    shoe = _take(people.shoe, who)
    sole = p[1] < rest[:, 7, 1][who] - 0.066
    bright = torch.where(shoe.mean(0) > 0.6, 0.45, 0.93).expand_as(shoe)
    return torch.where(sole, bright, shoe), int(Region.ACCESSORY)
