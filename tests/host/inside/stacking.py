"""HPFA together with what else patches a MODEL in the host, in both orders.

Each case is held against the slow reference under the same other patch, so "it runs" is not enough.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable

import comfy.controlnet
import comfy.hooks
import comfy.lora
import pytest
import torch
from bench import ALL, GREY, apply, close, far, latent, model, parsing, reference, sample, source, split
from fixtures.tiny import HEADS, _fill, make_conditioning, make_model, unet_config
from pack.nodes.host import call as host_call
from pack.nodes.host import patch as host_patch
from pack.nodes.host import unet as host_unet
from pack.nodes.host.base import RunCache
from patching import log_weight, unet


def run_node(module: str, name: str, **inputs: object) -> object:
    """The first output of a node of the host, whichever API its version uses."""
    node = getattr(importlib.import_module(module), name)
    if inspect.ismethod(getattr(node, "execute", None)):
        out = node.execute(**inputs)
    else:
        out = getattr(node(), node.FUNCTION)(**inputs)
    return getattr(out, "result", out)[0]


def extra_tokens(who: object) -> object:
    """A patch that lengthens the context of every self-attention, as reference and adapter packs do."""
    clone = who.clone()

    def more(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict) -> tuple:
        generator = torch.Generator().manual_seed(n.shape[-1])
        new = torch.randn((1, 5, n.shape[-1]), generator=generator).expand(context.shape[0], -1, -1)
        return n, torch.cat([context, new], 1), torch.cat([value, new], 1)

    clone.set_model_attn1_patch(more)
    return clone


def counting_override(who: object) -> object:
    """Another attention kernel in the single slot for it, as the Sage and Flash packs use it."""
    clone = who.clone()
    calls: list[int] = []

    def override(func: Callable, *args: object, **kwargs: object) -> torch.Tensor:
        assert kwargs.get("mask") is None, "a mask makes fast kernels fall back"
        calls.append(1)
        return func(*args, **kwargs) * 0.9

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    clone.calls = calls
    return clone


EXTRAS = "comfy_extras."
OTHERS: dict[str, Callable[[object], object]] = {
    "HyperTile": lambda m: run_node(
        EXTRAS + "nodes_hypertile", "HyperTile", model=m, tile_size=32, swap_size=2, max_depth=1, scale_depth=False
    ),
    "ToMe": lambda m: run_node(EXTRAS + "nodes_tomesd", "TomePatchModel", model=m, ratio=0.4),
    "PAG": lambda m: run_node(EXTRAS + "nodes_pag", "PerturbedAttentionGuidance", model=m, scale=2.0),
    "SAG": lambda m: run_node(EXTRAS + "nodes_sag", "SelfAttentionGuidance", model=m, scale=0.7, blur_sigma=2.0),
    "FreeU": lambda m: run_node(EXTRAS + "nodes_freelunch", "FreeU_V2", model=m, b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "RescaleCFG": lambda m: run_node(EXTRAS + "nodes_model_advanced", "RescaleCFG", model=m, multiplier=0.7),
    "DeepShrink": lambda m: run_node(
        EXTRAS + "nodes_model_downscale",
        "PatchModelAddDownscale",
        model=m,
        block_number=3,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
    "extra tokens": extra_tokens,
}
SIZE = {"height": 16, "width": 24}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("omega", [ALL, GREY], ids=["plain", "weighted"])
def test_both_orders_equal_the_reference(name: str, omega: tuple[float, ...]) -> None:
    other, features = OTHERS[name], source()
    alone = sample(other(model()), **SIZE)
    assert far(alone, sample(model(), **SIZE)), "the other patch does nothing here"
    before = sample(apply(other(model()), features, omega), **SIZE)
    after = sample(other(apply(model(), features, omega)), **SIZE)
    assert far(before, alone)
    assert close(before, after)
    with reference(unet(), [features], None if omega == ALL else log_weight(omega)):
        theirs = sample(other(model()), **SIZE)
    assert close(before, theirs, 1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_both_orders_with_dropped_rows_target_and_batch(name: str) -> None:
    other, features = OTHERS[name], source(1, 2)
    more = {"beta": 2.0, "target": parsing(7, 2), "keep_unconditional": False}
    before = sample(apply(other(model()), features, GREY, **more), batch=2, **SIZE)
    after = sample(other(apply(model(), features, GREY, **more)), batch=2, **SIZE)
    assert close(before, after)
    assert bool(before.isfinite().all())
    zero = sample(apply(other(model()), features, GREY, strength=0.0, **more), batch=2, **SIZE)
    assert torch.equal(zero, sample(other(model()), batch=2, **SIZE))


@pytest.mark.parametrize("name", ["HyperTile", "ToMe", "SAG", "PAG"])
def test_dropped_negative_rows_are_those_without_the_source(name: str) -> None:
    x = latent(9, 1, **SIZE)
    torch.manual_seed(0)
    plain = split(OTHERS[name](model()), x)
    torch.manual_seed(0)
    ours = split(apply(OTHERS[name](model()), source(), GREY, keep_unconditional=False), x)
    assert close(ours[1], plain[1])
    assert far(ours[0], plain[0])


def test_a_block_that_another_node_replaces_is_left_alone_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    host_unet.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="truepose"):
        sample(apply(OTHERS["SAG"](model()), source()), **SIZE)
    said = [r.message for r in caplog.records if "leaves block" in r.message]
    assert said == ["HPFA leaves block middle.0.0 alone: another node replaces its self-attention"]


def test_another_attention_kernel_computes_ours_too() -> None:
    for omega in (ALL, GREY):
        patched = counting_override(apply(model(), source(), omega))
        plain = counting_override(model())
        ours, alone = sample(patched), sample(plain)
        assert len(patched.calls) == len(plain.calls)
        assert far(ours, alone)
        assert far(ours, sample(apply(model(), source(), omega)))


LORA_SITES = ("input_blocks_1_1", "input_blocks_4_1", "middle_block_1", "output_blocks_5_1")


def lora() -> dict[str, torch.Tensor]:
    """A LoRA on to_k and to_v: the projections our source tokens go through."""
    generator = torch.Generator().manual_seed(3)
    out = {}
    weights = unet().state_dict()
    for place in LORA_SITES:
        for part in ("to_k", "to_v"):
            key = f"lora_unet_{place}_transformer_blocks_0_attn1_{part}"
            shape = next(w.shape for n, w in weights.items() if n.replace(".", "_") == key[10:] + "_weight")
            out[f"{key}.lora_up.weight"] = torch.randn((shape[0], 2), generator=generator) * 0.4
            out[f"{key}.lora_down.weight"] = torch.randn((2, shape[1]), generator=generator) * 0.4
            out[f"{key}.alpha"] = torch.tensor(2.0)
    return out


def with_lora(who: object) -> object:
    clone = who.clone()
    keys = comfy.lora.model_lora_keys_unet(clone.model, {})
    loaded = comfy.lora.load_lora(lora(), keys)
    assert len(clone.add_patches(loaded, 1.0)) == 2 * len(LORA_SITES)
    return clone


def merged() -> object:
    """A model of its own whose weights have the LoRA in them."""
    who = make_model(0)
    weights = lora()
    for name, weight in who.model.diffusion_model.named_parameters():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in weights:
            weight.data += weights[f"{key}.lora_up.weight"] @ weights[f"{key}.lora_down.weight"]
    return who


def test_lora_acts_on_the_source_tokens_too() -> None:
    features, whole = source(), merged()
    before = sample(apply(with_lora(model()), features, GREY))
    after = sample(with_lora(apply(model(), features, GREY)))
    with reference(unet(whole), [features], log_weight(GREY)):
        theirs = sample(whole)
    assert close(before, after)
    assert close(before, theirs)
    assert far(before, sample(apply(model(), features, GREY)))
    assert torch.equal(sample(model()), sample(make_model(0))), "the LoRA came off"


def test_source_is_read_with_the_lora() -> None:
    a, b = source(who=with_lora(model())), source(who=merged())
    assert all(close(a.sites[s], b.sites[s]) for s in a.sites)
    assert far(a.sites["output.5.0"], source().sites["output.5.0"])


def test_lora_hooks_on_one_prompt() -> None:
    hooks = comfy.hooks.create_hook_lora(lora=lora(), strength_model=1.0, strength_clip=0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(make_conditioning(1), hooks)
    features, whole, seen = source(), merged(), {}

    def keep(args: dict) -> torch.Tensor:
        seen["positive"], seen["negative"] = args["cond_denoised"], args["uncond_denoised"]
        return args["denoised"]

    def watched(who: object) -> object:
        clone = who.clone()
        clone.set_model_sampler_post_cfg_function(keep)
        return clone

    one_step = {"sigmas": (3.0, 0.0)}
    for order in (lambda m: watched(apply(m, features, GREY)), lambda m: apply(watched(m), features, GREY)):
        sample(order(model()), positive=positive, **one_step)
        hooked = dict(seen)
        sample(watched(apply(whole, features, GREY)), **one_step)
        assert close(hooked["positive"], seen["positive"])
        sample(watched(apply(model(), features, GREY)), **one_step)
        assert close(hooked["negative"], seen["negative"])
        assert far(hooked["positive"], seen["positive"])


def projections(patched: object, features: object, positive: list) -> int:
    """How often a run of three steps projects the source's tokens at one site."""
    _, attn = host_unet.self_attentions(host_unet.unet_of(patched, "it"))["input.1.0"]
    count, own = features.sites["input.1.0"].shape[1], []
    handle = attn.to_k.register_forward_hook(lambda _, args, out: own.append(args[0].shape[1] == count))
    try:
        sample(patched, positive=positive, sigmas=(3.0, 2.0, 1.0, 0.0))
    finally:
        handle.remove()
    return sum(own)


def test_keys_and_values_are_projected_once_per_run_unless_weights_may_change_in_it() -> None:
    prompt, hooks = make_conditioning(1), comfy.hooks.create_hook_lora(lora(), strength_model=1.0, strength_clip=0.0)
    features = source(height=8)
    patched = apply(model(), features)
    assert projections(patched, features, prompt) == 1
    assert projections(apply(merged(), features), features, prompt) == 1
    # The prompt with the hook, and the negative one without, are two calls of each step.
    assert projections(patched, features, comfy.hooks.set_hooks_for_conditioning(prompt, hooks)) == 6
    assert projections(patched, features, prompt) == 1


def control_net() -> object:
    """A tiny ControlNet with random weights, its zero convolutions included."""
    import comfy.cldm.cldm
    import comfy.ops

    config = unet_config()
    for unwanted in ("out_channels", "transformer_depth_output"):
        config.pop(unwanted)
    config.update(hint_channels=3, num_heads=HEADS, num_head_channels=-1)
    net = comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init, device="cpu")
    _fill(net, 8)
    return comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"), manual_cast_dtype=None)


def test_control_net() -> None:
    hint = torch.rand((1, 3, 96, 64), generator=torch.Generator().manual_seed(2))
    control = control_net().set_cond_hint(hint, 0.7)
    positive, negative = (
        [[c[0][0], {**c[0][1], "control": control, "control_apply_to_uncond": False}] for c in [make_conditioning(i)]]
        for i in (1, 2)
    )
    features = source()
    plain = sample(model(), positive, negative)
    assert far(plain, sample(model()))
    ours = sample(apply(model(), features, GREY), positive, negative)
    with reference(unet(), [features], log_weight(GREY)):
        theirs = sample(model(), positive, negative)
    assert close(ours, theirs)
    assert far(ours, plain)


def test_regional_prompts_by_mask_and_area() -> None:
    mask = torch.zeros(1, 12, 8)
    mask[:, :, 4:] = 1
    base = make_conditioning(1)[0]
    positive = [
        [make_conditioning(3)[0][0], {**base[1], "mask": mask, "strength": 0.8}],
        [make_conditioning(4)[0][0], {**base[1], "area": (6, 8, 2, 0), "strength": 0.5}],
        [base[0], base[1]],
    ]
    features = source()
    ours = sample(apply(model(), features, GREY), positive)
    with reference(unet(), [features], log_weight(GREY)):
        theirs = sample(model(), positive)
    assert close(ours, theirs)


def block_call(patched: object, kinds: list[int], rows: int) -> tuple:
    """Our replace of one block in a call with these chunks of `rows` pictures each, and q, k, v, options for it."""
    x = latent(9, rows * len(kinds))
    call = host_call.SourceCall(RunCache(), list(host_patch.applied_sources(patched)), x, {"cond_or_uncond": kinds})
    block, attn = host_unet.self_attentions(unet())["input.1.0"]
    replace = call.install(unet())["patches_replace"]["attn1"][block]
    tokens = torch.randn((x.shape[0], 96, attn.to_q.in_features), generator=torch.Generator().manual_seed(1))
    options = {"activations_shape": [x.shape[0], 32, 12, 8], "n_heads": attn.heads}
    return replace, (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)), options


@pytest.mark.parametrize("kinds", [[0, 1], [1, 0], [0, 1, 0, 1]])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_a_pack_that_calls_the_replace_again_on_the_negative_rows(kinds: list[int], sources: int, keep: bool) -> None:
    """As Advanced-ControlNet's reference does, which says which rows those are."""
    more = {"beta": 2.0, "target": parsing(7, 2), "keep_unconditional": keep}
    replace, qkv, options = block_call(apply(model(), source(1, sources), GREY, **more), kinds, 2)
    negative = [i for i in range(2 * len(kinds)) if kinds[i // 2] == 1]
    options |= {"ref_uncond_idxs": negative}
    whole = replace(*qkv, dict(options))
    assert close(whole[negative], replace(*(x[negative] for x in qkv), dict(options)))


def test_a_pack_that_does_not_say_which_rows_it_hands_over_is_named(caplog: pytest.LogCaptureFixture) -> None:
    host_unet.say_once.cache_clear()
    replace, qkv, options = block_call(apply(model(), source(), keep_unconditional=True), [0, 1], 1)
    whole = replace(*qkv, dict(options))
    assert close(whole[:1], replace(*(x[:1] for x in qkv), dict(options)))
    assert close(whole[1:], replace(*(x[1:] for x in qkv), dict(options)))
    assert [r.message for r in caplog.records] == [
        "stacking.py hands over 1 of 2 rows to Apply HPFA and does not say which: there negative rows see what "
        "positive ones do, batches of sources are not read, and region match and body match are off"
    ]
