"""A model and its file: one safetensors file with weights and a description of themselves in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truepose_core.errors import TruePoseError
from truepose_core.models.cfld.encoder import is_cfld
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.weights.settings import check_described
from truepose_core.weights.strict import (
    ARCHITECTURE,
    BUNDLED,
    bundled_path,
    load_strict,
    open_tensors,
    read_shapes,
    weights_hash,
)


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

    from truepose_core.pictures.files import atomic_write

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


def load_model(path: str | Path = BUNDLED, *, verify: bool = False, vae: str | Path | None = None) -> TruePoseModel:
    """Load a model file ("bundled" for the one that ships), in float32, ready for inference.

    vae: a folder in diffusers format whose vae/ a model that was trained on latents needs.
    verify: also compare the weights with the hash in the metadata. Raises TruePoseError when the file is missing,
    damaged, of another architecture, or when a weight is missing, unknown or of another shape.
    """
    path = bundled_path() if str(path) == BUNDLED else Path(path)
    metadata, shapes = read_shapes(path)
    if metadata.get("architecture") != ARCHITECTURE:
        keys = ", ".join(sorted(shapes)[:3])
        raise TruePoseError(
            f"{path} holds {metadata.get('architecture') or 'another architecture'} (keys such as {keys}); "
            f"expected a {ARCHITECTURE} model file, or a folder in diffusers format. truepose inspect says what a file "
            "is, truepose convert makes a model file of other systems' weights"
        )
    if "config" not in metadata:
        raise TruePoseError(f"{path} does not say its configuration in its metadata; get or make it again")
    if is_cfld(metadata):
        raise TruePoseError(f"{path} is a CFLD model; load it with truepose_core.models.cfld.model.load_cfld")
    config = TruePoseConfig.from_json(metadata["config"])
    if config.vae is not None and vae is not None:
        raise TruePoseError(f"{path} brings its own VAE; leave out --vae {vae}")
    if config.codec == "vae" and config.vae is None and vae is None:
        raise TruePoseError(f"{path} was trained on the latents of a VAE; name the folder that has it (--vae FOLDER)")
    check_model(config, shapes, str(path))
    codec = None
    if config.codec == "vae" and config.vae is None:
        from truepose_core.models.folder import load_vae

        codec = load_vae(vae)
    tensors = open_tensors(path)[1]
    if verify and weights_hash(tensors) != metadata.get("sha256"):
        raise TruePoseError(f"{path}: the weights do not match the hash in their metadata; the file was changed")
    model = TruePoseModel(config, codec=codec)
    load_strict(model, tensors, str(path), ignore=() if config.vae is not None else ("codec.",))
    return model.eval()


def check_model(config: TruePoseConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise TruePoseError when a model of this configuration has other weights than a file, or its scheduler cannot be
    made. Allocates nothing. shapes: name -> shape of the file's tensors."""
    from diffusers import DDPMScheduler

    def make() -> nn.Module:
        DDPMScheduler(**config.scheduler, prediction_type=config.prediction_type)
        own = config.vae is not None or config.codec == "pixels"
        return TruePoseModel(config, codec=None if own else nn.Identity())

    check_described(make, shapes, where, ignore=() if config.vae is not None else ("codec.",))
