"""The files of the small networks (lifting, field, alignment, keypoints)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.weights.settings import check_described, read_values
from truepose_core.weights.strict import ARCHITECTURE, load_strict, open_tensors, weights_hash

Network = TypeVar("Network", bound=nn.Module)


def save_small(
    tensors: Mapping[str, Tensor], path: str | Path, kind: str, config: Mapping[str, Any], training: Mapping[str, Any]
) -> Path:
    """Write a small network (lifting, field, alignment) in float16, atomically, described like a model."""
    from safetensors.torch import save

    from truepose_core.pictures.files import atomic_write

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
    where = f"{path}, {kind}"
    sizes = read_values(metadata.get("config", "{}"), f"the configuration of {path}")
    # First weights are drawn and thrown away: whoever asks first must not find other random numbers than who asks next.
    with torch.inference_mode(False), torch.random.fork_rng(devices=()):
        check_described(lambda: make(**sizes), {name: tuple(x.shape) for name, x in tensors.items()}, where)
        network = make(**sizes)
        load_strict(network, {name: x.float() for name, x in tensors.items()}, where)
        return network.eval().requires_grad_(False)
