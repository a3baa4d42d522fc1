"""Apply 3D Guidance on the host's own UNet: the diffusers pipeline's numbers, and nothing where it is switched off."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import comfy.samplers
import folder_paths
import pytest
import torch
from model import denoised, keypoints, noise, run, unchecked
from model import person as person_of
from pack.nodes.control3d import Apply3DGuidance
from pack.nodes.host import features as host_features
from pack.nodes.host import guider as host_guider
from pack.nodes.host import model as host_model
from pack.nodes.hpfa import HPFASampler
from pack.nodes.model import ApplyPoseEncoder
from pack.nodes.schema import read_bodies
from pack.nodes.source import ApplyHPFA, SourceNetEncode
from torch import Tensor

from truepose_core.alignment.control3d import Control3DConfig
from truepose_core.body.person import PosedBody
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.twins import mirror_body
from truepose_core.models.config import mannequin_config
from truepose_core.parsing import HumanParsing
from truepose_core.regions import REGION_NAMES

CELLS = (16, 12)
"""The grid of the model of these tests."""

diffusers = pytest.importorskip("diffusers", reason="the model is made and compared with diffusers")
from truepose_core.models.model import TruePoseModel  # noqa: E402
from truepose_core.models.store import load_model, save_model  # noqa: E402
from truepose_core.pipeline import TruePosePipeline  # noqa: E402

ONES = dict.fromkeys(REGION_NAMES, 1.0)
LIMIT = 1e-4
KINDS = {
    "body": Control3DConfig(scale=0.6),
    "found": Control3DConfig(keep_query=False, scale=0.6),
    "keypoints": Control3DConfig(query="keypoints", scale=0.6),
    "source": Control3DConfig(query="source", scale=0.6),
}


@lru_cache
def file(kind: str) -> Path:
    """A random small model with this guidance."""
    with torch.inference_mode(False):
        torch.manual_seed(0)
        config = mannequin_config("concat", caa=False, widths=(32, 32), control3d=KINDS[kind])
        model = TruePoseModel(config).eval().requires_grad_(False)
        model.pose_encoder.conv_out.weight.normal_(std=0.2)
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        return save_model(model, folder / f"guided-{kind}.safetensors", overwrite=True)


def person(seed: int, pose: str) -> object:
    return person_of(seed, pose, 64, 48)


@lru_cache
def loaded(kind: str = "body") -> host_model.Loaded:
    return host_model.load(file(kind))


@lru_cache
def encoded(kind: str = "body") -> host_features.HostFeatures:
    shown, net = person(3, "stand"), loaded(kind)
    return run(
        SourceNetEncode,
        model=net.source,
        vae=net.vae,
        image=shown.image.movedim(1, -1),
        parsing=HumanParsing(shown.parsing),
        pose=keypoints(shown),
    )[0]


def body(name: str = "walk") -> BodyPose:
    shown = person(5, name)
    return BodyPose(shown.theta, shown.beta, shown.camera)


def placed(one: BodyPose | None = None) -> PosedBody:
    return PosedBody(body() if one is None else one, (48, 64))


def guided(kind: str = "body", model: object = None, **more: object) -> object:
    given = {"target_body": placed()} if kind in ("body", "found") else {}
    if kind == "keypoints":
        given = {"target_pose": keypoints(person(5, "walk"))}
    model = loaded(kind).target if model is None else model
    return run(Apply3DGuidance, model=model, source=encoded(kind), **{**given, **more})[0]


def empty(kind: str = "body") -> list:
    return host_model.empty_conditioning(loaded(kind).adapter)


@lru_cache
def pipeline(kind: str) -> TruePosePipeline:
    model = load_model(file(kind))
    pipe = TruePosePipeline.from_model(model)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(
        **model.config.scheduler, prediction_type="sample", timestep_spacing="trailing"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def through_host(model: object, kind: str, steps: int, cfg: float = 1.0, pose_cfg: float | None = None) -> Tensor:
    pipe = pipeline(kind)
    pipe.scheduler.set_timesteps(steps)
    if pose_cfg is None:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(empty(kind), empty(kind))
        guider.set_cfg(cfg)
    else:
        guider = host_guider.make_guider(model, empty(kind), None, pose_cfg, cfg)
    euler = comfy.samplers.sampler_object("euler")
    start = noise(cells=CELLS)
    out = guider.sample(start, torch.zeros_like(start), euler, pipe.scheduler.sigmas.float(), disable_pbar=True)
    return loaded(kind).vae.decode(out).movedim(-1, 1)


def through_pipeline(kind: str, steps: int, **more: object) -> Tensor:
    pipe, shown = pipeline(kind), person(3, "stand")
    pipe.scheduler.set_timesteps(steps)
    scale = (1 + pipe.scheduler.sigmas[0] ** 2).sqrt() / pipe.scheduler.init_noise_sigma
    if kind in ("body", "found"):
        more.setdefault("target_pose", body())
    return pipe(
        shown.image,
        read_bodies(keypoints(person(5, "walk")), "the pose"),
        HumanParsing(shown.parsing),
        read_bodies(keypoints(shown), "the pose"),
        num_inference_steps=steps,
        latents=noise(cells=CELLS) * scale,
        **more,
    ).images


def posed(kind: str) -> object:
    return run(ApplyPoseEncoder, model=loaded(kind).target, pose=keypoints(person(5, "walk")))[0]


def whole(kind: str, **more: object) -> object:
    """Pose encoder, HPFA and guidance."""
    model = run(ApplyHPFA, model=posed(kind), source=encoded(kind), **ONES)[0]
    return guided(kind, model, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_is_the_pipelines(kind: str, steps: int) -> None:
    ours, theirs = through_host(whole(kind), kind, steps), through_pipeline(kind, steps)
    gap = float((ours - theirs).abs().max())
    print(f"parity, 3D guidance by {kind}, {steps} Euler steps: max abs difference {gap:.2e}")
    assert gap < LIMIT
    assert (
        through_host(run(ApplyHPFA, model=posed(kind), source=encoded(kind), **ONES)[0], kind, steps) - ours
    ).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["body", "source"])
def test_two_guidance_scales_are_the_pipelines(kind: str) -> None:
    ours = through_host(whole(kind), kind, 2, cfg=3.0, pose_cfg=2.0)
    theirs = through_pipeline(kind, 2, guidance_pose=2.0, guidance_source=3.0)
    assert float((ours - theirs).abs().max()) < LIMIT


def test_source_guidance_is_the_pipelines() -> None:
    ours, theirs = through_host(whole("body"), "body", 2, cfg=3.0), through_pipeline("body", 2, guidance_source=3.0)
    assert float((ours - theirs).abs().max()) < LIMIT


def test_strength_is_the_pipelines_and_zero_is_the_model_itself() -> None:
    ours = through_host(whole("body", strength=0.5), "body", 1)
    assert float((ours - through_pipeline("body", 1, control_strength=0.5)).abs().max()) < LIMIT
    model = posed("body")
    assert guided("body", model, strength=0.0) is model


def test_a_lifted_body_is_the_pipelines() -> None:
    ours = through_host(whole("body", target_body=None, target_pose=keypoints(person(5, "walk"))), "body", 1)
    pipe = pipeline("body")
    shown = person(3, "stand")
    pipe.scheduler.set_timesteps(1)
    scale = (1 + pipe.scheduler.sigmas[0] ** 2).sqrt() / pipe.scheduler.init_noise_sigma
    theirs = pipe(
        shown.image,
        read_bodies(keypoints(person(5, "walk")), "the pose"),
        HumanParsing(shown.parsing),
        read_bodies(keypoints(shown), "the pose"),
        num_inference_steps=1,
        latents=noise(cells=CELLS) * scale,
    ).images
    # Lifting is done on the same numbers; what is left is float32.
    assert float((ours - theirs).abs().max()) < LIMIT


def test_what_keypoints_cannot_tell_makes_another_picture() -> None:
    one = body()
    other = BodyPose(mirror_body(one.theta), one.beta, one.camera)
    a, b = (denoised(guided(target_body=placed(x)), noise(cells=CELLS)) for x in (one, other))
    assert (a - b).abs().max() > 1e-3


def test_a_body_on_another_canvas_is_put_into_the_models() -> None:
    """The same picture, twice as large: the camera is in frame heights."""
    one, other = (
        denoised(guided(target_body=PosedBody(body(), size)), noise(cells=CELLS)) for size in ((48, 64), (96, 128))
    )
    assert torch.allclose(one, other, atol=1e-5)
    # A wider one is padded above and below: the person gets smaller.
    assert (denoised(guided(target_body=PosedBody(body(), (96, 64))), noise(cells=CELLS)) - one).abs().max() > 1e-3


def test_it_works_in_its_window_only() -> None:
    model = unchecked(loaded("body").target)
    late = guided(start_percent=0.9)
    assert torch.equal(denoised(late, noise(cells=CELLS), sigma=10.0), denoised(model, noise(cells=CELLS), sigma=10.0))
    assert not torch.equal(
        denoised(late, noise(cells=CELLS), sigma=0.05), denoised(model, noise(cells=CELLS), sigma=0.05)
    )


def test_applying_leaves_the_model_as_it_was_and_the_last_one_counts() -> None:
    model = unchecked(loaded("body").target)
    before = denoised(model, noise(cells=CELLS))
    once = guided()
    assert torch.equal(
        denoised(guided("body", guided(strength=2.0)), noise(cells=CELLS)), denoised(once, noise(cells=CELLS))
    )
    assert torch.equal(denoised(model, noise(cells=CELLS)), before)


def test_a_batch_of_bodies_is_each_on_its_own() -> None:
    both = BodyPose(*(torch.cat([getattr(body(n), f) for n in ("walk", "wave")]) for f in ("theta", "beta", "camera")))
    start = torch.cat([noise(0, CELLS), noise(1, CELLS)])
    together = denoised(guided(target_body=placed(both)), start)
    for i, name in enumerate(("walk", "wave")):
        alone = denoised(guided(target_body=placed(body(name))), start[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)
    with pytest.raises(TruePoseError, match="2 target bodies and 3 latents"):
        denoised(guided(target_body=placed(both)), noise(cells=CELLS).expand(3, -1, -1, -1))


def test_the_sampler_guides_by_itself() -> None:
    given = {"target_pose": keypoints(person(5, "walk")), "steps": 2}
    (latent,) = run(HPFASampler, model=loaded().target, source=encoded(), **given)
    without = host_model.load(file("body"))
    for site in without.adapter._parts.control3d.target_sites.values():
        site.scale.zero_()
    (other,) = run(HPFASampler, model=without.target, source=encoded(), **given)
    assert (latent["samples"] - other["samples"]).abs().max() > 1e-3


def test_bad_input_is_refused() -> None:
    from model import loaded as bundled

    with pytest.raises(TruePoseError, match="trained without 3D guidance"):
        run(Apply3DGuidance, model=bundled().target, source=encoded(), target_body=placed())
    with pytest.raises(TruePoseError, match="connect target_body or target_pose"):
        guided(target_body=None)
    with pytest.raises(TruePoseError, match="reads keypoints alone"):
        guided("keypoints", target_pose=None, target_body=placed())
    with pytest.raises(TruePoseError, match="connect the source_net of the same"):
        run(
            Apply3DGuidance,
            model=loaded().target,
            source=replace(encoded(), family="sd15"),
            target_body=placed(),
        )
    with pytest.raises(TruePoseError, match="start_percent 1 is after"):
        guided(start_percent=1.0, end_percent=0.5)
