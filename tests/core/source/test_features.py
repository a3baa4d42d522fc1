"""Laws of `SourceFeatures` and of the token grids of a UNet."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import people
from torch.nn import Conv2d

from truepose_core.attention.caa import RegionTokens
from truepose_core.body.lift import lift_each
from truepose_core.body.places import SurfacePlaces
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_prior
from truepose_core.pose.limbs import body_coordinates
from truepose_core.source.features import Level, SourceFeatures, grid_of

sides = st.integers(1, 40)


def features(batch=2, latent_size=(7, 5), body=True, **other):
    g = torch.Generator().manual_seed(0)
    h, w = latent_size
    small = ((h + 1) // 2) * ((w + 1) // 2)
    sites = {
        "one": torch.randn(batch, h * w, 8, generator=g),
        "two": torch.randn(batch, small, 16, generator=g),
        "three": torch.randn(batch, small, 16, generator=g),
    }
    parsing = HumanParsing(torch.rand(batch, 7, 4 * h, 4 * w, generator=g).softmax(1))
    keypoints = torch.cat([torch.rand(batch, 18, 2, generator=g), torch.ones(batch, 18, 1)], -1) if body else None
    return SourceFeatures("mannequin", sites, latent_size, parsing, keypoints, **other)


@given(height=sides, width=sides, depth=st.integers(0, 4))
def test_a_level_has_the_grid_that_stride_2_convolutions_leave(height, width, depth):
    x = torch.zeros(1, 1, height, width)
    down = Conv2d(1, 1, 3, stride=2, padding=1)
    for _ in range(depth):
        x = down(x)
    assert grid_of(x[0, 0].numel(), (height, width)) == tuple(x.shape[2:])


@given(height=sides, width=sides, tokens=st.integers(1, 1700))
def test_any_other_count_is_refused(height, width, tokens):
    levels = {height * width}
    h, w = height, width
    while h * w > 1:
        h, w = (h + 1) // 2, (w + 1) // 2
        levels.add(h * w)
    if tokens in levels:
        rows, columns = grid_of(tokens, (height, width))
        assert rows * columns == tokens
    else:
        with pytest.raises(TruePoseError, match=f"{tokens} tokens.*{height}x{width}"):
            grid_of(tokens, (height, width))


def test_each_site_has_the_rows_of_its_own_grid():
    f = features()
    assert f.grid("one") == (7, 5) and f.grid("two") == (4, 3)
    for site in f.sites:
        assert torch.equal(f.regions(site), f.parsing.tokens(*f.grid(site)))
        assert torch.equal(f.coordinates(site), body_coordinates(f.body, *f.grid(site), aspect=5 / 7))
        assert f.regions(site).shape == (2, f.sites[site].shape[1], 7)
        assert (f.regions(site).sum(-1) - 1).abs().max() < 1e-5


def test_rows_are_computed_once_per_grid():
    f = features()
    assert f.regions("two") is f.regions("two") is f.regions("three")
    assert f.coordinates("two") is f.coordinates("three")
    assert f.regions("one") is not f.regions("two")


def test_a_copy_with_another_parsing_has_its_own_rows():
    f = features()
    f.regions("one"), f.coordinates("one")
    other = HumanParsing(f.parsing.masks.flip(1))
    assert torch.equal(replace(f, parsing=other).regions("one"), other.tokens(7, 5))
    assert replace(f, body=None).coordinates("one") is None


def test_without_keypoints_there_are_no_coordinates():
    assert features(body=False).coordinates("one") is None


def test_an_impossible_site_is_named():
    f = features()
    f.sites["odd"] = torch.zeros(2, 34, 8)
    with pytest.raises(TruePoseError, match=r"34 tokens.*7x5"):
        f.regions("odd")


def test_size_in_bytes_and_batch():
    f = features()
    assert f.nbytes == 4 * 2 * (35 * 8 + 12 * 16 + 12 * 16)
    assert f.batch == 2
    assert replace(f, sites={}).batch == 2, "a model that reads no source still has one"


def test_moving_changes_hidden_states_and_tokens_and_nothing_else():
    caa = RegionTokens(torch.randn(2, 14, 8), torch.ones(2, 14, dtype=torch.bool))
    image = torch.rand(2, 3, 28, 20)
    f = features(caa=caa, image=image)
    half = f.to("cpu", torch.float16)
    for site, x in f.sites.items():
        assert torch.equal(half.sites[site], x.half())
    assert half.caa.tokens.dtype == torch.float16 and torch.equal(half.caa.shown, caa.shown)
    assert torch.equal(half.body, f.body) and torch.equal(half.parsing.masks, f.parsing.masks)
    assert torch.equal(half.image, image)
    assert (half.family, half.latent_size) == (f.family, f.latent_size)
    assert half.nbytes == f.nbytes / 2
    assert features(body=False).to("cpu").body is None


# On the body's surface


def on_surface(rows=slice(0, 2)):
    """Features of people of the world that go by their bodies' surface."""
    source = people().source
    plain = features(batch=len(source.keypoints[rows]), latent_size=(16, 12), body=False)
    body = source.keypoints[rows]
    surface = SurfacePlaces.of_keypoints(body, 0.75)
    return replace(plain, parsing=HumanParsing(source.parsing[rows]), body=body, surface=surface)


def test_places_on_the_surface_have_four_numbers_and_are_the_bodys_own():
    f = on_surface()
    for site in f.sites:
        expected = f.surface.tokens(f.surface.bodies, *f.grid(site), 0.75)
        assert torch.equal(f.coordinates(site), expected) and expected.shape[-1] == 4
    assert f.coordinates("two") is f.coordinates("three")
    target = people().target.keypoints[:2]
    lifted = lift_each(target, 0.75, f.surface.bodies.beta)
    assert torch.equal(f.target_coordinates(target, 8, 6, 0.75), f.surface.tokens(lifted, 8, 6, 0.75))
    plain = replace(f, surface=None)
    assert torch.equal(plain.target_coordinates(target, 8, 6, 0.75), body_coordinates(target, 8, 6, 0.75))


def test_a_target_pose_is_lifted_once():
    f = on_surface()
    target = people().target.keypoints[:2]
    assert f.bodies_in(target, 0.75) is f.bodies_in(target.clone(), 0.75)
    assert f.bodies_in(target + 0.01, 0.75) is not f.bodies_in(target, 0.75)
    assert f.with_level(Level(0.0, f.sites)).bodies_in(target, 0.75) is f.bodies_in(target, 0.75)


def test_the_prior_goes_along_the_surface_for_any_number_of_poses():
    f = on_surface()
    target = people().target.keypoints
    both = f.prior(target[[0, 1, 2, 0]], 16, 12).masks
    assert both.shape == (4, 7, 16, 12)
    for row, (who, pose) in enumerate([(0, 0), (0, 1), (1, 2), (1, 0)]):
        alone = on_surface(slice(who, who + 1)).prior(target[pose : pose + 1], 16, 12).masks
        torch.testing.assert_close(both[row], alone[0], atol=1e-4, rtol=0)
    # One pose for both of them.
    one = f.prior(target[:1], 16, 12).masks
    torch.testing.assert_close(one, f.prior(target[[0, 0]], 16, 12).masks)
    assert (one - replace(f, surface=None).prior(target[:1], 16, 12).masks).abs().max() > 0.5


def test_a_target_that_shows_too_little_goes_by_the_skeleton_and_says_so_once(caplog):
    f = on_surface()
    target = people().target.keypoints[:2].clone()
    target[1, 4:] = 0
    with caplog.at_level(logging.WARNING):
        prior = f.prior(target, 16, 12)
        assert f.target_coordinates(target, 16, 12, 0.75) is None
        assert f.target_coordinates(target, 8, 6, 0.75) is None
    assert torch.equal(prior.masks, region_prior(f.parsing, f.body, target, 16, 12).masks)
    assert len(caplog.records) == 1
    assert f.coordinates("one").shape[-1] == 4, "the source's own places stay as they are"


def test_moving_keeps_the_surface():
    f = on_surface()
    assert f.to(dtype=torch.float16).surface is f.surface
