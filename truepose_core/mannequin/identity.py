"""Seeded people of the mannequin world: colours, garments and body shape.

Everything is drawn with a counter-based hash of ``(seed, person, draw)``. A person therefore
depends on its own index only, never on the batch it is drawn in or on torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

__all__ = [
    "BOTTOM_PATTERNS",
    "HAIR_LENGTHS",
    "LOGO_SHAPES",
    "TOP_PATTERNS",
    "Identities",
    "sample_identities",
    "uniform",
]

TOP_PATTERNS = ("plain", "stripes", "vertical stripes", "checks", "logo")
BOTTOM_PATTERNS = ("plain", "side stripe", "checks")
HAIR_LENGTHS = ("short", "medium", "long")
LOGO_SHAPES = ("disc", "square", "cross", "diamond", "star")

_SKIN = (
    (250, 222, 202),
    (241, 203, 176),
    (229, 183, 150),
    (214, 163, 125),
    (190, 138, 100),
    (158, 108, 75),
    (121, 80, 56),
    (88, 58, 42),
)
_HAIR = (
    (28, 24, 24),
    (52, 36, 28),
    (82, 54, 36),
    (121, 80, 48),
    (171, 125, 70),
    (219, 184, 120),
    (150, 64, 34),
    (150, 148, 148),
)
_EYES = (
    (70, 42, 24),
    (110, 72, 36),
    (52, 104, 168),
    (66, 128, 76),
    (110, 128, 140),
    (128, 110, 52),
)
# Fabric colours: light ones, dark ones and saturated ones of shirts that are really sold.
_FABRIC = (
    (244, 242, 236),
    (232, 220, 196),
    (190, 192, 194),
    (120, 124, 130),
    (52, 54, 60),
    (28, 30, 38),
    (28, 44, 84),
    (46, 92, 160),
    (128, 178, 216),
    (34, 112, 116),
    (44, 92, 60),
    (132, 152, 92),
    (176, 36, 44),
    (112, 28, 44),
    (226, 110, 74),
    (238, 190, 68),
    (232, 160, 172),
    (108, 70, 132),
    (136, 92, 60),
    (196, 168, 214),
)
_TROUSERS = (
    (38, 54, 92),
    (70, 98, 142),
    (128, 156, 190),
    (36, 38, 44),
    (92, 94, 100),
    (196, 176, 140),
    (106, 82, 58),
    (78, 88, 62),
    (226, 222, 212),
    (96, 40, 46),
)
_SHOES = (
    (236, 234, 230),
    (34, 34, 38),
    (96, 62, 40),
    (168, 44, 44),
    (40, 72, 130),
    (90, 96, 100),
    (214, 150, 62),
)
_BACKGROUND = (
    (214, 218, 222),
    (198, 206, 214),
    (224, 216, 204),
    (206, 214, 202),
    (216, 204, 208),
    (176, 186, 196),
    (164, 172, 166),
    (188, 178, 170),
    (142, 152, 166),
    (230, 230, 228),
)
# Two colours of one pattern differ by at least this much in luminance (0..1), so that a pattern is
# visible in a grey image too.
_LUMINANCE_GAP = 0.3

_MASK24 = (1 << 24) - 1


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= (1 << 63) else value


def _mix(x: Tensor) -> Tensor:
    """One finaliser round of SplitMix64 (Steele, Lea, Flood 2014); int64 wraps as uint64 does."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def as_indices(indices: Sequence[int] | Tensor) -> Tensor:
    """Person or pose indices as an int64 CPU tensor [N]; raises TruePoseError otherwise."""
    tensor = torch.as_tensor(indices)
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TruePoseError(
            f"indices must be a flat sequence of whole numbers, got shape {tuple(tensor.shape)} "
            f"of {tensor.dtype}. Pass e.g. range(16) or torch.arange(16)."
        )
    return tensor.to(device="cpu", dtype=torch.int64)


def uniform(indices: Tensor, seed: int, stream: int, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [N, draws].

    A pure function of (seed, stream, index, draw). ``stream`` keeps different uses of one
    seed apart.
    """
    root = _mix(torch.tensor([_signed(int(seed) * 0x9E3779B97F4A7C15 + stream)]))
    x = _mix(indices[:, None] * _signed(0xD1342543DE82EF95) + root)
    x = _mix(x + (torch.arange(draws) + 1) * _signed(0x9E3779B97F4A7C15))
    return ((x >> 40) & _MASK24).to(torch.float32) * (1.0 / (1 << 24))


def _palette(values: Sequence[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32) / 255.0


def luminance(rgb: Tensor) -> Tensor:
    """Rec. 709 luma of colours [..., 3] in 0..1 -> [...]."""
    return (rgb * rgb.new_tensor([0.2126, 0.7152, 0.0722])).sum(-1)


@dataclass(frozen=True)
class Identities:
    """N people. Colours are RGB in 0..1, lengths in metres, angles in turns.

    Attributes:
        skin, hair, eyes, shoe: colours [N, 3].
        hair_length: index into ``HAIR_LENGTHS`` [N].
        hair_tilt: slope of the fringe, -1..1 [N].
        top_pattern: index into ``TOP_PATTERNS`` [N].
        top_a, top_b, top_accent: the pattern's two colours and a logo's core [N, 3].
        top_period: stripe period, or twice the cell size of checks [N].
        top_phase: 0..1 [N].
        top_count: vertical stripes around the chest (checks: cells, even) [N].
        logo_shape: index into ``LOGO_SHAPES`` [N]. logo_size: its diameter [N].
        sleeve_long, bottom_long: 0 or 1 [N].
        bottom_pattern: index into ``BOTTOM_PATTERNS`` [N].
        bottom_a, bottom_b: colours [N, 3]. bottom_period, bottom_phase: as for the top [N].
        background: colour at the top and at the bottom of the frame [N, 2, 3].
        beta: body shape [N, 10], within -2..2. The axes are our own: height, girth, shoulder width,
            hip width, leg length, arm length, torso length, depth of the trunk, head size, neck.
    """

    skin: Tensor
    hair: Tensor
    eyes: Tensor
    shoe: Tensor
    hair_length: Tensor
    hair_tilt: Tensor
    top_pattern: Tensor
    top_a: Tensor
    top_b: Tensor
    top_accent: Tensor
    top_period: Tensor
    top_phase: Tensor
    top_count: Tensor
    logo_shape: Tensor
    logo_size: Tensor
    sleeve_long: Tensor
    bottom_long: Tensor
    bottom_pattern: Tensor
    bottom_a: Tensor
    bottom_b: Tensor
    bottom_period: Tensor
    bottom_phase: Tensor
    background: Tensor
    beta: Tensor

    def __len__(self) -> int:
        return self.skin.shape[0]

    def select(self, index: Tensor | Sequence[int]) -> Identities:
        """The people at ``index`` (positions in this batch, repeats allowed)."""
        index = torch.as_tensor(index, device=self.skin.device)
        return Identities(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Identities:
        """The same people on another device."""
        return Identities(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def _pick(table: Tensor, u: Tensor) -> Tensor:
    return table[(u * len(table)).long()]


def _contrasting(table: Tensor, base: Tensor, u: Tensor) -> Tensor:
    """For each base colour [N, 3] a colour of ``table`` far enough from it in luminance."""
    far = (luminance(base)[:, None] - luminance(table)[None]).abs() > _LUMINANCE_GAP
    rank = far.cumsum(1) - 1
    wanted = (u * far.sum(1)).long()
    return table[((rank == wanted[:, None]) & far).long().argmax(1)]


def sample_identities(indices: Sequence[int] | Tensor, seed: int) -> Identities:
    """People ``indices`` of the world ``seed``. Person i depends only on (seed, i).

    Args:
        indices: whole numbers, N of them.
        seed: any whole number.

    Returns:
        Identities of N people on the CPU.

    Raises:
        TruePoseError: if ``indices`` is not a flat sequence of whole numbers.
    """
    index = as_indices(indices)
    u = uniform(index, seed, 1, 48)
    column = iter(range(u.shape[1]))

    def draw() -> Tensor:
        return u[:, next(column)]

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draw()

    skins = _palette(_SKIN)
    place = draw() * (len(skins) - 1)
    low = place.long()
    part = (place - low)[:, None]
    skin = skins[low] * (1 - part) + skins[low + 1] * part
    hair = _pick(_palette(_HAIR), draw()) * between(0.88, 1.1)[:, None]
    # Light hair on dark skin would hide the hairline of nobody real; keep it dark there.
    dark = luminance(skin) < 0.5
    hair = torch.where(dark[:, None], hair * 0.35, hair).clamp(0, 1)
    eyes = _pick(_palette(_EYES), draw())
    shoe = _pick(_palette(_SHOES), draw())
    hair_length = (draw() * len(HAIR_LENGTHS)).long()
    hair_tilt = between(-1.0, 1.0)

    fabric = _palette(_FABRIC)
    top_pattern = (draw() * len(TOP_PATTERNS)).long()
    top_a = _pick(fabric, draw()) * between(0.92, 1.04)[:, None]
    top_a = top_a.clamp(0, 1)
    top_b = _contrasting(fabric, top_a, draw())
    top_accent = _contrasting(fabric, top_b, draw())
    scale = draw()
    # At 64 pixels of frame height a metre is about 32 pixels: stripes of 4.6 to 6.4 pixels, cells
    # of checks of 3.1 to 4 pixels, logos of 6.4 to 8.6 pixels. Smaller ones would not be resolved.
    period = torch.where(top_pattern == 3, 0.195 + 0.055 * scale, 0.145 + 0.055 * scale)
    around = draw()
    count = torch.where(top_pattern == 3, 8 + 2 * (around * 2).long(), 5 + (around * 3).long())
    top_phase = draw()
    logo_shape = (draw() * len(LOGO_SHAPES)).long()
    logo_size = between(0.2, 0.27)
    sleeve_long = (draw() < 0.5).long()
    bottom_long = (draw() < 0.62).long()

    trousers = _palette(_TROUSERS)
    bottom_pattern = (draw() * len(BOTTOM_PATTERNS)).long()
    bottom_a = _pick(trousers, draw()) * between(0.9, 1.05)[:, None]
    bottom_a = bottom_a.clamp(0, 1)
    bottom_b = _contrasting(torch.cat([trousers, fabric[:2]]), bottom_a, draw())
    bottom_period = between(0.2, 0.26)
    bottom_phase = draw()

    backdrop = _pick(_palette(_BACKGROUND), draw()) * between(0.85, 1.05)[:, None]
    fall = torch.where(draw() < 0.4, torch.zeros(len(index)), between(-0.12, 0.12))[:, None]
    background = torch.stack([backdrop + fall, backdrop - fall], 1).clamp(0, 1)

    # Sum of three uniforms: bell-shaped, bounded, variance 1/4; scaled to variance 0.81, clamped.
    shape = uniform(index, seed, 2, 30).view(-1, 10, 3).sum(-1) - 1.5
    beta = (shape * 1.8).clamp(-2, 2)
    return Identities(
        skin=skin,
        hair=hair,
        eyes=eyes,
        shoe=shoe,
        hair_length=hair_length,
        hair_tilt=hair_tilt,
        top_pattern=top_pattern,
        top_a=top_a,
        top_b=top_b,
        top_accent=top_accent,
        top_period=period,
        top_phase=top_phase,
        top_count=count,
        logo_shape=logo_shape,
        logo_size=logo_size,
        sleeve_long=sleeve_long,
        bottom_long=bottom_long,
        bottom_pattern=bottom_pattern,
        bottom_a=bottom_a,
        bottom_b=bottom_b,
        bottom_period=bottom_period,
        bottom_phase=bottom_phase,
        background=background,
        beta=beta,
    )
