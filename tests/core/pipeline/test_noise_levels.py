"""Reading an untrained checkpoint's source at the noise that the sampler is at, in diffusers folders."""

from __future__ import annotations

import pytest
import torch
from cli.test_folder import make_folder

from truepose_core.errors import TruePoseError
from truepose_core.models.folder import load_folder, trainable_from_folder
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.source.combine import combine_sources
from truepose_core.source.features import NOISE_SEED, Level, nearest_level

STEPS = 4


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request, tmp_path_factory):
    opened = load_folder(make_folder(tmp_path_factory.mktemp("folder") / request.param, request.param))
    pipe = TruePosePipeline.from_model(opened.model, opened.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def person(seed: int = 0) -> tuple[torch.Tensor, HumanParsing]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (1, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.rand((1, 3, 64, 64), generator=generator), HumanParsing.from_labels(labels)


def transfer(pipe, features, steps=STEPS):
    body = torch.full((1, 18, 3), 0.5)
    return pipe(features, body, height=64, width=64, num_inference_steps=steps, seed=3, guidance_source=1.0).images


def sigma_of(pipe, timestep):
    kept = float(pipe.scheduler.alphas_cumprod[timestep])
    return ((1 - kept) / kept) ** 0.5


def test_by_default_an_untrained_checkpoint_is_read_at_four_levels(pipe):
    features = pipe.encode_source(*person())
    assert [level.sigma for level in features.levels] == sorted((x.sigma for x in features.levels), reverse=True)
    assert len(features.levels) == 4 and features.latent is None
    timesteps = [round((1 - (i + 0.5) / 4) * 999) for i in range(4)]
    assert [level.sigma for level in features.levels] == [sigma_of(pipe, t) for t in timesteps]
    once = pipe.encode_source(*person(), source_reading="once")
    assert once.levels == () and once.sites.keys() == features.sites.keys()


def test_a_level_is_a_pass_over_the_noised_latent(pipe):
    """norm1's outputs in a plain call of the UNet, by hooks."""
    image, parsing = person()
    (level,) = pipe.encode_source(image, parsing, levels=1).levels
    model, found, hooks = pipe.model, {}, []
    latent = model.codec.encode(image)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    kept = 1 / (1 + level.sigma**2)
    timestep = round(0.5 * 999)
    for name, block in (
        (n, m) for n, m in model.source_net.named_modules() if hasattr(m, "norm1") and hasattr(m, "attn1")
    ):
        hooks.append(block.norm1.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, o.clone())))
    try:
        model._read(kept**0.5 * latent + (1 - kept) ** 0.5 * noise, timestep, (8, 8), None, None, None, (64, 64))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(found) == len(level.sites)
    for tokens, expected in zip(level.sites.values(), found.values(), strict=True):
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


def test_as_many_levels_as_steps_are_every_step(pipe):
    aim = transfer(pipe, pipe.encode_source(*person(), source_reading="every step"))
    pipe.scheduler.set_timesteps(STEPS)
    exact = [(int(t), sigma_of(pipe, int(t))) for t in pipe.scheduler.timesteps]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipe, "_levels", lambda count: exact)
        same = transfer(pipe, pipe.encode_source(*person(), levels=STEPS))
    torch.testing.assert_close(same, aim, atol=1e-5, rtol=0)


def test_more_levels_are_nearer_to_what_each_step_would_read(pipe):
    anew = pipe.encode_source(*person(), source_reading="every step")
    own = {t: pipe.model.read_noised(anew, t, sigma_of(pipe, t), None, None).sites for t in range(30, 1000, 160)}
    away = []
    for count in (1, 4, 16):
        features = pipe.encode_source(*person(), levels=count)
        near = {t: features.at(sigma_of(pipe, t)).sites for t in own}
        away.append(sum(float((near[t][site] - tokens).norm()) for t in own for site, tokens in own[t].items()))
    assert away[0] > away[1] > away[2] > 0


def test_the_readings_are_shared_and_every_step_reads_at_each(pipe):
    net, seen = pipe.model.source_net, []
    hook = net.register_forward_pre_hook(lambda module, args: seen.append(1))
    try:
        features = pipe.encode_source(*person(), levels=3)
        assert len(seen) == 3
        seen.clear()
        transfer(pipe, features)
        plain = len(seen)
        seen.clear()
        anew = pipe.encode_source(*person(), source_reading="every step")
        assert not seen and anew.latent is not None and not anew.sites
        transfer(pipe, anew)
        # The two nets of a folder are one.
        assert len(seen) == plain + len(pipe.scheduler.timesteps)
    finally:
        hook.remove()


def test_combined_sources_keep_their_levels(pipe):
    a, b = pipe.encode_source(*person(0)), pipe.encode_source(*person(1))
    both = combine_sources(a, b, [0, 0, 0, 1, 0, 0, 0])
    assert [level.sigma for level in both.levels] == [level.sigma for level in a.levels]
    for i, level in enumerate(both.levels):
        for site, tokens in level.sites.items():
            assert torch.equal(tokens, torch.cat([a.levels[i].sites[site], b.levels[i].sites[site]], 1))
    out = transfer(pipe, both)
    assert not torch.equal(out, transfer(pipe, a))
    for other in (pipe.encode_source(*person(1), levels=2), pipe.encode_source(*person(1), source_reading="once")):
        with pytest.raises(TruePoseError, match="other noise levels"):
            combine_sources(a, other, [0, 0, 0, 1, 0, 0, 0])


def test_region_weights_work_at_levels(pipe):
    for reading in ("noise levels", "every step"):
        features = pipe.encode_source(*person(), source_reading=reading)
        body, more = torch.full((1, 18, 3), 0.5), {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
        none = pipe(features, body, **more, guidance_source=1.0, strength=0.0).images
        shut = pipe(features, body, **more, guidance_source=1.0, region_weights=torch.zeros(7)).images
        assert torch.equal(none, shut)
        some = torch.tensor([0.0, 1, 1, 0.5, 0, 0, 0])
        assert not torch.equal(none, pipe(features, body, **more, guidance_source=1.0, region_weights=some).images)


def test_features_move_with_their_levels(pipe):
    features = pipe.encode_source(*person()).to(dtype=torch.float64)
    assert all(x.dtype == torch.float64 for level in features.levels for x in level.sites.values())


def test_nearest_in_log_snr():
    levels = tuple(Level(sigma, {}) for sigma in (8.0, 2.0, 0.5))
    assert [nearest_level(levels, s) for s in (100.0, 4.01, 3.99, 1.01, 0.99, 0.0)] == [0, 0, 1, 1, 2, 2]


def test_what_is_trained_reads_as_it_was_trained(tmp_path, pipe):
    trained = trainable_from_folder(make_folder(tmp_path / "folder", "sd15"), "concat", (64, 64))
    assert trained.config.behaviour.source_timestep == "zero"
    with pytest.raises(TruePoseError, match="expected one of once, noise levels, every step"):
        pipe.encode_source(*person(), source_reading="often")
    with pytest.raises(TruePoseError, match="expected 1 or more"):
        pipe.encode_source(*person(), levels=0)
