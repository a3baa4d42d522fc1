"""Reading an untrained checkpoint's source at the noise that the sampler is at, and its style."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from bench import ALL, GREY, apply, close, far, latent, model, parsing, sample, source, split
from comfy.patcher_extension import WrappersMP
from fixtures.tiny import make_conditioning, make_model, make_vae
from pack.nodes.host import features as host_features
from pack.nodes.host import patch as host_patch
from pack.nodes.host import source as host_source
from pack.nodes.host import unet as host_unet
from pack.nodes.source import ApplyHPFA, CombineSources, SourceNetEncode
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.source.features import NOISE_SEED, nearest_level

SIGMAS = (9.0, 4.0, 1.5, 0.6, 0.0)


def read(
    levels: int, anew: bool = False, seed: int = 1, batch: int = 1, who: object = None
) -> host_features.HostFeatures:
    return source(seed, batch, who, levels=levels, anew=anew)


def noised(features: host_features.HostFeatures, who: object, seed: int, sigma: float, batch: int = 1) -> Tensor:
    """What a checkpoint's UNet is given: the latent with fixed noise, scaled down to a variance of about one."""
    z = who.model.process_latent_in(latent(seed + 100, batch))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    alpha = 1 / (1 + sigma**2)
    return alpha**0.5 * z + (1 - alpha) ** 0.5 * noise


def in_front_of_attention(who: object, x: Tensor, sigma: float) -> dict[str, Tensor]:
    """The slow way: hooks on norm1 in a plain call of the UNet."""
    unet, found, hooks = who.model.diffusion_model, {}, []
    t = who.model.model_sampling.timestep(torch.full((x.shape[0],), sigma)).float()
    for site, (_, block) in host_unet.transformer_blocks(unet).items():
        hooks.append(block.norm1.register_forward_hook(lambda m, i, o, site=site: found.__setitem__(site, o.clone())))
    try:
        unet(x, t, context=make_conditioning(5)[0][0].expand(x.shape[0], -1, -1), transformer_options={})
    finally:
        for hook in hooks:
            hook.remove()
    return found


@pytest.mark.parametrize("batch", [1, 2])
def test_each_level_is_a_pass_over_the_noised_latent(batch: int) -> None:
    features = read(4, batch=batch)
    sampling = model().model.model_sampling
    assert [level.sigma for level in features.levels] == [
        float(sampling.percent_to_sigma((i + 0.5) / 4)) for i in range(4)
    ]
    assert all(a.sigma > b.sigma for a, b in pairwise(features.levels))
    for level in features.levels:
        x = noised(features, model(), 1, level.sigma, batch)
        expected = in_front_of_attention(model(), x, level.sigma)
        assert all(close(level.sites[site], tokens) for site, tokens in expected.items())
    assert features.sites.keys() == features.levels[0].sites.keys()
    assert features.get_ram_usage() >= 4 * features.nbytes


def test_a_step_reads_the_level_nearest_in_log_snr() -> None:
    features = read(3)
    for number, level in enumerate(features.levels):
        assert nearest_level(features.levels, level.sigma) == number
    a, b = features.levels[0].sigma, features.levels[1].sigma
    middle = (a * b) ** 0.5
    assert (nearest_level(features.levels, middle * 1.01), nearest_level(features.levels, middle * 0.99)) == (0, 1)
    assert nearest_level(features.levels, 0.0) == 2 and nearest_level(features.levels, 1e9) == 0
    x = latent(9)
    for level in features.levels:
        alone = host_features.HostFeatures(features.family, dict(level.sites), features.latent_size, features.parsing)
        ours = split(apply(model(), features, GREY), x * level.sigma, level.sigma)
        theirs = split(apply(model(), alone, GREY), x * level.sigma, level.sigma)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_every_step_is_one_level_at_that_step() -> None:
    x = latent(9)
    features = read(1, anew=True)
    for sigma in (7.3, 2.2, 0.41):
        sites = in_front_of_attention(model(), noised(features, model(), 1, sigma), sigma)
        alone = host_features.HostFeatures(features.family, sites, features.latent_size, features.parsing)
        ours = split(apply(model(), features, GREY), x * sigma, sigma)
        theirs = split(apply(model(), alone, GREY), x * sigma, sigma)
        assert all(close(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_more_levels_tend_to_every_step_and_as_many_as_steps_are_it(family: str) -> None:
    who, x, count = model(family=family), latent(9), 8
    steps = host_source.level_sigmas(who, count)

    def guided(features: host_features.HostFeatures) -> Tensor:
        patched = apply(who, features)
        return torch.cat([torch.cat(split(patched, x * (1 + s * s) ** 0.5, s)) / (1 + s) for s in steps])

    aim = guided(read(1, anew=True, who=who))
    away = [float((guided(read(n, who=who)) - aim).norm()) for n in (1, 3, count)]
    assert away[0] > away[1] > 1e-3
    assert away[2] < 1e-4
    assert float((guided(source(who=who)) - aim).norm()) > away[1]


def test_reading_for_itself_needs_no_second_model_and_leaves_nothing() -> None:
    before = sample(model())
    patched = apply(model(), read(1, anew=True))
    assert not patched.get_additional_models()
    assert torch.equal(sample(patched), sample(patched))
    assert torch.equal(sample(model()), before)
    assert torch.equal(sample(host_patch.without_hpfa(patched)), before)
    other = apply(make_model(0), read(1, anew=True))
    assert len(other.get_additional_models()) == 1
    assert close(sample(other), sample(patched))


def test_rows_in_calls_of_their_own_read_the_same() -> None:
    for features in (read(3), read(1, anew=True)):
        patched = apply(model(), features, GREY, keep_unconditional=False)
        for together, apart in zip(split(patched, latent(9)), split(patched, latent(9), apart=True), strict=True):
            assert close(together, apart)


def test_only_the_level_in_use_is_on_the_device() -> None:
    features = read(3)
    patched = apply(model(), features)
    cache, held = patched.attachments[host_patch.KEY].cache, []
    watched = patched.clone()
    watched.set_model_sampler_post_cfg_function(
        lambda args: (held.append({v[0] for v in cache.versions() if v is not None}), args["denoised"])[1]
    )
    sample(watched, sigmas=(*(level.sigma for level in features.levels), 0.0))
    assert held == [{0}, {1}, {2}]
    assert len(cache) == 0


def test_regions_and_matches_work_at_levels() -> None:
    target = parsing(7)
    for more in ({}, {"beta": 2.0, "target": target}):
        features = read(1, anew=True)
        (level,) = read(1).levels
        x = latent(9) * level.sigma
        ours = split(apply(model(), features, GREY, **more), x, level.sigma)
        theirs = split(apply(model(), read(1), GREY, **more), x, level.sigma)
        assert all(close(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(sample(apply(model(), read(2), (0.0,) * 7)), sample(model()))


class TestCombining:
    def both(self, **more: object) -> tuple[host_features.HostFeatures, host_features.HostFeatures]:
        return read(2, **more), read(2, seed=2, **more)

    def test_levels_are_combined_each(self) -> None:
        a, b = self.both()
        (joined,) = CombineSources.execute(source=a, donor=b, upper=1.0).result
        x = latent(9)
        for i, level in enumerate(joined.levels):
            single = [
                host_features.HostFeatures(f.family, dict(f.levels[i].sites), f.latent_size, f.parsing) for f in (a, b)
            ]
            (alone,) = CombineSources.execute(source=single[0], donor=single[1], upper=1.0).result
            ours = split(apply(model(), joined), x * level.sigma, level.sigma)
            theirs = split(apply(model(), alone), x * level.sigma, level.sigma)
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert joined.get_ram_usage() > a.get_ram_usage() + b.get_ram_usage()

    def test_other_levels_are_refused(self) -> None:
        with pytest.raises(TruePoseError, match="other noise levels"):
            CombineSources.execute(source=read(2), donor=read(3, seed=2), upper=1.0)
        with pytest.raises(TruePoseError, match="other noise levels"):
            CombineSources.execute(source=read(2), donor=source(2), upper=1.0)


class TestStyle:
    def test_moments_become_the_sources(self) -> None:
        """At every place, of the rows that see it: what leaves the block has the source's moments."""
        features = source()
        unet, seen = model().model.diffusion_model, {}
        places = host_unet.style_places(unet)
        assert places == {("input", 10), ("input", 11), *(("output", n) for n in range(5))}

        def look(h: Tensor, options: dict) -> Tensor:
            if options["block"] in places:
                # The positive row, and then the negative one.
                rows = [options["cond_or_uncond"].index(kind) for kind in (0, 1)]
                seen[host_unet.place_name(options["block"])] = h[rows].clone()
            return h

        def look_output(h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
            return look(h, options), skip

        # The innermost levels of a small latent are one cell, which has no deviation.
        features = source(height=64, width=64)
        patched = apply(model(), features, (0.0,) * 7, style=1.0, keep_unconditional=False)
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watcher(look, look_output))
        split(patched, latent(9, height=64, width=64))
        assert set(seen) == set(features.style) == {host_unet.place_name(p) for p in places}
        for place, h in seen.items():
            mean, deviation = features.style[place]
            assert close(h[:1].mean((2, 3), keepdim=True), mean, 1e-4)
            assert close(h[:1].std((2, 3), keepdim=True, correction=0), deviation, 1e-3)
            assert far(h[1:].mean((2, 3), keepdim=True), mean)

    def test_none_is_none_and_a_share_lies_between(self) -> None:
        features = read(2)
        none = sample(apply(model(), features))
        assert torch.equal(sample(apply(model(), features, style=0.0)), none)
        assert torch.equal(sample(apply(model(), features, style=1.0, strength=0.0)), sample(model()))
        far_off = [float((sample(apply(model(), features, style=s)) - none).norm()) for s in (0.01, 0.1, 1.0)]
        assert 0 < far_off[0] < far_off[1] < far_off[2]

    def test_two_sources_are_averaged(self) -> None:
        one = read(2)
        nobody = (0.0,) * 7
        once = sample(apply(model(), one, nobody, style=0.7))
        twice = sample(apply(apply(model(), one, nobody, style=0.7), one, nobody, style=0.7))
        assert close(once, twice)
        assert far(once, sample(model()))

    def test_read_at_every_step_it_is_that_steps(self) -> None:
        (level,) = read(1).levels
        x = latent(9) * level.sigma
        ours = split(apply(model(), read(1, anew=True), style=1.0), x, level.sigma)
        theirs = split(apply(model(), read(1), style=1.0), x, level.sigma)
        assert all(close(one, other) for one, other in zip(ours, theirs, strict=True))


def watcher(look: object, look_output: object) -> object:
    """A wrapper inside ours, whose patches come after ours."""

    def wrapper(executor, x, timesteps, context, y, control, options, **kwargs):
        patches = dict(options.get("patches", {}))
        patches["input_block_patch"] = [*patches.get("input_block_patch", []), look]
        patches["output_block_patch"] = [*patches.get("output_block_patch", []), look_output]
        return executor(x, timesteps, context, y, control, {**options, "patches": patches}, **kwargs)

    return wrapper


class TestNode:
    def encode(self, **more: object) -> host_features.HostFeatures:
        image = torch.rand((1, 96, 64, 3), generator=torch.Generator().manual_seed(1))
        given = {"model": model(), "vae": make_vae(), "image": image, "parsing": parsing(), **more}
        (found,) = SourceNetEncode.execute(**given).result
        return found

    def test_an_untrained_checkpoint_is_read_at_four_levels(self) -> None:
        assert len(self.encode().levels) == 4 and self.encode().reader is None
        assert len(self.encode(source_reading="noise levels", levels=2).levels) == 2
        once = self.encode(source_reading="once")
        assert once.levels == () and once.reader is None
        anew = self.encode(source_reading="every step")
        assert anew.levels == () and anew.reader.noise is not None

    def test_the_passes_are_as_many_as_the_levels_and_none_while_sampling(self) -> None:
        seen = []
        unet = model().model.diffusion_model
        hook = unet.register_forward_pre_hook(lambda net, args: seen.append(args[0].shape[0]))
        try:
            features = self.encode(levels=3)
            assert seen == [1, 1, 1]
            seen.clear()
            for seed in (1, 2):
                sample(apply(model(), features), seed=seed)
            assert seen == [2, 2, 2, 2]
            seen.clear()
            sample(apply(model(), self.encode(source_reading="every step")))
            # The hook sees the picture's call before that of the source, which runs inside of it.
            assert seen == [1, *[2, 1] * 2]
        finally:
            hook.remove()

    def test_apply_takes_the_style(self) -> None:
        (patched,) = ApplyHPFA.execute(model=model(), source=self.encode(), style=0.4).result
        assert host_patch.applied_sources(patched)[0].style == 0.4

    def test_models_that_say_how_they_were_trained(self) -> None:
        from types import SimpleNamespace

        from pack.nodes.host import model as host_model

        adapter = SimpleNamespace(config=SimpleNamespace(family="leffa", aligned=False, fusion="concat"))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(host_model, "adapter_of", lambda who, given: adapter)
            with pytest.raises(TruePoseError, match="says how it was trained"):
                self.encode(source_reading="noise levels")

    def test_no_level(self) -> None:
        with pytest.raises(TruePoseError, match="expected 1 or more"):
            host_source.level_sigmas(model(), 0)


def test_all_ones_at_every_step_is_concatenation_of_the_noised_sources_keys() -> None:
    """Advanced-ControlNet's reference attention, in the words of the tests' slow reference."""
    from bench import reference

    features, sigma, x = read(1, anew=True), 2.7, latent(9) * 2.7
    sites = in_front_of_attention(model(), noised(features, model(), 1, sigma), sigma)
    alone = host_features.HostFeatures(features.family, sites, features.latent_size, features.parsing)
    ours = split(apply(model(), features, ALL), x, sigma)
    with reference(model().model.diffusion_model, [alone]):
        theirs = split(model(), x, sigma)
    assert all(close(one, other) for one, other in zip(ours, theirs, strict=True))
