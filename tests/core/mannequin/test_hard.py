"""Laws of the hard cases: one thing of the source changes, and the targets are the usual world's."""

import pytest
import torch

from truepose_core.mannequin import sample_identities, sample_pairs
from truepose_core.mannequin.hard import HARD, one_colour
from truepose_core.mannequin.identity import BOTTOM_PATTERNS, TOP_PATTERNS
from truepose_core.mannequin.world import people_of
from truepose_core.regions import Region


@pytest.fixture(scope="module")
def worlds():
    return {kind: sample_pairs(12, "test", kind=kind) for kind in ("usual", *HARD)}


def test_trousers_of_the_tops_colours_never_have_its_pattern():
    people = sample_identities(range(400), 0)
    changed = one_colour(people)
    assert torch.equal(changed.bottom_a, people.top_a) and torch.equal(changed.bottom_b, people.top_b)
    for top, bottom in zip(changed.top_pattern, changed.bottom_pattern, strict=True):
        assert TOP_PATTERNS[top] != BOTTOM_PATTERNS[bottom]
    assert torch.equal(people_of(torch.arange(3), "test", kind="one-colour").bottom_a, sample_like("one-colour").top_a)


def sample_like(kind):
    return people_of(torch.arange(3), "test", kind=kind)


@pytest.mark.parametrize("kind", ["busy", "crossed-arm"])
def test_targets_stay_as_they_are(worlds, kind):
    assert worlds[kind].world == kind
    assert torch.equal(worlds[kind].target.image, worlds["usual"].target.image)
    assert not torch.equal(worlds[kind].source.image, worlds["usual"].source.image)


def test_a_busy_background_leaves_the_person_alone(worlds):
    busy, usual = worlds["busy"].source, worlds["usual"].source
    assert torch.equal(busy.parsing, usual.parsing) and torch.equal(busy.keypoints, usual.keypoints)
    person = usual.parsing[:, Region.BACKGROUND, None] == 0
    assert ((busy.image - usual.image) * person).abs().max() == 0
    around = usual.parsing[:, Region.BACKGROUND] == 1
    spread = [image[:, where].std(1).mean().item() for image, where in zip(busy.image, around, strict=True)]
    assert min(spread) > 0.2 and busy.image.min() >= 0 and busy.image.max() <= 1


def test_a_crossed_arm_hides_a_part_of_the_top_from_the_front(worlds):
    crossed, usual = worlds["crossed-arm"].source, worlds["usual"].source
    wrists = crossed.keypoints[:, [4, 7]]
    hips, shoulders = crossed.keypoints[:, [8, 11]], crossed.keypoints[:, [2, 5]]
    seen = (wrists[..., 2] > 0).all(1) & (hips[..., 2] > 0).all(1) & (shoulders[..., 2] > 0).all(1)
    # Seen from the front: the left shoulder is on the right of the picture, by more than a third of the trunk's height.
    wide = shoulders[:, 1, 0] - shoulders[:, 0, 0] > 0.33 * (hips[:, 0, 1] - shoulders[:, 0, 1]).abs()
    front = seen & wide
    assert front.sum() >= 3
    for points in crossed.keypoints[front]:
        low, high = points[[2, 5], 0].min(), points[[2, 5], 0].max()
        assert any(low <= points[w, 0] <= high for w in (4, 7)), "a wrist is between the shoulders"
    for joint in (0, 3, 6, 9):
        assert torch.equal(crossed.theta[:, joint], usual.theta[:, joint])
