"""One safetensors file per model: weights and a description of themselves in the metadata. Loading is strict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.models.cfld_encoder import is_cfld
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.model import TruePoseModel

ARCHITECTURE = "truepose"
BUNDLED = "bundled"
"""The name of the model that ships with the package."""
Network = TypeVar("Network", bound=nn.Module)


def bundled_path(name: str = "mannequin") -> Path:
    """The file of a model that ships with the package. Raises TruePoseError if it is missing."""
    path = Path(str(resources.files("truepose_core") / "assets" / f"{name}.safetensors"))
    if not path.is_file():
        raise TruePoseError(f"{path} is missing from this installation; install the package again")
    return path


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{x.dtype}|{tuple(x.shape)}|".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(
    model: TruePoseModel,
    path: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model to one safetensors file, atomically. training: what the metadata tells about data, steps,
    seed and hardware (JSON values). dtype: store the weights in this type. A VAE is written where the configuration
    has one of its own (`TruePoseConfig.vae`)."""
    from safetensors.torch import save

    from truepose_core.images import atomic_write

    tensors = {
        name: x.detach().cpu().to(dtype or x.dtype).contiguous().clone()
        for name, x in model.state_dict().items()
        if model.config.vae is not None or not name.startswith("codec.")
    }
    metadata = {
        "format": "pt",
        "architecture": ARCHITECTURE,
        "config": model.config.to_json(),
        "prediction_type": model.config.prediction_type,
        "scheduler": json.dumps(model.config.scheduler, sort_keys=True),
        "training": json.dumps(dict(training or {}), sort_keys=True),
        "sha256": weights_hash(tensors),
    }
    return atomic_write(path, save(tensors, metadata), overwrite=overwrite)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises TruePoseError when the file is missing, truncated or not one."""
    return _open(path)[0]


def _open(path: str | Path, with_tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise TruePoseError(f"no model file at {path}; expected a .safetensors file made by this package")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TruePoseError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated: get or copy it again"
        ) from error
    return metadata, tensors


def save_small(
    tensors: Mapping[str, Tensor], path: str | Path, kind: str, config: Mapping[str, Any], training: Mapping[str, Any]
) -> Path:
    """Write a small network (lifting, field, alignment) in float16, atomically, described like a model."""
    from safetensors.torch import save

    from truepose_core.images import atomic_write

    half = {name: x.detach().cpu().half().contiguous().clone() for name, x in tensors.items()}
    metadata = {
        "format": "pt",
        "architecture": f"{ARCHITECTURE}-{kind}",
        "config": json.dumps(dict(config), sort_keys=True),
        "training": json.dumps(dict(training), sort_keys=True),
        "sha256": weights_hash(half),
    }
    return atomic_write(path, save(half, metadata), overwrite=True)


def read_small(path: str | Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of `save_small`. Raises TruePoseError when it is missing, damaged or another
    kind."""
    metadata, tensors = open_tensors(path)
    if metadata.get("architecture") != f"{ARCHITECTURE}-{kind}":
        raise TruePoseError(
            f"{path} holds {metadata.get('architecture') or 'another architecture'}; expected the weights of "
            f"truepose train --row {kind}"
        )
    return metadata, tensors


def load_small(path: str | Path, kind: str, make: Callable[..., Network]) -> Network:
    """The network of a file of `save_small`, in float32, for inference. make: takes its configuration as keywords.

    Its weights are ordinary tensors even where a node of ComfyUI, which runs in inference mode, asks for them first: a
    gradient may be taken through the network. Raises TruePoseError as `read_small`, and where the weights do not fit.
    """
    metadata, tensors = read_small(path, kind)
    # First weights are drawn and thrown away: whoever asks first must not find other random numbers than who asks next.
    with torch.inference_mode(False), torch.random.fork_rng(devices=()):
        try:
            network = make(**json.loads(metadata["config"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TruePoseError(f"{path}: the metadata does not say the sizes of this network ({error})") from error
        load_strict(network, {name: x.float() for name, x in tensors.items()}, str(path))
        return network.eval().requires_grad_(False)


def open_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises TruePoseError when it is missing or truncated."""
    return _open(path, with_tensors=True)


def load_model(path: str | Path = BUNDLED, *, verify: bool = False, vae: str | Path | None = None) -> TruePoseModel:
    """Load a model file ("bundled" for the one that ships), in float32, ready for inference.

    vae: a folder in diffusers format whose vae/ a model that was trained on latents needs.
    verify: also compare the weights with the hash in the metadata. Raises TruePoseError when the file is missing,
    damaged, of another architecture, or when a weight is missing, unknown or of another shape.
    """
    path = bundled_path() if str(path) == BUNDLED else Path(path)
    metadata, tensors = _open(path, with_tensors=True)
    if metadata.get("architecture") != ARCHITECTURE:
        keys = ", ".join(sorted(tensors)[:3])
        raise TruePoseError(
            f"{path} holds {metadata.get('architecture') or 'another architecture'} (keys such as {keys}); "
            f"expected a {ARCHITECTURE} model file, or a folder in diffusers format. truepose inspect says what a file "
            "is, truepose convert makes a model file of other systems' weights"
        )
    if verify and weights_hash(tensors) != metadata.get("sha256"):
        raise TruePoseError(f"{path}: the weights do not match the hash in their metadata; the file was changed")
    if "config" not in metadata:
        raise TruePoseError(f"{path} does not say its configuration in its metadata; get or make it again")
    if is_cfld(metadata):
        raise TruePoseError(f"{path} is a CFLD model; load it with truepose_core.models.cfld.load_cfld")
    config = TruePoseConfig.from_json(metadata["config"])
    codec = None
    if config.vae is not None and vae is not None:
        raise TruePoseError(f"{path} brings its own VAE; leave out --vae {vae}")
    if config.codec == "vae" and config.vae is None:
        from truepose_core.models.folder import load_vae

        if vae is None:
            raise TruePoseError(
                f"{path} was trained on the latents of a VAE; name the folder that has it (--vae FOLDER)"
            )
        codec = load_vae(vae)
    model = TruePoseModel(config, codec=codec)
    load_strict(model, tensors, str(path), ignore=() if config.vae is not None else ("codec.",))
    return model.eval()


def load_strict(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str, ignore: tuple[str, ...] = ()
) -> None:
    """Copy tensors into the module; every weight must be there, none may be left over, shapes must agree.

    ignore: prefixes of the module's weights that the file does not carry (the VAE).
    """
    own = {k: v for k, v in module.state_dict().items() if not k.startswith(ignore)} if ignore else module.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
        for k in sorted(set(own) & set(tensors))
        if own[k].shape != tensors[k].shape
    ]
    problems = [
        f"{len(items)} {label}: {', '.join(items[:6])}{' ...' if len(items) > 6 else ''}"
        for label, items in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if items
    ]
    if problems:
        raise TruePoseError(f"{where}: the weights do not fit the model. " + "; ".join(problems))
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(tensors[name])
