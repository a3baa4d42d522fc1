"""The bundled model through the host against the diffusers pipeline: the same noise and sigmas, float32."""

from __future__ import annotations

from functools import lru_cache

import comfy.samplers
import pytest
import torch
from model import ONES, encode, keypoints, loaded, noise, person
from pack.nodes.host import features as host_features
from pack.nodes.host import guider as host_guider
from pack.nodes.host import model as host_model
from pack.nodes.host import nets as host_nets
from pack.nodes.model import ApplyPoseEncoder
from pack.nodes.source import ApplyHPFA
from torch import Tensor

from truepose_core.parsing import HumanParsing

diffusers = pytest.importorskip("diffusers", reason="parity compares with the diffusers pipeline")
from truepose_core.models.store import load_model  # noqa: E402
from truepose_core.pipeline import TruePosePipeline  # noqa: E402

LIMIT = 1e-3


@lru_cache
def pipeline() -> TruePosePipeline:
    pipe = TruePosePipeline.from_model(load_model())
    # Trailing spacing has whole time steps, which the host's sigmas lie on.
    pipe.scheduler = diffusers.EulerDiscreteScheduler(
        **load_model().config.scheduler, prediction_type="sample", timestep_spacing="trailing"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_back(pose: list[dict]) -> Tensor:
    """The keypoints as POSE_KEYPOINT tells them: in whole or fractional pixels."""
    from pack.nodes.schema import read_bodies

    return read_bodies(pose, "the pose")


def through_host(
    noise: Tensor,
    steps: int,
    weights: dict,
    cfg: float = 1.0,
    size: tuple[int, int] = (128, 96),
    pose_cfg: float | None = None,
    **more: object,
) -> Tensor:
    """Nodes, then the host's guider, its Euler sampler and VAE."""
    _, features = encode(size)
    target = keypoints(person(5, "walk"))
    (model,) = ApplyPoseEncoder.execute(loaded().target, pose=target).result
    (model,) = ApplyHPFA.execute(model, features, target_pose=target, **{**weights, **more}).result
    pipe = pipeline()
    pipe.scheduler.set_timesteps(steps)
    sigmas = pipe.scheduler.sigmas.float()
    empty = host_model.empty_conditioning(loaded().adapter)
    if pose_cfg is None:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(empty, empty)
        guider.set_cfg(cfg)
    else:
        guider = host_guider.make_guider(model, empty, None, pose_cfg, cfg)
    euler = comfy.samplers.sampler_object("euler")
    out = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True)
    return loaded().vae.decode(out).movedim(-1, 1)


def through_pipeline(
    noise: Tensor, steps: int, omega: Tensor | None, cfg: float = 1.0, size=(128, 96), **more
) -> Tensor:
    shown = person(3, "stand", *size)
    pipe = pipeline()
    features = pipe.encode_source(shown.image, HumanParsing(shown.parsing), read_back(keypoints(shown)))
    pipe.scheduler.set_timesteps(steps)
    # The host starts from the highest noise at the variance that its forward process has there.
    scale = (1 + pipe.scheduler.sigmas[0] ** 2).sqrt() / pipe.scheduler.init_noise_sigma
    return pipe(
        features,
        read_back(keypoints(person(5, "walk"))),
        height=128,
        width=96,
        num_inference_steps=steps,
        guidance_source=cfg,
        region_weights=omega,
        latents=noise * scale,
        **more,
    ).images


def gap(a: Tensor, b: Tensor, what: str) -> float:
    worst = float((a - b).abs().max())
    print(f"parity, {what}: max abs difference {worst:.2e}")
    return worst


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_sampling_is_the_pipelines(steps: int) -> None:
    ours, theirs = through_host(noise(), steps, ONES), through_pipeline(noise(), steps, None)
    assert gap(ours, theirs, f"{steps} Euler steps") < LIMIT


def test_source_guidance_is_the_pipelines() -> None:
    ours = through_host(noise(1), 4, ONES, cfg=3.0)
    theirs = through_pipeline(noise(1), 4, None, cfg=3.0)
    assert gap(ours, theirs, "4 steps, source guidance 3") < LIMIT


@pytest.mark.parametrize("scales", [(2.0, 3.0), (1.5, 0.0), (1.0, 1.0)])
def test_two_guidance_scales_are_the_pipelines(scales: tuple[float, float]) -> None:
    pose, source = scales
    ours = through_host(noise(4), 4, ONES, cfg=source, pose_cfg=pose)
    theirs = through_pipeline(noise(4), 4, None, cfg=source, guidance_pose=pose)
    assert gap(ours, theirs, f"4 steps, pose guidance {pose:g}, source guidance {source:g}") < LIMIT


def test_parity_would_notice() -> None:
    """Each part on its own moves the picture further than the limit."""
    full = through_pipeline(noise(), 4, None)
    adapter = loaded().adapter
    for name in ("site_weights", "cross_tokens", "aligned"):
        with pytest.MonkeyPatch.context() as patch:
            nothing = {"site_weights": None, "cross_tokens": {}, "aligned": None}[name]
            patch.setattr(adapter, name, lambda *args, _nothing=nothing, **more: _nothing)
            assert gap(through_host(noise(), 4, ONES), full, f"without {name}") > 3 * LIMIT


def test_region_weights_and_strength_are_the_pipelines() -> None:
    weights = {**ONES, "background": 0.0, "upper": 0.4, "hair": 0.0}
    omega = torch.tensor(list(weights.values()))
    ours = through_host(noise(2), 4, weights, strength=0.7)
    theirs = through_pipeline(noise(2), 4, omega, strength=0.7)
    assert gap(ours, theirs, "4 steps, region weights, strength 0.7") < LIMIT


@pytest.mark.parametrize("style", [0.4, 1.0])
def test_style_is_the_pipelines(style: float) -> None:
    none = through_pipeline(noise(5), 4, None, cfg=3.0)
    theirs = through_pipeline(noise(5), 4, None, cfg=3.0, style=style)
    assert float((theirs - none).abs().max()) > 3 * LIMIT
    ours = through_host(noise(5), 4, ONES, cfg=3.0, style=style)
    assert gap(ours, theirs, f"4 steps, source guidance 3, style {style:g}") < LIMIT


def test_another_source_size_is_framed_as_in_the_pipeline() -> None:
    ours = through_host(noise(3), 4, ONES, size=(120, 120))
    theirs = through_pipeline(noise(3), 4, None, size=(120, 120))
    assert gap(ours, theirs, "4 steps, a square source") < LIMIT


def test_source_features_are_the_pipelines() -> None:
    shown, ours = encode()
    theirs = pipeline().encode_source(shown.image, HumanParsing(shown.parsing), read_back(keypoints(shown)))
    names = host_nets.host_sites(loaded().source.model.model_config.unet_config)
    assert {names[site] for site in theirs.sites} == set(ours.sites)
    for site, tokens in theirs.sites.items():
        assert float((ours.sites[names[site]] - tokens).abs().max()) < 1e-4, site
    assert torch.equal(ours.caa.shown, theirs.caa.shown)
    assert float((ours.caa.tokens - theirs.caa.tokens).abs().max()) < 1e-5
    assert torch.equal(ours.image, theirs.image)
    assert set(ours.style) == set(theirs.style)
    for place, moments in theirs.style.items():
        for one, other in zip(ours.style[place], moments, strict=True):
            # Some are thousands.
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-4), place
    assert isinstance(ours, host_features.HostFeatures) and ours.family == "mannequin"
