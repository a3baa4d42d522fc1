"""FLOPs of a step: the plain UNet as torch counts it, and what HPFA, K/V projection and CAA add.

The whole plain UNet runs on the meta device under FlopCounterMode, which counts two per multiply-add of every
matrix product and convolution, attention included; norms, activations, softmax and copies are not counted. HPFA's
calls run on the meta device too, one for each shape of site, times the number of such sites. One picture per
step; ratios do not depend on the batch, as long as every row reads the source.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from truepose_core.attention.caa import CAASite
from truepose_core.attention.hpfa import hpfa_attention
from truepose_core.benchmark.shapes import Net, Site, attention_inputs, build, region_tokens, step_inputs
from truepose_core.models.processors import attention_sites

META = {"device": "meta", "dtype": torch.float32}


@dataclass(frozen=True)
class Part:
    """Modules of one kind on one grid. flops: of all of them, without the kernels of self-attention.

    module: one of them, on the meta device, with the shapes of its inputs; its own flops are `module_flops`.
    """

    kind: str
    tokens: int
    flops: int
    module: nn.Module
    inputs: tuple[tuple[int, ...], ...]
    module_flops: int


@dataclass(frozen=True)
class StepCount:
    """A plain step: its FLOPs, its self-attention sites (largest first), and its parts."""

    flops: int
    sites: tuple[Site, ...]
    parts: tuple[Part, ...]


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of the call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_step(net: Net) -> StepCount:
    """Run the plain UNet on the meta device and count it, as a whole and by parts."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    unet = build(net)
    counter = FlopCounterMode(display=False)
    started: dict[int, int] = {}
    found: list[tuple[nn.Module, tuple[Tensor, ...], Tensor, int]] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        started[id(module)] = counter.get_total_flops()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        flops = counter.get_total_flops() - started.pop(id(module))
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        found.append((module, tensors, output[0] if isinstance(output, tuple) else output, flops))

    watched = (ResnetBlock2D, Downsample2D, Upsample2D, Transformer2DModel, BasicTransformerBlock)
    for module in unet.modules():
        if isinstance(module, watched) or module in (unet.conv_in, unet.conv_out):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, with_kwargs=True)
    with torch.no_grad(), counter:
        unet(**step_inputs(net, unet, **META))

    names = {id(block): name for name, block in attention_sites(unet).items()}
    sites: Counter[tuple[int, int, int]] = Counter()
    flops: defaultdict[tuple[str, int], int] = defaultdict(int)
    example: dict[tuple[str, int], tuple[nn.Module, tuple[tuple[int, ...], ...], int]] = {}
    for module, tensors, output, own in found:
        shapes = tuple(tuple(x.shape) for x in tensors)
        if isinstance(module, BasicTransformerBlock):
            attn = module.attn1
            site = Site(output.shape[1], attn.heads, attn.inner_dim // attn.heads, 1)
            sites[site.tokens, site.heads, site.width] += id(module) in names
            kernel = count_attention(site)
            flops["transformer", site.tokens] -= kernel
            example.setdefault(("transformer", site.tokens), (module, shapes, own - kernel))
            continue
        kind = "transformer" if isinstance(module, Transformer2DModel) else "convolution"
        key = (kind, output.shape[-2] * output.shape[-1])
        flops[key] += own
        # The narrowest residual block of a grid stands for its convolutions.
        if isinstance(module, ResnetBlock2D) and (key not in example or own < example[key][2]):
            example[key] = (module, shapes, own)
    parts = tuple(Part(*key, flops[key], *example[key]) for key in flops)
    shapes = sorted(sites.items(), reverse=True)
    return StepCount(counter.get_total_flops(), tuple(Site(*shape, n) for shape, n in shapes), parts)


def count_attention(site: Site, kept: int = 0, channels: int = 0) -> int:
    """One attention call: plain, or HPFA with `kept` source tokens and that many spare channels."""
    if kept == 0:
        q = torch.empty(1, site.heads, site.tokens, site.width, **META)
        return counted(lambda: scaled_dot_product_attention(q, q, q))
    x = attention_inputs(site, kept, channels, **META)
    return counted(lambda: hpfa_attention(x.q, x.k, x.v, x.source, **x.terms))


def added_by_hpfa(step: StepCount, share: float, channels: int) -> int:
    """What a step does more when every self-attention also reads that share of the source; K and V are at hand."""
    return sum(s.count * (count_attention(s, s.kept(share), channels) - count_attention(s)) for s in step.sites)


def added_by_projection(step: StepCount, share: float) -> int:
    """Projecting K and V of that share of the source's tokens at every site, for one source."""

    def project(site: Site) -> int:
        layer = nn.Linear(site.inner, site.inner, bias=False, **META)
        return 2 * counted(lambda: layer(torch.empty(1, site.kept(share), site.inner, **META)))

    return sum(site.count * project(site) for site in step.sites)


def added_by_caa(step: StepCount, context: int) -> tuple[int, int]:
    """(the decoupled cross-attention of every block, the alignment maps that HPFA reads beside it)."""
    tokens = region_tokens(context, **META)
    cross = aligned = 0
    for site in step.sites:
        module = CAASite(context, site.inner, site.heads).to("meta")
        q = torch.empty(1, site.heads, site.tokens, site.width, **META)
        prior = torch.empty(1, site.tokens, 7, **META)
        once = counted(lambda m=module, q=q, p=prior: m(q, tokens, p))
        to_q = nn.Linear(site.inner, site.inner, bias=False, **META)
        x = torch.empty(1, site.tokens, site.inner, **META)
        cross += site.count * once
        aligned += site.count * (once + counted(lambda f=to_q, x=x: f(x)))
    return cross, aligned
