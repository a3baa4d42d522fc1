"""The laws of HPFA on a MODEL, against a slow reference that spells the formula out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bench import ALL, GREY, apply, close, far, latent, model, parsing, reference, sample, source, split
from comfy.patcher_extension import CallbacksMP, WrappersMP
from fixtures.tiny import make_conditioning, make_model
from pack.nodes.host import features as host_features
from pack.nodes.host import patch as host_patch
from pack.nodes.host import source as host_source
from pack.nodes.host import unet as host_unet
from pack.nodes.host.applied import AppliedSource

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing

SIZES = [(1, 12, 8), (2, 12, 8), (1, 13, 7), (3, 9, 11)]


def unet(who: object = None) -> object:
    return (who or model()).model.diffusion_model


def log_weight(omega: tuple[float, ...], strength: float = 1.0):
    """The formula's log w + log strength as a bias."""

    def bias(site: str, features: host_features.HostFeatures, n: int) -> torch.Tensor:
        weight = (features.regions(site)[0] * torch.tensor(omega)).sum(-1) * strength
        return weight.log()[None].expand(n, -1)

    return bias


def test_strength_zero_and_all_weights_zero_are_the_model_itself() -> None:
    before = sample(model())
    for applied in (
        AppliedSource(source(), ALL, strength=0.0),
        AppliedSource(source(), (0.0,) * 7),
        AppliedSource(source(), (0.0,) * 7, beta=3.0, target=parsing(3)),
    ):
        assert not applied.has_effect
        assert torch.equal(before, sample(host_patch.with_hpfa(model(), applied)))


def test_patched_model_leaves_the_other_clones_alone() -> None:
    before = sample(model())
    patched = apply(model(), source())
    assert far(before, sample(patched))
    assert torch.equal(before, sample(model()))
    assert torch.equal(before, sample(host_patch.without_hpfa(patched)))
    assert torch.equal(before, sample(model().clone()))


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_all_ones_is_concatenation_of_keys_and_values(batch: int, height: int, width: int) -> None:
    features = source()
    ours = sample(apply(model(), features), batch=batch, height=height, width=width)
    with reference(unet(), [features]):
        theirs = sample(model(), batch=batch, height=height, width=width)
    assert close(ours, theirs)


@pytest.mark.parametrize("family", ["SD20", "SDXL"])
def test_other_families(family: str) -> None:
    who = make_model(0, family)
    features = source(who=who)
    ours = sample(apply(who, features, GREY))
    with reference(unet(who), [features], log_weight(GREY)):
        theirs = sample(who)
    assert close(ours, theirs)


@pytest.mark.parametrize("omega", [GREY, (0.2, 1.0, 0.5, 0.0, 0.9, 0.3, 0.7), (0.0, 0.0, 0.0, 0.4, 0.0, 0.0, 0.0)])
def test_region_weights_are_log_weights_of_tokens(omega: tuple[float, ...]) -> None:
    features = source()
    ours = sample(apply(model(), features, omega))
    with reference(unet(), [features], log_weight(omega)):
        theirs = sample(model())
    assert close(ours, theirs)


def test_strength_is_a_weight_of_all_tokens() -> None:
    features = source()
    ours = sample(apply(model(), features, GREY, strength=0.35))
    with reference(unet(), [features], log_weight(GREY, 0.35)):
        theirs = sample(model())
    assert close(ours, theirs)


def test_source_of_another_size_than_the_picture() -> None:
    features = source(height=9, width=14)
    ours = sample(apply(model(), features, GREY))
    with reference(unet(), [features], log_weight(GREY)):
        theirs = sample(model())
    assert close(ours, theirs)


def region_match(target: HumanParsing, beta: float, height: int, width: int):
    def bias(site: str, features: host_features.HostFeatures, n: int) -> torch.Tensor:
        h, w = height, width
        while h * w > n:
            h, w = (h + 1) // 2, (w + 1) // 2
        return beta * target.tokens(h, w)[0] @ features.regions(site)[0].mT

    return bias


@pytest.mark.parametrize(("height", "width"), [(12, 8), (13, 7)])
def test_region_match_with_a_target_parsing(height: int, width: int) -> None:
    features, target = source(), parsing(7)
    ours = sample(apply(model(), features, beta=2.5, target=target), height=height, width=width)
    with reference(unet(), [features], region_match(target, 2.5, height, width)):
        theirs = sample(model(), height=height, width=width)
    assert close(ours, theirs)
    assert far(ours, sample(apply(model(), features), height=height, width=width))


def test_body_match_draws_to_the_same_place_of_the_body() -> None:
    body = torch.rand((2, 18, 3), generator=torch.Generator().manual_seed(4)) * 0.8 + 0.1
    body[..., 2] = 1
    features = source(body=body[:1])

    def bias(site: str, one: host_features.HostFeatures, n: int) -> torch.Tensor:
        h, w = 12, 8
        while h * w > n:
            h, w = (h + 1) // 2, (w + 1) // 2
        a = one.target_coordinates(body[1:], h, w, 8 / 12)[0]
        b = one.coordinates(site)[0]
        assert a.shape[-1] == 4, "an untrained model goes by the body's surface"
        far_apart = (a[:, None, :-1] - b[None, :, :-1]).square().sum(-1)
        return -3.0 * a[:, None, -1] * b[None, :, -1] * far_apart

    ours = sample(apply(model(), features, gamma=3.0, target_body=body[1:]))
    with reference(unet(), [features], bias):
        theirs = sample(model())
    assert close(ours, theirs)


def test_dropped_rows_do_not_see_the_source() -> None:
    x, features = latent(9), source()
    plain = split(model(), x)
    kept = split(apply(model(), features, GREY), x)
    dropped = split(apply(model(), features, GREY, keep_unconditional=False), x)
    assert close(dropped[1], plain[1])
    assert close(dropped[0], kept[0])
    assert far(kept[1], plain[1])


def test_cond_and_uncond_apart_as_with_little_memory() -> None:
    x = latent(9, 2)
    target = parsing(7)
    for keep in (True, False):
        patched = apply(model(), source(), GREY, beta=2.0, target=target, keep_unconditional=keep)
        for together, apart in zip(split(patched, x), split(patched, x, apart=True), strict=True):
            assert close(together, apart)


@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_is_its_items_one_by_one(keep: bool) -> None:
    features, target, x = source(1, 2), parsing(7, 4), latent(9, 4)
    both = split(apply(model(), features, GREY, beta=2.0, target=target, keep_unconditional=keep), x)
    for i in range(4):
        half = i // 2
        one = host_features.HostFeatures(
            features.family,
            {s: t[half : half + 1] for s, t in features.sites.items()},
            features.latent_size,
            features.parsing[half],
        )
        alone = apply(model(), one, GREY, beta=2.0, target=target[i], keep_unconditional=keep)
        for got, expected in zip(both, split(alone, x[i : i + 1]), strict=True):
            assert close(got[i : i + 1], expected)


def test_a_source_that_keeps_nothing_in_one_picture_of_a_batch() -> None:
    labels = torch.zeros(2, 96, 64, dtype=torch.int64)
    labels[1, 20:70] = 3
    two = host_source.read_source(model(), latent(5, 2), HumanParsing.from_labels(labels), make_conditioning(5))
    got = split(apply(model(), two, GREY), latent(9, 2))[0]
    assert close(got[:1], split(model(), latent(9, 2))[0][:1])
    assert far(got[1:], split(model(), latent(9, 2))[0][1:])


def test_two_sources_add_up_in_any_order() -> None:
    a, b = source(1), source(2)
    ab = sample(apply(apply(model(), a), b))
    ba = sample(apply(apply(model(), b), a))
    with reference(unet(), [a, b]):
        theirs = sample(model())
    assert close(ab, theirs)
    assert close(ba, theirs)
    assert far(ab, sample(apply(model(), a)))


def test_two_sources_with_weights_and_matches_of_their_own() -> None:
    a, b, target = source(1), source(2), parsing(7)
    top = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)

    def bias(site: str, features: host_features.HostFeatures, n: int) -> torch.Tensor:
        if features is a:
            return log_weight(GREY)(site, features, n) + region_match(target, 1.5, 12, 8)(site, features, n)
        return log_weight(top, 0.6)(site, features, n)

    patched = apply(apply(model(), a, GREY, beta=1.5, target=target), b, top, strength=0.6)
    with reference(unet(), [a, b], bias):
        theirs = sample(model())
    assert close(sample(patched), theirs)


def test_one_source_dropped_and_one_kept_for_negative_rows() -> None:
    a, b, x = source(1), source(2), latent(9)
    patched = apply(apply(model(), a, keep_unconditional=False), b)
    got = split(patched, x)
    with reference(unet(), [a, b]):
        assert close(got[0], split(model(), x)[0])
    with reference(unet(), [b]):
        assert close(got[1], split(model(), x)[1])


def test_window_and_blocks() -> None:
    features = source()
    plain, full = sample(model()), sample(apply(model(), features))
    sampling = model().get_model_object("model_sampling")
    assert host_unet.sigma_window(model(), 0.0, 1.0) is None
    never = host_unet.sigma_window(model(), 0.999, 0.9991)
    assert torch.equal(plain, sample(apply(model(), features, sigmas=never)))
    always = (float("inf"), 0.0)
    assert torch.equal(full, sample(apply(model(), features, sigmas=always)))
    half = (float(sampling.percent_to_sigma(0.0)), 5.0)
    first = sample(apply(model(), features, sigmas=half))
    assert far(first, plain) and far(first, full)
    outs = {blocks: sample(apply(model(), features, blocks=blocks)) for blocks in host_unet.BLOCKS}
    assert torch.equal(outs["all"], full)
    for blocks in ("encoder", "middle", "decoder", "middle and decoder"):
        assert far(outs[blocks], plain) and far(outs[blocks], full)


def test_regional_prompt_sees_its_crop_of_the_target() -> None:
    """A prompt for an area: the UNet gets a crop, and so does the target parsing."""
    features, target = source(), parsing(7, 1, 128, 128)
    area = (8, 8, 8, 0)
    whole = make_conditioning(1)
    placed = [[whole[0][0], {**whole[0][1], "area": area, "strength": 1.0}]]
    patched = apply(model(), features, beta=4.0, target=target)
    x = latent(9, 1, 16, 16)
    seen = {}

    def keep(args: dict) -> torch.Tensor:
        seen["cond"] = args["cond_denoised"]
        return args["denoised"]

    watched = patched.clone()
    watched.set_model_sampler_post_cfg_function(keep)
    sample(watched, positive=placed, height=16, width=16, sigmas=(3.0, 0.0), seed=9)
    crop = HumanParsing(target.masks[:, :, 64:128, 0:64])
    alone = apply(model(), features, beta=4.0, target=crop)
    expected = split(alone, x[:, :, 8:16, 0:8] * 3.0)[0]
    # The host fades an area's upper edge in where it meets the rest, so the numbers to compare are those inside it.
    assert close(seen["cond"][:, :, 8:16, 0:8], expected)


def test_clones_share_the_patch_and_nothing_grows() -> None:
    patched = apply(model(), source())
    sizes = []
    for _ in range(3):
        patched = patched.clone()
        sample(patched)
        kinds = (
            WrappersMP.DIFFUSION_MODEL,
            WrappersMP.CALC_COND_BATCH,
            WrappersMP.PREPARE_SAMPLING,
        )
        sizes.append(
            [len(patched.get_wrappers(kind, host_patch.KEY)) for kind in kinds]
            + [len(patched.get_callbacks(CallbacksMP.ON_CLEANUP, host_patch.KEY))]
        )
    assert sizes == [[1, 1, 1, 1]] * 3
    applied = host_patch.applied_sources(patched)[0]
    assert copy.deepcopy(applied) is applied
    wrapper = patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, host_patch.KEY)[0]
    assert copy.deepcopy(wrapper).__self__ is wrapper.__self__


def test_device_copies_are_freed_after_runs_and_after_failures() -> None:
    patched = apply(model(), source())
    cache = patched.attachments[host_patch.KEY].cache
    sample(patched)
    assert len(cache) == 0
    broken = patched.clone()

    def fail(args: dict) -> None:
        assert len(cache)
        raise RuntimeError("stop")

    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(RuntimeError, match="stop"):
        sample(broken)
    assert len(cache) == 0
    assert torch.equal(sample(patched), sample(patched))


def test_the_options_of_a_call_are_not_touched() -> None:
    patched = apply(model(), source())
    options = {"cond_or_uncond": [0], "sigmas": torch.tensor([3.0]), "patches_replace": {"attn1": {}}}
    wrapper = patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, host_patch.KEY)[0]
    options["wrappers"] = {WrappersMP.DIFFUSION_MODEL: {host_patch.KEY: [wrapper]}}
    before = copy.copy(options)
    x = latent(9)
    unet()(x, torch.zeros(1), context=make_conditioning(1)[0][0], transformer_options=options)
    assert options == before
    assert options["patches_replace"] == {"attn1": {}}


def test_memory_is_asked_for() -> None:
    asked = []
    patched = apply(model(), source())

    def watch(executor, who, shape, *args, **kwargs):
        asked.append(tuple(shape))
        return executor(who, shape, *args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "watch", watch)
    sample(patched)
    assert math.prod(asked[0]) > 4 * 12 * 8
    applied = host_patch.applied_sources(patched)[0]
    assert applied.nbytes(2) * 2 == applied.nbytes(4) > 0


class TestBadInput:
    def test_source_of_another_family(self) -> None:
        other = source(who=make_model(0, "SD20"))
        with pytest.raises(TruePoseError, match="same family"):
            apply(model(), other)

    def test_source_of_another_shape(self) -> None:
        other = source(who=make_model(0, model_channels=64))
        with pytest.raises(TruePoseError, match="attention sites"):
            apply(model(), other)

    def test_model_without_self_attention(self) -> None:
        from types import SimpleNamespace

        flux = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1), model_config=object()))
        with pytest.raises(TruePoseError, match="not a UNet"):
            host_unet.unet_of(flux, "the model")

    def test_batches_that_do_not_match(self) -> None:
        patched = apply(model(), source(1, 2))
        with pytest.raises(TruePoseError, match="2 source images and 3 latents"):
            sample(patched, batch=3)
        assert sample(patched, batch=4).shape[0] == 4
        poses = apply(model(), source(), beta=1.0, target=parsing(7, 2))
        with pytest.raises(TruePoseError, match="2 target parsings and 3 latents"):
            sample(poses, batch=3)


def test_rows_of_one_kind_that_lie_apart_come_back_in_place() -> None:
    """A host may batch rows as positive, negative, positive."""
    patched = apply(model(), source(), GREY, keep_unconditional=False)
    wrapper = patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, host_patch.KEY)[0]
    x, tokens = latent(9, 3), make_conditioning(1)[0][0].expand(3, -1, -1)

    def run(rows: torch.Tensor, kinds: list[int]) -> torch.Tensor:
        options = {"cond_or_uncond": kinds, "sigmas": torch.tensor([3.0])}
        options["wrappers"] = {WrappersMP.DIFFUSION_MODEL: {host_patch.KEY: [wrapper]}}
        t = torch.full((rows.shape[0],), 500.0)
        return unet()(rows, t, context=tokens[: rows.shape[0]], transformer_options=options)

    together = run(x, [0, 1, 0])
    for i, kind in enumerate([0, 1, 0]):
        assert close(together[i : i + 1], run(x[i : i + 1], [kind]))
    assert far(run(x[:1], [0]), run(x[:1], [1]))
