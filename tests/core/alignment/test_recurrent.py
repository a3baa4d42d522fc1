"""Laws of recurrent alignment: the path, the module before it has learned anything, and its composition."""

import copy
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from small import body_of, people
from torch.nn.functional import grid_sample

from truepose_core.alignment.recurrent import (
    CANDIDATES,
    CHANNELS,
    AlignConfig,
    AlignNet,
    align,
    align_net,
    align_person,
    body_points,
    compose,
    enlarge,
    gradient,
    in_grid,
    move_state,
    pose_distance,
    pose_path,
    step_inputs,
)
from truepose_core.body.carry import carried_parsing, correspond
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import axis_angle_to_matrix, forward_kinematics, matrix_to_axis_angle, rest_joints
from truepose_core.mannequin.body import PARENTS
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_colors
from truepose_core.weights.small import save_small

SMALL = AlignConfig(width=16, state=16, deep=16, head=8)


@pytest.fixture(scope="module")
def scene():
    """(image, parsing, source, target, target keypoints) of three pairs at 64x48."""
    pairs = people()
    source, target = body_of(pairs.source), body_of(pairs.target)
    return pairs.source.image, HumanParsing(pairs.source.parsing), source, target, pairs.target.keypoints


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return AlignNet(SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def learned():
    """A network whose last layers say something, too."""
    torch.manual_seed(1)
    net = AlignNet(SMALL).eval().requires_grad_(False)
    for layer in (net.coarse, net.last):
        layer.weight.normal_(std=0.05)
        layer.bias.normal_(std=0.1)
    return net


def rows(scene, index):
    image, parsing, source, target, keypoints = scene
    index = torch.tensor(index)
    return (
        image[index],
        HumanParsing(parsing.masks[index]),
        source.select(index),
        target.select(index),
        keypoints[index],
    )


def between(a, b):
    """Angle of each joint's turn between two bodies [N, 24], radians."""
    turn = axis_angle_to_matrix(a.theta.double()).mT @ axis_angle_to_matrix(b.theta.double())
    return ((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos()


# The path


def test_the_path_ends_in_the_target_and_has_as_many_steps(scene):
    _, _, source, target, _ = scene
    for steps in (1, 2, 4):
        path = pose_path(source, target, steps)
        assert len(path) == steps and path[-1] is target
    with pytest.raises(TruePoseError, match="0 alignment steps; expected at least 1"):
        pose_path(source, target, 0)


def test_steps_of_the_path_are_equal_turns_on_the_shortest_way(scene):
    _, _, source, target, _ = scene
    whole = between(source, target)
    (middle, _) = pose_path(source, target, 2)
    torch.testing.assert_close(between(source, middle), whole / 2, atol=2e-3, rtol=0)
    torch.testing.assert_close(between(middle, target), whole / 2, atol=2e-3, rtol=0)
    path = [source, *pose_path(source, target, 4)]
    for one, other in pairwise(path):
        torch.testing.assert_close(between(one, other), whole / 4, atol=2e-3, rtol=0)
    torch.testing.assert_close(middle.camera, (source.camera + target.camera) / 2)


def test_the_path_keeps_bone_lengths(scene):
    _, _, source, target, _ = scene
    rest = rest_joints(source.beta)
    parents = list(PARENTS[1:])
    expected = (rest[:, 1:] - rest[:, parents]).norm(dim=-1)
    for body in pose_path(source, target, 4):
        torch.testing.assert_close(body.beta, source.beta)
        _, joints = forward_kinematics(body.theta, rest_joints(body.beta))
        torch.testing.assert_close((joints[:, 1:] - joints[:, parents]).norm(dim=-1), expected, atol=1e-5, rtol=0)


def test_the_pose_distance_is_a_mean_angle(scene):
    _, _, source, target, _ = scene
    assert pose_distance(source, source).max() < 1e-3
    torch.testing.assert_close(pose_distance(source, target), pose_distance(target, source), atol=1e-4, rtol=0)
    # The root turns everybody: every joint is turned by as much.
    theta = source.theta.clone()
    turn = axis_angle_to_matrix(torch.tensor([0.0, 0.7, 0.0])) @ axis_angle_to_matrix(theta[:, 0])
    theta[:, 0] = matrix_to_axis_angle(turn)
    turned = replace(source, theta=theta)
    torch.testing.assert_close(pose_distance(source, turned), torch.full((3,), 0.7), atol=2e-3, rtol=0)


def test_points_of_a_body_are_the_worlds_keypoints(scene):
    side = people().source
    found = body_points(body_of(side), 0.75)
    inside = ((found[..., :2] >= 0) & (found[..., :2] < 1)).all(-1)
    torch.testing.assert_close(found * inside[..., None], side.keypoints, atol=1e-5, rtol=0)


# What the module reads


def test_the_module_reads_what_geometry_knows(scene):
    image, parsing, source, target, keypoints = scene
    model = GenericBody()
    source_maps, target_maps = (model.render(body, 64, 48) for body in (source, target))
    inputs, first = step_inputs(image, parsing, source, target, source_maps, target_maps, keypoints)
    assert inputs.maps.shape == (3, CHANNELS, 64, 48) and inputs.maps.isfinite().all()
    expected = correspond(source, target, source_maps, target_maps)
    assert torch.equal(first.grid, expected.grid) and torch.equal(inputs.grid, expected.grid)
    torch.testing.assert_close(inputs.colors[:, 0], expected.sample(image), atol=1e-6, rtol=0)
    person = expected.sample(1 - parsing.masks[:, :1]) > 0.5
    assert torch.equal(inputs.seen[:, 0], expected.seen * person)
    torch.testing.assert_close(inputs.prior, carried_parsing(expected, parsing.masks, inputs.seen[:, 0]).masks)
    for place, name in enumerate(CANDIDATES):
        found = correspond(source, target, source_maps, target_maps, mirror=name)
        torch.testing.assert_close(inputs.colors[:, place], found.sample(image), atol=1e-6, rtol=0)


# The composition


def test_weights_sum_to_one_and_nothing_is_nan(scene, learned):
    for result in align(learned, *scene, 2):
        torch.testing.assert_close(result.weights.sum(1), torch.ones(3, 64, 48))
        assert result.weights.min() >= 0 and result.picture.isfinite().all()
        torch.testing.assert_close(result.seen[:, 0], result.weights[:, :-1].sum(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(result.parsing.masks, result.log_parsing.softmax(1))
        assert result.flow.abs().max() <= SMALL.reach
        torch.testing.assert_close(result.looked_up, result.grid + in_grid(result.flow, 64, 48))


def test_before_it_has_learned_anything_the_picture_is_what_was_carried(scene, fresh):
    """sum_c w_c candidate_c with the weights of the depth test, region colours on the carried parsing."""
    image, parsing, source, target, keypoints = scene
    model = GenericBody()
    maps = [model.render(body, 64, 48) for body in (source, target)]
    inputs, first = step_inputs(image, parsing, source, target, *maps, keypoints)
    result = align(fresh, *scene)[-1]
    assert not result.flow.any() and not result.residual.any() and torch.equal(result.gain, torch.ones(3, 5, 64, 48))
    torch.testing.assert_close(result.parsing.masks, inputs.prior, atol=0.02, rtol=0)
    torch.testing.assert_close(result.looked_up, first.grid)
    palette, _ = region_colors(image, parsing)
    flat = torch.einsum("brc,brhw->bchw", palette, result.parsing.masks)
    own = grid_sample(image, first.grid, padding_mode="border", align_corners=False)
    candidates = [own, *inputs.colors[:, 1:].unbind(1), flat]
    expected = sum(result.weights[:, i : i + 1] * c for i, c in enumerate(candidates))
    torch.testing.assert_close(result.picture, expected, atol=1e-5, rtol=0)
    # What the depth test calls seen is taken from there, what it calls hidden is not.
    seen, hidden = inputs.seen[:, 0, 0] > 0, (inputs.seen[:, 0, 0] == 0) & (maps[1].mask[:, 0] > 0)
    assert result.weights[:, 0][seen].min() > 0.8 and result.weights[:, 0][hidden].max() < 0.15


def test_composing_equal_candidates_gives_the_candidate():
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 1, 3, 4, 5, generator=generator)
    weights = torch.rand(2, 5, 4, 5, generator=generator).softmax(1)
    ones, nothing = torch.ones(2, 5, 4, 5), torch.zeros(2, 3, 4, 5)
    torch.testing.assert_close(compose(one.expand(-1, 5, -1, -1, -1), weights, ones, nothing), one[:, 0])
    brighter = compose(one.expand(-1, 5, -1, -1, -1), weights, 2 * ones, nothing + 0.1)
    torch.testing.assert_close(brighter, 2 * one[:, 0] + 0.1)


def test_flow_is_in_heights_of_the_source_whatever_its_width():
    """A shift by a tenth of the height finds what lies there, in a source of any shape."""
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0], flow[:, 1] = 0.1, -0.2
    for height, width in ((40, 40), (40, 80), (60, 30)):
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / height, indexing="ij"
        )
        places = torch.stack([x, y])[None]
        there = grid_sample(places, in_grid(flow, height, width), align_corners=False)
        middle = torch.tensor([width / height / 2, 0.5])[None, :, None, None]
        torch.testing.assert_close(there, (middle + flow).expand(1, 2, 8, 8), atol=1e-5, rtol=0)


# Steps, batches, sizes


def test_one_step_is_one_forward(scene, learned):
    image, parsing, source, target, keypoints = scene
    model = GenericBody()
    maps = [model.render(body, 64, 48) for body in (source, target)]
    inputs, _ = step_inputs(image, parsing, source, target, *maps, keypoints)
    expected = learned(inputs)
    (made,) = align(learned, *scene, 1)
    for name in ("picture", "weights", "flow", "state", "log_parsing"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    (given,) = align(learned, *scene, 1, source_maps=maps[0], target_maps=maps[1])
    assert torch.equal(given.picture, made.picture)


def test_the_state_makes_the_last_step_know_of_those_before(scene, learned):
    one, two = align(learned, *scene, 1)[-1], align(learned, *scene, 2)[-1]
    assert torch.equal(one.grid, two.grid), "both end in the target's own geometry"
    assert (one.picture - two.picture).abs().max() > 1e-4
    assert two.state.shape == (3, SMALL.state, 16, 12)


def test_the_state_moves_with_the_surface(scene):
    _, _, source, target, _ = scene
    model = GenericBody()
    maps = model.render(source, 64, 48)
    state = torch.rand(3, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    on = torch.nn.functional.interpolate(maps.mask, (16, 12), mode="nearest")
    stayed = move_state(state, source, maps, model)
    # A cell's pixel lies up to half a cell from its middle.
    ramp = torch.linspace(0, 1, 12).expand(3, 1, 16, 12)
    assert (move_state(ramp, source, maps, model) - ramp * on).abs().max() < 0.08
    assert not (stayed * (1 - on)).any()
    assert not torch.equal(move_state(state, source, model.render(target, 64, 48), model), stayed)


def test_a_batch_equals_its_items(scene, learned):
    whole = align(learned, *scene, 2)[-1]
    for i in range(3):
        alone = align(learned, *rows(scene, [i]), 2)[-1]
        torch.testing.assert_close(alone.picture[0], whole.picture[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.weights[0], whole.weights[i], atol=1e-4, rtol=0)


def test_source_and_target_pictures_may_differ_in_shape(scene, fresh):
    """A target picture that is wider on both sides shows the same person between its margins, also where all of it is
    looked up a little further right and down."""
    net = copy.deepcopy(fresh)
    net.coarse.bias[:2] = torch.tensor([0.9, 0.4])
    image, parsing, source, target, keypoints = scene
    wide = keypoints.clone()
    wide[..., 0] = ((keypoints[..., 0] - 0.5) * 48 / 64 + 0.5) * (keypoints[..., 2] > 0)
    plain = align(net, *scene)[-1]
    made = align(net, image, parsing, source, target, wide, size=(64, 64))[-1]
    assert plain.flow.abs().max() > 0.5 * SMALL.reach
    assert made.picture.shape == (3, 3, 64, 64)
    torch.testing.assert_close(made.picture[..., 8:-8], plain.picture, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(60, 48), (64, 50)])
def test_sides_that_8_does_not_divide_are_refused(scene, fresh, size):
    with pytest.raises(TruePoseError, match=f"{size[0]}x{size[1]}; expected sides that 8 divides"):
        align(fresh, *scene, size=size)


def test_counts_and_sizes_that_do_not_match_are_refused(scene, fresh):
    image, parsing, source, target, keypoints = scene
    one = HumanParsing(parsing.masks[:1])
    little = HumanParsing(parsing.masks[..., ::2, ::2])
    for wrong in (
        (image, one, source, target),
        (image[:2], parsing, source, target),
        (image, parsing, source.select([0]), target),
        (image, parsing, source, target.select([0, 1])),
        (image, little, source, target),
    ):
        with pytest.raises(TruePoseError, match="expected one parsing of the same size and two bodies"):
            align(fresh, *wrong, keypoints)


# At any size


def test_enlarging_to_the_same_size_changes_nothing_on_the_body(scene, learned):
    image, parsing, source, target, _ = scene
    result = align(learned, *scene)[-1]
    picture, seen, regions = enlarge(result, image, parsing, source, target, (64, 48))
    mask = GenericBody().render(target, 64, 48).mask
    torch.testing.assert_close(picture * mask, result.picture.clamp(0, 1) * mask, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen, result.seen * mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(regions.masks, result.parsing.masks, atol=1e-5, rtol=0)


def test_a_person_of_keypoints_alone(scene, learned):
    image, parsing, _, _, keypoints = scene
    sources = people().source.keypoints
    made = align_person(image[:1], HumanParsing(parsing.masks[:1]), sources[:1], keypoints[:2], (32, 24), net=learned)
    assert made.picture.shape == (2, 3, 32, 24) and made.seen.shape == (2, 1, 32, 24)
    assert made.picture.min() >= 0 and made.picture.max() <= 1
    assert made.parsing.masks.shape == (2, 7, 32, 24)
    # One person: the target bodies have the source's shape.
    assert torch.equal(made.source.beta, made.target.beta) and torch.equal(made.source.beta[0], made.source.beta[1])
    with pytest.raises(TruePoseError, match="2 pictures, 3 parsings"):
        align_person(image[:2], parsing, sources[:2], keypoints, net=learned)
    with pytest.raises(TruePoseError, match="a number of target poses that the pictures divide"):
        align_person(image[:2], HumanParsing(parsing.masks[:2]), sources[:2], keypoints, net=learned)


# Small parts


def test_gradients_are_differences_to_the_right_and_down():
    x = 2 * torch.arange(5.0)[None, None, None] + 3 * torch.arange(4.0)[None, None, :, None]
    made = gradient(x)
    assert made.shape == (1, 2, 3, 4)
    assert (made[:, 0] == 2).all() and (made[:, 1] == 3).all()


def test_weights_are_read_strictly(tmp_path, learned):
    path = save_small(learned.state_dict(), tmp_path / "a.safetensors", "alignment", asdict(SMALL), {})
    net = align_net(str(path))
    assert net.config == SMALL
    for name, value in learned.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, atol=2e-3, rtol=2e-3)
    other = save_small(learned.state_dict(), tmp_path / "b.safetensors", "lift", asdict(SMALL), {})
    with pytest.raises(TruePoseError, match="truepose-lift; expected the weights of truepose train --row alignment"):
        align_net(str(other))
    wrong = save_small(learned.state_dict(), tmp_path / "c.safetensors", "alignment", asdict(AlignConfig()), {})
    with pytest.raises(TruePoseError, match="do not fit"):
        align_net(str(wrong))


def test_bodies_of_a_path_may_be_far_apart():
    """From a person who faces the camera to one who looks away: half way they are seen from the side."""
    theta = torch.zeros(2, 24, 3)
    theta[1, 0, 1] = math.pi - 0.01
    body = BodyPose(theta, torch.zeros(2, 10), torch.tensor([[0.42, 0, -0.06]] * 2))
    (middle, _) = pose_path(body.select([0]), body.select([1]), 2)
    assert middle.theta[0, 0, 1].item() == pytest.approx((math.pi - 0.01) / 2, abs=1e-3)
    shown = GenericBody().render(middle, 32, 24)
    assert shown.mask.sum() < GenericBody().render(body.select([0]), 32, 24).mask.sum()
