"""Tiny random models in the host's own classes. Imports the host: only for code that runs inside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

WIDTH, CONTEXT, HEADS = 32, 48, 2
CLIP_EMBEDDING = 40


def _fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights of a sensible size: the host's layers come with uninitialised memory."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            value = centre + 0.05 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
            if "to_q" in name or "to_k" in name:
                value = 1.5 * value  # sharp enough attention that a wrong key shows
        parameter.data.copy_(value)


def unet_config(**changes: object) -> dict:
    """The shape of SD1.5's UNet at a tenth of its width."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": WIDTH,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "context_dim": CONTEXT,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    return {**config, **changes}


SDXL = {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "transformer_depth_middle": 3,
    "use_linear_in_transformer": True,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}


def make_model(seed: int = 0, family: str = "SD15", **changes: object):
    """A ModelPatcher: "SD15" (also with in_channels=9 for inpainting), "SD20" or "SDXL" (shape only)."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if family == "SDXL":
        changes = {**SDXL, **changes}
    config = getattr(comfy.supported_models, family)(unet_config(**changes))
    # The class writes its full-size heads over the ones asked for.
    config.unet_config["num_heads"] = HEADS
    config.unet_config["num_head_channels"] = -1
    model = config.get_model({}, "", device=torch.device("cpu"))
    _fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


TEXT = CONTEXT
"""Width of the text that the tiny editors read."""
_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": TEXT,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    **_FLUX,
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
_QWEN = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": [8, 12, 12],
}
EDITORS: dict[str, tuple[str, dict]] = {
    "kontext": ("Flux", _FLUX),
    "flux2": ("Flux2", _FLUX2),
    "klein": ("Flux2", {**_FLUX2, "guidance_embed": False}),
    "longcat": ("LongCatImage", {**_FLUX, "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]}),
    "qwen": ("QwenImage", _QWEN),
    "qwen2511": ("QwenImage", {**_QWEN, "default_ref_method": "index_timestep_zero"}),
    "omnigen2": (
        "Omnigen2",
        {
            "hidden_size": 48,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": [4, 4, 4],
            "text_feat_dim": TEXT,
            "timestep_scale": 1000.0,
        },
    ),
    "zimage": (
        "Lumina2",
        {
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "n_layers": 3,
            "n_refiner_layers": 2,
            "n_heads": 8,
            "n_kv_heads": 8,
            "multiple_of": 16,
            "ffn_dim_multiplier": 0.1,
            "qk_norm": True,
            "cap_feat_dim": TEXT,
            "axes_dims": [8, 12, 12],
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 8,
            "siglip_feat_dim": 20,
        },
    ),
}
"""Editors that hold their references as tokens: the host's configuration class, and the tiny network."""


def has_editor(name: str) -> bool:
    """Whether this version of the host knows the family."""
    import inspect

    import comfy.ldm.flux.model
    import comfy.ldm.lumina.model
    import comfy.ldm.qwen_image.model
    import comfy.supported_models

    if name == "qwen2511":
        known = inspect.signature(comfy.ldm.qwen_image.model.QwenImageTransformer2DModel).parameters
        return "default_ref_method" in known
    if name == "zimage":
        return "siglip_feat_dim" in inspect.signature(comfy.ldm.lumina.model.NextDiT).parameters
    return hasattr(comfy.supported_models, EDITORS[name][0])


def make_editor(name: str = "kontext", seed: int = 0, **changes: object):
    """A ModelPatcher of one of `EDITORS`."""
    import dataclasses

    import comfy.ldm.flux.model
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    kind, network = EDITORS[name]
    network = {**network, **changes, "dtype": torch.float32}
    if kind in ("Flux", "Flux2", "LongCatImage"):
        known = {f.name for f in dataclasses.fields(comfy.ldm.flux.model.FluxParams)} | {"dtype"}
        network = {k: v for k, v in network.items() if k in known}
    config = getattr(comfy.supported_models, kind)(network)
    config.unet_config = dict(network)
    model = config.get_model({}, "", device=torch.device("cpu"))
    _fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def make_vae(seed: int = 0, channels: int = 4):
    """A VAE with eightfold reduction."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    config = {"params": {"ddconfig": sizes, "embed_dim": channels}}
    first = AutoencoderKL(**config["params"])
    _fill(first, seed)
    return comfy.sd.VAE(sd=first.state_dict(), config=config)


class FrameVAE:
    """A VAE whose latents have an axis of frames [B, C, 1, h, w], as Qwen's have."""

    def __init__(self, vae: object) -> None:
        self.vae = vae

    def __getattr__(self, name: str) -> object:
        return getattr(self.vae, name)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(pixels)[:, :, None]

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(samples[:, :, 0])


def make_control_net(seed: int = 0, family: str = "SD15"):
    """A ControlNet for `make_model` of that family, its zero convolutions filled too."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops

    config = unet_config(**(SDXL if family == "SDXL" else {}))
    for unwanted in ("out_channels", "transformer_depth_output"):
        config.pop(unwanted)
    config.update(hint_channels=3, num_heads=HEADS, num_head_channels=-1)
    net = comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init, device="cpu")
    _fill(net, seed)
    return comfy.controlnet.ControlNet(
        net, load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=None
    )


def make_clip_vision(seed: int = 0):
    """A CLIP_VISION of the host's own class with a grid of 4 x 4 patches."""
    import comfy.clip_vision

    config = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 192,
        "hidden_act": "gelu",
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
        "projection_dim": CLIP_EMBEDDING,
        "model_type": "clip_vision_model",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vision.json"
        path.write_text(json.dumps(config))
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    _fill(vision.model, seed)
    return vision


def make_conditioning(seed: int = 0, tokens: int = 7, width: int = CONTEXT) -> list:
    """CONDITIONING of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn((1, 1280), generator=generator)
    return [[torch.randn((1, tokens, width), generator=generator), {"pooled_output": pooled}]]
