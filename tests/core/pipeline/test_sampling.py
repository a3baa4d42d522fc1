"""Laws of the sampling loop, on a predictor that knows the answer."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler

from truepose_core.errors import TruePoseError
from truepose_core.pipeline.sampling import denoise, start_noise, step_callback

SHAPE = (3, 2, 4, 4)
SETTINGS = {"prediction_type": "sample", "timestep_spacing": "trailing"}


def scheduler(kind=DDIMScheduler, steps=5, **more):
    made = kind(**{**SETTINGS, **more})
    made.set_timesteps(steps)
    return made


def half(x, t):
    """A predictor that depends on what it sees."""
    return 0.5 * x


def test_picture_i_of_a_seed_is_the_first_of_the_seed_plus_i():
    noise, generators = start_noise(SHAPE, 7)
    for i in range(3):
        alone, (generator,) = start_noise((1, *SHAPE[1:]), 7 + i)
        assert torch.equal(noise[i : i + 1], alone)
        assert torch.equal(torch.randn(5, generator=generators[i]), torch.randn(5, generator=generator))
    assert torch.equal(noise, start_noise(SHAPE, [7, 8, 9])[0])


def test_given_noise_is_taken_as_it_is_and_that_of_another_shape_is_refused():
    given = torch.rand(SHAPE)
    assert torch.equal(start_noise(SHAPE, 0, given)[0], given)
    with pytest.raises(TruePoseError, match=r"\(1, 2, 4, 4\); expected \(3, 2, 4, 4\)"):
        start_noise(SHAPE, 0, given[:1])
    with pytest.raises(TruePoseError, match="2 seeds for 3 pictures"):
        start_noise(SHAPE, [1, 2])


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler])
def test_who_predicts_the_picture_gets_it(kind):
    truth = torch.rand(SHAPE)
    made = scheduler(kind, **({"clip_sample": False} if kind is not HeunDiscreteScheduler else {}))
    noise, generators = start_noise(SHAPE, 0)
    assert torch.allclose(denoise(lambda x, t: truth, made, noise, generators), truth, atol=2e-3)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_a_batch_equals_its_items_also_where_noise_is_drawn_on_the_way(kind):
    more = {"prediction_type": "epsilon"}
    together = denoise(half, scheduler(kind, **more), *start_noise(SHAPE, 3))
    for i in range(3):
        alone = denoise(half, scheduler(kind, **more), *start_noise((1, *SHAPE[1:]), 3 + i))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-6)


def test_every_timestep_is_asked_once_and_in_order():
    made, seen, shown = scheduler(steps=4), [], []

    def predict(x, t):
        seen.append(int(t))
        return half(x, t)

    def progress(steps):
        shown.extend(int(t) for t in steps)
        return steps

    denoise(predict, made, *start_noise(SHAPE, 0), progress=progress)
    assert seen == shown == made.timesteps.tolist()


def test_the_callback_sees_each_step_and_may_replace_the_latents():
    pipe, told = object(), []

    def callback(who, i, t, tensors):
        assert who is pipe
        told.append((i, t, tensors["latents"]))
        return {"latents": torch.zeros(SHAPE)} if i == 3 else {}

    made = scheduler(steps=4)
    out = denoise(half, made, *start_noise(SHAPE, 0), on_step=step_callback(pipe, callback))
    assert [(i, t) for i, t, _ in told] == list(enumerate(made.timesteps.tolist()))
    assert torch.equal(out, torch.zeros(SHAPE)) and bool(told[3][2].any())
    assert step_callback(pipe, None) is None
