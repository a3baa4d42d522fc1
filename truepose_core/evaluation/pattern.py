"""The pattern score: does the cloth carry the true pattern? (Ours.)

PSNR rewards a garment of the right mean colour, however blurred. This score looks at what is left of each garment
when its slow part (colour, shading) is taken away:

    r(I) = I - G(m I) / G(m)    inside m            the residual: m the garment's eroded mask, G a Gaussian
    score = <r(a), r(b)> / max(|r(a)|^2, |r(b)|^2)      a the result, b the truth, over pixels and colours

That is the correlation of the residuals times min(c, 1/c), c the ratio of their contrasts. So it is 1 only for the
true residual; a pattern at half its contrast has 0.5; noise and invented detail of any strength have about 0, because
they enter the larger norm but not the product; a pattern of the wrong direction or another garment's has about 0 on
average; and one shifted by half a period is negative. A constant shift of colour changes nothing.

A picture's score keeps its sign, and only the mean over pictures is clamped to [0, 1]: a model that paints stripes
with a guessed phase then gains nothing by guessing, where clamping each picture would give it about 0.3.

Only garments whose true picture has contrast count (`MIN_CONTRAST`): on plain cloth there is no pattern to carry.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

CLOTHES = (Region.UPPER, Region.LOWER)
"""The garments. Each is looked at alone, so the step from shirt to trousers is no pattern."""

SIGMA = 3 / 64
"""Standard deviation of G in picture heights, for a person who fills the picture: about half the period of the
coarsest pattern, so that patterns stay in the residual and shading leaves it."""
EROSION = 1 / 64
"""How far the mask is eroded, in picture heights (at least a pixel): silhouettes are no pattern either."""
PURE = 0.99
"""A pixel belongs to a garment where the parsing gives it at least this share."""
MIN_CONTRAST = 0.09
"""Root mean square of the true residual, in colour units of 0 to 1, from which a garment is said to have a pattern.
In the mannequin world plain garments stay below 0.085 (folds, collar, shading) and stripes and checks above 0.09."""
MIN_PIXELS = 16
"""Garments with fewer pixels in the eroded mask are left out."""


def pattern_scores(images: Tensor, truth: Tensor, parsing: HumanParsing) -> Tensor:
    """The score of each picture, the mean over its patterned garments: float64 [B] in [-1, 1].

    images: the results, [B, 3, H, W] in [0, 1]. truth: the true pictures. parsing: theirs, of the same size. NaN where
    the true picture shows no patterned garment.
    """
    scores = torch.stack([garment_scores(images, truth, parsing, garment) for garment in CLOTHES])
    return scores.nanmean(0)


def pattern_score(images: Tensor, truth: Tensor, parsing: HumanParsing) -> float | None:
    """The score of a set of pictures in [0, 1]: the mean of `pattern_scores`, clamped; None if no picture counts."""
    return mean_score(pattern_scores(images, truth, parsing))


def mean_score(scores: Tensor) -> float | None:
    """Mean over pictures [B], NaN left out, clamped to [0, 1]; None if no picture counts."""
    counted = scores[~scores.isnan()]
    return counted.mean().clamp(0, 1).item() if len(counted) else None


def garment_scores(images: Tensor, truth: Tensor, parsing: HumanParsing, garment: Region) -> Tensor:
    """The score of one garment of each picture: float64 [B] in [-1, 1]; NaN where it shows no pattern or too little."""
    mask = garment_mask(parsing, garment)
    sigma = SIGMA * truth.shape[-2]
    result, true = residual(images.double(), mask, sigma), residual(truth.double(), mask, sigma)
    product, energy, true_energy = (
        (x * y).flatten(1).sum(1) for x, y in ((result, true), (result, result), (true, true))
    )
    pixels = mask.flatten(1).sum(1)
    contrast = (true_energy / (3 * pixels).clamp(min=1)).sqrt()
    score = product / torch.maximum(energy, true_energy).clamp(min=1e-12)
    return score.masked_fill((contrast < MIN_CONTRAST) | (pixels < MIN_PIXELS), torch.nan)


def garment_mask(parsing: HumanParsing, garment: Region) -> Tensor:
    """The garment's pure pixels, eroded: float64 [B, 1, H, W] of 0 and 1."""
    radius = max(1, round(EROSION * parsing.size[0]))
    outside = (parsing.mask(garment)[:, None] < PURE).double()
    return 1 - max_pool2d(outside, 2 * radius + 1, 1, radius)


def residual(image: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """What is left inside the mask when its local mean is taken away, 0 outside: [B, C, H, W].

    The mean is Gaussian of sigma pixels and takes in masked pixels only (normalised convolution). mask: [B, 1, H, W].
    """
    # A masked pixel weighs 1 in its own mean; only where nothing is masked for far around is there no weight at all.
    local = _blur(image * mask, sigma) / _blur(mask, sigma).clamp(min=1e-9)
    return (image - local) * mask


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, C, H, W], nothing around. As two matrix products: fast in float64, exact to its rounding."""
    return _gaussian(x.shape[-2], sigma, x) @ x @ _gaussian(x.shape[-1], sigma, x)


def _gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    """[size, size]: the weight of each pixel of a line in each pixel's mean (not normalised: `residual` divides)."""
    place = torch.arange(size, dtype=like.dtype, device=like.device)
    return (-((place[:, None] - place) ** 2) / (2 * sigma**2)).exp()
