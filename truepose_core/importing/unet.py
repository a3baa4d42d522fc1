"""The sizes of a Stable Diffusion UNet, read from the names and shapes of its weights as diffusers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truepose_core.errors import TruePoseError
from truepose_core.weights.reading import TensorInfo

GROUPS = 32
SD_HEADS, SDXL_HEAD_WIDTH = 8, 64


def under(prefix: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors whose names start with prefix, without it."""
    return {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}


def is_unet(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether these names are those of a conditional UNet."""
    return "conv_in.weight" in tensors and any(".attn1.to_q.weight" in n and n.startswith("down") for n in tensors)


def unet_config(tensors: Mapping[str, TensorInfo], what: str, *, head_width: int | None = None) -> dict[str, Any]:
    """Keyword arguments of diffusers' UNet2DConditionModel for these weights (names without a prefix).

    head_width: of each attention head; None for SD1.5's way, 8 heads everywhere. Heads and groups leave no trace in
    shapes, so they are the base model's. Raises TruePoseError, which calls the net `what`, for anything that is no such
    UNet.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise TruePoseError(f"{what} lacks {name}; the file is incomplete, or another kind of net")
        return tensors[name].shape

    def count(stem: str) -> int:
        numbers = {int(n.removeprefix(stem).split(".")[0]) for n in tensors if n.startswith(stem)}
        return len(numbers)

    levels = count("down_blocks.")
    widths = [shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    attended = [count(f"down_blocks.{i}.attentions.") > 0 for i in range(levels)]
    if not any(attended):
        raise TruePoseError(f"{what} has no attention in its encoder; expected a Stable Diffusion UNet")
    depths = [max(1, count(f"down_blocks.{i}.attentions.0.transformer_blocks.")) for i in range(levels)]
    first = f"down_blocks.{attended.index(True)}.attentions.0."
    heads: int | list[int] = SD_HEADS if head_width is None else [width // head_width for width in widths]
    unit = SD_HEADS if head_width is None else head_width
    wrong = [width for width in widths if width % GROUPS or width % unit]
    if wrong:
        raise TruePoseError(
            f"{what} has levels of {', '.join(map(str, widths))} channels; expected multiples of {max(GROUPS, unit)}"
        )
    config: dict[str, Any] = {
        "sample_size": 64 if head_width is None else 128,
        "in_channels": shape("conv_in.weight")[1],
        "out_channels": shape("conv_out.weight")[0] if "conv_out.weight" in tensors else 4,
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
        "layers_per_block": count("down_blocks.0.resnets."),
        "attention_head_dim": heads,
        "cross_attention_dim": shape(f"{first}transformer_blocks.0.attn2.to_k.weight")[1],
        "norm_num_groups": GROUPS,
    }
    if len(shape(f"{first}proj_in.weight")) == 2:
        config["use_linear_projection"] = True
    if max(depths) > 1:
        config["transformer_layers_per_block"] = depths
    return config
