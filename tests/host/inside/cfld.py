"""CFLD in the host: one step against the diffusers side, who sees what, and clear refusals."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import comfy.samplers
import folder_paths
import pytest
import torch
from pack.nodes.cfld import ApplyCFLD, LoadCFLD, RestoreCFLD
from pack.nodes.host import applied as host_applied
from pack.nodes.host import cfld as host_cfld
from pack.nodes.host import guider as host_guider
from pack.nodes.host import patch as host_patch
from pack.nodes.host import source as host_source
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.models.cfld.encoder import CFLDConfig, cfld_frame, pose_maps, squash
from truepose_core.models.config import SD_SCHEDULE
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, write_pose

pytest.importorskip("diffusers", reason="the model to compare with is diffusers'")
from truepose_core.models.cfld.model import CFLDModel
from truepose_core.models.store import save_model

LIMIT = 1e-4
CONFIG = CFLDConfig(
    unet={
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64, 128, 128],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 96,
        "norm_num_groups": 32,
    },
    size=128,
    swin_width=32,
    swin_depths=(2, 2, 2, 1),
    swin_window=4,
    detail_widths=(32, 32, 64),
    detail_depth=1,
    tokens=4,
    decoder_depth=1,
    pose_widths=(32, 64, 128),
    scheduler=dict(SD_SCHEDULE),
)


@lru_cache
def reference() -> CFLDModel:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = CFLDModel(CONFIG).eval().requires_grad_(False)
        for name, x in model.encoder.named_parameters():
            x.normal_(std=x[0].numel() ** -0.5 if x.ndim > 1 else 0.1)
            if "norm" in name and name.endswith("weight"):
                x.add_(1)
        return model


@lru_cache
def loaded() -> tuple:
    folder = Path(folder_paths.get_folder_paths("truepose")[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cfld.safetensors"
    save_model(reference(), path, overwrite=True)
    return LoadCFLD.execute("cfld.safetensors").result


def picture(count: int = 1, seed: int = 0, size: tuple[int, int] = (64, 44)) -> Tensor:
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(seed))


def keypoints(count: int = 1, seed: int = 0) -> Tensor:
    xy = 0.1 + 0.8 * torch.rand(count, 18, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([xy, torch.ones(count, 18, 1)], -1)


def posed(body: Tensor, width: int = 44, height: int = 64) -> list[dict]:
    return write_pose([Pose(width, height, (Person(x.numpy()),)) for x in body])


def noise(count: int = 1, seed: int = 5) -> Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def apply(count: int = 1, **inputs: object) -> tuple:
    given = {"source": picture(count), "pose": posed(keypoints(count)), **inputs}
    return ApplyCFLD.execute(*loaded(), **given).result


def one_call(guider: object, x: Tensor, sigma: float) -> Tensor:
    """The guided prediction of the noise at one noise level."""
    found = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            at = torch.full((x.shape[0],), sigma)
            found["x0"] = model_wrap(x, at, **extra_args)
            return x

    guider.sample(torch.zeros_like(x), torch.zeros_like(x), Probe(), torch.zeros(1), disable_pbar=True)
    return (x - found["x0"]) / sigma


def through_host(result: tuple, x: Tensor, sigma: float, scales: tuple[float, float]) -> Tensor:
    model, positive, negative, _ = result
    if scales[0] == scales[1]:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(scales[0])
    else:
        guider = host_guider.make_guider(model, positive, negative, *scales)
    return one_call(guider, x, sigma)


def by_hand(count: int, x: Tensor, sigma: float, timestep: int, scales: tuple[float, float]) -> Tensor:
    model = reference()
    condition = model.encoder.encode_source(squash(picture(count).movedim(-1, 1), 64))
    body = cfld_frame((64, 44), 128).apply_keypoints(pixels(keypoints(count)))
    pose = model.encoder.encode_pose(pose_maps(body, 64))
    scaled, t = x / (1 + sigma**2) ** 0.5, torch.full((x.shape[0],), timestep)
    none = model.no_source(count)
    full, alone = model.target_pass(condition), model.target_pass(none)
    e0 = model.denoise(scaled, t, alone, none.tokens, None)
    e_pose = model.denoise(scaled, t, alone, none.tokens, pose)
    e_full = model.denoise(scaled, t, full, condition.tokens, pose)
    return e0 + scales[0] * (e_pose - e0) + scales[1] * (e_full - e_pose)


def pixels(body: Tensor) -> Tensor:
    """The keypoints as POSE_KEYPOINT tells them."""
    from pack.nodes.schema import read_bodies

    return read_bodies(posed(body), "the pose")


def sigma_of(model: object, timestep: int) -> float:
    return float(model.get_model_object("model_sampling").sigmas[timestep])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 2.0), (1.7, 2.6), (2.0, 0.0)])
def test_one_step_is_the_diffusers_side(count: int, scales: tuple[float, float]) -> None:
    result = apply(count)
    sigma, x = sigma_of(result[0], 500), noise(count)
    ours = through_host(result, 4 * x, sigma, scales)
    theirs = by_hand(count, 4 * x, sigma, 500, scales)
    worst = float((ours - theirs).abs().max())
    print(f"CFLD, {count} pictures, scales {scales}: max abs difference {worst:.2e} of {float(theirs.abs().max()):.1f}")
    assert worst < LIMIT
    if scales != (1.0, 1.0):
        assert float((ours - by_hand(count, 4 * x, sigma, 500, (1.0, 1.0))).abs().max()) > 100 * LIMIT


def test_a_sampler_runs_and_gives_pictures_of_the_pose_size() -> None:
    model, positive, negative, latent = apply(2)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(2.0)
    euler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    out = guider.sample(noise(2), latent["samples"], euler, sigmas, disable_pbar=True)
    assert out.shape == (2, 4, 16, 16) and bool(out.isfinite().all())
    (restored,) = RestoreCFLD.execute(torch.rand(2, 128, 128, 3), 90, 60).result
    assert restored.shape == (2, 60, 90, 3)


def test_the_negative_reads_the_learned_tokens_whatever_is_connected() -> None:
    model, positive, negative, _ = apply()
    text = [[torch.randn(1, 77, 96), {}]]
    sigma = sigma_of(model, 500)
    with_text = through_host((model, positive, text, None), noise(), sigma, (3.0, 3.0))
    assert (
        float((with_text - through_host((model, positive, negative, None), noise(), sigma, (3.0, 3.0))).abs().max())
        < LIMIT
    )


def test_the_loaded_model_stays_as_it_was_and_two_applies_do_not_mix() -> None:
    first, other = apply(), apply(source=picture(seed=9))
    sigma = sigma_of(first[0], 500)
    before = through_host(first, noise(), sigma, (2.0, 2.0))
    assert float((through_host(other, noise(), sigma, (2.0, 2.0)) - before).abs().max()) > 100 * LIMIT
    assert torch.equal(through_host(first, noise(), sigma, (2.0, 2.0)), before)
    again = ApplyCFLD.execute(first[0], loaded()[1], picture(seed=9), posed(keypoints())).result
    assert torch.equal(through_host(again, noise(), sigma, (2.0, 2.0)), through_host(other, noise(), sigma, (2.0, 2.0)))
    plain = loaded()[0]
    assert not plain.model_options["transformer_options"].get("wrappers")


def test_another_nodes_replacement_gets_the_biased_queries() -> None:
    """As IP-Adapter packs do: attention of their own in attn2's place."""
    import comfy.ldm.modules.attention as attention

    model, positive, negative, _ = apply()
    sigma = sigma_of(model, 500)
    expected = through_host((model, positive, negative, None), noise(), sigma, (2.0, 2.0))
    calls = []

    def theirs(q, k, v, extra):
        calls.append(extra["block"])
        return attention.optimized_attention(q, k, v, extra["n_heads"])

    clone = model.clone()
    for number in (9, 10, 11):
        clone.set_model_attn2_replace(theirs, "output", number)
    found = through_host((clone, positive, negative, None), noise(), sigma, (2.0, 2.0))
    assert calls and float((found - expected).abs().max()) < LIMIT


@pytest.mark.parametrize("first", ["CFLD", "HPFA"])
def test_hpfa_goes_on_top_in_either_order(first: str) -> None:
    """Off it changes nothing, bit for bit; on it changes the picture."""
    plain, encoders = loaded()
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    labels[:, 32:, 32:] = 3
    latent = 0.5 * noise(seed=8)
    condition = encoders.encode(picture().movedim(-1, 1), pixels(keypoints()))
    positive, negative = host_cfld.conditionings(condition)
    source = host_source.read_source(plain, latent, HumanParsing.from_labels(labels), positive)
    sigma = sigma_of(plain, 500)

    def made(omega: float) -> Tensor:
        applied = host_applied.AppliedSource(source, (omega,) * 7)
        if first == "CFLD":
            model = host_patch.with_hpfa(host_cfld.with_cfld(plain, condition), applied)
        else:
            model = host_cfld.with_cfld(host_patch.with_hpfa(plain, applied), condition)
        return through_host((model, positive, negative, None), noise(), sigma, (2.0, 2.0))

    expected = through_host(
        (host_cfld.with_cfld(plain, condition), positive, negative, None), noise(), sigma, (2.0, 2.0)
    )
    assert torch.equal(made(0.0), expected)
    assert float((made(1.0) - expected).abs().max()) > 100 * LIMIT


def test_wrong_connections_are_named() -> None:
    model, positive, negative, _ = apply()
    sigma = sigma_of(model, 500)
    with pytest.raises(TruePoseError, match="positive conditioning is not that"):
        through_host((model, negative, negative, None), noise(), sigma, (2.0, 2.0))
    with pytest.raises(TruePoseError, match=r"16x24 cells; CFLD makes pictures of 128x128 pixels only"):
        through_host((model, positive, negative, None), torch.zeros(1, 4, 24, 16), sigma, (2.0, 2.0))
    with pytest.raises(TruePoseError, match="2 pairs of source and pose and 3 latents"):
        through_host(apply(2), noise(3), sigma, (2.0, 2.0))
    with pytest.raises(TruePoseError, match="2 source images and 3 target poses"):
        apply(source=picture(2), pose=posed(keypoints(3)))
    from fixtures.tiny import make_model

    with pytest.raises(TruePoseError, match="connect the model of Load CFLD"):
        ApplyCFLD.execute(make_model(), loaded()[1], picture(), posed(keypoints()))
    with pytest.raises(TruePoseError, match="expected CFLD's square picture"):
        RestoreCFLD.execute(torch.rand(1, 64, 32, 3))


def test_other_files_are_refused() -> None:
    from truepose_core.weights.strict import bundled_path

    with pytest.raises(TruePoseError, match=r"pytorch_model_1.bin in more_files"):
        host_cfld.load([bundled_path()])


def test_the_published_files_give_the_same_model(tmp_path: Path) -> None:
    """Names as published: the UNet under "model.", the encoders' stages with their downsampling at the end."""
    weights = reference().state_dict()
    encoders, unet = {}, {}
    for name, x in weights.items():
        net, _, key = name.partition(".")
        if net == "target_net":
            unet[f"model.{key}"] = x
        elif net == "encoder":
            for i in range(1, 4):
                key = key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample")
            encoders[key] = x
    folder = Path(folder_paths.get_folder_paths("truepose")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate((encoders, unet)):
        torch.save({k: x.clone() for k, x in tensors.items()}, folder / f"published_{number}.bin")
    model, encoder = LoadCFLD.execute("published_0.bin", "published_1.bin").result
    ours, ready = loaded()
    for a, b in ((model.model.diffusion_model, ours.model.diffusion_model), (encoder._encoder, ready._encoder)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    with pytest.raises(TruePoseError, match=r"add its UNet \(pytorch_model_1.bin"):
        LoadCFLD.execute("published_0.bin")
