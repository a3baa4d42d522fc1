"""What the inside tests share: a tiny model, sampling with it, and a second, slow way to compute HPFA."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise

import comfy.samplers
import torch
from fixtures.tiny import make_conditioning, make_model
from pack.nodes.host import applied as host_applied
from pack.nodes.host import patch as host_patch
from pack.nodes.host import source as host_source
from pack.nodes.host import unet as host_unet
from torch import Tensor

from truepose_core.parsing import HumanParsing

GREY = (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
ALL = (1.0,) * 7


@lru_cache
def model(seed: int = 0, family: str = "SD15", channels: int = 4):
    return make_model(seed, family, **({"in_channels": channels} if channels != 4 else {}))


def latent(seed: int, batch: int = 1, height: int = 12, width: int = 8) -> Tensor:
    return torch.randn((batch, 4, height, width), generator=torch.Generator().manual_seed(seed))


def parsing(seed: int = 0, batch: int = 1, height: int = 96, width: int = 64) -> HumanParsing:
    """Hard regions in blobs of 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (batch, height // 16, width // 16), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return HumanParsing.from_labels(labels)


def source(seed: int = 1, batch: int = 1, who: object = None, height: int = 12, width: int = 8, **more: object):
    who = model() if who is None else who
    image = parsing(seed, batch, height * 8, width * 8)
    return host_source.read_source(who, latent(seed + 100, batch, height, width), image, make_conditioning(5), **more)


class _Steps(comfy.samplers.Sampler):
    """Two plain Euler steps: short, and every host has the same."""

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        x = noise * sigmas[0]
        for now, after in pairwise(sigmas):
            denoised = model_wrap(x, now.expand(x.shape[0]), **extra_args)
            x = x + (x - denoised) / now * (after - now)
        return x


def sample(
    who: object,
    positive: list | None = None,
    negative: list | None = None,
    seed: int = 9,
    batch: int = 1,
    height: int = 12,
    width: int = 8,
    cfg: float = 4.0,
    sigmas: tuple[float, ...] = (8.0, 2.0, 0.0),
) -> Tensor:
    """A sampled latent, with everything the host does around a sampler."""
    guider = comfy.samplers.CFGGuider(who)
    guider.set_conds(positive or make_conditioning(1), negative or make_conditioning(2))
    guider.set_cfg(cfg)
    noise = latent(seed, batch, height, width)
    torch.manual_seed(0)  # HyperTile and ToMe draw from the global generator
    return guider.sample(noise, torch.zeros_like(noise), _Steps(), torch.tensor(sigmas), seed=seed, disable_pbar=True)


def split(
    who: object, x: Tensor, sigma: float = 3.0, apart: bool = False, conds: tuple[list, list] | None = None
) -> tuple[Tensor, Tensor]:
    """Denoised predictions of one call: (positive, negative). apart: cond and uncond in calls of their own, as
    with little memory. conds: the two prompts."""
    out = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            conds = [model_wrap.conds["positive"], model_wrap.conds["negative"]]
            level = torch.full((x.shape[0],), sigma)
            run = comfy.samplers.calc_cond_batch
            options = extra_args["model_options"]
            if apart:
                out["positive"] = run(model_wrap.inner_model, [conds[0], None], x, level, options)[0]
                out["negative"] = run(model_wrap.inner_model, [None, conds[1]], x, level, options)[1]
            else:
                both = run(model_wrap.inner_model, conds, x, level, options)
                out["positive"], out["negative"] = both
            return x

    guider = comfy.samplers.CFGGuider(who)
    guider.set_conds(*(conds or (make_conditioning(1), make_conditioning(2))))
    guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([sigma, 0.0]), disable_pbar=True)
    return out["positive"], out["negative"]


@contextmanager
def reference(unet: object, sources: list, bias=None):
    """HPFA written the slow way: attn1 modules whose forward appends all source tokens under an explicit bias.

    sources: SourceFeatures of batch 1. bias(site, source, N) -> [N, M], added to the logits of source tokens.
    """
    found = host_unet.self_attentions(unet)

    def patched(site: str, attn: object):
        def forward(x, context=None, value=None, mask=None, transformer_options=None):
            b, n, c = x.shape
            heads = attn.heads
            context = x if context is None else context
            q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context if value is None else value)
            k, v = k.reshape(b, -1, c), v.reshape(b, -1, c)  # HyperTile folds x alone
            biases = [torch.zeros(n, k.shape[1])]
            for one in sources:
                tokens = one.sites[site]
                k = torch.cat([k, attn.to_k(tokens).expand(b, -1, -1)], 1)
                v = torch.cat([v, attn.to_v(tokens).expand(b, -1, -1)], 1)
                zero = torch.zeros(n, tokens.shape[1])
                biases.append(zero if bias is None else bias(site, one, n))
            q, k, v = (t.reshape(b, -1, heads, c // heads).transpose(1, 2) for t in (q, k, v))
            logits = q @ k.mT * (c // heads) ** -0.5 + torch.cat(biases, 1)
            out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
            return attn.to_out(out)

        return forward

    try:
        for site, (_, attn) in found.items():
            attn.forward = patched(site, attn)
        yield
    finally:
        for _, attn in found.values():
            del attn.forward


def apply(who: object, features: object, omega: tuple[float, ...] = ALL, **more: object) -> object:
    """Apply HPFA with negative rows kept, unless told otherwise."""
    more.setdefault("keep_unconditional", True)
    return host_patch.with_hpfa(who, host_applied.AppliedSource(features, omega, **more))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    """Equal up to rounding of float32, relative to the size of the values."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def far(a: Tensor, b: Tensor) -> bool:
    """Different enough that a test of equality means something."""
    return bool((a - b).abs().max() > 1e-3)
