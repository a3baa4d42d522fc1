"""The pipeline's promises: one source pass, seeds, batches, sizes, schedulers, guidance, offloading."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from small import people, small_model, source_of
from torch.nn.functional import interpolate

from truepose_core.attention.caa import RegionTokens
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.pipeline.truepose import combine_guidance, default_scheduler, guidance_factors, weigh_region_tokens
from truepose_core.pose.skeleton import draw_skeleton
from truepose_core.regions import Region

CLOSE = {"atol": 2e-5, "rtol": 0}


def quiet(model, scheduler=None):
    pipe = TruePosePipeline.from_model(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return quiet(small_model())


def bodies(count=3):
    return people().target.keypoints[:count]


def calls_of(module):
    """A list that grows by one at every forward pass of the module, and the handle that ends this."""
    seen = []
    return seen, module.register_forward_hook(lambda *_: seen.append(1))


def test_source_net_runs_once_for_many_poses_seeds_and_steps(pipe):
    seen, handle = calls_of(pipe.source_net)
    out = pipe(*with_source(bodies()), num_inference_steps=3)
    assert len(seen) == 1
    again = pipe(out.features, bodies(), height=64, width=48, num_inference_steps=3, seed=5)
    handle.remove()
    assert len(seen) == 1
    assert again.images.shape == (3, 3, 64, 48)


def with_source(body):
    image, parsing, keypoints = source_of(people(), slice(1))
    return image, body, parsing, keypoints


def test_features_of_an_earlier_call_give_the_same_picture(pipe):
    first = pipe(*with_source(bodies(2)), num_inference_steps=2)
    again = pipe(first.features, bodies(2), height=64, width=48, num_inference_steps=2)
    assert torch.equal(first.images, again.images)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_seeds_fix_the_picture(name):
    pipe = quiet(small_model(prediction_type="epsilon"))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    torch.manual_seed(1)
    first = pipe(*with_source(bodies(2)), num_inference_steps=2, seed=3).images
    torch.manual_seed(2)
    again = pipe(*with_source(bodies(2)), num_inference_steps=2, seed=3).images
    other = pipe(*with_source(bodies(2)), num_inference_steps=2, seed=4).images
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3


def test_one_seed_counts_up_and_many_are_taken_one_by_one(pipe):
    body = bodies(1).expand(2, -1, -1)
    counted = pipe(*with_source(body), num_inference_steps=2, seed=4).images
    given = pipe(*with_source(body), num_inference_steps=2, seed=[4, 5]).images
    same = pipe(*with_source(body), num_inference_steps=2, seed=[4, 4]).images
    assert torch.equal(counted, given)
    torch.testing.assert_close(same[0], same[1], **CLOSE)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_batch_is_its_items_one_by_one(aligned):
    pipe = quiet(small_model(aligned=aligned))
    image, parsing, keypoints = source_of(people(), slice(2))
    body = torch.cat([bodies(3), bodies(1)])
    options = {"num_inference_steps": 2, "guidance_source": 1.5}
    batch = pipe(image, body, parsing, keypoints, seed=[0, 1, 2, 3], **options).images
    for i in range(4):
        s = i // 2
        alone = pipe(image[s : s + 1], body[i : i + 1], parsing[s], keypoints[s : s + 1], seed=[i], **options).images
        torch.testing.assert_close(batch[i : i + 1], alone, **CLOSE)


def test_padded_sources_do_not_mix(pipe):
    image, parsing, keypoints = source_of(people(), slice(2))
    wide = interpolate(image, (64, 90), mode="bilinear")
    wide_parsing = parsing.resize(64, 90)
    both = pipe.encode_source(wide, wide_parsing, keypoints)
    one = pipe.encode_source(wide[1:], wide_parsing[1], keypoints[1:])
    for site, tokens in both.sites.items():
        torch.testing.assert_close(tokens[1:], one.sites[site], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 48), (16, 16), (37, 101), (200, 30)])
def test_any_size_that_is_asked_for_comes_out(pipe, size):
    out = pipe(*with_source(bodies(1)), height=size[0], width=size[1], num_inference_steps=1)
    assert out.images.shape == (1, 3, *size)
    assert torch.equal(out.images, out.images.clamp(0, 1))


@pytest.mark.parametrize(
    ("name", "predicts"),
    [
        ("DDIMScheduler", "sample"),
        ("EulerDiscreteScheduler", "sample"),
        ("DPMSolverMultistepScheduler", "sample"),
        ("UniPCMultistepScheduler", "sample"),
        ("LCMScheduler", "sample"),
        # diffusers has these two for epsilon and v prediction only.
        ("EulerAncestralDiscreteScheduler", "epsilon"),
        ("HeunDiscreteScheduler", "epsilon"),
    ],
)
def test_any_scheduler_runs(name, predicts):
    pipe = quiet(small_model(prediction_type=predicts))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = pipe(*with_source(bodies(2)), num_inference_steps=3).images
    assert images.isfinite().all()
    assert images.std() > 0.01


def test_a_scheduler_for_another_prediction_is_refused(pipe):
    other = quiet(pipe.model, diffusers.EulerDiscreteScheduler(**pipe.model.config.scheduler))
    with pytest.raises(TruePoseError, match=r"expects the prediction 'epsilon' .* EulerDiscreteScheduler\.from_config"):
        other(*with_source(bodies(1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_float32(dtype):
    pipe = quiet(small_model(aligned=True))
    exact = pipe(*with_source(bodies(1)), num_inference_steps=2).images
    pipe.to(dtype=dtype)
    assert pipe.dtype == dtype
    half = pipe(*with_source(bodies(1)), num_inference_steps=2).images
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("scales", "calls"), [((1.0, 1.0), 1), ((0.0, 0.0), 1), ((1.0, 0.0), 1), ((1.0, 2.0), 2), ((3.0, 2.0), 3)]
)
def test_guidance_costs_the_network_calls_it_needs(pipe, scales, calls):
    seen, handle = calls_of(pipe.target_net)
    pipe(*with_source(bodies(1)), num_inference_steps=4, guidance_pose=scales[0], guidance_source=scales[1])
    handle.remove()
    assert len(seen) == 4 * calls


def test_guidance_is_its_formula():
    nothing, pose, full = torch.randn(3, 2, 4, dtype=torch.float64)
    for w_pose, w_source in ((1.0, 1.0), (2.0, 3.0), (0.0, 0.0), (1.5, 0.0)):
        expected = nothing + w_pose * (pose - nothing) + w_source * (full - pose)
        torch.testing.assert_close(combine_guidance(nothing, pose, full, w_pose, w_source), expected)
        assert math.isclose(sum(guidance_factors(w_pose, w_source)), 1)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.5, 2.0)])
def test_sampling_is_the_loop_written_out(scales):
    """DDIM by hand: x0 from three predictions, then the deterministic step. 4 divides the 1000 training steps, so that
    diffusers' step sizes are whole."""
    model = small_model(aligned=True)
    image, parsing, keypoints = source_of(people(), slice(1))
    body = bodies(1)
    ours = quiet(model)(
        image,
        body,
        parsing,
        keypoints,
        num_inference_steps=4,
        seed=9,
        guidance_pose=scales[0],
        guidance_source=scales[1],
    ).images

    scheduler = default_scheduler(model)
    scheduler.set_timesteps(4)
    alphas = scheduler.alphas_cumprod
    source = model.encode_source(image, parsing, keypoints)
    pose = model.encode_pose(draw_skeleton(body, 64, 48))
    full, alone = model.target_pass((16, 12), source, body), model.target_pass((16, 12), None)
    aligned = model.encode_aligned(source, body)
    x = torch.randn(48, 16, 12, generator=torch.Generator().manual_seed(9))[None]
    steps = scheduler.timesteps.tolist()
    for t, after in zip(steps, [*steps[1:], None], strict=True):
        when = torch.tensor([t])
        e0, ep, ef = (
            model.denoise(x, when, alone, None),
            model.denoise(x, when, alone, pose),
            model.denoise(x, when, full, pose, aligned=aligned),
        )
        clean = e0 + scales[0] * (ep - e0) + scales[1] * (ef - ep)
        a = alphas[t]
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        b = alphas[after] if after is not None else torch.tensor(1.0)
        x = b.sqrt() * clean.clamp(-1, 1) + (1 - b).sqrt() * noise
    torch.testing.assert_close(ours, model.codec.decode(x), atol=1e-4, rtol=0)


def test_strength_and_region_weights_of_zero_are_the_pose_alone():
    pipe = quiet(small_model(aligned=True))
    call = lambda **options: pipe(*with_source(bodies(1)), num_inference_steps=2, **options).images  # noqa: E731
    pose_only = call(guidance_source=0.0)
    assert torch.equal(call(strength=0.0), pose_only)
    assert torch.equal(call(region_weights=torch.zeros(7)), pose_only)
    assert not torch.allclose(call(), pose_only, atol=1e-3)
    weights = torch.ones(7)
    weights[Region.FACE] = 0
    assert not torch.allclose(call(region_weights=weights), call(), atol=1e-4)


def test_region_weights_reach_the_region_tokens(pipe):
    image, parsing, keypoints = source_of(people(), slice(1))
    features = pipe.encode_source(image, parsing, keypoints)
    omega = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    caa: RegionTokens = weigh_region_tokens(features, omega, 1.0).caa
    factor = caa.regions @ torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    assert torch.equal(caa.tokens, features.caa.tokens * factor[:, None])
    # The vision tower never sees the background, so leaving the background out leaves its tokens alone.
    omega = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert torch.equal(weigh_region_tokens(features, omega, 1.0).caa.tokens, features.caa.tokens)
    assert weigh_region_tokens(features, None, 1.0) is features


def test_the_background_left_out_does_not_matter_but_for_the_background(pipe):
    """With omega = 0 for the background, its tokens are dropped: fewer tokens, finite pictures."""
    weights = torch.ones(7)
    weights[Region.BACKGROUND] = 0
    images = pipe(*with_source(bodies(1)), num_inference_steps=1, region_weights=weights).images
    assert images.isfinite().all()


@pytest.mark.parametrize("slice_size", ["auto", "max", 3])
def test_attention_slicing_changes_nothing(slice_size):
    pipe = quiet(small_model())
    whole = pipe(*with_source(bodies(1)), num_inference_steps=2).images
    pipe.enable_attention_slicing(slice_size)
    torch.testing.assert_close(pipe(*with_source(bodies(1)), num_inference_steps=2).images, whole, **CLOSE)
    pipe.disable_attention_slicing()
    assert torch.equal(pipe(*with_source(bodies(1)), num_inference_steps=2).images, whole)


@pytest.mark.parametrize("aligned", [False, True])
def test_offloading_changes_nothing(aligned):
    """The hooks of diffusers' model offloading, with the CPU in the part of the accelerator."""
    pipe = quiet(small_model(aligned=aligned))
    plain = pipe(*with_source(bodies(2)), num_inference_steps=2).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(*with_source(bodies(2)), num_inference_steps=2).images, plain)


def test_a_given_pose_map_replaces_the_drawn_one(pipe):
    drawn = draw_skeleton(bodies(2), 64, 48)
    options = {"num_inference_steps": 2}
    same = pipe(*with_source(bodies(2)), pose_map=drawn, **options).images
    assert torch.equal(same, pipe(*with_source(bodies(2)), **options).images)
    other = pipe(*with_source(bodies(2)), pose_map=1 - drawn, **options).images
    assert not torch.allclose(other, same, atol=1e-3)


def test_a_given_target_parsing_stands_where_the_carried_one_would():
    """Given, the parsing that is carried makes the same picture (CAA would align it further); the true one does not."""
    pipe = quiet(small_model(caa=False))
    image, body, parsing, keypoints = with_source(bodies(1))
    features, patch = pipe.encode_source(image, parsing, keypoints), pipe.model.codec.patch
    carried = features.prior(body, image.shape[2] // patch, image.shape[3] // patch).masks
    given = HumanParsing(carried.repeat_interleave(patch, 2).repeat_interleave(patch, 3))

    def made(target_parsing):
        more = {"height": image.shape[2], "width": image.shape[3], "num_inference_steps": 2}
        return pipe(features, body, target_parsing=target_parsing, **more).images

    torch.testing.assert_close(made(given), made(None), **CLOSE)
    assert (made(HumanParsing(people().target.parsing[:1])) - made(None)).abs().max() > 100 * CLOSE["atol"]


def test_callback_sees_every_step_and_may_change_the_latents(pipe):
    seen = []

    def callback(_, step, timestep, given):
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(given["latents"])}

    images = pipe(*with_source(bodies(1)), num_inference_steps=3, callback_on_step_end=callback).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)
    torch.testing.assert_close(images, torch.full_like(images, 0.5))


def test_given_latents_replace_the_seed(pipe):
    latents = torch.randn(48, 16, 12, generator=torch.Generator().manual_seed(3))[None]
    given = pipe(*with_source(bodies(1)), num_inference_steps=2, latents=latents).images
    assert torch.equal(given, pipe(*with_source(bodies(1)), num_inference_steps=2, seed=3).images)


def test_source_without_keypoints_works(pipe):
    image, parsing, _ = source_of(people(), slice(1))
    assert pipe(image, bodies(1), parsing, num_inference_steps=1).images.isfinite().all()


def test_model_without_source_net_works():
    pipe = quiet(small_model("none", caa=False))
    images = pipe(*with_source(bodies(1)), num_inference_steps=2).images
    image, parsing, keypoints = source_of(people(), slice(1, 2))
    other = pipe(image, bodies(1), parsing, keypoints, num_inference_steps=2).images
    assert torch.equal(images, other)


def test_weights_that_give_nan_are_an_error():
    model = small_model("none", caa=False)
    model.target_net.conv_out.bias[0] = math.nan
    with pytest.raises(TruePoseError, match=r"NaN in torch\.float32"):
        quiet(model)(*with_source(bodies(1)), num_inference_steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, "0 sampling steps"),
        ({"guidance_pose": -1.0}, "guidance_pose is -1.0"),
        ({"guidance_source": math.nan}, "guidance_source is nan"),
        ({"strength": 1.5}, "strength is 1.5; expected 0 to 1"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents are \(1, 4, 8, 8\); expected \(1, 48, 16, 12\)"),
        ({"source_parsing": None}, "needs its human parsing"),
        ({"source_parsing": HumanParsing.from_labels(torch.zeros(64, 48, dtype=torch.long))}, "shows nobody"),
        ({"source_parsing": HumanParsing.from_labels(torch.ones(32, 48, dtype=torch.long))}, "the same size"),
        ({"source": torch.zeros(1, 1, 64, 48)}, r"source image is \(1, 1, 64, 48\)"),
        ({"source_body": torch.zeros(2, 18, 3)}, r"source keypoints are \(2, 18, 3\)"),
        ({"target_body": torch.zeros(1, 18, 3)}, "no keypoint at all"),
        ({"target_body": torch.zeros(1, 17, 3)}, r"target keypoints are \(1, 17, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(pipe, change, message):
    image, body, parsing, keypoints = with_source(bodies(1))
    call = {"source": image, "target_body": body, "source_parsing": parsing, "source_body": keypoints}
    with pytest.raises(TruePoseError, match=message):
        pipe(**{**call, **change})


def test_batches_that_do_not_divide_are_refused(pipe):
    image, parsing, keypoints = source_of(people(), slice(2))
    with pytest.raises(TruePoseError, match="3 target poses cannot be shared among 2 sources"):
        pipe(image, bodies(3), parsing, keypoints)
    empty = parsing.masks.clone()
    empty[1], empty[1, 0] = 0, 1
    with pytest.raises(TruePoseError, match="shows nobody"):
        pipe(image, bodies(2), HumanParsing(empty), keypoints)
    with pytest.raises(TruePoseError, match="height and width are needed"):
        pipe(pipe.encode_source(image, parsing, keypoints), bodies(2))


def test_features_of_another_model_are_refused(pipe):
    image, parsing, keypoints = source_of(people(), slice(1))
    features = replace(pipe.encode_source(image, parsing, keypoints), family="sd15")
    with pytest.raises(TruePoseError, match="Encode the source again"):
        pipe(features, bodies(1), height=64, width=48)
