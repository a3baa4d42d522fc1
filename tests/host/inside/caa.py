"""CAA on a MODEL: training-free with IP-Adapter weights, and with the region tokens a TruePose model learned with.

What is added is held against IP-Adapter packs' own way (a replace of attn2) and against the formula spelt out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import comfy.clip_vision
import comfy.samplers
import folder_paths
import pytest
import torch
from bench import apply as apply_hpfa
from bench import close, far, latent, model, parsing, sample, source, split
from fixtures.tiny import CONTEXT, _fill, make_conditioning, make_model
from model import ONES, encode, keypoints, loaded, noise, person, run
from pack.nodes.caa import ApplyCAA, CAAEncode, LoadCAAAdapter, LoadOpenCLIPVision
from pack.nodes.host import caa as host_caa
from pack.nodes.host import guider as host_guider
from pack.nodes.host import model as host_model
from pack.nodes.host import patch as host_patch
from pack.nodes.host import unet as host_unet
from pack.nodes.host import vision as host_vision
from pack.nodes.host.vision import CAAAdapter, SourceCAA
from pack.nodes.model import ApplyPoseEncoder
from pack.nodes.source import ApplyHPFA, SourceNetEncode
from patching import unet
from safetensors.torch import save_file
from stacking import OTHERS, control_net, with_lora
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fits_cells
from truepose_core.models import vision_tower
from truepose_core.models.ip_adapter import RegionAdapter
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import prior_for_poses
from truepose_core.regions import Region

UPPER = int(Region.UPPER)
SIDE, PATCH, WIDTH = 32, 8, 48
"""Of the CLIP vision model: a grid of 4 x 4 patches."""


@lru_cache
def clip(seed: int = 0) -> comfy.clip_vision.ClipVisionModel:
    """The host's own CLIP_VISION, tiny and random."""
    config = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 4 * WIDTH,
        "hidden_act": "gelu",
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_channels": 3,
        "projection_dim": 40,
        "model_type": "clip_vision_model",
    }
    path = Path(folder_paths.get_temp_directory()) / "vision.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    vision = comfy.clip_vision.ClipVisionModel(str(path))
    _fill(vision.model, seed)
    return vision


def adapter_weights(who: object, plus: bool, seed: int = 0) -> dict[str, Tensor]:
    """A random IP-Adapter of the model's shape."""
    blocks = {site: block.attn2 for site, (_, block) in host_unet.transformer_blocks(unet(who)).items()}
    order = [s for part in ("input", "output", "middle") for s in blocks if s.startswith(part)]
    g = torch.Generator().manual_seed(seed)

    def matrix(out: int, width: int, gain: float = 1.0) -> Tensor:
        return gain * torch.randn((out, width), generator=g) / width**0.5

    w: dict[str, Tensor] = {}
    for i, site in enumerate(order):
        width = blocks[site].to_k.out_features
        w[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = matrix(width, CONTEXT, 2.0)
        w[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = matrix(width, CONTEXT)
    at = "image_proj"
    if not plus:
        w[f"{at}.proj.weight"], w[f"{at}.proj.bias"] = matrix(4 * CONTEXT, 40, 3.0), torch.zeros(4 * CONTEXT)
        w[f"{at}.norm.weight"], w[f"{at}.norm.bias"] = torch.ones(CONTEXT), torch.randn(CONTEXT, generator=g)
        return w
    dim = 64
    w[f"{at}.latents"] = torch.randn((1, 5, dim), generator=g)
    w[f"{at}.proj_in.weight"], w[f"{at}.proj_in.bias"] = matrix(dim, WIDTH), torch.zeros(dim)
    w[f"{at}.proj_out.weight"], w[f"{at}.proj_out.bias"] = matrix(CONTEXT, dim), torch.zeros(CONTEXT)
    for name, width in (("norm_out", CONTEXT), *((f"layers.0.{n}", dim) for n in ("0.norm1", "0.norm2", "1.0"))):
        w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"] = torch.ones(width), torch.zeros(width)
    w[f"{at}.layers.0.0.to_q.weight"], w[f"{at}.layers.0.0.to_out.weight"] = matrix(dim, dim, 2.0), matrix(dim, dim)
    w[f"{at}.layers.0.0.to_kv.weight"] = matrix(2 * dim, dim)
    w[f"{at}.layers.0.1.1.weight"], w[f"{at}.layers.0.1.3.weight"] = matrix(4 * dim, dim), matrix(dim, 4 * dim)
    return w


@lru_cache
def adapter(plus: bool = True, family: str = "SD15") -> CAAAdapter:
    return CAAAdapter(RegionAdapter.from_tensors(adapter_weights(model(0, family), plus)))


def picture(seed: int, batch: int = 1, height: int = 96, width: int = 64) -> Tensor:
    """IMAGE of blobs."""
    small = torch.rand((batch, 3, height // 16, width // 16), generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(16, 2).repeat_interleave(16, 3).movedim(1, -1)


def encoded(plus: bool = True, batch: int = 1, family: str = "SD15", **more: object) -> SourceCAA:
    inputs = {"image": picture(3, batch), "parsing": parsing(3, batch), "clip_vision": clip(), **more}
    return run(CAAEncode, adapter=adapter(plus, family), **inputs)[0]


def whole(batch: int = 1) -> dict:
    """A square person that is one region from edge to edge."""
    labels = torch.full((batch, 64, 64), UPPER)
    return {"image": picture(4, batch, 64, 64), "parsing": HumanParsing.from_labels(labels)}


def applied(who: object, caa: SourceCAA, **more: object) -> object:
    return run(ApplyCAA, model=who, caa=caa, **more)[0]


# --------------------------------------------------------------------------------------- a second way to compute it


def as_packs_do(
    who: object, add: Callable[[str, int, Tensor, dict], Tensor], kinds: tuple[int, ...] = (0, 1)
) -> object:
    """The model with every attn2 replaced: its own attention, plus add(site, kind, q of that kind's rows, options)."""
    clone = who.clone()
    for site, (block, module) in host_unet.transformer_blocks(unet(who)).items():

        def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict, site: str = site, module: object = module) -> Tensor:
            heads = module.attn2.heads
            q, k, v = (host_caa.split_heads(x, heads) for x in (q, k, v))
            out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            chunks = q.chunk(len(extra["cond_or_uncond"]))
            more = [add(site, kind, x, extra) for kind, x in zip(extra["cond_or_uncond"], chunks, strict=True)]
            return host_caa.merge_heads(out + torch.cat(more))

        clone.set_model_attn2_replace(replace, *block)
    return clone


def layer(who: object, weights: Mapping[str, Tensor], site: str) -> tuple[Tensor, Tensor]:
    """to_k_ip and to_v_ip of a site, counted as the original counts."""
    sites = list(host_unet.transformer_blocks(unet(who)))
    order = [s for part in ("input", "output", "middle") for s in sites if s.startswith(part)]
    number = 2 * order.index(site) + 1
    return tuple(weights[f"ip_adapter.{number}.to_{x}_ip.weight"] for x in "kv")


def original_ip_adapter(who: object, plus: bool, image: Tensor, scale: float) -> object:
    """IP-Adapter as published: tokens of the whole picture, of no picture for negative rows, no regions anywhere."""
    weights = adapter_weights(who, plus)
    pictures = [image, torch.tensor(clip().image_mean).expand(1, SIDE, SIDE, 3)]
    seen = [clip().encode_image(x) for x in pictures]
    project = RegionAdapter.from_tensors(weights).image_proj
    if plus:
        tokens = [project(x.penultimate_hidden_states, torch.ones(1, 17, 1))[:, 0] for x in seen]
    else:
        tokens = [project(seen[0].image_embeds), project(torch.zeros_like(seen[1].image_embeds))]

    def add(site: str, kind: int, q: Tensor, extra: dict) -> Tensor:
        k, v = (
            host_caa.split_heads(tokens[kind] @ w.T, q.shape[1]).expand(q.shape[0], -1, -1, -1)
            for w in layer(who, weights, site)
        )
        return scale * (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    return as_packs_do(who, add)


@pytest.mark.parametrize("plus", [True, False], ids=["plus", "plain"])
@pytest.mark.parametrize(("family", "batch"), [("SD15", 1), ("SD15", 2), ("SDXL", 1)])
def test_one_region_is_the_original_ip_adapter(plus: bool, family: str, batch: int) -> None:
    who, shown = model(0, family), whole()
    ours = sample(applied(who, encoded(plus, family=family, **shown), strength=0.7), batch=batch)
    theirs = sample(original_ip_adapter(who, plus, shown["image"], 0.7), batch=batch)
    assert close(ours, theirs, 1e-4)
    assert far(ours, sample(who, batch=batch))


def formula(who: object, caa: SourceCAA, omega: tuple[float, ...], target: HumanParsing, **how: float) -> object:
    """Regions, weights, region match and the background's share with every logit at hand."""
    weights = adapter_weights(who, True)
    region = torch.arange(7).repeat_interleave(caa.tokens.tokens.shape[1] // 7)
    sides = [caa.tokens.tokens, caa.nothing.repeat(1, 7, 1)]

    def add(site: str, kind: int, q: Tensor, extra: dict) -> Tensor:
        height, width = extra["activations_shape"][-2:]
        prior = target.tokens(height, width)[:, None]
        k, v = (host_caa.split_heads(sides[kind] @ w.T, q.shape[1]) for w in layer(who, weights, site))
        logits = q @ k.mT * q.shape[-1] ** -0.5 + how["match"] * prior[..., region]
        logits = logits.masked_fill(~caa.tokens.shown[:, None, None], -torch.inf)
        out = logits.softmax(-1) @ (v * torch.tensor(omega)[region][:, None])
        return how["strength"] * out * (1 - (1 - how["background"]) * prior[..., :1])

    return as_packs_do(who, add)


@pytest.mark.parametrize("background", [0.0, 0.4, 1.0])
def test_regions_are_the_formula(background: float) -> None:
    omega = (0.5, 0.0, 1.0, 0.3, 0.9, 0.2)
    names = ("face", "hair", "upper", "lower", "skin", "accessory")
    caa, target = encoded(), parsing(7)
    settings = {**dict(zip(names, omega, strict=True)), "background": background, "region_match": 3.0, "strength": 0.8}
    ours = sample(applied(model(), caa, target_parsing=target, **settings))
    how = {"match": 3.0, "strength": 0.8, "background": background}
    assert close(ours, sample(formula(model(), caa, (1.0, *omega), target, **how)), 1e-4)
    assert far(ours, sample(applied(model(), caa, target_parsing=target, **{**settings, "hair": 1.0})))
    assert far(ours, sample(applied(model(), caa, **settings)))


def test_without_a_known_target_match_and_background_say_nothing() -> None:
    caa = encoded()
    plain = sample(applied(model(), caa))
    assert torch.equal(plain, sample(applied(model(), caa, region_match=9.0, background=1.0)))


def test_the_target_that_apply_hpfa_knows_serves_too() -> None:
    caa, features, target = encoded(), source(), parsing(7)
    hpfa = {"beta": 0.0, "target": target, "given": True}
    told = sample(applied(apply_hpfa(model(), features, **hpfa), caa, target_parsing=target))
    assert close(sample(applied(apply_hpfa(model(), features, **hpfa), caa)), told)
    assert far(told, sample(applied(apply_hpfa(model(), features), caa)))


def test_a_pose_carries_the_regions() -> None:
    shown, caa = person(3, "stand", 96, 64), {}
    for name, pose in (("with", keypoints(shown)), ("without", None)):
        inputs = {"image": shown.image.movedim(1, -1), "parsing": HumanParsing(shown.parsing), "pose": pose}
        caa[name] = encoded(**inputs)
    target = keypoints(person(5, "walk", 96, 64))
    from pack.nodes.schema import read_bodies

    carried = prior_for_poses(caa["with"].parsing, caa["with"].body, read_bodies(target, "the pose"))
    ours = sample(applied(model(), caa["with"], target_pose=target))
    assert close(ours, sample(applied(model(), caa["with"], target_parsing=carried)))
    with pytest.raises(TruePoseError, match="connect pose to CAA Encode"):
        applied(model(), caa["without"], target_pose=target)


# ------------------------------------------------------------------------------------------- nothing is left behind

NONE = dict.fromkeys(("face", "hair", "upper", "lower", "skin", "accessory"), 0.0)


def test_strength_zero_and_all_weights_zero_are_the_model_itself() -> None:
    before = sample(model())
    for nothing in ({"strength": 0.0}, NONE, {**NONE, "background": 1.0}):
        assert torch.equal(before, sample(applied(model(), encoded(), **nothing)))
    hpfa = apply_hpfa(model(), source())
    assert torch.equal(sample(hpfa), sample(applied(hpfa, encoded(), strength=0.0)))


def test_a_bypass_leaves_nothing() -> None:
    before, caa = sample(model()), encoded()
    hpfa = apply_hpfa(model(), source())
    with_both = applied(hpfa, caa)
    assert far(sample(with_both), sample(hpfa))
    assert torch.equal(before, sample(model()))
    assert torch.equal(before, sample(host_patch.without_hpfa(host_patch.without_caa(with_both))))
    assert torch.equal(sample(hpfa), sample(host_patch.without_caa(with_both)))
    assert torch.equal(sample(applied(model(), caa)), sample(host_patch.without_hpfa(with_both)))


def test_clones_share_it_and_copies_are_freed() -> None:
    patched = applied(model(), encoded())
    (one,) = host_patch.applied_caas(patched.clone().clone())
    assert copy.deepcopy(one) is one
    assert torch.equal(sample(patched), sample(patched.clone()))
    cache = patched.attachments[host_patch.KEY].cache
    assert len(cache) == 0
    assert one.nbytes(2) * 2 == one.nbytes(4) > 0
    broken, seen = patched.clone(), []

    def fail(args: dict) -> None:
        seen.append(len(cache))
        raise RuntimeError("stop")

    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(RuntimeError, match="stop"):
        sample(broken)
    assert seen[0] > 0 and len(cache) == 0


# ------------------------------------------------------------------------------------------------- rows and batches


def test_dropped_rows_get_the_tokens_of_no_picture() -> None:
    x, caa = latent(9), encoded()
    plain, dropped = split(model(), x), split(applied(model(), caa), x)
    kept = split(applied(model(), caa, unconditional="keep"), x)
    assert close(kept[0], dropped[0])
    assert far(kept[1], dropped[1]) and far(dropped[1], plain[1]), "no picture is not nothing, as in its training"


def test_cond_and_uncond_apart_as_with_little_memory() -> None:
    x = latent(9, 2)
    for unconditional in ("drop", "keep"):
        patched = applied(model(), encoded(), target_parsing=parsing(7), unconditional=unconditional)
        for together, apart in zip(split(patched, x), split(patched, x, apart=True), strict=True):
            assert close(together, apart)


@pytest.mark.parametrize("plus", [True, False], ids=["plus", "plain"])
def test_a_batch_is_its_items_one_by_one(plus: bool) -> None:
    images, regions, target, x = picture(3, 2), parsing(3, 2), parsing(7, 4), latent(9, 4)
    both = split(applied(model(), encoded(plus, 2), target_parsing=target), x)
    for i in range(4):
        half = i // 2
        one = encoded(plus, image=images[half : half + 1], parsing=regions[half])
        alone = split(applied(model(), one, target_parsing=target[i]), x[i : i + 1])
        for got, expected in zip(both, alone, strict=True):
            assert close(got[i : i + 1], expected)
    with pytest.raises(TruePoseError, match="2 CAA source images and 3 latents"):
        sample(applied(model(), encoded(plus, 2)), batch=3)


def test_the_window() -> None:
    plain, full = sample(model()), sample(applied(model(), encoded()))
    late = applied(model(), encoded(), start_percent=0.999)
    assert torch.equal(plain, sample(late))
    some = sample(applied(model(), encoded(), end_percent=0.3))
    assert far(some, plain) and far(some, full)


def test_two_persons_add_up() -> None:
    a, b = encoded(), encoded(image=picture(8))
    ab = sample(applied(applied(model(), a, strength=0.4), b, strength=0.6))
    ba = sample(applied(applied(model(), b, strength=0.6), a, strength=0.4))
    assert close(ab, ba)
    assert far(ab, sample(applied(model(), a, strength=0.4)))
    half = applied(applied(model(), a, strength=0.5), a, strength=0.5)
    assert close(sample(half), sample(applied(model(), a)), 1e-4)


# ------------------------------------------------------------------------------------------------------- with others


def other_pack(who: object) -> object:
    """An IP-Adapter pack's own node: a replace of attn2."""
    return original_ip_adapter(who, True, picture(8, 1, 64, 64), 0.5)


MORE = {**OTHERS, "an IP-Adapter pack": other_pack, "LoRA": with_lora, "HPFA": lambda m: apply_hpfa(m, source())}
SIZE = {"height": 16, "width": 24}


@pytest.mark.parametrize("name", MORE)
def test_both_orders_are_the_same(name: str) -> None:
    other, caa = MORE[name], encoded()
    alone = sample(other(model()), **SIZE)
    before = sample(applied(other(model()), caa, target_parsing=parsing(7, 1, 128, 192)), **SIZE)
    after = sample(other(applied(model(), caa, target_parsing=parsing(7, 1, 128, 192))), **SIZE)
    assert far(before, alone) and bool(before.isfinite().all())
    assert close(before, after)
    assert torch.equal(alone, sample(applied(other(model()), caa, strength=0.0), **SIZE))


def test_an_ip_adapter_packs_own_output_stays() -> None:
    """What it adds and what we add are both linear in the block's output projection: one site shows the sum."""
    shown = whole()
    other, caa = other_pack(model()), encoded(**shown)
    both = sample(applied(other, caa, strength=0.5))
    together = original_ip_adapter(other_pack(model()), True, shown["image"], 0.5)
    own = {k: v for k, v in other.model_options["transformer_options"]["patches_replace"]["attn2"].items()}
    theirs = together.model_options["transformer_options"]["patches_replace"]["attn2"]

    def add_up(first: Callable, second: Callable) -> Callable:
        def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
            heads = extra["n_heads"]
            split_q, split_k, split_v = (host_caa.split_heads(x, heads) for x in (q, k, v))
            text = (split_q @ split_k.mT * split_q.shape[-1] ** -0.5).softmax(-1) @ split_v
            return first(q, k, v, extra) + second(q, k, v, extra) - host_caa.merge_heads(text)

        return replace

    summed = model().clone()
    for block, first in own.items():
        summed.set_model_attn2_replace(add_up(first, theirs[block]), *block)
    assert close(both, sample(summed), 1e-4)


def test_control_net_and_regional_prompts() -> None:
    hint = torch.rand((1, 3, 96, 64), generator=torch.Generator().manual_seed(2))
    control = control_net().set_cond_hint(hint, 0.7)
    mask = torch.zeros(1, 12, 8)
    mask[:, :, 4:] = 1
    base = make_conditioning(1)[0]
    positive = [
        [make_conditioning(3, tokens=9)[0][0], {**base[1], "mask": mask, "strength": 0.8}],
        [base[0], {**base[1], "control": control, "control_apply_to_uncond": False}],
    ]
    caa, target = encoded(), parsing(7)
    ours = sample(applied(model(), caa, target_parsing=target), positive)
    how = {"match": 4.0, "strength": 1.0, "background": 0.0}
    assert close(ours, sample(formula(model(), caa, (1.0,) * 7, target, **how), positive), 1e-4)
    assert far(ours, sample(model(), positive))


def test_a_prompt_for_an_area_sees_its_crop_of_the_target() -> None:
    caa, target = encoded(), parsing(7, 1, 128, 128)
    whole_prompt = make_conditioning(1)
    placed = [[whole_prompt[0][0], {**whole_prompt[0][1], "area": (8, 8, 8, 0), "strength": 1.0}]]
    x, seen = latent(9, 1, 16, 16), {}

    def keep(args: dict) -> Tensor:
        seen["cond"] = args["cond_denoised"]
        return args["denoised"]

    watched = applied(model(), caa, target_parsing=target).clone()
    watched.set_model_sampler_post_cfg_function(keep)
    sample(watched, positive=placed, height=16, width=16, sigmas=(3.0, 0.0), seed=9)
    crop = applied(model(), caa, target_parsing=HumanParsing(target.masks[:, :, 64:128, 0:64]))
    expected = split(crop, x[:, :, 8:16, 0:8] * 3.0)[0]
    assert close(seen["cond"][:, :, 8:16, 0:8], expected)


def test_the_guider_hides_the_person_with_the_source() -> None:
    """Where guidance asks for the pose alone, a row reads the tokens of no picture, as negative rows do."""
    caa, positive, x = encoded(), make_conditioning(1), latent(9)
    guider = host_guider.make_guider(applied(model(), caa), positive, None, 1.0, 0.0)
    euler = comfy.samplers.sampler_object("euler")
    got = guider.sample(x, torch.zeros_like(x), euler, torch.tensor([3.0, 0.0]), disable_pbar=True)
    seen = split_with_same_prompt(applied(model(), caa), x, positive)
    got = model().model.process_latent_in(got)
    assert close(got, seen[1], 1e-4) and far(got, seen[0])


def split_with_same_prompt(who: object, x: Tensor, prompt: list) -> tuple[Tensor, Tensor]:
    """(positive, negative) denoised at sigma 3 from the same noise, both with one prompt."""
    out = {}

    def keep(args: dict) -> Tensor:
        out["both"] = args["cond_denoised"], args["uncond_denoised"]
        return args["denoised"]

    watched = who.clone()
    watched.set_model_sampler_post_cfg_function(keep)
    guider = comfy.samplers.CFGGuider(watched)
    guider.set_conds(prompt, prompt)
    guider.set_cfg(2.0)
    euler = comfy.samplers.sampler_object("euler")
    guider.sample(x, torch.zeros_like(x), euler, torch.tensor([3.0, 0.0]), disable_pbar=True)
    return out["both"]


# ----------------------------------------------------------------------------------------------------- SourceNet


def test_source_net_reads_the_same_tokens() -> None:
    """Reading with IP-Adapter beside the prompt is what the original does to the source pass, site by site."""
    from fixtures.tiny import make_vae

    shown = whole()
    inputs = {**shown, "model": model(), "vae": make_vae(), "conditioning": make_conditioning(5)}
    plain = run(SourceNetEncode, **inputs)[0]
    ours = run(SourceNetEncode, **inputs, caa=encoded(**shown))[0]
    theirs = run(SourceNetEncode, **{**inputs, "model": original_ip_adapter(model(), True, shown["image"], 1.0)})[0]
    last = list(plain.sites)[-1]
    assert far(ours.sites[last], plain.sites[last])
    assert all(close(ours.sites[site], theirs.sites[site], 1e-4) for site in plain.sites)
    patched = run(SourceNetEncode, **{**inputs, "model": applied(model(), encoded(**shown))})[0]
    assert torch.equal(patched.sites[last], plain.sites[last]), "Apply CAA is taken off for the pass"


# ------------------------------------------------------------------------------------------------- TruePose models


def truepose(hpfa: bool = True, caa: SourceCAA | None = None, first: bool = False, **more: object) -> Tensor:
    """One prediction of the bundled model."""
    from model import denoised

    _, features = encode()
    pose = keypoints(person(5, "walk"))
    (who,) = run(ApplyPoseEncoder, model=loaded().target, pose=pose)
    if caa is not None and first:
        who = applied(who, caa, **more)
    if hpfa:
        (who,) = run(ApplyHPFA, model=who, source=features, target_pose=pose, **ONES)
    if caa is not None and not first:
        who = applied(who, caa, **more)
    return denoised(who, noise())


def own_caa(seed: int = 3, **more: object) -> SourceCAA:
    shown = person(seed, "stand")
    inputs = {"image": shown.image.movedim(1, -1), "parsing": HumanParsing(shown.parsing), "pose": keypoints(shown)}
    return run(CAAEncode, adapter=loaded().adapter, **{**inputs, **more})[0]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_on_a_truepose_model_it_replaces_and_never_counts_twice(first: bool) -> None:
    own = truepose()
    assert close(truepose(caa=own_caa(), first=first), own)
    other = truepose(caa=own_caa(11), first=first)
    assert far(other, own)
    assert far(truepose(caa=own_caa(), first=first, strength=0.5), own)
    assert torch.equal(truepose(caa=own_caa(), first=first, strength=0.0), own)
    twice = applied(applied(loaded().target, own_caa(11)), own_caa())
    assert len(host_patch.applied_caas(twice)) == 1


def test_regions_of_a_truepose_models_caa_can_be_turned_down() -> None:
    own = truepose(caa=own_caa())
    for name in ("upper", "face"):
        assert not torch.equal(truepose(caa=own_caa(), **{name: 0.0}), own)


def test_the_alignment_goes_by_the_tokens_applied() -> None:
    """Half way of the sampling on, the tokens are no longer added, and HPFA still aligns by them."""
    late = {"end_percent": 0.0}
    silent = truepose(caa=own_caa(), **late)
    adapter = loaded().adapter
    with pytest.MonkeyPatch.context() as patch:
        real = adapter.cross_tokens

        def unscaled(tokens: object, net: str) -> dict:
            return {s: x.weighed((1.0,) * 7, 0.0 if net == "target" else 1.0) for s, x in real(tokens, net).items()}

        patch.setattr(adapter, "cross_tokens", unscaled)
        assert close(truepose(), silent)
    assert not close(truepose(caa=own_caa(11), **late), silent)


def test_source_net_encode_takes_a_truepose_models_tokens() -> None:
    shown, plain = encode()
    inputs = {"model": loaded().source, "vae": loaded().vae, "image": shown.image.movedim(1, -1)}
    inputs |= {"parsing": HumanParsing(shown.parsing), "pose": keypoints(shown)}
    same = run(SourceNetEncode, **inputs, caa=own_caa())[0]
    assert all(torch.equal(same.sites[s], plain.sites[s]) for s in plain.sites)
    assert torch.equal(same.caa.tokens, plain.caa.tokens)
    other = run(SourceNetEncode, **inputs, caa=own_caa(11))[0]
    last = list(plain.sites)[-1]
    assert not torch.equal(other.sites[last], plain.sites[last])
    assert torch.equal(other.caa.tokens, own_caa(11).tokens.tokens)


# ---------------------------------------------------------------------------------------------------- vision towers

TINY = {
    "embed_dim": 40,
    "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": 3, "head_width": 24},
    "text_cfg": {},
}


@pytest.fixture
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a tower that open_clip can build, in models/clip_vision."""
    monkeypatch.setattr(vision_tower, "architectures", lambda: {"tiny": TINY})
    monkeypatch.setattr(vision_tower, "_normalisation", lambda name: (vision_tower.CLIP_MEAN, vision_tower.CLIP_STD))
    tower = vision_tower._build("tiny")
    _fill(tower, 5)
    path = Path(folder_paths.get_folder_paths("clip_vision")[0]) / "tiny.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"visual.{k}": x.contiguous() for k, x in tower.state_dict().items()}, path)
    return path


def test_a_tower_of_open_clip_sees_what_the_hosts_own_would(tiny_tower: Path) -> None:
    assert host_vision.tower_files() == ["tiny.safetensors"]
    (ours,) = run(LoadOpenCLIPVision, file="tiny.safetensors")
    theirs = comfy.clip_vision.ClipVisionModel(str(Path(folder_paths.get_temp_directory()) / "vision.json"))
    theirs.model.float()  # the host keeps towers in half precision
    weights = {f"visual.{k}": x.clone() for k, x in ours.get_sd().items()}
    own = comfy.clip_vision.convert_to_transformers(weights, "visual.")
    missing, _ = theirs.load_sd({k: x.contiguous() for k, x in own.items()})
    assert not missing
    for crop in (True, False):
        a, b = ours.encode_image(picture(3), crop=crop), theirs.encode_image(picture(3), crop=crop)
        for name in ("penultimate_hidden_states", "last_hidden_state", "image_embeds"):
            assert close(getattr(a, name), getattr(b, name), 1e-4), name
    assert a.mm_projected is None and ours.get_ram_usage() > 0
    assert ours.patcher.model is ours.model


def test_caa_encode_takes_either(tiny_tower: Path) -> None:
    (vision,) = run(LoadOpenCLIPVision, file="tiny.safetensors", architecture="tiny")
    for plus in (True, False):
        caa = encoded(plus, clip_vision=vision)
        assert caa.tokens.tokens.shape == encoded(plus).tokens.tokens.shape
        assert far(sample(applied(model(), caa)), sample(model()))


def test_an_adapter_file() -> None:
    folder = Path(folder_paths.get_folder_paths("ipadapter")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_weights(model(), True), folder / "tiny-plus.safetensors")
    assert "tiny-plus.safetensors" in host_vision.adapter_files()
    assert isinstance(LoadCAAAdapter.fingerprint_inputs(file="tiny-plus.safetensors"), str)
    (made,) = run(LoadCAAAdapter, file="tiny-plus.safetensors")
    inputs = {"image": picture(3), "parsing": parsing(3), "clip_vision": clip()}
    caa = run(CAAEncode, adapter=made, **inputs)[0]
    assert torch.equal(caa.tokens.tokens, encoded().tokens.tokens)
    assert caa.get_ram_usage() > 0 and made.get_ram_usage() > 0
    with pytest.raises(TruePoseError, match=r"no file 'gone\.safetensors' in models/ipadapter or models/truepose"):
        run(LoadCAAAdapter, file="gone.safetensors")


class TestBadInput:
    def test_no_vision(self) -> None:
        with pytest.raises(TruePoseError, match="connect clip_vision"):
            encoded(clip_vision=None)

    def test_an_adapter_for_another_model(self) -> None:
        with pytest.raises(TruePoseError, match=r"this IP-Adapter was made for .*choose an IP-Adapter for this model"):
            applied(model(0, "SDXL"), encoded())

    def test_a_model_without_cross_attention(self) -> None:
        who = make_model(0)
        for _, block in host_unet.transformer_blocks(unet(who)).values():
            block.attn2 = torch.nn.Identity()
        with pytest.raises(TruePoseError, match="reads no text"):
            applied(who, encoded())

    def test_truepose_tokens_on_another_model(self) -> None:
        with pytest.raises(TruePoseError, match="take model and adapter from the same"):
            applied(model(), own_caa())

    def test_a_parsing_of_another_picture(self) -> None:
        with pytest.raises(TruePoseError, match="make the parsing from the same image"):
            encoded(parsing=parsing(3, 1, 64, 64))

    def test_an_ip_adapter_beside_a_truepose_models_own_tokens(self) -> None:
        with pytest.raises(TruePoseError, match="this IP-Adapter was made for"):
            shown = person(3, "stand")
            inputs = {"image": shown.image.movedim(1, -1), "parsing": HumanParsing(shown.parsing)}
            inputs |= {"pose": keypoints(shown), "caa": encoded()}
            run(SourceNetEncode, model=loaded().source, vae=loaded().vae, **inputs)

    def test_a_window_the_wrong_way_round(self) -> None:
        with pytest.raises(TruePoseError, match="is after end_percent"):
            applied(model(), encoded(), start_percent=0.6, end_percent=0.2)

    @pytest.mark.parametrize("size", [(64, 96), (64, 64), (96, 160)])
    def test_a_target_of_another_shape(self, size: tuple[int, int]) -> None:
        """The latent is 12 rows of 8 cells: a picture of 96 rows of 64 pixels, or of any other scale."""
        wrong = parsing(7, 1, *size)
        for patched in (
            applied(model(), encoded(), target_parsing=wrong),
            run(ApplyHPFA, model=model(), source=source(), target_parsing=wrong)[0],
        ):
            with pytest.raises(TruePoseError, match=f"the target parsing is {size[1]}x{size[0]} .*8x12 cells"):
                sample(patched)

    def test_rounding_to_whole_cells_is_no_other_shape(self) -> None:
        for picture_size, cells in (
            ((512, 768), (64, 96)),
            ((515, 770), (64, 96)),
            ((100, 61), (13, 7)),
            ((6, 4), (12, 8)),
        ):
            assert fits_cells(picture_size, cells)
        for picture_size, cells in (((512, 512), (64, 96)), ((512, 800), (64, 96)), ((768, 512), (64, 96))):
            assert not fits_cells(picture_size, cells)


def test_the_adapter_file_goes_by_the_models_shape() -> None:
    """A model of other widths than the adapter's is refused before anything is sampled."""
    with pytest.raises(TruePoseError, match="context width"):
        applied(make_model(0, context_dim=64), encoded())
    assert host_model.adapter_of(model()) is None
