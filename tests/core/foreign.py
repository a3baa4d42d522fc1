"""Small weights as other systems publish them, and a toy system that the tests know completely."""

from __future__ import annotations

import json
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from small import small_model

from truepose_core.errors import TruePoseError
from truepose_core.importing.plan import Part, Plan


class Toy:
    """A system whose two files are the halves of a small model of this package, under other names."""

    name = "toy"
    title = "Toy system"

    def recognise(self, file, tensors):
        return [Part(self.name, role, file, f"{role}.") for role in ("left", "right") if role in self._roles(tensors)]

    def plan(self, parts, files, choices):
        if {part.role for part in parts} != {"left", "right"}:
            raise TruePoseError(f"file 0 is the {parts[0].role} half alone; give both")
        if choices.get("taste", "sweet") != "sweet":
            raise TruePoseError("the choice taste knows sweet only")
        tensors = {
            key.removeprefix(part.prefix): (part.file, key)
            for part in sorted(parts, key=lambda part: part.role)
            for key in files[part.file]
            if key.startswith(part.prefix) and not key.endswith("extra")
        }
        ignored = {(i, key): "a toy" for i, names in enumerate(files) for key in names if key.endswith("extra")}
        return Plan(self.name, json.loads(toy_model().config.to_json()), tensors, ignored, {"title": "Toy 1"})

    def _roles(self, tensors):
        return {name.split(".")[0] for name in tensors}


@cache
def toy_model():
    return small_model("concat", caa=False)


def toy_files(dtype=torch.float32):
    """(left, right): the source net with something that is left out, and the rest."""
    state = {k: v.to(dtype) for k, v in toy_model().state_dict().items()}
    left = {f"left.{k}": v for k, v in state.items() if k.startswith("source_net.")}
    right = {f"right.{k}": v for k, v in state.items() if not k.startswith("source_net.")}
    return {**left, "left.extra": torch.arange(3)}, right


@cache
def unet(widths=(32, 64), context=16):
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=context,
    )
    return net.eval().requires_grad_(False)


def animate_anyone(widths=(32, 64), context=16):
    """{"reference", "denoising", "guider", "motion"}: tiny, of the published files' making."""
    denoising = dict(unet(widths, context).state_dict())
    reference = {k: v for k, v in denoising.items() if not k.startswith(("conv_norm_out", "conv_out"))}
    torch.manual_seed(1)
    guider = dict(ControlNetConditioningEmbedding(widths[0], 3, (4, 8, 8)).state_dict())
    motion = {f"down_blocks.0.motion_modules.{i}.temporal_transformer.norm.weight": torch.ones(32) for i in range(2)}
    return {"reference": reference, "denoising": denoising, "guider": guider, "motion": motion}


def ip_adapter(kind="plus", widths=(32, 32, 64), context=16, seed=0):
    """{"image_proj": {...}, "ip_adapter": {...}}, as torch.save writes it. kind: "plain" or "plus"."""
    rand = torch.Generator().manual_seed(seed)

    def x(*shape):
        return torch.randn(*shape, generator=rand)

    if kind == "plain":
        image = {"proj.weight": x(4 * context, 24), "proj.bias": x(4 * context), "norm.weight": x(context)}
        image["norm.bias"] = x(context)
    else:
        dim, inner = 64, 128
        image = {"latents": x(1, 4, dim), "proj_in.weight": x(dim, 24), "proj_in.bias": x(dim)}
        image |= {"proj_out.weight": x(context, dim), "proj_out.bias": x(context)}
        image |= {"norm_out.weight": x(context), "norm_out.bias": x(context)}
        for i in range(4):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                image |= {f"layers.{i}.{norm}.weight": x(dim), f"layers.{i}.{norm}.bias": x(dim)}
            image |= {f"layers.{i}.0.to_q.weight": x(inner, dim), f"layers.{i}.0.to_kv.weight": x(2 * inner, dim)}
            image |= {f"layers.{i}.0.to_out.weight": x(dim, inner)}
            image |= {f"layers.{i}.1.1.weight": x(4 * dim, dim), f"layers.{i}.1.3.weight": x(dim, 4 * dim)}
    sites = {f"{2 * i + 1}.to_{p}_ip.weight": x(w, context) for i, w in enumerate(widths) for p in "kv"}
    return {"image_proj": image, "ip_adapter": sites}


def flat(nested):
    return {f"{half}.{name}": x for half, part in nested.items() for name, x in part.items()}
