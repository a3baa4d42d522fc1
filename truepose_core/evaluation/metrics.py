"""PSNR and SSIM inside the person, the clothes and the face of the true target picture.

A region is the pixels of which the TRUE target parsing gives it at least half; what a model painted where does not
change which pixels are looked at. The measures themselves are torchmetrics' (the extra "eval").
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.pattern import CLOTHES, pattern_scores
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

AREAS = ("foreground", "clothes", "face")
COLUMNS = (*(f"{area}_{name}" for name in ("psnr", "ssim") for area in AREAS), "pattern")
"""What `measure` gives, in the table's order."""

MIN_PIXELS = 4
"""Pictures that show fewer pixels of an area are left out of that area's columns (a face seen from behind)."""
PSNR_CAP = 60.0
"""dB given to equal areas, whose PSNR is infinite: below the rounding of 8-bit pictures (58.9 dB)."""


def library() -> ModuleType:
    """torchmetrics' functional image measures. Raises TruePoseError when torchmetrics is not installed."""
    try:
        import torchmetrics.functional.image as measures
    except ImportError as error:
        raise TruePoseError(
            'the evaluation needs torchmetrics; install it with: pip install "comfyui-truepose[eval]"'
        ) from error
    return measures


def area_masks(parsing: HumanParsing) -> dict[str, Tensor]:
    """The pixels of each area: {"foreground" | "clothes" | "face": bool [B, H, W]}. parsing: the true target's."""
    return {
        "foreground": parsing.masks[:, Region.BACKGROUND] <= 0.5,
        "clothes": parsing.mask(CLOTHES) >= 0.5,
        "face": parsing.mask(Region.FACE) >= 0.5,
    }


def masked_psnr(images: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """PSNR in dB over the masked pixels and all colours, one per picture: float64 [B], at most `PSNR_CAP`.

    images, truth: [B, 3, H, W] in [0, 1]. mask: bool [B, H, W]. NaN where the mask has fewer than `MIN_PIXELS` pixels.
    A table's PSNR is the mean of these over pictures, not the PSNR of the mean error.
    """
    psnr = library().peak_signal_noise_ratio
    result = torch.full((images.shape[0],), torch.nan, dtype=torch.float64)
    for i, pixels in enumerate(mask):
        if int(pixels.sum()) >= MIN_PIXELS:
            value = psnr(images[i][:, pixels].double(), truth[i][:, pixels].double(), data_range=1.0)
            result[i] = value.clamp(max=PSNR_CAP)
    return result


def ssim_map(images: Tensor, truth: Tensor) -> Tensor:
    """SSIM of every pixel, the mean of its three colours: [B, H, W] in [-1, 1].

    Gaussian window of standard deviation 1.5 pixels (Wang et al., Image Quality Assessment, 2004, section III-B).
    images, truth: [B, 3, H, W] in [0, 1].
    """
    _, full = library().structural_similarity_index_measure(
        images.float(), truth.float(), data_range=1.0, reduction="none", return_full_image=True
    )
    return full.mean(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, H, W] over the masked pixels: [B]; NaN where there are fewer than `MIN_PIXELS`."""
    count = mask.flatten(1).sum(1)
    mean = (values * mask).flatten(1).sum(1) / count.clamp(min=1)
    return mean.masked_fill(count < MIN_PIXELS, torch.nan)


def measure(images: Tensor, truth: Tensor, parsing: HumanParsing) -> dict[str, Tensor]:
    """All columns of the table, one number per picture: {column: float64 [B]}.

    images: the results, [B, 3, H, W] in [0, 1]. truth: the true target pictures. parsing: theirs, of the same size.
    NaN marks a picture that does not count in a column. Windows of SSIM near an area's border reach over it.
    Raises TruePoseError when the sizes differ.
    """
    if images.shape != truth.shape or parsing.size != tuple(truth.shape[-2:]) or parsing.batch != truth.shape[0]:
        raise TruePoseError(
            f"results are {tuple(images.shape)}, true pictures {tuple(truth.shape)} and their parsing "
            f"{tuple(parsing.masks.shape)}; expected one batch of one size"
        )
    masks = area_masks(parsing)
    similarity = ssim_map(images, truth)
    columns = {f"{area}_psnr": masked_psnr(images, truth, mask) for area, mask in masks.items()}
    columns |= {f"{area}_ssim": masked_mean(similarity.double(), mask) for area, mask in masks.items()}
    columns["pattern"] = pattern_scores(images, truth, parsing)
    return columns
