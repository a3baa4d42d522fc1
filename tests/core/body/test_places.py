"""Laws of places on the body's surface: one place for one surface point, in whatever picture it is seen."""

import logging
from dataclasses import replace

import pytest
import torch
from small import body_of, people, standing

from truepose_core.alignment.recurrent import body_points
from truepose_core.body import places as body_places
from truepose_core.body.lift import FEWEST, lift_each
from truepose_core.body.places import TORSO, SurfacePlaces, in_torsos, places_of
from truepose_core.body.render import GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import rest_joints
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_prior
from truepose_core.pose.limbs import body_coordinates
from truepose_core.regions import Region

ASPECT = 0.75


@pytest.fixture(scope="module")
def pairs():
    return people()


def too_few(keypoints):
    less = keypoints.clone()
    less[1, :FEWEST], less[1, FEWEST - 1 :] = 1, 0
    return less


def test_a_torso_is_one():
    joints = rest_joints(torch.zeros(1, 10))[0]
    assert (joints[12] - joints[0]).norm().item() == pytest.approx(TORSO)
    tokens = torch.tensor([[[0.25, 1.0, -0.5, 1.0], [0, 0, 0, 0]]])
    assert in_torsos(tokens).tolist() == [[[0.5, 2.0, -1.0, 1.0], [0, 0, 0, 0]]]


def test_models_that_go_by_the_skeleton_need_no_bodies(pairs):
    assert places_of("skeleton", pairs.source.keypoints, ASPECT) is None
    assert places_of("surface", None, ASPECT) is None
    assert isinstance(places_of("surface", pairs.source.keypoints, ASPECT), SurfacePlaces)


def test_too_few_keypoints_are_said_once_and_give_none(pairs, caplog):
    with caplog.at_level(logging.WARNING):
        assert places_of("surface", too_few(pairs.source.keypoints), ASPECT) is None
    (record,) = caplog.records
    assert f"the source has {FEWEST - 1} visible body keypoints, a body needs {FEWEST}" in record.message
    assert "skeleton" in record.message
    caplog.clear()
    surface = SurfacePlaces.of_keypoints(pairs.source.keypoints, ASPECT)
    with caplog.at_level(logging.WARNING):
        assert surface.target(too_few(pairs.target.keypoints), ASPECT) is None
    (record,) = caplog.records
    assert "a target pose has 4 visible" in record.message and "without body match" in record.message


def test_bodies_are_lifted_once_and_targets_take_their_shape(pairs, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return lift_each(*args, **kwargs)

    monkeypatch.setattr(body_places, "lift_each", counted)
    surface = SurfacePlaces.of_keypoints(pairs.source.keypoints, ASPECT)
    assert not calls, "nothing is lifted before it is asked for"
    assert surface.bodies is surface.bodies and len(calls) == 1
    expected = lift_each(pairs.source.keypoints, ASPECT)
    assert torch.equal(surface.bodies.theta, expected.theta)
    six = pairs.target.keypoints.repeat_interleave(2, 0)
    assert torch.equal(surface.target(six, ASPECT).beta, expected.beta.repeat_interleave(2, 0))
    # One pose for all is of the first one's shape.
    assert torch.equal(surface.target(six[:1], ASPECT).beta, expected.beta[:1])
    given = SurfacePlaces(pairs.source.keypoints, ASPECT, given=body_of(pairs.source))
    assert torch.equal(given.bodies.beta, pairs.source.beta)
    with pytest.raises(TruePoseError, match=r"expected \[4, 10\]"):
        surface.target(six[:4], ASPECT)


def test_repeated_people_stand_in_a_row(pairs):
    surface = SurfacePlaces.of_keypoints(pairs.source.keypoints, ASPECT)
    twice = surface.repeated(2)
    assert torch.equal(twice.body, pairs.source.keypoints[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(twice.bodies.theta, surface.bodies.theta[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("grid", [(16, 12), (8, 6), (4, 3)])
def test_tokens_of_any_grid_lie_on_the_body_or_are_nothing(pairs, grid):
    surface = SurfacePlaces.of_keypoints(pairs.source.keypoints, ASPECT)
    tokens = surface.tokens(surface.bodies, *grid, ASPECT)
    assert tokens.shape == (3, grid[0] * grid[1], 4) and tokens.isfinite().all()
    on = tokens[..., 3] > 0
    assert set(tokens[..., 3].unique().tolist()) <= {0.0, 1.0}
    assert not tokens[~on].any()
    # A T-pose: arms of less than 2 torsos to each side, from soles to crown, half a torso deep.
    low, high = tokens[on][:, :3].amin(0), tokens[on][:, :3].amax(0)
    assert (low > torch.tensor([-2.0, -2.5, -0.7])).all() and (high < torch.tensor([2.0, 1.8, 0.7])).all()


def test_tokens_are_where_the_parsing_says_that_a_person_is(pairs):
    surface = SurfacePlaces(pairs.source.keypoints, ASPECT, given=body_of(pairs.source))
    on = surface.tokens(surface.bodies, 16, 12, ASPECT)[..., 3]
    person = 1 - HumanParsing(pairs.source.parsing).tokens(16, 12)[..., Region.BACKGROUND]
    assert ((on > 0) == (person > 0.3)).float().mean() > 0.9


def test_one_surface_point_has_one_place_in_source_and_target():
    """Tokens of the same body in two poses: where a token's surface is seen in both, their places agree."""
    one, other = standing(6, 0), standing(6, 9)
    surface = SurfacePlaces(body_points(one, ASPECT), ASPECT, given=one)
    grid = (32, 24)
    source = surface.tokens(one, *grid, ASPECT)
    maps = GenericBody().render(other, *grid)
    target = surface.tokens(other, *grid, ASPECT)
    found = GenericBody().locate(maps, one)
    shown = GenericBody().render(one, *grid)
    column, row = (found[:, 0] * grid[1]).long(), (found[:, 1] * grid[0]).long()
    inside = (maps.mask[:, 0] > 0) & (column >= 0) & (column < grid[1]) & (row >= 0) & (row < grid[0])
    column, row = column.clamp(0, grid[1] - 1), row.clamp(0, grid[0] - 1)
    person = torch.arange(6)[:, None, None].expand_as(row)
    seen = inside & ((shown.depth[:, 0][person, row, column] - found[:, 2]).abs() < 0.01)
    there = source[person, row * grid[1] + column]
    here = target.unflatten(1, grid)
    seen &= (there[..., 3] > 0) & (here[..., 3] > 0)
    distance = (there - here)[seen][:, :3].norm(dim=-1)
    # A cell is 1 / (32 * 0.42) = 7.4 cm, 0.15 torsos.
    assert seen.sum() > 200
    assert distance.median() < 0.15 and distance.quantile(0.8) < 0.3
    # The nearest source token is one of the same surface: that is what HPFA's body match asks.
    nearest = (
        torch.cdist(target[..., :3], source[..., :3]).masked_fill(source[:, None, :, 3] == 0, torch.inf).argmin(-1)
    )
    y, x = nearest // grid[1], nearest % grid[1]
    off = torch.stack([x.unflatten(1, grid) - column, y.unflatten(1, grid) - row]).abs().amax(0)[seen]
    assert (off <= 2).float().mean() > 0.8


def test_a_grid_with_cells_that_are_not_square_covers_the_same_picture():
    body = standing(2)
    surface = SurfacePlaces(body_points(body, ASPECT), ASPECT, given=body)
    square = surface.tokens(body, 32, 24, ASPECT).unflatten(1, (32, 24))
    flat = surface.tokens(body, 32, 12, ASPECT).unflatten(1, (32, 12))
    both = torch.nn.functional.max_pool2d(square[..., 3], (1, 2))
    assert (both == flat[..., 3]).float().mean() > 0.93


# The carried parsing


def test_in_the_same_pose_the_prior_is_the_sources_own_parsing(pairs):
    surface = SurfacePlaces(pairs.source.keypoints, ASPECT, given=body_of(pairs.source))
    parsing = HumanParsing(pairs.source.parsing)
    made = surface.carry_parsing(parsing, surface.bodies, (16, 12))
    own = parsing.tokens(16, 12).transpose(1, 2).unflatten(2, (16, 12))
    both = (made.masks[:, 0] < 0.5) & (own[:, 0] < 0.5)
    assert both.float().mean() > 0.15
    assert (made.masks.argmax(1) == own.argmax(1))[both].float().mean() > 0.95


def test_several_poses_of_a_person_are_as_each_alone(pairs):
    surface = SurfacePlaces(pairs.source.keypoints, ASPECT, given=body_of(pairs.source))
    parsing = HumanParsing(pairs.source.parsing)
    targets = body_of(pairs.target)
    poses = targets.select([0, 1, 1, 2, 2, 0])
    poses = replace(poses, beta=surface.bodies.beta.repeat_interleave(2, 0))
    whole = surface.carry_parsing(parsing, poses, (16, 12)).masks
    for i in range(6):
        one = SurfacePlaces(surface.body[i // 2 : i // 2 + 1], ASPECT, given=surface.bodies.select([i // 2]))
        alone = one.carry_parsing(HumanParsing(parsing.masks[i // 2 : i // 2 + 1]), poses.select([i]), (16, 12))
        torch.testing.assert_close(alone.masks[0], whole[i], atol=1e-4, rtol=0)


def test_the_prior_knows_the_target_better_than_the_skeleton(pairs):
    parsing = HumanParsing(pairs.source.parsing)
    surface = SurfacePlaces.of_keypoints(pairs.source.keypoints, ASPECT)
    targets = surface.target(pairs.target.keypoints, ASPECT)
    carried = surface.carry_parsing(parsing, targets, (32, 24))
    skeleton = region_prior(parsing, pairs.source.keypoints, pairs.target.keypoints, 32, 24)
    truth = HumanParsing(pairs.target.parsing).tokens(32, 24).transpose(1, 2).unflatten(2, (32, 24))
    miss, of_skeleton = ((x.masks - truth).abs().sum(1).mean() for x in (carried, skeleton))
    assert miss < 0.8 * of_skeleton


def test_widths_tell_skeleton_and_surface_apart(pairs):
    surface = SurfacePlaces.of_keypoints(pairs.source.keypoints, ASPECT)
    assert surface.tokens(surface.bodies, 4, 3, ASPECT).shape[-1] == 4
    assert body_coordinates(pairs.source.keypoints, 4, 3).shape[-1] == 3
