"""CFLD's two files: the encoders (`pytorch_model.bin`) and the UNet (`pytorch_model_1.bin`).

The encoders are told by their `learnable_vector` and `pose_encoder.conv_in`; the UNet is Stable Diffusion 1.5's in
diffusers' names under `model.`. What stands before those names is the part's prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import torch

from truepose_core.errors import TruePoseError
from truepose_core.importing.plan import Part, Plan
from truepose_core.importing.unet import is_unet, under, unet_config
from truepose_core.models.cfld.encoder import HEAD_WIDTH, KIND, POSE_CHANNELS, UNSHUFFLE, CFLDConfig
from truepose_core.models.config import SD_SCHEDULE
from truepose_core.weights.reading import TensorInfo

ENCODERS, UNET = "encoders", "UNet"
_WHAT = {
    ENCODERS: "its encoders (pytorch_model.bin, keys such as learnable_vector)",
    UNET: "its UNet (pytorch_model_1.bin, keys such as model.conv_in.weight)",
}
# Indices and masks that follow from the sizes.
_COMPUTED = re.compile(r"(relative_position_index|attn_mask)$")
_DOWNSAMPLE = re.compile(r"^backbone\.layers\.(\d+)\.downsample\.")


class CFLD:
    """Coarse-to-Fine Latent Diffusion as published: one model in two files."""

    name = KIND
    title = "CFLD"

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        parts = []
        for key in tensors:
            prefix = key.removesuffix("learnable_vector")
            if prefix != key and f"{prefix}pose_encoder.conv_in.weight" in tensors:
                parts.append(Part(KIND, ENCODERS, file, prefix))
            prefix = key.removesuffix("conv_in.weight")
            # Others keep a UNet without a name before its keys, or under a longer one.
            if prefix.endswith("model.") and is_unet(under(prefix, tensors)):
                parts.append(Part(KIND, UNET, file, prefix))
        return parts

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """No choices. Raises TruePoseError when one of the two files is missing or given twice, when the two do not
        belong together, or for an ablation of CFLD."""
        encoders, unet = _only(parts, ENCODERS), _only(parts, UNET)
        config = _config(under(encoders.prefix, files[encoders.file]), under(unet.prefix, files[unet.file]))
        tensors: dict[str, tuple[int, str]] = {}
        ignored: dict[tuple[int, str], str] = {}
        for key in under(encoders.prefix, files[encoders.file]):
            source = (encoders.file, encoders.prefix + key)
            if _COMPUTED.search(key):
                ignored[source] = "computed from the sizes"
            else:
                tensors[f"encoder.{_timm(key)}"] = source
        for key in under(unet.prefix, files[unet.file]):
            tensors[f"target_net.{key}"] = (unet.file, unet.prefix + key)
        return Plan(KIND, json.loads(config.to_json()), tensors, ignored, expected=shapes_of(config))


def shapes_of(config: CFLDConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight in the file of this model. Allocates nothing."""
    from truepose_core.models.cfld.model import CFLDModel

    with torch.device("meta"):
        model = CFLDModel(config)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def _only(parts: Sequence[Part], role: str) -> Part:
    found = [part for part in parts if part.role == role]
    if not found:
        given = _WHAT[UNET if role == ENCODERS else ENCODERS]
        raise TruePoseError(f"a CFLD model is two files, and only {given} was given; add {_WHAT[role]}")
    if len(found) > 1:
        names = " and ".join(f"file {part.file}" for part in found)
        raise TruePoseError(f"{names} each have a CFLD model's {role}; convert one model at a time")
    return found[0]


def _timm(key: str) -> str:
    """timm counts the downsampling between two stages to the second."""
    return _DOWNSAMPLE.sub(lambda match: f"backbone.layers.{int(match[1]) + 1}.downsample.", key)


def _config(encoders: Mapping[str, TensorInfo], unet: Mapping[str, TensorInfo]) -> CFLDConfig:
    """Every size that shapes tell."""

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in encoders:
            raise TruePoseError(
                f"CFLD's encoders lack {key}; the file is incomplete, or of an ablation, which cannot be converted"
            )
        found = encoders[key].shape
        if len(found) != rank:
            raise TruePoseError(f"{key} is {found}; expected {rank} dimensions")
        return found

    def count(stem: str) -> int:
        return len({key.removeprefix(stem).split(".")[0] for key in encoders if key.startswith(stem)})

    net = unet_config(unet, "CFLD's UNet")
    widths, context = net["block_out_channels"], net["cross_attention_dim"]
    if len(widths) != 4 or net["in_channels"] != 4 or net["down_block_types"][3] != "DownBlock2D":
        raise TruePoseError(
            f"CFLD's UNet has {len(widths)} levels and {net['in_channels']} input channels; expected Stable Diffusion "
            "1.5's: 4 levels, the last without attention, and 4 channels"
        )
    _, tokens, width = shape("learnable_vector", 3)
    if width != context:
        raise TruePoseError(
            f"CFLD's encoders make tokens of width {width} and its UNet reads {context}; they do not belong together"
        )
    stem = "pose_encoder.resnets."
    pose_widths = tuple(shape(f"{stem}{i}.conv2.weight", 4)[0] for i in range(count(stem)))
    if pose_widths != tuple(widths[:3]):
        raise TruePoseError(
            f"CFLD's pose encoder makes features of widths {pose_widths} and its UNet has {tuple(widths[:3])}; "
            "they do not belong together"
        )
    channels = shape("pose_encoder.conv_in.weight", 4)[1]
    if channels != POSE_CHANNELS * UNSHUFFLE**2:
        raise TruePoseError(
            f"pose_encoder.conv_in.weight reads {channels} channels; expected {POSE_CHANNELS * UNSHUFFLE**2}: a "
            "coloured skeleton and 18 heat maps"
        )
    per_level = net["layers_per_block"] + 1
    swin = shape("backbone.patch_embed.proj.weight", 4)[0]
    if swin % HEAD_WIDTH:
        raise TruePoseError(f"CFLD's vision tower is {swin} wide; expected a multiple of {HEAD_WIDTH}")
    cells = round(shape("decoder.kv_pos_embed", 3)[1] ** 0.5)
    table = shape("backbone.layers.0.blocks.0.attn.relative_position_bias_table", 2)[0]
    return CFLDConfig(
        unet={**net, "sample_size": 8 * cells},
        size=64 * cells,
        swin_width=swin,
        swin_depths=tuple(count(f"backbone.layers.{i}.blocks.") for i in range(4)),
        swin_window=(round(table**0.5) + 1) // 2,
        detail_widths=tuple(shape(f"appearance_encoder.zero_conv_ins.{i * per_level}.weight", 4)[0] for i in range(3)),
        detail_depth=count("appearance_encoder.blocks.0."),
        tokens=tokens,
        decoder_depth=count("decoder.blocks."),
        pose_widths=pose_widths,
        scheduler=dict(SD_SCHEDULE),
    )
