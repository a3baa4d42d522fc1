"""One safetensors file per network: weights and a description of themselves in the metadata. Loading is strict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.weights.settings import compare_shapes

ARCHITECTURE = "truepose"
BUNDLED = "bundled"
"""The name of the model that ships with the package."""


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


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises TruePoseError when the file is missing, truncated or not one."""
    return _open(path)[0]


def read_shapes(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata of a safetensors file, and the shape of every tensor; no values. Raises as `read_metadata`."""
    with _opened(path) as file:
        return file.metadata() or {}, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _open(path: str | Path, with_tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
        return file.metadata() or {}, tensors


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        if not path.is_file():
            raise TruePoseError(f"no model file at {path}; expected a .safetensors file made by this package")
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, TruePoseError):
            raise
        raise TruePoseError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated: get or copy it again"
        ) from error


def open_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. Raises TruePoseError when it is missing or truncated."""
    return _open(path, with_tensors=True)


def load_strict(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str, ignore: tuple[str, ...] = ()
) -> None:
    """Copy tensors into the module; every weight must be there, none may be left over, shapes must agree.

    ignore: prefixes of the module's weights that the file does not carry (the VAE).
    """
    own = {k: v for k, v in module.state_dict().items() if not k.startswith(ignore)} if ignore else module.state_dict()
    compare_shapes({k: tuple(x.shape) for k, x in own.items()}, {k: tuple(x.shape) for k, x in tensors.items()}, where)
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(tensors[name])
