"""Editing a parsing: rows keep summing to 1, and each edit does to its region what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes, gaussian_filter

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.editing import blur_region, fill_region, grow_region, mask_region, soften_mask
from truepose_core.regions import Region

quick = settings(max_examples=25, deadline=None)
regions = st.sampled_from(list(Region))


def soft(seed: int, batch: int = 1, height: int = 20, width: int = 17) -> HumanParsing:
    g = torch.Generator().manual_seed(seed)
    return HumanParsing((3 * torch.randn(batch, 7, height, width, generator=g)).softmax(1))


def disc(radius: float, size: int = 101, region: Region = Region.UPPER) -> HumanParsing:
    at = torch.arange(size) - size // 2
    inside = at[:, None] ** 2 + at**2 <= radius**2
    return HumanParsing.from_labels(torch.where(inside, int(region), 0))


EDITS = [
    lambda p, r: grow_region(p, r, 3),
    lambda p, r: grow_region(p, r, -3),
    lambda p, r: blur_region(p, r, 2.0),
    fill_region,
    lambda p, r: mask_region(p, r, soft(9, 1, *p.size).masks[:, 0], "replace"),
    lambda p, r: mask_region(p, r, soft(9, 1, *p.size).masks[:, 0], "add"),
    lambda p, r: mask_region(p, r, torch.ones(1, *p.size), "remove"),
]


@given(st.integers(0, 1000), regions, st.sampled_from(EDITS), st.booleans())
@quick
def test_rows_sum_to_1_and_stay_non_negative(seed, region, edit, hard):
    parsing = soft(seed, 2)
    if hard:
        parsing = HumanParsing.from_labels(parsing.labels())
    masks = edit(parsing, region).masks
    assert masks.shape == parsing.masks.shape
    assert masks.min() >= 0
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 20, 17), atol=1e-5, rtol=0)


@given(st.integers(0, 1000), regions, st.integers(1, 6))
@quick
def test_growing_never_takes_from_the_region_and_shrinking_never_gives(seed, region, pixels):
    parsing = soft(seed)
    own = parsing.masks[:, region]
    assert (grow_region(parsing, region, pixels).masks[:, region] >= own - 1e-5).all()
    assert (grow_region(parsing, region, -pixels).masks[:, region] <= own + 1e-5).all()


def test_nothing_asked_changes_nothing():
    parsing = soft(0)
    assert grow_region(parsing, "face", 0) is parsing and blur_region(parsing, "face", 0.0) is parsing
    assert fill_region(disc(10), "upper").masks.equal(disc(10).masks)
    mask = parsing.masks[:, Region.FACE]
    torch.testing.assert_close(mask_region(parsing, "face", mask).masks, parsing.masks, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pixels", [-12, -5, -1, 1, 2, 7, 20])
def test_a_disc_grows_by_that_many_pixels(pixels):
    grown = grow_region(disc(25), "upper", pixels).mask("upper")[0] > 0.5
    # A drawn disc has tips of a few pixels, which shrinking takes off.
    assert all(abs(int(side.sum()) - (51 + 2 * pixels)) <= 2 for side in (grown[50], grown[:, 50]))
    diagonal = torch.arange(101)
    reach = (int(grown[diagonal, diagonal].sum()) - 1) / 2 * math.sqrt(2)
    assert abs(reach - (25 + pixels)) < 2
    assert abs((int(grown.sum()) / math.pi) ** 0.5 - (25 + pixels)) < 1.5


def test_the_picture_border_is_no_edge():
    labels = torch.full((1, 30, 30), int(Region.UPPER))
    everywhere = HumanParsing.from_labels(labels)
    assert grow_region(everywhere, "upper", -9).masks.equal(everywhere.masks)
    labels[:, :, :10] = 0
    shrunk = grow_region(HumanParsing.from_labels(labels), "upper", -4).mask("upper")[0]
    assert torch.equal(shrunk > 0.5, (torch.arange(30) >= 14).expand(30, 30))


def test_what_a_region_gives_up_goes_to_its_neighbours():
    labels = torch.full((1, 40, 40), int(Region.LOWER))
    labels[:, :20] = int(Region.UPPER)
    shrunk = grow_region(HumanParsing.from_labels(labels), "upper", -5)
    assert torch.equal(shrunk.labels()[0, :, 0], torch.where(torch.arange(40) < 15, Region.UPPER, Region.LOWER))
    assert shrunk.mask("background").max() < 1e-3


def test_what_a_region_gains_comes_from_all_others_in_proportion():
    parsing = soft(3)
    grown = grow_region(parsing, "hair", 2).masks
    rest = [r for r in Region if r is not Region.HAIR]
    before, after = parsing.masks[:, rest], grown[:, rest]
    torch.testing.assert_close(after / after.sum(1, True), before / before.sum(1, True), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("sigma", [0.7, 3.0])
def test_blur_is_a_gaussian_of_the_regions_mask(sigma):
    parsing = disc(20)
    expected = gaussian_filter(parsing.mask("upper")[0].double().numpy(), sigma, mode="nearest", truncate=3.0)
    ours = blur_region(parsing, "upper", sigma).mask("upper")[0].numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_blur_leaves_other_edges_alone():
    labels = torch.zeros(1, 60, 60, dtype=torch.int64)
    labels[:, :, 40:] = int(Region.LOWER)
    labels[:, :, :10] = int(Region.UPPER)
    parsing = HumanParsing.from_labels(labels)
    blurred = blur_region(parsing, "upper", 2.0).masks
    torch.testing.assert_close(blurred[..., 25:], parsing.masks[..., 25:], atol=1e-4, rtol=0)
    assert 0.3 < blurred[0, Region.UPPER, 30, 10] < 0.5


@pytest.mark.parametrize("pixels", [-4, 0, 6])
def test_a_mask_alone_grows_and_blurs_as_a_region_does(pixels):
    parsing = disc(20)
    region = blur_region(grow_region(parsing, "upper", pixels), "upper", 1.5).mask("upper")
    torch.testing.assert_close(soften_mask(parsing.mask("upper"), pixels, 1.5), region, atol=1e-4, rtol=0)


@given(st.integers(0, 10_000), st.floats(0.3, 0.8))
@quick
def test_filling_equals_scipy(seed, share):
    inside = torch.rand(3, 24, 31, generator=torch.Generator().manual_seed(seed)) < share
    filled = fill_region(HumanParsing.from_labels(torch.where(inside, int(Region.SKIN), 0)), "skin").mask("skin") > 0.5
    # Ours takes the soft rim of a hole with it, which is inside the region anyway.
    expected = np.stack([binary_fill_holes(x) for x in inside.numpy()])
    np.testing.assert_array_equal(filled.numpy(), expected)


def test_filling_follows_a_spiral_to_its_middle():
    size = 41
    wall = torch.zeros(size, size, dtype=torch.bool)
    low, high = 1, size - 2
    while high - low > 4:
        wall[low, low : high + 1] = True
        wall[low : high + 1, high] = True
        wall[high, low : high + 1] = True
        wall[low + 2 : high + 1, low] = True
        wall[low + 2, low : low + 3] = True
        low, high = low + 2, high - 2
    parsing = HumanParsing.from_labels(torch.where(wall, int(Region.HAIR), 0)[None])
    filled = fill_region(parsing, "hair").mask("hair")[0] > 0.5
    np.testing.assert_array_equal(filled.numpy(), binary_fill_holes(wall.numpy()))


def test_a_soft_hole_closes_with_its_rim():
    at = torch.arange(61.0) - 30
    distance = (at[:, None] ** 2 + at**2).sqrt()
    mask = ((25 - distance) / 4).clamp(0, 1) * ((distance - 4) / 4).clamp(0, 1)
    filled = fill_region(HumanParsing.from_masks({"upper": mask[None]}), "upper").mask("upper")[0]
    assert filled[distance < 7].min() > 0.99
    torch.testing.assert_close(filled[distance > 20], mask[distance > 20], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["replace", "add", "remove"])
def test_the_mask_does_what_its_mode_says(mode):
    parsing = soft(4, 2)
    mask = torch.rand(2, 20, 17, generator=torch.Generator().manual_seed(1))
    own = parsing.mask("skin")
    wanted = {"replace": mask, "add": torch.maximum(own, mask), "remove": torch.minimum(own, 1 - mask)}[mode]
    torch.testing.assert_close(mask_region(parsing, "skin", mask, mode).mask("skin"), wanted, atol=1e-5, rtol=0)


def test_what_is_removed_from_a_hard_region_becomes_background():
    parsing = mask_region(disc(20), "upper", torch.ones(1, 101, 101), "remove")
    assert parsing.is_empty
    ground = mask_region(disc(20), "background", torch.ones(101, 101), "remove")
    assert ground.labels()[0, 0, 0] == Region.SKIN


def test_one_mask_serves_a_batch_and_one_parsing_many_masks():
    mask = torch.rand(1, 20, 17)
    assert mask_region(soft(0, 3), "face", mask).batch == 3
    assert mask_region(soft(0, 1), "face", mask.expand(3, -1, -1)).batch == 3


def test_the_number_format_is_kept():
    assert grow_region(soft(0).to(dtype=torch.float16), "face", 2).masks.dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: grow_region(p, "face", 600), "600 pixels; expected -512 to 512"),
        (lambda p: grow_region(p, "face", 1.5), "1.5 pixels"),
        (lambda p: blur_region(p, "face", -1.0), "expected 0 to 64"),
        (lambda p: blur_region(p, "face", math.nan), "expected 0 to 64"),
        (lambda p: soften_mask(p.mask("face"), 600, 0), "cannot grow by 600"),
        (lambda p: grow_region(p, "nose", 1), "unknown region 'nose'"),
        (lambda p: mask_region(p, "face", torch.zeros(1, 17, 20)), "the mask is 20x17 and the parsing 17x20"),
        (lambda p: mask_region(p, "face", torch.zeros(3, 20, 17)), "3 masks for a parsing of 2"),
        (lambda p: mask_region(p, "face", torch.zeros(1, 20, 17), "xor"), "expected replace, add, remove"),
        (lambda p: mask_region(p, "face", torch.full((1, 20, 17), 2.0)), "outside 0..1"),
        (lambda p: mask_region(p, "face", torch.full((1, 20, 17), math.nan)), "outside 0..1"),
    ],
)
def test_wrong_edits_are_refused(call, message):
    with pytest.raises(TruePoseError) as caught:
        call(soft(0, 2))
    assert message in str(caught.value)
