"""The networks behind FID and LPIPS, on weights that the user has, and the Frechet distance.

Nothing is downloaded. A file is looked for where it is named, in torch's cache of downloads (where torchvision and
torch-fidelity put it), and in the folder of `truepose models`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.protocols import Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights. file: its name, which ends in the first digits of its sha256. page: where it is
    published. option: how a user names another place."""

    file: str
    page: str
    option: str

    @property
    def digits(self) -> str:
        """The first digits of the published file's sha256."""
        return self.file.rpartition("-")[2].partition(".")[0]


INCEPTION = {
    "torchvision": WeightsFile(
        "inception_v3_google-0cc3c7bd.pth", "https://download.pytorch.org/models/", "--inception FILE"
    ),
    "torch-fidelity": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases",
        "--inception FILE",
    ),
}
ALEXNET = WeightsFile("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/", "--alexnet FILE")

Features = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [0, 1] -> features [B, D]."""


def find_weights(wanted: WeightsFile, given: str | Path | None, why: str) -> Path:
    """The file of weights. given: the user's path, which then must exist. why: what it is for, in an error.

    Raises TruePoseError that says what to put where when it is nowhere.
    """
    from truepose_core.networks.known import default_folder

    if given is not None:
        if not Path(given).is_file():
            raise TruePoseError(f"the weights {given} do not exist; expected {wanted.file} of {wanted.page}")
        return Path(given)
    folders = (Path(torch.hub.get_dir()) / "checkpoints", default_folder())
    for folder in folders:
        if (folder / wanted.file).is_file():
            return folder / wanted.file
    raise TruePoseError(
        f"{why} needs {wanted.file}, which is in neither {folders[0]} nor {folders[1]}; get it from {wanted.page}, or "
        f"name it with {wanted.option}, or leave {why} out with --metrics"
    )


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file)


def _hash(file: object) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def inception(network: str, path: Path, device: torch.device | str = "cpu") -> Features:
    """The features [B, 2048] of FID. network: as `Protocol.fid_network`.

    "torchvision" is ImageNet's Inception v3 up to its mean pooling, as PIDM, CFLD and PCDMs call it: pictures brought
    to 299x299 (bilinear, no antialiasing), and each channel taken by x 0.229/0.5 + (0.485 - 0.5)/0.5 (and so on), which
    is torchvision's way from ImageNet-normalised to [-1, 1], applied to [0, 1]. "torch-fidelity" is the network of the
    original FID, on bytes. Raises TruePoseError for weights that are not the network's, and without torch-fidelity.
    """
    if network == "torch-fidelity":
        return _fidelity(path, device)
    from torchvision.models import inception_v3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = inception_v3(weights=None, init_weights=False, aux_logits=True)
    load_exactly(net, path, "torchvision's Inception v3")
    net.fc, net.dropout, net.transform_input = nn.Identity(), nn.Identity(), False
    net.eval().requires_grad_(False).to(device)
    scale = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1) / 0.5
    shift = (torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1) - 0.5) / 0.5

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures.to(device), size=(299, 299), mode="bilinear", align_corners=False)
        return net(x * scale + shift).cpu()

    return features


def _fidelity(path: Path, device: torch.device | str) -> Features:
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise TruePoseError(
            "the FID of the preset torchmetrics needs torch-fidelity; install it with: "
            'pip install "comfyui-truepose[eval]", or choose another preset'
        ) from error
    _read_tensors(path)  # with our words, should it be no file of weights
    try:
        net = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).to(device)
    except RuntimeError as error:
        raise TruePoseError(f"{path} does not hold torch-fidelity's Inception: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        return net((pictures * 255).byte().to(device)).cpu()

    return features


def lpips_network(path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """LPIPS of the package lpips (version 0.1) on AlexNet: (result, truth) [B, 3, H, W] -> [B, 1, 1, 1].

    path: torchvision's AlexNet. Raises TruePoseError for other weights, and without the package.
    """
    try:
        import lpips
    except ImportError as error:
        raise TruePoseError(
            'LPIPS needs the package lpips; install it with: pip install "comfyui-truepose[eval]"'
        ) from error
    from torchvision.models import alexnet

    trunk = alexnet(weights=None)
    load_exactly(trunk, path, "torchvision's AlexNet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in net.net.children():
        for index, layer in part.named_children():
            layer.load_state_dict(trunk.features[int(index)].state_dict())
    return net.eval().requires_grad_(False).to(device)


def load_exactly(net: nn.Module, path: Path, what: str) -> None:
    """Load a whole network. Raises TruePoseError when the file lacks a tensor, has one more, or of another shape."""
    given = _read_tensors(path)
    wanted = net.state_dict()
    # Counters of batches are newer than the published files.
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(given) - optional)
    strange = sorted(set(given) - set(wanted))
    shapes = [n for n in wanted if n in given and wanted[n].shape != given[n].shape]
    for names, problem in ((missing, "does not hold"), (strange, "also holds"), (shapes, "has in another shape")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TruePoseError(f"{path} is not {what}: it {problem} {names[0]}{more}")
    net.load_state_dict({**{name: wanted[name] for name in optional}, **given})


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    from truepose_core.weights.reading import CheckpointReader

    with CheckpointReader(path) as reader:
        return {name: reader.tensor(name) for name in reader.infos()}


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] (over n - 1) of features, float64. count: of pictures, None where a file does not
    say it. root: R [D, n] with R R^T the covariance, where that is smaller than finding it."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    root: np.ndarray | None = None


def moments(features: Tensor, protocol: Protocol) -> Moments:
    """Of the features [N, D] of a set of pictures. CFLD takes the mean in float32, the others in float64.

    Raises TruePoseError for fewer than two pictures.
    """
    import numpy as np

    if len(features) < 2:
        raise TruePoseError(f"FID needs at least 2 pictures on each side; there are {len(features)}")
    values = features.numpy().astype(np.float32 if protocol.name == "cfld" else np.float64)
    mean, count = values.mean(0), len(values)
    few = count < values.shape[1]
    root = (values - values.mean(0, dtype=np.float64)).T / (count - 1) ** 0.5 if few else None
    return Moments(mean.astype(np.float64), np.cov(values, rowvar=False), count, root)


def frechet_distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017.

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which needs no root of a product that
    is singular for fewer pictures than features, where the codes' sqrtm adds 1e-6 to the diagonals or stops.
    """
    import numpy as np

    if one.mean.shape != other.mean.shape:
        raise TruePoseError(
            f"FID compares features of {one.mean.shape[0]} and {other.mean.shape[0]} numbers; are the statistics of "
            "the same network?"
        )
    roots = _root(one).T @ _root(other)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    difference = one.mean - other.mean
    return float(difference @ difference + np.trace(one.covariance) + np.trace(other.covariance) - 2 * overlap)


def _root(moments: Moments) -> np.ndarray:
    """R [D, rank] with R R^T the covariance."""
    import numpy as np

    if moments.root is not None:
        return moments.root
    values, vectors = np.linalg.eigh(moments.covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def read_moments(path: Path) -> tuple[Moments, dict[str, str]]:
    """Statistics of a real set as PIDM and PCDMs cache them (an .npz with mu and sigma), and what ours says of how they
    were made ({} for theirs). Raises TruePoseError for another file."""
    import numpy as np

    from truepose_core.body.arrays import read_npz

    wanted = ("mu", "sigma", "preset", "size", "inception", "count")
    arrays = read_npz(path, wanted, f"the statistics {path}")
    mean, covariance = arrays.get("mu"), arrays.get("sigma")
    if mean is None or covariance is None or covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
        raise TruePoseError(f"{path} holds {sorted(arrays)}; expected mu [D] and sigma [D, D]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise TruePoseError(f"the statistics {path} hold NaN or infinite values")
    made = {name: str(arrays[name]) for name in ("preset", "size", "inception") if name in arrays}
    count = int(arrays["count"]) if "count" in arrays else None
    return Moments(mean.astype(np.float64), covariance.astype(np.float64), count), made


def moments_bytes(values: Moments, made: Mapping[str, str]) -> bytes:
    """An .npz file that `read_moments` reads."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    words = {name: np.array(text) for name, text in made.items()}
    np.savez(buffer, mu=values.mean, sigma=values.covariance, count=np.array(values.count or 0), **words)
    return buffer.getvalue()


def features_of(pictures: Iterable[Tensor], network: Features, batch: int = 32) -> Tensor:
    """Features [N, D] of pictures [3, H, W], a batch at a time; sizes may differ from picture to picture."""
    parts: list[Tensor] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        if waiting:
            parts.append(network(torch.stack(waiting)).float())
            waiting.clear()

    for picture in pictures:
        if waiting and (len(waiting) == batch or waiting[0].shape != picture.shape):
            flush()
        waiting.append(picture)
    flush()
    if not parts:
        raise TruePoseError("FID needs at least 2 pictures on each side; there are none")
    return torch.cat(parts)
