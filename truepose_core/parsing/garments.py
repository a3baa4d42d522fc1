"""How far garments reach over a figure, from the colours along its limbs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truepose_core.parsing.figure import ARMS, HIPS, LEGS, NECK, _face_middle, _Lengths, _Skeleton, _unit

# Colours.


def _lab(image: Tensor) -> Tensor:
    """sRGB [3, H, W] in [0, 1] as CIE L*a*b* (D65), L with half its weight: light varies more than what it falls on."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    matrix = image.new_tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) / image.new_tensor([[0.9505], [1.0], [1.089]])
    xyz = torch.einsum("ij,jhw->ihw", matrix, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([0.5 * (116 * f[1] - 16), 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


_SKIN_EDGE = 5.0
"""Colours up to this squared Mahalanobis distance count as skin."""


@dataclass(frozen=True)
class _Skin:
    """The skin's colour: a Gaussian in the colours of `_lab`."""

    mean: np.ndarray
    inverse: np.ndarray

    def distance(self, colors: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of colours [..., 3]."""
        off = colors - self.mean
        return np.einsum("...i,ij,...j->...", off, self.inverse, off)


def _like_skin(lab: Tensor, skin: _Skin) -> Tensor:
    """How much each pixel looks like skin, in the units of `_likelihood`: [H, W]."""
    off = lab - torch.as_tensor(skin.mean, dtype=lab.dtype)[:, None, None]
    inverse = torch.as_tensor(skin.inverse, dtype=lab.dtype)
    return (_SKIN_EDGE - (torch.einsum("cd,dhw->chw", inverse, off) * off).sum(0)).clamp_(-4, 4)


def _skin(lab: Tensor, s: _Skeleton) -> _Skin | None:
    """Skin from the middle of the face, or of the hands where no face is seen."""
    middle = _face_middle(s)
    if middle is not None:
        # Below the eyes: cheeks and nose.
        spots = [(middle - 0.02 * s.head_scale * s.head_up, 0.075 * s.head_scale)]
    else:
        spots = [
            (s.xy[w] + 0.12 * s.scale * _unit(s.xy[w] - s.xy[e], -s.up), 0.04 * s.scale)
            for _, e, w in ARMS
            if s.seen[e] and s.seen[w]
        ]
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2), -1).reshape(-1, 2)
    samples = [_sample(lab, spot + radius * grid) for spot, radius in spots]
    colors = np.concatenate(samples) if samples else np.zeros((0, 3))
    colors = colors[np.isfinite(colors[:, 0])]
    if len(colors) < 9:
        return None
    # Eyes, nostrils and glasses are no skin: keep the half that is nearest to the median.
    off = np.abs(colors - np.median(colors, 0)).sum(1)
    colors = colors[off <= np.median(off)]
    # Limbs are lit unlike the face: at least this spread in half L, a and b.
    spread = np.cov(colors.T) + np.diag([8.0, 4.0, 5.0]) ** 2
    return _Skin(colors.mean(0), np.linalg.inv(spread))


def _sample(lab: Tensor, points: np.ndarray) -> np.ndarray:
    """Colours at points [..., 2] in pixels -> [..., 3]; NaN outside of the picture."""
    height, width = lab.shape[-2:]
    x, y = np.floor(points[..., 0]).astype(int), np.floor(points[..., 1]).astype(int)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    colors = lab.numpy()[:, y.clip(0, height - 1), x.clip(0, width - 1)]
    return np.where(inside[..., None], np.moveaxis(colors, 0, -1), np.nan)


_STEPS = 24
"""Steps along a chain of two bones."""


def _chain(lab: Tensor, s: _Skeleton, joints: tuple[int, int, int], half: float) -> np.ndarray:
    """Colours at `_STEPS` steps along two bones, 5 across: [_STEPS, 5, 3], NaN where a bone is missing."""
    colors = np.full((_STEPS, 5, 3), np.nan)
    t = (np.arange(_STEPS // 2) + 0.5) / (_STEPS // 2)
    for bone in range(2):
        first, second = joints[bone], joints[bone + 1]
        if s.seen[first] and s.seen[second]:
            a, b = s.xy[first], s.xy[second]
            unit = _unit(b - a, -s.up)
            across = np.linspace(-half, half, 5)[:, None] * np.array([-unit[1], unit[0]])
            points = (a + t[:, None] * (b - a))[:, None] + across
            colors[bone * _STEPS // 2 : (bone + 1) * _STEPS // 2] = _sample(lab, points)
    return colors


def _cloth(lab: Tensor, s: _Skeleton, low: float, high: float) -> np.ndarray:
    """The colour in the middle of the torso between t = low and high: [3], NaN outside of the picture."""
    side = np.array([-s.up[1], s.up[0]])
    across = np.linspace(-0.12, 0.12, 9)[:, None] * s.scale * side
    colors = _sample(lab, (s.neck + np.linspace(low, high, 9)[:, None] * (s.hip - s.neck))[:, None] + across)
    colors = colors[np.isfinite(colors[..., 0])]
    return np.median(colors, 0) if len(colors) else np.full(3, np.nan)


def _cover(
    lab: Tensor, s: _Skeleton, skin: _Skin, limbs: tuple[tuple[int, int, int], ...], half: float, cloth: np.ndarray
) -> float | None:
    """How far both limbs are covered, 0 to 2 (see `_Lengths`): where skin begins, best told by the two together.

    half: half the width that is looked at. cloth: the garment's colour on the torso; what is nearer to it than to the
    skin is covered. None when nothing of the limbs is seen.
    """
    score = np.zeros(_STEPS)
    known = np.zeros(_STEPS, bool)
    for joints in limbs:
        colors = _chain(lab, s, joints, half)
        there = np.isfinite(colors[..., 0])
        # Above 0 where it looks like skin. The bounds keep one fold or one print from deciding.
        far = skin.distance(colors)
        like = _SKIN_EDGE - far
        if np.isfinite(cloth[0]):
            like = np.minimum(like, skin.distance(colors - cloth + skin.mean) - far)
        like = np.clip(like, -5, 5)
        step = there.any(1)
        score[step] += np.nanmedian(np.where(there, like, np.nan)[step], axis=1)
        known |= step
    if not known.any():
        return None
    # Bare from step k on: skin after it and none before.
    before = np.concatenate([[0], np.cumsum(score)])
    gain = (before[-1] - before) - before
    best = int(np.flatnonzero(gain >= gain.max() - 1e-9)[-1])
    if best == 0 or not known[:best].any():
        return 0.0
    if best > int(np.flatnonzero(known)[-1]):
        return 2.0
    reach = best / _STEPS * 2
    return reach if reach < 1.85 else 2.0


_WAIST = 0.95
_WAIST_RANGE = (0.62, 1.3)
_WAIST_STEPS, _WAIST_ROWS = 28, 5
_SAME_CLOTH = 7.0
"""Colours of `_lab` that differ by less than this are one garment's."""


def _waist(lab: Tensor, s: _Skeleton) -> tuple[float, bool]:
    """(where the upper garment ends along the torso, whether the cloth changes there)."""
    t = np.linspace(*_WAIST_RANGE, _WAIST_STEPS)
    axis = s.hip - s.neck
    side = np.array([-s.up[1], s.up[0]])
    across = np.linspace(-0.14, 0.14, 7)[:, None] * s.scale * side
    colors = _sample(lab, (s.neck + t[:, None] * axis)[:, None] + across)
    rows = np.isfinite(colors[..., 0]).all(1)
    if rows.sum() < 2 * _WAIST_ROWS:
        return _WAIST, False
    t, line = t[rows], np.median(colors[rows], 1)
    count = np.arange(1, len(line))
    total = np.cumsum(line, 0)
    above = total[:-1] / count[:, None]
    below = (total[-1] - total[:-1]) / (len(line) - count)[:, None]
    gap = ((above - below) ** 2).sum(1)
    gap[: _WAIST_ROWS - 1], gap[len(gap) - _WAIST_ROWS + 1 :] = 0, 0
    at = (t[1:] + t[:-1]) / 2
    gain = count * (len(line) - count) / len(line) * gap * np.exp(-(((at - _WAIST) / 0.3) ** 2))
    best = int(gain.argmax())
    if gap[best] < _SAME_CLOTH**2:
        return _WAIST, False
    return float(at[best]), True


def _lengths(lab: Tensor, s: _Skeleton, skin: _Skin | None) -> _Lengths:
    waist, changes = _waist(lab, s)
    if skin is None:
        return _Lengths(waist=waist)
    sleeve = _cover(lab, s, skin, ARMS, 0.05 * s.scale, _cloth(lab, s, 0.3, 0.7))
    leg = _cover(lab, s, skin, LEGS, 0.07 * s.scale, _cloth(lab, s, 0.98, 1.1))
    feet = [
        _sample(lab, s.xy[a] + np.linspace(0.05, 0.15, 5)[:, None] * s.scale * _unit(s.xy[a] - s.xy[k], -s.up))
        for _, k, a in LEGS
        if s.seen[k] and s.seen[a]
    ]
    colors = np.concatenate(feet) if feet else np.zeros((0, 3))
    colors = colors[np.isfinite(colors[:, 0])]
    barefoot = leg is not None and leg < 1.7 and len(colors) > 3 and float(np.median(skin.distance(colors))) < 3
    dress = not changes and leg is not None and 0 < leg < 1.7 and s.seen[list(HIPS)].all() and s.seen[NECK]
    return _Lengths(2.0 if sleeve is None else sleeve, 2.0 if leg is None else leg, waist, barefoot, bool(dress))
