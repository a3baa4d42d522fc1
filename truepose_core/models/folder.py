"""Stable Diffusion folders in diffusers format (SD1.5, SD2.1, SDXL) as SourceNet and TargetNet."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.models.codec import VAECodec
from truepose_core.models.config import Behaviour, TruePoseConfig
from truepose_core.models.model import TruePoseModel

TRAINING_FREE_BETA = 2.0


@dataclass(frozen=True)
class FolderModel:
    """model: ready for inference. scheduler: the folder's own. context [1, T, c], pooled [1, p] or None: the encoded
    prompt; None where the folder has no text encoder (the nets then read one zero token)."""

    model: TruePoseModel
    scheduler: Any
    context: Tensor | None
    pooled: Tensor | None


def family_of(unet_config: dict[str, Any]) -> str:
    """ "sdxl", "sd21" or "sd15", by the width of the text context and SDXL's extra embedding."""
    if unet_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd21" if unet_config.get("cross_attention_dim") == 1024 else "sd15"


def load_folder(
    path: str | Path,
    *,
    source: str | Path | None = None,
    controlnet: str | Path | None = None,
    prompt: str = "",
    dtype: torch.dtype = torch.float32,
) -> FolderModel:
    """Load a folder that has unet/ and vae/ (and text encoders, which a prompt needs).

    source: another folder whose unet/ becomes SourceNet; by default both nets are the same weights, held once.
    controlnet: a folder with an OpenPose ControlNet, which then carries the pose; without one a plain Stable
    Diffusion model does not see the pose except through HPFA's region match.
    Raises TruePoseError when a part is missing, not in safetensors, or weights are missing or unknown.
    """
    from diffusers import ControlNetModel, UNet2DConditionModel

    path = Path(path)
    target_net = _load(UNet2DConditionModel, path / "unet", dtype)
    source_net = target_net if source is None else _load(UNet2DConditionModel, Path(source) / "unet", dtype)
    if source is not None and dict(source_net.config)["block_out_channels"] != target_net.config.block_out_channels:
        raise TruePoseError(f"{source}/unet and {path}/unet have other widths; SourceNet and TargetNet must agree")
    codec = load_vae(path, dtype)
    scheduler = _scheduler(path)
    config = _config(target_net, codec, scheduler)
    model = TruePoseModel(config, source_net=source_net, target_net=target_net, codec=codec)
    if controlnet is not None:
        model.controlnet = _load(ControlNetModel, Path(controlnet), dtype)
    context, pooled = _encode_prompt(path, prompt, dtype)
    return FolderModel(model.to(dtype).eval(), scheduler, context, pooled)


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32) -> VAECodec:
    """The VAE of a folder in diffusers format, or a folder that is only a VAE. Raises as `load_folder`."""
    from diffusers import AutoencoderKL

    path = Path(path)
    inside = path / "vae"
    alone = not inside.is_dir() and (path / "config.json").is_file()
    return VAECodec(_load(AutoencoderKL, path if alone else inside, dtype))


def load_image_encoder(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A folder of transformers' CLIPVisionModelWithProjection, ready for inference. Raises as `load_folder`."""
    from transformers import CLIPVisionModelWithProjection

    # Published as pytorch_model.bin, which transformers opens as weights only.
    encoder = _load(CLIPVisionModelWithProjection, Path(path), dtype, use_safetensors=None)
    return encoder.eval().requires_grad_(False)


def _config(unet: Any, codec: VAECodec, scheduler: Any) -> TruePoseConfig:
    """The training-free configuration of a folder: concatenation, and one beta for every head."""
    net = {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}
    side = net["sample_size"] if isinstance(net["sample_size"], int) else net["sample_size"][0]
    schedule = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return TruePoseConfig(
        family=family_of(net),
        unet=net,
        codec="vae",
        patch=codec.patch,
        fusion="concat",
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        scheduler={k: scheduler.config[k] for k in schedule if k in scheduler.config},
        size=(side * codec.patch, side * codec.patch),
        beta=TRAINING_FREE_BETA,
        match="surface",
        behaviour=Behaviour(source_timestep="noised"),
    )


def trainable_from_folder(
    path: str | Path, fusion: str, size: tuple[int, int], aligned_tokens: bool = False
) -> TruePoseModel:
    """A TruePose model whose SourceNet and TargetNet start as two copies of the folder's UNet, with its VAE (frozen).

    fusion: "none", "concat" or "hpfa", which starts as concatenation (beta = gamma = lambda = 0). size: (height, width)
    of the training pictures in pixels. aligned_tokens: as in `TruePoseConfig`. The pose encoder starts at zero. Raises
    as `load_folder`.
    """
    from diffusers import UNet2DConditionModel

    path = Path(path)
    target_net = _load(UNet2DConditionModel, path / "unet", torch.float32)
    codec = load_vae(path)
    config = _config(target_net, codec, _scheduler(path))
    # What is trained is trained to read clean.
    config = replace(config, fusion=fusion, size=size, beta=0.0, behaviour=Behaviour(), aligned_tokens=aligned_tokens)
    source_net = None if fusion == "none" else copy.deepcopy(target_net)
    return TruePoseModel(config, source_net=source_net, target_net=target_net, codec=codec)


def _load(kind: type, path: Path, dtype: torch.dtype, use_safetensors: bool | None = True) -> Any:
    if not (path / "config.json").is_file():
        raise TruePoseError(f"{path} has no config.json; expected a {kind.__name__} folder in diffusers format")
    try:
        module, report = kind.from_pretrained(
            str(path),
            torch_dtype=dtype,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TruePoseError(f"{path} cannot be loaded as {kind.__name__}: {error}") from error
    problems = [
        f"{len(report[k])} {k.replace('_', ' ')}: {', '.join(sorted(report[k])[:4])}" for k in report if report[k]
    ]
    if problems:
        raise TruePoseError(f"{path}: the weights do not fit {kind.__name__}. " + "; ".join(problems))
    return module


def _scheduler(path: Path) -> Any:
    import diffusers

    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise TruePoseError(f"{path} has no scheduler/scheduler_config.json; it says how the model was trained")
    name = json.loads(file.read_text(encoding="utf-8")).get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise TruePoseError(f"{file} names the scheduler {name!r}, which this diffusers version does not have")
    return kind.from_pretrained(str(file.parent))


def _encode_prompt(path: Path, prompt: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    parts = [s for s in ("", "_2") if (path / f"text_encoder{s}").is_dir()]
    if not parts:
        if prompt:
            raise TruePoseError(f"{path} has no text_encoder, so it cannot read the prompt {prompt!r}; leave it out")
        return None, None
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    states, pooled = [], None
    for part in parts:
        kind = CLIPTextModelWithProjection if part else CLIPTextModel
        tokenizer = CLIPTokenizer.from_pretrained(str(path / f"tokenizer{part}"), local_files_only=True)
        encoder = kind.from_pretrained(str(path / f"text_encoder{part}"), torch_dtype=dtype, local_files_only=True)
        ids = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            out = encoder(ids, output_hidden_states=True)
        # SDXL reads the last layer but one of both encoders, SD1.5 the last.
        states.append(out.hidden_states[-2] if len(parts) > 1 else out.last_hidden_state)
        pooled = out[0] if part else None
    return torch.cat(states, -1), pooled
