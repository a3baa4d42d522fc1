"""AdaIN: the source's mean and contrast of features in place of the picture's own, as "reference only" does it.

Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization" (arXiv 1703.06868),
applied to the activations between a UNet's blocks.
"""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-6
"""The variance of a constant channel, so that nothing is divided by zero."""


def moments(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the picture: h [B, C, h, w] -> two [B, C, 1, 1]."""
    mean = h.mean((2, 3), keepdim=True)
    variance = (h - mean).square().mean((2, 3), keepdim=True)
    return mean, variance.clamp(min=_LEAST).sqrt()


def restyled(h: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """h [B, C, h, w] with these moments [B or 1, C, 1, 1] in place of its own."""
    own_mean, own_deviation = moments(h)
    return (h - own_mean) / own_deviation * deviation + mean
