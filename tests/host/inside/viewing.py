"""Attention View: what it measures equals attention written out, and looking changes nothing."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.samplers
import pytest
import torch
from bench import ALL, GREY, apply, far, latent, model, parsing, sample, source
from fixtures.tiny import make_conditioning, make_vae
from pack.nodes.host import features as host_features
from pack.nodes.host import unet as host_unet
from pack.nodes.host import view as host_view
from pack.nodes.mannequin import Mannequin
from pack.nodes.source import ApplyHPFA, SourceNetEncode
from pack.nodes.view import AttentionView
from torch import Tensor

from truepose_core.attention.view import SiteLook, combine
from truepose_core.errors import TruePoseError

PERCENT = 0.4


@contextmanager
def written_out(unet: object, features: list, which: int, rows: int, bias=None, groups=None):
    """Attention with whole maps, all source tokens and a bias; yields the looks it saw, one list for each row."""
    seen: list[list[SiteLook]] = [[] for _ in range(rows)]
    found = host_unet.self_attentions(unet)

    def patched(site: str, attn: object):
        def forward(x, context=None, value=None, mask=None, transformer_options=None):
            b, n, _ = x.shape
            k, v, extra = attn.to_k(x), attn.to_v(x), [torch.zeros(n, n)]
            for number, one in enumerate(features):
                k = torch.cat([k, attn.to_k(one.sites[site]).expand(b, -1, -1)], 1)
                v = torch.cat([v, attn.to_v(one.sites[site]).expand(b, -1, -1)], 1)
                m = one.sites[site].shape[1]
                extra.append(torch.zeros(n, m) if bias is None else bias(number, one, site, n))
            q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(x), k, v))
            maps = (q @ k.mT * q.shape[-1] ** -0.5 + torch.cat(extra, 1)).softmax(-1)
            first = n + sum(one.sites[site].shape[1] for one in features[:which])
            mine = features[which]
            m = mine.sites[site].shape[1]
            weight = torch.ones(n, 1) if groups is None else groups(n)
            weight = weight / weight.sum(0).clamp(min=1e-9)
            for row in range(rows):
                mass = weight.mT @ maps[row].mean(0)[:, first : first + m]
                seen[row].append(SiteLook(mass, mine.grid(site), mine.regions(site)[0], n))
            return attn.to_out((maps @ v).transpose(1, 2).flatten(2))

        return forward

    try:
        for site, (_, attn) in found.items():
            attn.forward = patched(site, attn)
        yield seen
    finally:
        for _, attn in found.values():
            del attn.forward


def call_once(who: object, samples: Tensor, seed: int = 0) -> None:
    """One call at the noise level that `look` takes, through the host, with nothing of ours."""
    sigma = torch.tensor([float(who.get_model_object("model_sampling").percent_to_sigma(PERCENT))])
    guider = comfy.samplers.CFGGuider(who)
    guider.inner_set_conds({"positive": make_conditioning(1)})
    noise = torch.randn(samples.shape, generator=torch.manual_seed(seed))
    guider.sample(noise, samples, host_view._LookOnce(), sigma, disable_pbar=True)


def look(who: object, samples: Tensor, number: int = 0, target: object = None) -> list:
    return host_view.look(who, make_conditioning(1), {"samples": samples}, number, PERCENT, 0, target)


def same(seen: list, wanted: list) -> bool:
    pairs = zip(seen, (combine(sites) for sites in wanted), strict=True)
    names = ("heat", "by_region", "share")
    return all(torch.allclose(getattr(a, n), getattr(b, n), rtol=1e-3, atol=1e-4) for a, b in pairs for n in names)


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_the_look_is_the_attention(family: str) -> None:
    who = model(0, family)
    one, samples = source(who=who), latent(4)
    with written_out(who.model.diffusion_model, [one], 0, 1) as wanted:
        call_once(who, samples)
    assert same(look(apply(who, one), samples), wanted)
    assert len(wanted[0]) == len(one.sites)


def test_with_weights_match_and_groups_of_two_sources() -> None:
    first, second, target, samples = source(1), source(2), parsing(8), latent(4, 2)
    beta, strength = 1.5, 0.7

    def rows(n: int) -> Tensor:
        h = round((n * 1.5) ** 0.5)
        return target.tokens(h, n // h)[0]

    def bias(number: int, one: object, site: str, n: int) -> Tensor:
        regions = one.regions(site)[0]
        if number == 0:
            return torch.zeros(n, regions.shape[0])
        weight = (regions @ torch.tensor(GREY)).clamp(0, 1)
        # Tokens of next to no weight are dropped by the node.
        logs = torch.where(weight > 1e-6, weight.log(), torch.full_like(weight, -1e4))
        matched = torch.tensor(strength).log() + beta * rows(n) @ regions.mT
        return logs[None] + matched

    def groups(n: int) -> Tensor:
        return torch.cat([torch.ones(n, 1), rows(n)], 1)

    unet = model().model.diffusion_model
    with written_out(unet, [first, second], 1, 2, bias, groups) as wanted:
        call_once(model(), samples)
    both = apply(apply(model(), first), second, GREY, beta=beta, strength=strength, target=target)
    assert same(look(both, samples, 1, target), wanted)


def test_without_guidance_is_plain_concatenation() -> None:
    one = source()
    guided = apply(model(), one, GREY, beta=3.0, target=parsing(8), strength=0.5)
    plain = host_view.without_guidance(guided)
    assert torch.equal(sample(plain), sample(apply(model(), one, ALL)))
    assert far(sample(plain), sample(guided))


def test_looking_leaves_no_trace_and_calls_who_was_there() -> None:
    who = apply(model(), source())
    before = sample(who)
    calls = []
    watched = who.clone()
    options = watched.model_options["transformer_options"]

    def theirs(attention, *args, **kwargs):
        calls.append(1)
        return attention(*args, **kwargs)

    options["optimized_attention_override"] = theirs
    seen = look(watched, latent(4))
    assert calls and torch.equal(seen[0].heat, look(who, latent(4))[0].heat)
    assert options["optimized_attention_override"] is theirs
    assert torch.equal(sample(who), before)
    assert "optimized_attention_override" not in who.model_options["transformer_options"]


def test_a_batch_of_sources_serves_its_rows() -> None:
    two, samples = source(1, batch=2), latent(4, 2)
    both = look(apply(model(), two), samples)
    assert far(both[0].heat, both[1].heat)
    for row in range(2):
        sites = {k: v[row : row + 1] for k, v in two.sites.items()}
        one = host_features.HostFeatures(two.family, sites, two.latent_size, two.parsing[row])
        alone = look(apply(model(), one), samples)[row]
        assert torch.allclose(alone.heat, both[row].heat, rtol=1e-3, atol=1e-4)


class TestNode:
    def people(self) -> dict:
        image, regions, pose, *_ = Mannequin.execute(seed=1, width=64, height=96).result
        source_ = SourceNetEncode.execute(model(), make_vae(), image, regions, pose=pose).result[0]
        target = Mannequin.execute(seed=1, pose="walk", width=64, height=96).result
        return {"image": image, "source": source_, "pose": target[2], "parsing": target[1]}

    def test_figures(self) -> None:
        people = self.people()
        (guided,) = ApplyHPFA.execute(model(), people["source"], target_pose=people["pose"]).result
        inputs = {"positive": make_conditioning(1), "latent": {"samples": latent(4, 2)}}
        (full,) = AttentionView.execute(guided, image=people["image"], **inputs).result
        assert full.shape[0] == 2 and full.shape[3] == 3 and bool(full.isfinite().all())
        (again,) = AttentionView.execute(guided, image=people["image"], **inputs).result
        assert torch.equal(full, again)
        (guided,) = ApplyHPFA.execute(model(), people["source"]).result
        (narrow,) = AttentionView.execute(guided, **inputs).result
        # Without a target nothing is known of its regions: one map, one chart.
        assert narrow.shape[2] < full.shape[2] and narrow.shape[1] < full.shape[1]

    def test_weights_show(self) -> None:
        people = self.people()
        (guided,) = ApplyHPFA.execute(model(), people["source"], face=0.0, upper=0.0, skin=0.0).result
        seen = look(guided, latent(4))[0]
        plain = look(host_view.without_guidance(guided), latent(4))[0]
        # Tokens on a border still show some of their other region.
        assert bool((seen.by_region[0, [1, 3, 5]] < plain.by_region[0, [1, 3, 5]]).all())
        assert float(seen.share[0]) < float(plain.share[0])

    @pytest.mark.parametrize("percent", [0.0, 1.0])
    def test_the_ends_of_the_sampling(self, percent: float) -> None:
        inputs = {"positive": make_conditioning(1), "latent": {"samples": latent(4)}}
        (drawn,) = AttentionView.execute(apply(model(), source()), percent=percent, **inputs).result
        assert bool(drawn.isfinite().all())

    def test_refusals(self) -> None:
        inputs = {"positive": make_conditioning(1), "latent": {"samples": latent(4)}}
        with pytest.raises(TruePoseError, match="reads no source"):
            AttentionView.execute(model(), **inputs)
        one = apply(model(), source())
        with pytest.raises(TruePoseError, match="source_number is 2 and the model reads 1"):
            AttentionView.execute(one, source_number=2, **inputs)
        with pytest.raises(TruePoseError, match="3 images and 1 sources"):
            AttentionView.execute(one, image=torch.rand(3, 96, 64, 3), **inputs)
        with pytest.raises(TruePoseError, match="the image is 96x96 and the source was read at 64x96"):
            AttentionView.execute(one, image=torch.rand(1, 96, 96, 3), **inputs)
        late = apply(model(), source(), sigmas=host_unet.sigma_window(model(), 0.6, 1.0))
        with pytest.raises(TruePoseError, match=r"not read at 0\.4"):
            AttentionView.execute(late, **inputs)
