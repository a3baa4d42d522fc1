"""How the published codes of PIDM, CFLD and PCDMs measure a result, and torchmetrics' defaults, as presets.

Numbers are comparable under the same preset only. What differs between the codes is small to write and large in the
figures: which filter brings a picture to the measured size, what LPIPS is fed, the window of SSIM, whether the last
partial batch counts. Each is a field of `Protocol`; the facts are from the codes' own metrics.py (PIDM and PCDMs) and
models/metrics.py with pose_transfer_test.py (CFLD).

* size (height x width): 256x176 in pidm, whose SSIM and PSNR take the files' own size; 256x176 or 512x352 in cfld and
  pcdms; the files' own in torchmetrics.
* filter: OpenCV's bilinear on floats (pidm); Pillow's bicubic on bytes for true pictures, torch's antialiased bicubic
  cut to bytes for results (cfld); OpenCV's bicubic on floats (pcdms); none (torchmetrics).
* LPIPS on AlexNet, version 0.1, is fed [-1, 1], in pcdms [0, 1].
* SSIM: a uniform window of 51 with the sample covariance, and SSIM_256: a Gaussian of 1.2 pixels (pidm, pcdms) or 1.5
  (cfld) with the population's, on 0 to 255. torchmetrics: a Gaussian of 1.5.
* the last partial batch is dropped in pidm (64) and pcdms (FID 128, LPIPS 64).
* pcdms makes several samples per pair and keeps the best by SSIM_256 to the true picture.
* FID is on torchvision's Inception at 299x299 (bilinear), in torchmetrics on torch-fidelity's. The real pictures are
  the training split in the published tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.pictures.files import decode, load_image

METRICS = ("fid", "lpips", "ssim", "psnr")
"""What can be measured. ssim is every SSIM of the preset."""
SMALL, LARGE = (256, 176), (512, 352)
"""(height, width) at which pose transfer on DeepFashion is measured."""


@dataclass(frozen=True)
class Protocol:
    """One published way of measuring.

    sizes: the (height, width) it knows, the usual one first; () where files are measured as they are. resize: "cv2
    bilinear", "cv2 bicubic", "bicubic" (Pillow for true pictures, torch for results) or "none". native: SSIM and PSNR
    are taken at the files' own size. raw_lpips: LPIPS is fed [0, 1] instead of [-1, 1]. ssim: column -> sigma of the
    Gaussian window in pixels, None for the uniform window of 51. double: SSIM is computed in float64 (an older
    scikit-image), else float32. fid_batch, lpips_batch: pictures of a batch of which the last partial one is dropped,
    None where all count. best_of: several samples per pair are allowed, and the best by SSIM_256 counts.
    fid_network: "torchvision" or "torch-fidelity".
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    resize: str
    ssim: tuple[tuple[str, float | None], ...]
    native: bool = False
    raw_lpips: bool = False
    double: bool = False
    fid_batch: int | None = None
    lpips_batch: int | None = None
    best_of: bool = False
    fid_network: str = "torchvision"


PRESETS: dict[str, Protocol] = {
    preset.name: preset
    for preset in (
        Protocol(
            "pidm",
            (SMALL,),
            "cv2 bilinear",
            (("ssim", None), ("ssim_256", 1.2)),
            native=True,
            double=True,
            fid_batch=64,
            lpips_batch=64,
        ),
        Protocol("cfld", (SMALL, LARGE), "bicubic", (("ssim", None), ("ssim_256", 1.5))),
        Protocol(
            "pcdms",
            (SMALL, LARGE),
            "cv2 bicubic",
            (("ssim", None), ("ssim_256", 1.2)),
            raw_lpips=True,
            fid_batch=128,
            lpips_batch=64,
            best_of=True,
        ),
        Protocol("torchmetrics", (), "none", (("ssim", 1.5),), fid_network="torch-fidelity"),
    )
}

_UNIFORM = 51
_TRUNCATE = 3.5
"""Standard deviations at which scikit-image cuts a Gaussian window."""


@dataclass(frozen=True)
class Measured:
    """What a preset looks at of one pair, float32 [3, H, W] in [0, 1]: result and truth as SSIM and PSNR see them, and
    as the networks of LPIPS and FID see them (before what `lpips_input` does)."""

    result: Tensor
    truth: Tensor
    network_result: Tensor
    network_truth: Tensor


def read_pair(protocol: Protocol, result: str | Path, truth: str | Path, size: tuple[int, int] | None) -> Measured:
    """The pictures of one pair as the preset looks at them. size: (height, width), one of the preset's; None for a
    preset without. Raises TruePoseError for a picture that cannot be read, and where sizes differ that must not."""
    made, true = read_result(protocol, result, size), read_truth(protocol, truth, size)
    if not (protocol.native or size is None):
        return Measured(made, true, made, true)
    own = [load_image(path)[0] for path in (result, truth)] if protocol.native else [made, true]
    if own[0].shape != own[1].shape:
        sides = [f"{x.shape[-1]}x{x.shape[-2]}" for x in own]
        raise TruePoseError(
            f"{result} is {sides[0]} and {truth} is {sides[1]} (width x height); the preset {protocol.name} measures "
            "the files as they are, so they must be of one size"
        )
    return Measured(*own, made, true)


def read_truth(protocol: Protocol, path: str | Path, size: tuple[int, int] | None) -> Tensor:
    """A real picture as the preset's networks see it: float32 [3, H, W], about [0, 1]."""
    if protocol.resize == "bicubic":
        return _pillow_bicubic(path, size)
    return _resized_by_cv2(protocol, load_image(path)[0], size)


def read_result(protocol: Protocol, path: str | Path, size: tuple[int, int] | None) -> Tensor:
    """A model's picture, likewise. CFLD brings its samples to the measured size as tensors and cuts them to bytes."""
    picture = load_image(path)[0]
    if protocol.resize != "bicubic":
        return _resized_by_cv2(protocol, picture, size)
    picture = F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0] * 255
    # A picture of that size already comes back as it was; the cut must not lose a step to rounding.
    if picture.shape[-2:] == load_size(path):
        picture = picture.round()
    return picture.clamp(0, 255).to(torch.uint8).float() / 255


def load_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file."""
    from truepose_core.pictures.files import image_size

    return image_size(path)[::-1]


def _pillow_bicubic(path: str | Path, size: tuple[int, int]) -> Tensor:
    import numpy as np
    from PIL import Image

    # Bytes before and after, as torchvision's Resize leaves a Pillow picture.
    picture = decode(path).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _resized_by_cv2(protocol: Protocol, picture: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None:
        return picture
    cv2 = opencv(protocol.name)
    filters = {"cv2 bilinear": cv2.INTER_LINEAR, "cv2 bicubic": cv2.INTER_CUBIC}
    pixels = (picture.permute(1, 2, 0) * 255).round().contiguous().numpy()
    resized = cv2.resize(pixels, size[::-1], interpolation=filters[protocol.resize])
    return torch.from_numpy(resized).permute(2, 0, 1) / 255


def opencv(why: str) -> ModuleType:
    """OpenCV. Raises TruePoseError when it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise TruePoseError(
            f'the preset {why} resizes with OpenCV; install it with: pip install "comfyui-truepose[eval]"'
        ) from error
    return cv2


def skimage_metrics() -> ModuleType:
    """scikit-image's metrics. Raises TruePoseError when it is not installed."""
    try:
        import skimage.metrics
    except ImportError as error:
        raise TruePoseError(
            'SSIM and PSNR need scikit-image; install it with: pip install "comfyui-truepose[eval]"'
        ) from error
    return skimage.metrics


def lpips_input(protocol: Protocol, picture: Tensor) -> Tensor:
    """What LPIPS is fed: [-1, 1], or [0, 1] where the code forgot to bring it there (PCDMs)."""
    return picture if protocol.raw_lpips else picture * 2 - 1


def psnr(result: Tensor, truth: Tensor) -> float:
    """10 log10(1 / mean squared error) of pictures [3, H, W] in [0, 1], in dB; infinite for equal ones."""
    import numpy as np

    with np.errstate(divide="ignore"):
        return float(skimage_metrics().peak_signal_noise_ratio(truth.numpy(), result.numpy(), data_range=1))


def ssim(result: Tensor, truth: Tensor, sigma: float | None, double: bool) -> float:
    """SSIM of pictures [3, H, W] in [0, 1]; sigma and double as `Protocol.ssim`.

    The uniform window takes the sample covariance and a data range of 1; the Gaussian one the population's, on values
    of 0 to 255 with the range that the result itself has, as the codes do. A result of one flat colour has no range;
    its SSIM is NaN there too.
    """
    import numpy as np

    measure = skimage_metrics().structural_similarity
    made, true = (x.numpy().astype(np.float64 if double else np.float32) for x in (result, truth))
    if sigma is None:
        if min(truth.shape[-2:]) < _UNIFORM:
            raise TruePoseError(
                f"a picture is {truth.shape[-1]}x{truth.shape[-2]} (width x height), and the preset's SSIM has a "
                f"window of {_UNIFORM} pixels; expected pictures of at least that"
            )
        return float(measure(true, made, data_range=1, win_size=_UNIFORM, channel_axis=0))
    made, true = made * 255, true * 255
    with np.errstate(divide="ignore", invalid="ignore"):
        value = measure(
            true,
            made,
            gaussian_weights=True,
            sigma=sigma,
            use_sample_covariance=False,
            channel_axis=0,
            data_range=made.max() - made.min(),
        )
    return float(value)


def torchmetrics_ssim(result: Tensor, truth: Tensor) -> float:
    """SSIM as torchmetrics' defaults give it for a data range of 1."""
    from truepose_core.evaluation.metrics import library

    return float(library().structural_similarity_index_measure(result[None], truth[None], data_range=1.0))


def similarities(protocol: Protocol, pictures: Measured) -> dict[str, float]:
    """Every SSIM of the preset by its column."""
    if protocol.name == "torchmetrics":
        return {"ssim": torchmetrics_ssim(pictures.result, pictures.truth)}
    return {name: ssim(pictures.result, pictures.truth, sigma, protocol.double) for name, sigma in protocol.ssim}


def best_sample(results: list[Path], truth: Path) -> Path:
    """Of several samples of one pair the one with the highest SSIM_256 (sigma 1.2) to the truth, the first of equals.

    As PCDMs choose: at the sample's own size, the true picture brought there by Pillow's bicubic filter."""
    scores = []
    for path in results:
        made = load_image(path)[0]
        true = _pillow_bicubic(truth, tuple(made.shape[-2:]))
        scores.append(ssim(made, true, 1.2, double=True))
    return results[max(range(len(scores)), key=lambda i: scores[i])]


def counted(total: int, batch: int | None) -> int:
    """How many of `total` pictures a preset counts that drops its last partial batch. A batch larger than the set is
    made as large as the set, so then all count."""
    return total if batch is None or batch >= total else total // batch * batch
