"""Load TruePose Model and what it gives: MODEL, VAE, latents, poses, the sampler and the guider of our own."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import pytest
import torch
from fixtures.tiny import make_conditioning, make_model
from pack.nodes.host import call as host_call
from pack.nodes.host import checks as host_checks
from pack.nodes.host import guider as host_guider
from pack.nodes.host import model as host_model
from pack.nodes.host import patch as host_patch
from pack.nodes.host import unet as host_unet
from pack.nodes.hpfa import Guider, HPFASampler
from pack.nodes.model import ApplyPoseEncoder, EmptyLatent, LoadModel
from pack.nodes.source import ApplyHPFA, SourceNetEncode
from torch import Tensor

import nodes as host_nodes
from truepose_core.errors import TruePoseError
from truepose_core.guidance.scales import combine_guidance
from truepose_core.mannequin import ready_poses, render, sample_identities
from truepose_core.mannequin.world import split_seed
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, write_pose
from truepose_core.regions import REGION_NAMES
from truepose_core.weights.strict import bundled_path

WORLD = split_seed("test", 0)
ONES = dict.fromkeys(REGION_NAMES, 1.0)


@lru_cache
def loaded() -> host_model.Loaded:
    return host_model.load(host_model.model_path(host_model.BUNDLED))


@lru_cache
def person(seed: int, pose: str, height: int = 128, width: int = 96):
    return render(sample_identities([seed], WORLD), ready_poses()[pose], height, width)


def keypoints(shown: object) -> list[dict]:
    height, width = shown.image.shape[2:]
    return write_pose([Pose(width, height, (Person(body.numpy()),)) for body in shown.keypoints])


def encode(source_size: tuple[int, int] = (128, 96)) -> tuple[object, object]:
    shown = person(3, "stand", *source_size)
    (features,) = SourceNetEncode.execute(
        loaded().source,
        loaded().vae,
        shown.image.movedim(1, -1),
        HumanParsing(shown.parsing),
        pose=keypoints(shown),
    ).result
    return shown, features


def noise(seed: int = 0, cells: tuple[int, int] = (32, 24)) -> Tensor:
    return torch.randn((1, 48, *cells), generator=torch.Generator().manual_seed(seed))


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


def empty() -> list:
    return host_model.empty_conditioning(loaded().adapter)


def denoised(model: object, x: Tensor, conds: tuple[list | None, list | None] = (None, None), sigma: float = 3.0):
    """What one call of the model predicts for a positive row, alone."""
    found = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            level = torch.full((x.shape[0],), sigma)
            found["out"] = model_wrap(x, level, **extra_args)
            return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conds[0] or empty(), conds[1] or empty())
    guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([sigma, 0.0]), disable_pbar=True)
    return found["out"]


def unchecked(target: object = None) -> object:
    """A target_net, the bundled one unless another is given, that may be sampled without a pose."""
    model = (loaded().target if target is None else target).clone()
    model.remove_wrappers_with_key(host_patch.WrappersMP.PREPARE_SAMPLING, host_checks.KEY)
    return model


def posed(name: str = "walk", **more: object) -> object:
    return run(ApplyPoseEncoder, model=loaded().target, pose=keypoints(person(5, name)), **more)[0]


def with_source(model: object, name: str = "walk", **more: object) -> object:
    _, features = encode()
    inputs = {**ONES, "target_pose": keypoints(person(5, name)), **more}
    return run(ApplyHPFA, model=model, source=features, **inputs)[0]


def test_the_node_gives_what_it_says() -> None:
    target, source, vae, adapter, conditioning = run(LoadModel)
    assert len(LoadModel.GET_SCHEMA().outputs) == 5
    for model in (target, source):
        assert type(model.model.diffusion_model).__name__ == "UNetModel"
        assert host_unet.family_of(model) == "mannequin"
        assert host_model.adapter_of(model) is adapter
    assert vae.spacial_compression_encode() == vae.spacial_compression_decode() == 4
    assert conditioning[0][0].shape == (1, 1, 64)
    assert LoadModel.GET_SCHEMA().inputs[0].options[0] == host_model.BUNDLED
    assert isinstance(LoadModel.fingerprint_inputs(file=host_model.BUNDLED), str)


def test_loading_needs_no_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert host_model.load(host_model.model_path(host_model.BUNDLED)).adapter.latent_shape == (48, 32, 24)


def test_a_file_in_the_models_folder() -> None:
    folder = Path(folder_paths.get_folder_paths("truepose")[0])
    folder.mkdir(parents=True, exist_ok=True)
    data = bundled_path().read_bytes()
    (folder / "mine.safetensors").write_bytes(data)
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "notes.txt").write_text("no model")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    assert host_model.model_files() == [host_model.BUNDLED, "cut.safetensors", "mine.safetensors", "other.safetensors"]
    assert host_model.load(host_model.model_path("mine.safetensors")).adapter.size == (128, 96)
    for name, match in (
        ("cut.safetensors", "truncated"),
        ("other.safetensors", "is no TruePose model file"),
        ("gone.safetensors", "there is no model file 'gone.safetensors'"),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(LoadModel, file=name)


@pytest.mark.parametrize("size", [(128, 96), (131, 98)])
def test_vae_is_exact_in_the_hosts_nodes(size: tuple[int, int]) -> None:
    image = torch.rand((2, *size, 3), generator=torch.Generator().manual_seed(0))
    (latent,) = host_nodes.VAEEncode().encode(loaded().vae, image)
    assert latent["samples"].shape == (2, 48, size[0] // 4, size[1] // 4)
    (back,) = host_nodes.VAEDecode().decode(loaded().vae, latent)
    top, left = size[0] % 4 // 2, size[1] % 4 // 2
    assert torch.allclose(back, image[:, top : top + back.shape[1], left : left + back.shape[2]], atol=1e-6)
    (tiled,) = host_nodes.VAEDecodeTiled().decode(loaded().vae, latent, 512)
    assert torch.equal(tiled, back)
    with pytest.raises(TruePoseError, match="4 channels"):
        loaded().vae.decode(torch.zeros(1, 4, 8, 8))


def test_the_preview_is_the_picture_in_blocks() -> None:
    image = torch.zeros(1, 128, 96, 3)
    image[..., 0] = 1
    latent = loaded().vae.encode(image)
    form = loaded().target.model.latent_format
    shown = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors).decode_latent_to_preview(latent)
    assert shown.size == (24, 32) and shown.getpixel((3, 3))[0] > 250 and shown.getpixel((3, 3))[1] < 5


def test_pose_and_source_are_seen() -> None:
    x = noise(4)
    plain, walking, kicking = (denoised(m, x) for m in (unchecked(), posed(), posed("kick")))
    assert float((plain - walking).abs().max()) > 0.01 and float((walking - kicking).abs().max()) > 0.01
    both = denoised(with_source(posed()), x)
    assert float((both - walking).abs().max()) > 0.01
    shown = person(5, "kick")
    picture = host_nodes.VAEDecode().decode(loaded().vae, {"samples": loaded().vae.encode(shown.image.movedim(1, -1))})
    assert picture[0].shape == (1, 128, 96, 3)


def test_a_drawn_skeleton_is_the_pose() -> None:
    from truepose_core.pose.skeleton import draw_skeleton

    drawn = draw_skeleton(person(5, "walk").keypoints, 128, 96).movedim(1, -1)
    (model,) = run(ApplyPoseEncoder, model=loaded().target, skeleton=drawn)
    assert float((denoised(model, noise(4)) - denoised(posed(), noise(4))).abs().max()) < 1e-3
    for inputs in ({}, {"pose": keypoints(person(5, "walk")), "skeleton": drawn}):
        with pytest.raises(TruePoseError, match="either pose or skeleton"):
            run(ApplyPoseEncoder, model=loaded().target, **inputs)


def test_no_effect_is_bit_equal() -> None:
    x = noise(5)
    walking = posed()
    before = denoised(walking, x)
    for more in ({"strength": 0.0}, dict.fromkeys(REGION_NAMES, 0.0)):
        assert torch.equal(denoised(with_source(walking, **more), x), before)
    with_source(walking)
    assert torch.equal(denoised(walking, x), before)
    bare = host_patch.without_pose(host_patch.without_hpfa(walking))
    bare.remove_wrappers_with_key(host_patch.WrappersMP.PREPARE_SAMPLING, host_checks.KEY)
    assert torch.equal(denoised(unchecked(), x), denoised(bare, x))


def test_dropped_rows_do_not_see_the_source() -> None:
    x, out = noise(6), {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            conds = [model_wrap.conds["positive"], model_wrap.conds["negative"]]
            options = extra_args["model_options"]
            out["both"] = comfy.samplers.calc_cond_batch(model_wrap.inner_model, conds, x, torch.tensor([3.0]), options)
            return x

    def both(model: object) -> list[Tensor]:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(empty(), empty())
        guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([3.0, 0.0]), disable_pbar=True)
        return out["both"]

    alone, (seen, dropped) = denoised(posed(), x), both(with_source(posed()))
    assert float((dropped - alone).abs().max()) < 1e-5 and float((seen - alone).abs().max()) > 0.01
    kept = both(with_source(posed(), unconditional="keep"))
    assert float((kept[0] - kept[1]).abs().max()) < 1e-5 and float((kept[0] - seen).abs().max()) < 1e-5


def test_a_batch_is_its_pictures() -> None:
    x = torch.cat([noise(7), noise(8)])
    target = keypoints(person(5, "walk")) + keypoints(person(5, "kick"))
    _, features = encode()
    (model,) = run(ApplyPoseEncoder, model=loaded().target, pose=target)
    (model,) = run(ApplyHPFA, model=model, source=features, target_pose=target, **ONES)
    together = denoised(model, x)
    for i, name in enumerate(("walk", "kick")):
        alone = denoised(with_source(posed(name), name), x[i : i + 1])
        assert float((together[i : i + 1] - alone).abs().max()) < 1e-5
    with pytest.raises(TruePoseError, match="2 target poses and 3 latents"):
        denoised(run(ApplyPoseEncoder, model=loaded().target, pose=target)[0], torch.cat([x, noise(9)]))


def test_learned_weights_give_way_to_set_ones() -> None:
    x = noise(9)
    learned = denoised(with_source(posed()), x)
    assert torch.equal(denoised(with_source(posed(), region_match=9.0), x), learned)
    as_set = denoised(with_source(posed(), match="as set", region_match=9.0, body_match=1.0), x)
    assert float((as_set - learned).abs().max()) > 1e-3


def test_a_given_target_parsing_is_used() -> None:
    x, shown = noise(9), person(5, "walk")
    given = denoised(with_source(posed(), target_parsing=HumanParsing(shown.parsing)), x)
    assert float((given - denoised(with_source(posed()), x)).abs().max()) > 1e-4


def test_the_guider_is_the_formula() -> None:
    x = noise(10)
    both = with_source(posed())
    e0, e_pose, e_full = (denoised(m, x) for m in (unchecked(), posed(), both))
    for scales in ((1.0, 1.0), (2.0, 3.0), (1.0, 2.5), (0.0, 0.0), (2.0, 0.0)):
        (guider,) = run(
            Guider, model=both, positive=empty(), guidance_pose=scales[0], guidance_source=scales[1], negative=empty()
        )
        found = {}

        class Probe(comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, *args, _found=found, **kwargs):
                _found["out"] = model_wrap(x, torch.tensor([3.0]), **extra_args)
                return x

        guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([3.0, 0.0]), disable_pbar=True)
        expected = combine_guidance(e0, e_pose, e_full, *scales)
        assert float((found["out"] - expected).abs().max()) < 1e-4, scales
    with pytest.raises(TruePoseError, match="guidance_pose is -1"):
        run(Guider, model=both, positive=empty(), guidance_pose=-1)


def test_the_guider_lets_other_nodes_have_their_say() -> None:
    model = with_source(posed()).clone()
    seen = []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(sorted(args)) or args["denoised"])
    guider = host_guider.make_guider(model, empty(), None, 2.0, 2.0)
    host_guider.sample(guider, {"samples": torch.zeros(1, 48, 32, 24)}, 0, 2, "euler", "normal")
    assert len(seen) == 2 and "uncond_denoised" in seen[0]


def test_the_all_in_one_sampler_is_the_nodes_one_by_one() -> None:
    _, features = encode()
    target = keypoints(person(5, "walk"))
    (one,) = run(
        HPFASampler,
        model=loaded().target,
        source=features,
        target_pose=target,
        seed=3,
        steps=3,
        sampler_name="euler",
        scheduler="normal",
    )
    (latent,) = run(EmptyLatent, adapter=loaded().adapter)
    (by_hand,) = host_nodes.common_ksampler(
        with_source(posed()), 3, 3, 1.0, "euler", "normal", empty(), empty(), latent
    )
    assert float((one["samples"] - by_hand["samples"]).abs().max()) < 1e-5
    with pytest.raises(TruePoseError, match="connect latent and positive"):
        run(HPFASampler, model=make_model(), source=features)


def test_another_nodes_cross_attention_stays() -> None:
    """What an IP-Adapter does: it owns attn2's slot. CAA adds to what comes out of it."""
    x, seen = noise(11), []

    def theirs(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        seen.append(extra["block"])
        return host_call.host_attention.optimized_attention(q, k, v, extra["n_heads"])

    before = denoised(with_source(posed()), x)
    for first in (True, False):
        model = posed().clone()
        model = model if first else with_source(model).clone()
        for block in (("input", 3), ("middle", 0), ("output", 3)):
            model.set_model_attn2_replace(theirs, *block)
        model = with_source(model) if first else model
        assert float((denoised(model, x) - before).abs().max()) < 1e-5
    assert set(seen) == {("input", 3), ("middle", 0), ("output", 3)}


def test_two_sources_share_the_picture() -> None:
    x = noise(12)
    top = {**dict.fromkeys(REGION_NAMES, 0.0), "upper": 1.0}
    rest = {**ONES, "upper": 0.0}
    both = denoised(with_source(with_source(posed(), **rest), **top), x)
    for one in (top, rest, ONES):
        assert float((both - denoised(with_source(posed(), **one), x)).abs().max()) > 1e-3


def test_two_people_in_one_batch() -> None:
    shown = [person(3, "stand"), person(4, "stand")]
    (features,) = run(
        SourceNetEncode,
        model=loaded().source,
        vae=loaded().vae,
        image=torch.cat([s.image for s in shown]).movedim(1, -1),
        parsing=HumanParsing(torch.cat([s.parsing for s in shown])),
        pose=keypoints(shown[0]) + keypoints(shown[1]),
    )
    target = keypoints(person(5, "walk"))
    (model,) = run(ApplyHPFA, model=posed(), source=features, target_pose=target, **ONES)
    x = torch.cat([noise(7), noise(7)])
    together = denoised(model, x)
    assert float((together[:1] - denoised(with_source(posed()), x[:1])).abs().max()) < 1e-5
    assert float((together[:1] - together[1:]).abs().max()) > 0.01


class TestWhatIsMissing:
    """Each of these was a wrong picture without a word."""

    def test_poses_that_a_carried_source_needs(self) -> None:
        shown = person(3, "stand")
        inputs = {"image": shown.image.movedim(1, -1), "parsing": HumanParsing(shown.parsing)}
        with pytest.raises(TruePoseError, match=r"carries the source to the new pose.*connect pose "):
            run(SourceNetEncode, model=loaded().source, vae=loaded().vae, **inputs)
        with pytest.raises(TruePoseError, match="connect target_pose "):
            with_source(loaded().target, target_pose=None)
        with pytest.raises(TruePoseError, match="connect target_pose"):
            run(HPFASampler, model=loaded().target, source=encode()[1], steps=1)

    def test_a_pose_of_another_picture(self) -> None:
        shown = person(3, "stand")
        with pytest.raises(TruePoseError, match=r"96x128 .*192x128.*another picture"):
            run(
                SourceNetEncode,
                model=loaded().source,
                vae=loaded().vae,
                image=shown.image.movedim(1, -1).repeat(1, 1, 2, 1),
                parsing=HumanParsing(shown.parsing.repeat(1, 1, 1, 2)),
                pose=keypoints(shown),
            )

    def test_nets_in_each_others_place(self) -> None:
        shown = person(3, "stand")
        inputs = {"image": shown.image.movedim(1, -1), "parsing": HumanParsing(shown.parsing), "pose": keypoints(shown)}
        with pytest.raises(TruePoseError, match=r"target_net.*connect its source_net to SourceNet Encode"):
            run(SourceNetEncode, model=loaded().target, vae=loaded().vae, **inputs)
        swapped = with_source(run(ApplyPoseEncoder, model=loaded().source, pose=keypoints(person(5, "walk")))[0])
        with pytest.raises(TruePoseError, match=r"source_net.*sample with its target_net"):
            denoised(swapped, noise(0))

    def test_no_pose_encoder(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(TruePoseError, match="nobody told this mannequin model which pose to make"):
            denoised(loaded().target, noise(0))
        assert bool(denoised(with_source(loaded().target), noise(0)).isfinite().all())
        assert "put Apply Pose Encoder" in caplog.text and "will be poor" in caplog.text
        caplog.clear()
        denoised(with_source(posed()), noise(0))
        assert not caplog.records

    def test_a_prompt(self) -> None:
        prompts = make_conditioning(1), make_conditioning(2)
        with pytest.raises(TruePoseError, match="reads no text: connect the conditioning output of Load TruePose"):
            denoised(posed(), noise(0), prompts)
        with pytest.raises(TruePoseError, match=r"negative holds .* width 48.*reads no text"):
            denoised(posed(), noise(0), (empty(), prompts[1]))


class TestRefuses:
    def test_a_checkpoint_has_no_pose_encoder(self) -> None:
        with pytest.raises(TruePoseError, match="has no pose encoder"):
            run(ApplyPoseEncoder, model=make_model(), pose=keypoints(person(5, "walk")))

    def test_an_adapter_of_another_family(self) -> None:
        with pytest.raises(TruePoseError, match="same Load TruePose Model"):
            run(ApplyPoseEncoder, model=make_model(), pose=keypoints(person(5, "walk")), adapter=loaded().adapter)

    def test_a_source_of_another_family(self) -> None:
        _, features = encode()
        with pytest.raises(TruePoseError, match="read with a mannequin model"):
            run(ApplyHPFA, model=make_model(), source=features)

    def test_another_vae(self) -> None:
        shown = person(3, "stand")
        with pytest.raises(TruePoseError, match="48 channels and the model reads 4"):
            run(
                SourceNetEncode,
                model=make_model(),
                vae=loaded().vae,
                image=shown.image.movedim(1, -1),
                parsing=HumanParsing(shown.parsing),
                conditioning=make_conditioning(1),
            )

    def test_a_latent_of_another_size(self) -> None:
        x = torch.zeros(1, 48, 8, 6)
        for model in (posed(), with_source(loaded().target)):
            with pytest.raises(TruePoseError, match="6x8 cells and this TruePose model makes pictures of 24x32"):
                denoised(model, x)
        assert bool(denoised(posed(), noise(0)).isfinite().all())

    def test_nan_latent(self) -> None:
        guider = host_guider.make_guider(loaded().target, empty(), None, 1.0, 1.0)
        with pytest.raises(TruePoseError, match="holds NaN"):
            host_guider.sample(guider, {"samples": torch.full((1, 48, 32, 24), torch.nan)}, 0, 2, "euler", "normal")
