"""The pattern score on planted cases: the same people in the same poses, wearing the true cloth or a wrong one."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from truepose_core.evaluation.pattern import (
    MIN_CONTRAST,
    garment_mask,
    garment_scores,
    mean_score,
    pattern_score,
    pattern_scores,
    residual,
)
from truepose_core.mannequin import render, sample_identities, sample_poses
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

SIZES = ((64, 48), (128, 96))
STRIPES, VERTICAL, CHECKS, LOGO = 1, 2, 3, 4
PEOPLE = {64: 36, 128: 12}


class World:
    """People with patterned tops and checked trousers at one size, seen from the front or the side."""

    def __init__(self, size):
        self.size, self.unit = size, size[0] / 64
        count = PEOPLE[size[0]]
        people = sample_identities(range(count), 77)
        self.people = replace(
            people,
            top_pattern=1 + torch.arange(count) % 3,
            bottom_pattern=torch.full((count,), 2),
        )
        self.poses = sample_poses(range(count), 77, "front")
        true = render(self.people, self.poses, *size)
        self.truth, self.parsing = true.image, HumanParsing(true.parsing)

    def wearing(self, **changes):
        return render(replace(self.people, **changes), self.poses, *self.size).image

    def score(self, images):
        return pattern_score(images.clamp(0, 1), self.truth, self.parsing)

    def signed(self, images):
        return pattern_scores(images.clamp(0, 1), self.truth, self.parsing).nanmean().item()


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
def world(request):
    return World(request.param)


def noise(like, seed=0):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def blurred(image, sigma):
    radius = int(4 * sigma + 1)
    place = torch.arange(-radius, radius + 1.0)
    kernel = (-(place**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    image = torch.nn.functional.pad(image, (radius,) * 4, mode="replicate")
    image = torch.nn.functional.conv2d(image, kernel, groups=3)
    return torch.nn.functional.conv2d(image, kernel.mT, groups=3)


def test_the_truth_has_1(world):
    scores = pattern_scores(world.truth, world.truth, world.parsing)
    assert not scores.isnan().any()
    assert torch.allclose(scores, torch.ones_like(scores), atol=1e-9)


def test_a_constant_shift_of_colour_changes_nothing(world):
    shift = torch.tensor([0.06, -0.03, -0.05]).view(1, 3, 1, 1)
    scores = pattern_scores(world.truth + shift, world.truth, world.parsing)
    assert torch.allclose(scores, torch.ones_like(scores), atol=1e-6)
    assert world.score(world.truth + shift) > 0.97  # clipped to [0, 1], as pictures are


def test_slight_noise_passes(world):
    assert world.score(world.truth + 0.03 * noise(world.truth)) > 0.93


@pytest.mark.parametrize("contrast", [0.0, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0])
def test_the_score_of_a_weaker_or_stronger_pattern_is_the_ratio_of_contrasts(world, contrast):
    images = 0.5 + contrast * (world.truth - 0.5)
    scores = pattern_scores(images, world.truth, world.parsing)
    expected = min(contrast, 1 / contrast) if contrast else 0.0
    assert torch.allclose(scores, torch.full_like(scores, expected), atol=1e-6)


def test_blur_lowers_the_score_until_nothing_is_left(world):
    sigmas = [0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    scores = [world.score(blurred(world.truth, sigma * world.unit)) for sigma in sigmas]
    assert all(a > b for a, b in zip([1.0, *scores], scores, strict=False))
    at = dict(zip(sigmas, scores, strict=True))
    assert at[1.0] < 0.4 and at[1.5] < 0.2 and at[2.0] < 0.1 and at[3.0] < 0.03


def test_the_mean_colour_of_each_token_of_4_by_4_pixels_fails_at_64x48():
    world = World((64, 48))
    tokens = interpolate(avg_pool2d(world.truth, 4), scale_factor=4)
    assert world.score(tokens) < 0.15


def test_region_colours_have_0(world):
    flat = torch.zeros_like(world.truth)
    for region in Region:
        mask = world.parsing.masks[:, region][:, None]
        mean = (world.truth * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        flat = torch.where(mask > 0.5, mean, flat)
    scores = pattern_scores(flat, world.truth, world.parsing)
    assert scores.abs().max() < 1e-9


def test_plain_cloth_of_the_right_colour_and_shading_fails(world):
    people = world.people
    plain = world.wearing(
        top_pattern=torch.zeros_like(people.top_pattern),
        bottom_pattern=torch.zeros_like(people.bottom_pattern),
        top_a=(people.top_a + people.top_b) / 2,
        bottom_a=(people.bottom_a + people.bottom_b) / 2,
    )
    assert world.score(plain) < 0.1


def test_another_persons_garments_fail(world):
    garment = [f.name for f in fields(world.people) if f.name.startswith(("top_", "bottom_"))]
    garment.remove("bottom_long")
    other = {name: getattr(world.people, name).roll(7, 0) for name in garment}
    assert abs(world.signed(world.wearing(**other))) < 0.15


def test_a_pattern_of_another_direction_fails(world):
    top = world.people.top_pattern
    chosen = top != CHECKS
    turned = world.wearing(top_pattern=torch.where(chosen, STRIPES + VERTICAL - top, top))
    scores = garment_scores(turned, world.truth, world.parsing, Region.UPPER)[chosen]
    assert abs(scores.nanmean()) < 0.1


def test_a_shift_of_half_a_period_is_negative(world):
    people = world.people
    shifted = world.wearing(top_phase=people.top_phase + 0.5, bottom_phase=people.bottom_phase + 0.5)
    # Vertical stripes have no phase, so they stay as they are.
    upper = garment_scores(shifted, world.truth, world.parsing, Region.UPPER)[people.top_pattern != VERTICAL]
    lower = garment_scores(shifted, world.truth, world.parsing, Region.LOWER)
    for scores in (upper[~upper.isnan()], lower[~lower.isnan()]):
        assert scores.max() < -0.3 and scores.mean() < -0.8


def test_a_shift_of_a_quarter_period_has_about_0(world):
    people = world.people
    shifted = world.wearing(top_phase=people.top_phase + 0.25)
    upper = garment_scores(shifted, world.truth, world.parsing, Region.UPPER)[people.top_pattern != VERTICAL]
    assert abs(upper.nanmean()) < 0.15


def test_guessing_the_phase_gains_nothing():
    world = World((64, 48))
    phases = [(world.people.top_phase + k / 6) for k in range(6)]
    scores = torch.stack(
        [garment_scores(world.wearing(top_phase=phase), world.truth, world.parsing, Region.UPPER) for phase in phases]
    )[:, world.people.top_pattern != VERTICAL]
    assert abs(scores.nanmean()) < 0.06
    # What clamping each picture would have given for the same guesses.
    assert scores.clamp(min=0).nanmean() > 0.25


def test_invented_detail_of_any_strength_has_about_0(world):
    for strength in (0.02, 0.1, 0.5):
        assert abs(world.signed(0.5 + strength * noise(world.truth))) < 0.03


def test_a_logo_counts_where_it_is_seen():
    count = 16
    people = sample_identities(range(count), 5)
    people = replace(people, top_pattern=torch.full((count,), LOGO))
    for view, shown in (("front", 0.75), ("back", 0.0)):
        picture = render(people, sample_poses(range(count), 5, view), 128, 96)
        parsing = HumanParsing(picture.parsing)
        scores = garment_scores(picture.image, picture.image, parsing, Region.UPPER)
        share = (~scores.isnan()).double().mean()
        assert share >= shown if shown else share <= 0.1


def test_plain_clothes_do_not_count(world):
    nothing = torch.zeros_like(world.people.top_pattern)
    plain = world.wearing(top_pattern=nothing, bottom_pattern=nothing)
    scores = pattern_scores(plain, plain, world.parsing)
    assert scores.isnan().all()
    assert mean_score(scores) is None


def test_patterned_and_plain_garments_are_told_apart(world):
    mask = garment_mask(world.parsing, Region.UPPER)
    contrast = residual(world.truth.double(), mask, 3 * world.unit).square().sum((1, 2, 3))
    contrast = (contrast / (3 * mask.sum((1, 2, 3)))).sqrt()
    assert contrast.min() > MIN_CONTRAST


def test_scores_lie_between_minus_1_and_1_and_do_not_depend_on_the_batch(world):
    images = torch.rand(world.truth.shape, generator=torch.Generator().manual_seed(3))
    images[::2] = 1 - world.truth[::2]
    scores = pattern_scores(images, world.truth, world.parsing)
    assert scores.abs().max() <= 1
    assert torch.allclose(scores[::2], -torch.ones_like(scores[::2]), atol=1e-6)
    alone = [pattern_scores(images[i : i + 1], world.truth[i : i + 1], world.parsing[i]) for i in range(len(images))]
    assert torch.allclose(torch.cat(alone), scores, atol=1e-12)


def test_what_is_outside_the_garments_changes_nothing(world):
    inside = sum(garment_mask(world.parsing, garment) for garment in (Region.UPPER, Region.LOWER))
    images = torch.where(inside > 0, world.truth, torch.rand_like(world.truth))
    scores = pattern_scores(images, world.truth, world.parsing)
    assert torch.allclose(scores, torch.ones_like(scores), atol=1e-9)
