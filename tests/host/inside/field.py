"""Pose Field Guidance: behind CFG in any sampler, in inference mode, and nothing at all where its scale is 0."""

from __future__ import annotations

from pathlib import Path

import comfy.samplers
import folder_paths
import pytest
import torch
from bench import model, sample
from fixtures.tiny import make_conditioning
from model import denoised, empty, keypoints, loaded, noise, person, posed, run, unchecked, with_source
from pack.nodes.field import PoseFieldGuidance
from pack.nodes.host import field as host_field
from pack.nodes.host import guider as host_guider
from pack.nodes.schema import read_bodies
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.guidance.field import FieldGuidance, field_step, load_energy
from truepose_core.guidance.keypoints import KeypointPredictor
from truepose_core.weights.small import save_small


def guided(who: object, name: str | None = "walk", **more: object) -> object:
    target = {} if name is None else {"target_pose": keypoints(person(5, name))}
    return run(PoseFieldGuidance, model=who, **{"scale": 50.0, **target, **more})[0]


def predictor(name: str, channels: int = 4) -> str:
    """A small random predictor of latents in models/truepose."""
    torch.manual_seed(0)
    reader = KeypointPredictor("vae", channels, widths=(8, 8, 8))
    folder = Path(folder_paths.get_folder_paths("truepose")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_small(reader.state_dict(), folder / name, "keypoints", reader.sizes, {})
    return name


def test_scale_zero_hands_the_model_on() -> None:
    who = posed()
    assert guided(who, scale=0.0) is who
    assert "sampler_post_cfg_function" not in who.model_options
    patched = guided(who)
    assert patched is not who and len(patched.model_options["sampler_post_cfg_function"]) == 1
    assert "sampler_post_cfg_function" not in who.model_options


def test_the_estimate_is_moved_by_the_cores_step() -> None:
    x, who = noise(4), posed()
    plain = denoised(who, x)
    for name, weight in (("walk", 20.0), (None, 20.0), ("walk", 0.0)):
        target = None if name is None else read_bodies(keypoints(person(5, name)), "pose", loaded().adapter)
        options = FieldGuidance(scale=50.0, mu=weight)
        step = field_step(load_energy(None, True), plain, options, aspect=48 / 64, patch=4, target=target)
        moved = denoised(guided(who, name, target_weight=weight), x)
        # Where a valid body is seen, the field alone has nothing to say.
        assert float(step.abs().max()) > (1e-4 if name and weight else 0)
        assert float((moved - (plain - step)).abs().max()) < 1e-6


def test_outside_of_its_part_nothing_happens() -> None:
    x, who = noise(5), posed()
    sampling = who.get_model_object("model_sampling")
    plain = denoised(who, x)
    early, late = guided(who, start_percent=0.0, end_percent=0.2), guided(who, start_percent=0.8, end_percent=1.0)
    assert float(sampling.percent_to_sigma(0.2)) > 3.0 > float(sampling.percent_to_sigma(0.8))
    assert torch.equal(denoised(early, x), plain) and torch.equal(denoised(late, x), plain)
    middle = guided(who, start_percent=0.2, end_percent=0.8)
    assert torch.equal(denoised(middle, x), denoised(guided(who), x))


@pytest.mark.parametrize(
    "sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "ddim", "lcm"]
)
def test_every_sampler_takes_it(sampler: str) -> None:
    who = with_source(posed())

    def drawn(one: object) -> Tensor:
        guider = comfy.samplers.CFGGuider(one)
        guider.set_conds(empty(), empty())
        guider.set_cfg(2.0)
        sigmas = comfy.samplers.calculate_sigmas(who.get_model_object("model_sampling"), "normal", 3)
        method = comfy.samplers.sampler_object(sampler)
        return guider.sample(noise(1), torch.zeros(1, 48, 32, 24), method, sigmas, disable_pbar=True, seed=7)

    plain, moved = drawn(who), drawn(guided(who))
    assert bool(moved.isfinite().all()) and float((plain - moved).abs().max()) > 1e-3
    assert torch.equal(drawn(who), plain)


def test_our_guider_takes_it() -> None:
    who = with_source(posed())

    def drawn(one: object) -> Tensor:
        guider = host_guider.make_guider(one, empty(), None, 2.0, 2.0)
        return host_guider.sample(guider, {"samples": torch.zeros(1, 48, 32, 24)}, 0, 2, "euler", "normal")["samples"]

    assert float((drawn(who) - drawn(guided(who))).abs().max()) > 1e-3


def test_several_poses_share_a_batch() -> None:
    x = torch.cat([noise(i) for i in range(4)])
    both = keypoints(person(5, "walk")) + keypoints(person(5, "kick"))
    together = denoised(guided(unchecked(), None, target_pose=both), x)
    for i in range(4):
        alone = denoised(guided(unchecked(), "walk" if i < 2 else "kick"), x[i : i + 1])
        assert float((together[i : i + 1] - alone).abs().max()) < 1e-4
    with pytest.raises(TruePoseError, match="2 target poses cannot be shared among 3 pictures"):
        denoised(guided(unchecked(), None, target_pose=both), x[:3])


def test_it_can_be_put_on_twice_and_taken_off() -> None:
    x, who = noise(6), posed()
    once, twice = guided(who), guided(guided(who))
    assert float((denoised(twice, x) - denoised(once, x)).abs().max()) > 1e-5
    assert torch.equal(denoised(who, x), denoised(posed(), x))


def test_models_on_latents_take_a_predictor_of_their_own() -> None:
    name = predictor("reader.safetensors")
    assert name in host_field.predictor_files() and host_field.predictor_files()[0] == host_field.BUNDLED
    moved = guided(model(), None, predictor=name, target_pose=keypoints(person(5, "walk")))
    assert float((sample(moved) - sample(model())).abs().max()) > 1e-3
    with pytest.raises(TruePoseError, match="reads pictures and this model works on a VAE's latents"):
        guided(model())
    with pytest.raises(TruePoseError, match="reads vae and this model works on pixel patches"):
        guided(posed(), predictor=name)
    with pytest.raises(TruePoseError, match="reads latents of 16 channels and the model's have 4"):
        guided(model(), predictor=predictor("wide.safetensors", 16))
    with pytest.raises(TruePoseError, match=r"there is no predictor 'gone\.safetensors'"):
        guided(posed(), predictor="gone.safetensors")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TruePoseError, match=r"from 0\.8 to 0\.2"):
        guided(posed(), start_percent=0.8, end_percent=0.2)
    with pytest.raises(TruePoseError, match="the target pose shows nobody"):
        guided(posed(), None, target_pose=[{"canvas_width": 48, "canvas_height": 64, "people": []}])
    with pytest.raises(TruePoseError, match="the field's scale is -1"):
        guided(posed(), scale=-1.0)


def test_conditioning_and_cfg_stay_as_they_are() -> None:
    name = predictor("reader.safetensors")
    moved = guided(model(), None, predictor=name)
    assert torch.equal(sample(guided(model(), None, predictor=name, scale=0.0)), sample(model()))
    apart = [
        sample(one, make_conditioning(1), make_conditioning(2), cfg=cfg)
        for one in (model(), moved)
        for cfg in (1.0, 4.0)
    ]
    assert all(float((a - b).abs().max()) > 1e-4 for i, a in enumerate(apart) for b in apart[i + 1 :])


def test_guided_sampling_is_the_pipelines() -> None:
    pytest.importorskip("diffusers", reason="parity compares with the diffusers pipeline")
    import parity

    options = FieldGuidance(scale=1000.0, mu=20.0, start=0.0, end=0.9)
    theirs = parity.through_pipeline(noise(), 4, None, field_guidance=options)
    who = guided(with_source(posed()), scale=1000.0, end_percent=0.9)
    pipe = parity.pipeline()
    pipe.scheduler.set_timesteps(4)
    guider = comfy.samplers.CFGGuider(who)
    guider.set_conds(empty(), empty())
    guider.set_cfg(1.0)
    euler = comfy.samplers.sampler_object("euler")
    out = guider.sample(noise(), torch.zeros(1, 48, 32, 24), euler, pipe.scheduler.sigmas.float(), disable_pbar=True)
    ours = loaded().vae.decode(out).movedim(-1, 1)
    assert parity.gap(ours, theirs, "4 Euler steps, pose field") < parity.LIMIT
    plain = parity.through_pipeline(noise(), 4, None)
    assert float((plain - theirs).abs().max()) > 3 * parity.LIMIT
