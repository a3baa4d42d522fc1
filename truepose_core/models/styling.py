"""The source's style (AdaIN, `attention.style`) in diffusers' UNets: read in SourceNet's pass, put on in TargetNet's.

The places are those of ComfyUI's numbering, so that a source has the same style in both hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from truepose_core.attention.style import moments, restyled
from truepose_core.models.processors import SourcePass, TargetPass

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_pass: ContextVar[SourcePass | TargetPass | None] = ContextVar("style_pass", default=None)


@contextmanager
def styling(call: SourcePass | TargetPass) -> Iterator[None]:
    """A forward pass in which the style is read, or put on. Of this thread alone."""
    token = _pass.set(call)
    try:
        yield
    finally:
        _pass.reset(token)


def add_style_places(unet: UNet2DConditionModel) -> None:
    """Let the UNet's places look for a `styling` pass: behind the last sixth of its input blocks, and in front of the
    first third of its output blocks (as "reference only" weighs them; the first of these is behind the middle)."""
    inputs = _input_blocks(unet)
    for number in range(len(inputs) - len(inputs) // 6, len(inputs)):
        inputs[number].register_forward_hook(partial(_behind, f"input.{number}"))
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    width = unet.config.block_out_channels[-1]
    for number, resnet in enumerate(resnets[: len(resnets) // 3 + 1]):
        resnet.register_forward_pre_hook(partial(_in_front, f"output.{number}", width))
        width = resnet.out_channels


def _input_blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The last module of each input block: conv_in, every layer of a level, every downsampler."""
    found = [unet.conv_in]
    for block in unet.down_blocks:
        found += getattr(block, "attentions", block.resnets)
        found += block.downsamplers or []
    return found


def _behind(place: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    call = _pass.get()
    if call is None:
        return output
    # Attention blocks give a tuple.
    return (_look(place, output[0], call), *output[1:]) if isinstance(output, tuple) else _look(place, output, call)


def _in_front(place: str, width: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    call = _pass.get()
    if call is None:
        return None
    # The first channels are the picture's, the rest are the skip connection's.
    joined = args[0]
    return torch.cat([_look(place, joined[:, :width], call), joined[:, width:]], 1), *args[1:]


def _look(place: str, h: Tensor, call: SourcePass | TargetPass) -> Tensor:
    if isinstance(call, SourcePass):
        call.style[place] = moments(h.detach().float())
        return h
    mean, deviation = (x.to(h).repeat_interleave(h.shape[0] // x.shape[0], 0) for x in call.source.style[place])
    return h + call.style * (restyled(h, mean, deviation) - h)
