"""What HPFA must agree with from outside: AnimateAnyone's fusion, and LoRA files as people have them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import comfy.utils
import folder_paths
import pytest
import torch
from bench import GREY, apply, close, far, model, sample, source
from fixtures.tiny import _fill, make_model
from model import ONES, denoised, keypoints, noise, person, run
from pack.nodes.host import model as host_model
from pack.nodes.host import unet as host_unet
from pack.nodes.model import ApplyPoseEncoder
from pack.nodes.source import ApplyHPFA, SourceNetEncode
from patching import unet
from safetensors.torch import load_file, save_file
from torch import Tensor

import nodes as host_nodes
from truepose_core.models.config import mannequin_config
from truepose_core.parsing import HumanParsing

CELLS = (16, 12)
"""The grid of the models of these tests."""

# ------------------------------------------------------------------------------------------------- AnimateAnyone


@lru_cache
def two_nets(fusion: str) -> host_model.Loaded:
    """A random TruePose model without CAA, from a file as people load it."""
    pytest.importorskip("diffusers", reason="the model's file is written with diffusers")
    from truepose_core.models.model import TruePoseModel
    from truepose_core.models.store import save_model

    config = replace(mannequin_config(fusion, caa=False, widths=(32, 32)), size=(64, 48))
    made = TruePoseModel(config)
    _fill(made.source_net, 1)
    _fill(made.target_net, 2)
    path = Path(folder_paths.get_temp_directory()) / f"{fusion}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return host_model.load(save_model(made, path, overwrite=True))


def normed_inputs(net: object, latent: Tensor, context: Tensor) -> dict[str, Tensor]:
    """What norm1 of every block gives in one pass of the net over a clean latent, at time step 0."""
    found: dict[str, Tensor] = {}
    hooks = [
        block.norm1.register_forward_hook(lambda _, args, out, site=site: found.__setitem__(site, out.clone()))
        for site, (_, block) in host_unet.transformer_blocks(net).items()
    ]
    try:
        net(latent, torch.zeros(latent.shape[0]), context=context)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def concatenated(attn: torch.nn.Module, bank: Tensor):
    """Self-attention with the bank's tokens behind its own, in keys and values: AnimateAnyone's reading."""

    def forward(x, context=None, value=None, mask=None, transformer_options=None):
        everything = torch.cat([x, bank.expand(x.shape[0], -1, -1)], 1)
        q, k, v = (
            f(t).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f, t in ((attn.to_q, x), (attn.to_k, everything), (attn.to_v, everything))
        )
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.to_out(out.transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("fusion", ["concat", "hpfa"])
def test_without_weights_and_match_it_is_animate_anyones_fusion(fusion: str) -> None:
    made = two_nets(fusion)
    shown, target = person(3, "stand", 64, 48), keypoints(person(5, "walk"))
    (posed,) = run(ApplyPoseEncoder, model=made.target, pose=target)
    image = shown.image.movedim(1, -1)
    context = host_model.empty_conditioning(made.adapter)[0][0]
    inputs = {"image": image, "parsing": HumanParsing(shown.parsing), "pose": keypoints(shown)}
    (features,) = run(SourceNetEncode, model=made.source, vae=made.vae, **inputs)
    # What a model learned to match is set aside; one that only concatenates has nothing to set aside.
    as_set = {} if fusion == "concat" else {"match": "as set", "region_match": 0.0, "body_match": 0.0}
    (patched,) = run(ApplyHPFA, model=posed, source=features, target_pose=target, **ONES, **as_set)
    ours = denoised(patched, noise(cells=CELLS))
    bank = normed_inputs(made.source.model.diffusion_model, made.vae.encode(image), context)
    net = made.target.model.diffusion_model
    attentions = {site: attn for site, (_, attn) in host_unet.self_attentions(net).items()}
    try:
        for site, attn in attentions.items():
            attn.forward = concatenated(attn, bank[site])
        theirs = denoised(posed, noise(cells=CELLS))
    finally:
        for attn in attentions.values():
            del attn.forward
    assert close(ours, theirs)
    assert far(ours, denoised(posed, noise(cells=CELLS)))
    if fusion == "hpfa":
        (learned,) = run(ApplyHPFA, model=posed, source=features, target_pose=target, **ONES)
        assert far(denoised(learned, noise(cells=CELLS)), ours)


# ------------------------------------------------------------------------------------------------------ LoRA files

RANK, ALPHA = 2, 3.0
PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k")


def lora_names(place: str, naming: str) -> tuple[str, str]:
    """What a LoRA file calls its two matrices for a layer of diffusers' name."""
    if naming == "kohya":
        name = "lora_unet_" + place.replace(".", "_")
        return f"{name}.lora_up.weight", f"{name}.lora_down.weight"
    name = "unet." + place.replace(".to_", ".processor.to_").removesuffix(".0")
    return f"{name}_lora.up.weight", f"{name}_lora.down.weight"


def lora_file(naming: str) -> str:
    """A LoRA on the attentions in models/loras; the name of the file."""
    g = torch.Generator().manual_seed(4)
    weights, found = unet().state_dict(), {}
    for theirs, ours in comfy.utils.unet_to_diffusers(model().model.model_config.unet_config).items():
        place = theirs.removesuffix(".weight")
        if not theirs.endswith(".weight") or not place.endswith(PROJECTIONS):
            continue
        rows, columns = weights[ours].shape
        up, down = (torch.randn(s, generator=g) * 0.3 for s in ((rows, RANK), (RANK, columns)))
        names = lora_names(place, naming)
        found |= dict(zip(names, (up, down), strict=True))
        if naming == "kohya":
            found[names[0].replace("lora_up.weight", "alpha")] = torch.tensor(ALPHA)
    assert found
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / f"{naming}.safetensors")
    return f"{naming}.safetensors"


def merged(naming: str, strength: float) -> object:
    """A model of its own with the file's LoRA in its weights."""
    who = make_model(0)
    parameters = dict(who.model.diffusion_model.named_parameters())
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    found = load_file(folder / lora_file(naming))
    for theirs, ours in comfy.utils.unet_to_diffusers(who.model.model_config.unet_config).items():
        up, down = lora_names(theirs.removesuffix(".weight"), naming)
        if theirs.endswith(".weight") and up in found:
            scale = strength * (ALPHA / RANK if naming == "kohya" else 1.0)
            parameters[ours].data += scale * found[up] @ found[down]
    return who


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_a_lora_file_before_and_after(naming: str) -> None:
    name, features, loader = lora_file(naming), source(), host_nodes.LoraLoaderModelOnly()

    def with_lora(who: object) -> object:
        return loader.load_lora_model_only(who, name, 0.8)[0]

    plain = sample(apply(model(), features, GREY))
    before = sample(apply(with_lora(model()), features, GREY))
    after = sample(with_lora(apply(model(), features, GREY)))
    assert close(before, after)
    assert far(before, plain)
    assert close(before, sample(apply(merged(naming, 0.8), features, GREY)), 1e-4)
    assert torch.equal(plain, sample(apply(model(), features, GREY))), "the LoRA came off"
