"""What is timed: the attention calls of a step, the rest of a step, or a whole step.

A step put together from its parts is

    t(step) = sum over grids and kinds  F / f * t(module)
            + sum over site shapes      count * H / h * t(attention on h of H heads)

where, for convolutions and for transformer blocks without their self-attention kernel, one module of each grid stands
for all of that kind there: t(module) its time, f its FLOPs, F those of all of them. Heads are independent pieces of
equal work, so a few of them stand for all. The few FLOPs outside such modules (time embedding) are added in proportion.

Checked against whole steps of SD1.5 in float32 on one core of a busy machine, two readings each: the plain step came
out 4 to 6 % short (19.5 and 18.9 for 20.8 and 19.6 s), and the ratios of steps differed by up to 0.06, the noise of
the single readings included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.attention.caa import CAASite
from truepose_core.attention.hpfa import hpfa_attention
from truepose_core.benchmark.count import Part, StepCount, count_attention
from truepose_core.benchmark.memory import CALLS
from truepose_core.benchmark.shapes import (
    BETA,
    GAMMA,
    Net,
    Site,
    attention_inputs,
    build,
    materialise,
    region_tokens,
    source_tokens,
    step_inputs,
)
from truepose_core.models.processors import TargetPass, attention_sites, install
from truepose_core.parsing import HumanParsing
from truepose_core.regions import N_REGIONS
from truepose_core.source.features import SourceFeatures

Work = dict[tuple, Callable[[], Any]]


def some_heads(site: Site, budget: float | None) -> Site:
    """The site with as many heads as plain attention of `budget` FLOPs allows, at least one. None is all of them."""
    if budget is None:
        return site
    per_head = count_attention(Site(site.tokens, 1, site.width, 1))
    return Site(site.tokens, min(site.heads, max(1, int(budget / per_head))), site.width, site.count)


def attention_work(
    sites: Iterable[Site],
    shares: Iterable[float],
    channels: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    budget: float | None = None,
) -> Work:
    """("plain", site) and ("hpfa", site, share, channels) -> one attention call, on `some_heads` of it."""
    work: Work = {}
    for site in sites:
        part = some_heads(site, budget)
        plain = attention_inputs(part, 1, 0, device, dtype)
        work["plain", site] = lambda x=plain: scaled_dot_product_attention(x.q, x.k, x.v)
        for share in shares:
            for c in channels:
                x = attention_inputs(part, part.kept(share), c, device, dtype)
                work["hpfa", site, share, c] = lambda x=x: hpfa_attention(x.q, x.k, x.v, x.source, **x.terms)
    return work


def compared_work(
    site: Site, shares: Iterable[float], device: torch.device, dtype: torch.dtype, budget: float | None = None
) -> Work:
    """Region match in three ways, each (way, site, share) -> one call: "augmented" with 8 spare channels, "masked" with
    an explicit mask, and "mask ready": the kernel alone, with a mask (shared by all heads) that is already there."""
    part = some_heads(site, budget)
    work: Work = {}
    for share in shares:
        x = attention_inputs(part, part.kept(share), 8, device, dtype)
        for how, call in CALLS.items():
            work[how, site, share] = lambda x=x, f=call: f(x.q, x.k, x.v, x.source, **x.terms)
        k, v = torch.cat([x.k, x.source.k], 2), torch.cat([x.v, x.source.v], 2)
        bias = torch.zeros(1, 1, part.tokens, k.shape[2], device=device, dtype=dtype).expand(-1, part.heads, -1, -1)
        work["mask ready", site, share] = lambda q=x.q, k=k, v=v, m=bias: scaled_dot_product_attention(
            q, k, v, attn_mask=m
        )
    return work


def projection_work(sites: Iterable[Site], shares: Iterable[float], device: torch.device, dtype: torch.dtype) -> Work:
    """("project", site, share) -> K and V of that share of the source's tokens."""
    work: Work = {}
    for site in sites:
        to_k, to_v = (nn.Linear(site.inner, site.inner, bias=False, device=device, dtype=dtype) for _ in range(2))
        for share in shares:
            x = torch.randn(1, site.kept(share), site.inner, device=device, dtype=dtype)
            work["project", site, share] = lambda k=to_k, v=to_v, x=x: (k(x), v(x))
    return work


def caa_work(sites: Iterable[Site], context: int, device: torch.device, dtype: torch.dtype) -> Work:
    """("caa", site) -> the decoupled cross-attention of a block; ("query", site) -> one query projection, which the
    alignment map of a block needs besides a second such call."""
    work: Work = {}
    tokens = region_tokens(context, device, dtype)
    for site in sites:
        module = CAASite(context, site.inner, site.heads).to(device=device, dtype=dtype)
        to_q = nn.Linear(site.inner, site.inner, bias=False, device=device, dtype=dtype)
        q = torch.randn(1, site.heads, site.tokens, site.width, device=device, dtype=dtype)
        prior = torch.rand(1, site.tokens, N_REGIONS, device=device, dtype=dtype)
        x = torch.randn(1, site.tokens, site.inner, device=device, dtype=dtype)
        work["caa", site] = lambda m=module, q=q, p=prior: m(q, tokens, p)
        work["query", site] = lambda f=to_q, x=x: f(x)
    return work


class WithoutKernel:
    """An attention processor with every projection and without attention: V goes straight to the output."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attn.to_q(hidden_states), attn.to_k(hidden_states)
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


def rest_work(parts: Iterable[Part], device: torch.device, dtype: torch.dtype) -> Work:
    """("rest", kind, tokens) -> the module that stands for its kind on its grid."""
    work: Work = {}
    for part in parts:
        module = materialise(copy.deepcopy(part.module), device, dtype)
        first, second = (torch.randn(*shape, device=device, dtype=dtype) for shape in part.inputs[:2])
        if part.kind == "transformer":
            module.attn1.set_processor(WithoutKernel())
            call = lambda m=module, x=first, y=second: m(x, encoder_hidden_states=y)  # noqa: E731
        else:
            call = lambda m=module, x=first, y=second: m(x, y)  # noqa: E731
        work["rest", part.kind, part.tokens] = call
    return work


def rest_seconds(step: StepCount, seconds: dict[tuple, float]) -> float:
    """A step without its self-attention kernels, from the times of `rest_work`."""
    rate = {p: seconds["rest", p.kind, p.tokens] / p.module_flops for p in step.parts}
    watched = sum(p.flops for p in step.parts)
    kernels = sum(s.count * count_attention(s) for s in step.sites)
    return sum(p.flops * rate[p] for p in step.parts) * (step.flops - kernels) / watched


def target_pass(
    net: Net, sites: dict[str, Site], share: float, channels: int, device: torch.device | str, dtype: torch.dtype
) -> TargetPass:
    """A pass of TargetNet whose source's K and V are at hand. sites: the shape of every site by its name."""
    nobody = HumanParsing(torch.eye(N_REGIONS)[:1, :, None, None])
    prior, body = {}, {}
    for site in sites.values():
        if channels >= 8:
            prior[site.tokens] = torch.rand(1, site.tokens, N_REGIONS, device=device, dtype=dtype)
        if channels >= 16:
            body[site.tokens] = torch.rand(1, site.tokens, 3, device=device, dtype=dtype)
    return TargetPass(
        net.latent,
        SourceFeatures(net.model, {}, net.latent, nobody),
        beta=BETA if channels >= 8 else 0.0,
        gamma=GAMMA if channels >= 16 else 0.0,
        prior=prior,
        body=body,
        kv={name: source_tokens(s, s.kept(share), channels, device, dtype) for name, s in sites.items()},
    )


def named_sites(unet: nn.Module, inputs: dict[str, Any]) -> dict[str, Site]:
    """The shape of every self-attention of the UNet by its name, from one call."""
    found: dict[str, Site] = {}
    hooks = []
    for name, block in attention_sites(unet).items():

        def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            attn = module.attn1
            found[name] = Site(args[0].shape[1], attn.heads, attn.inner_dim // attn.heads, 1)

        hooks.append(block.register_forward_pre_hook(note))
    with torch.no_grad():
        unet(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def whole_work(
    net: Net, shares: Iterable[float], channels: Iterable[int], device: torch.device, dtype: torch.dtype
) -> Work:
    """("step",) and ("step", share, channels) -> one call of the whole UNet, plain and with HPFA."""
    unet = build(net)
    if device.type != "meta":
        unet = materialise(unet, device, dtype)
    inputs = step_inputs(net, unet, device, dtype)
    sites = named_sites(unet, inputs)
    install(unet)

    def call(how: TargetPass) -> Callable[[], Any]:
        return lambda: unet(**inputs, cross_attention_kwargs={"truepose": how})

    work: Work = {("step",): call(TargetPass(net.latent))}
    for share in shares:
        for c in channels:
            work["step", share, c] = call(target_pass(net, sites, share, c, device, dtype))
    return work
