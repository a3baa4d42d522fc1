"""Laws of lifting: the network's input and output, the camera, the Gauss-Newton fit, and the asset that ships."""

import pytest
import torch
from small import body_of, people

from truepose_core.alignment.recurrent import body_points, pose_distance
from truepose_core.body.lift import (
    FEWEST,
    LiftNet,
    _jacobian,
    _shape_jacobian,
    fit_bodies,
    keypoints_of,
    lift,
    lift_net,
    net_path,
    normalise,
    propose,
    rotation_of_six,
    six_of_rotation,
    solve_camera,
)
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import axis_angle_to_matrix, rest_joints, sample_pairs
from truepose_core.mannequin.body import chain_rotations, openpose_points
from truepose_core.training.lift import angle_errors
from truepose_core.weights.small import save_small
from truepose_core.weights.strict import bundled_path

ASPECT = 0.75


@pytest.fixture(scope="module")
def crowd():
    """Twelve people of the test split, each in two poses."""
    return sample_pairs(12, "test")


@pytest.fixture(scope="module")
def exact(crowd):
    """True bodies and their keypoints, none of them cut off by the frame."""
    body = body_of(crowd.source)
    return body, body_points(body, ASPECT)


def random_bodies(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = 0.4 * torch.randn(count, 24, 3, generator=generator, dtype=torch.float64)
    return axis_angle_to_matrix(theta), torch.randn(count, 10, generator=generator, dtype=torch.float64)


# What the network reads and gives


def test_six_numbers_are_a_rotation_and_back():
    rotation, _ = random_bodies(5)
    torch.testing.assert_close(rotation_of_six(six_of_rotation(rotation)), rotation)
    any_six = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = rotation_of_six(any_six)
    torch.testing.assert_close(made @ made.mT, torch.eye(3, dtype=torch.float64).expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(made), torch.ones(50, dtype=torch.float64))


def test_what_is_read_says_neither_where_nor_how_large_nor_in_what_frame(exact):
    _, points = exact
    expected = normalise(points, ASPECT)
    assert expected.shape == (12, 54)
    moved = points.clone()
    moved[..., :2] = 0.3 * points[..., :2] + torch.tensor([0.4, -0.1])
    moved[points[..., 2] == 0] = 0
    torch.testing.assert_close(normalise(moved, ASPECT), expected, atol=1e-4, rtol=0)
    # The same picture in a frame twice as wide.
    wide = points.clone()
    wide[..., 0] /= 2
    torch.testing.assert_close(normalise(wide, 2 * ASPECT), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(normalise(points, torch.full((12,), ASPECT)), expected)
    assert torch.equal(expected[:, 36:], (points[..., 2] > 0).float())


def test_the_camera_is_found_again_from_what_it_shows():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 18, 3, generator=generator, dtype=torch.float64)
    camera = torch.tensor([[0.5, 0.1, -0.2], [0.1, 0, 0], [2.0, -1, 3], [0.03, 0.2, 0.2]], dtype=torch.float64)
    seen = points[..., :2] * torch.tensor([1.0, -1.0]) * camera[:, :1, None] + camera[:, None, 1:]
    weight = (torch.rand(4, 18, generator=generator, dtype=torch.float64) > 0.4).double()
    wrong = torch.where(weight[..., None] > 0, seen, 99.0)
    torch.testing.assert_close(solve_camera(points, wrong, weight), camera)


# The fit


def test_the_jacobian_is_that_of_autograd():
    rotation, beta = random_bodies(3)
    world, position = chain_rotations(rotation, rest_joints(beta))
    points, _ = openpose_points(world, position, beta)
    found = _jacobian(world, position, points)

    def moved(turn):
        local = rotation @ axis_angle_to_matrix(turn)
        return keypoints_of(local, beta)[0]

    expected = torch.autograd.functional.jacobian(moved, torch.zeros(3, 24, 3, dtype=torch.float64))
    expected = torch.stack([expected[i, :, :, i].flatten(2) for i in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert expected.abs().amax((0, 1, 2)).count_nonzero() > 40, "most joints move some point"


def test_the_jacobian_of_the_shape_is_that_of_autograd():
    rotation, beta = random_bodies(3)
    points, _ = keypoints_of(rotation, beta)
    expected = torch.autograd.functional.jacobian(lambda b: keypoints_of(rotation, b)[0], beta)
    expected = torch.stack([expected[i, :, :, i] for i in range(3)])
    # Products of two numbers make it a little curved over the step.
    torch.testing.assert_close(_shape_jacobian(rotation, beta, points), expected, atol=2e-4, rtol=0)


def test_exact_keypoints_of_a_body_in_the_priors_mean_stay_put(exact):
    body, points = exact
    rotation = axis_angle_to_matrix(body.theta)
    found, beta, camera, error = fit_bodies(rotation, body.beta, points, ASPECT, covariance=lift_net().covariance)
    torch.testing.assert_close(found, rotation, atol=1e-4, rtol=0)
    torch.testing.assert_close(beta, body.beta, atol=1e-3, rtol=0)
    torch.testing.assert_close(camera, body.camera, atol=1e-5, rtol=0)
    assert error.max() < 1e-5


def test_the_fit_brings_keypoints_nearer_and_bodies_nearer_to_the_truth(crowd):
    points, truth = crowd.source.keypoints, body_of(crowd.source)
    raw, fitted = lift(points, ASPECT, steps=0), lift(points, ASPECT)
    assert (fitted.error < raw.error).all()
    assert fitted.error.mean() < 0.3 * raw.error.mean()
    assert pose_distance(fitted.bodies, truth).mean() < 0.9 * pose_distance(raw.bodies, truth).mean()


def test_the_error_is_that_of_the_fitted_bodys_own_keypoints(crowd):
    points = crowd.source.keypoints
    made = lift(points, ASPECT)
    own = keypoints_of(axis_angle_to_matrix(made.bodies.theta), made.bodies.beta)[0]
    camera = made.bodies.camera
    xy = own[..., :2] * torch.tensor([1.0, -1.0]) * camera[:, :1, None] + camera[:, None, 1:]
    off = (xy - (points[..., :2] - 0.5) * torch.tensor([ASPECT, 1.0])).square().sum(-1)
    seen = points[..., 2] > 0
    expected = ((off * seen).sum(1) / seen.sum(1)).sqrt()
    torch.testing.assert_close(made.error, expected, atol=1e-5, rtol=0)


def test_a_known_shape_stays_as_it_is_bit_for_bit(crowd):
    shape = torch.linspace(-2.9, 3.4, 120).view(12, 10)
    made = lift(crowd.source.keypoints, ASPECT, shape=shape, hypotheses=2)
    for body in (made.bodies, *made.others):
        assert torch.equal(body.beta, shape)


def test_a_looser_prior_lets_the_keypoints_nearer(crowd):
    points = crowd.source.keypoints
    rotation, beta, _ = propose(points, ASPECT)
    errors = [
        fit_bodies(rotation[:, 0], beta[:, 0], points, ASPECT, covariance=lift_net().covariance * factor)[3].mean()
        for factor in (1e-4, 1.0, 100.0)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_batch_equals_its_items(crowd):
    points = crowd.source.keypoints
    whole = lift(points, ASPECT, hypotheses=3)
    for i in (0, 5, 11):
        one = lift(points[i : i + 1], ASPECT, hypotheses=3)
        for alone, among in zip((one.bodies, *one.others), (whole.bodies, *whole.others), strict=True):
            torch.testing.assert_close(
                axis_angle_to_matrix(alone.theta[0]), axis_angle_to_matrix(among.theta[i]), atol=1e-3, rtol=0
            )
            torch.testing.assert_close(alone.camera[0], among.camera[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(one.doubt[0], whole.doubt[i], atol=1e-4, rtol=0)


# Missing keypoints, doubt


def without_limbs(points):
    less = points.clone()
    less[:, [3, 4, 6, 7, 9, 10, 12, 13]] = 0
    return less


def test_where_a_missing_keypoint_would_be_has_no_influence(crowd):
    less = without_limbs(crowd.source.keypoints)
    elsewhere = less.clone()
    elsewhere[..., :2] += 7.0 * (less[..., 2:] == 0)
    one, other = lift(less, ASPECT), lift(elsewhere, ASPECT)
    for name, value in vars(one.bodies).items():
        assert torch.equal(value, getattr(other.bodies, name))
    assert torch.equal(one.doubt, other.doubt) and torch.equal(one.error, other.error)


def test_doubt_grows_when_keypoints_are_taken_away_and_the_error_with_it(crowd):
    points, truth = crowd.source.keypoints, body_of(crowd.source)
    full, less = lift(points, ASPECT), lift(without_limbs(points), ASPECT)
    assert less.doubt.mean() > 1.5 * full.doubt.mean()
    assert pose_distance(less.bodies, truth).mean() > pose_distance(full.bodies, truth).mean()


def test_the_next_likeliest_bodies_are_others(crowd):
    points = crowd.source.keypoints
    made = lift(points, ASPECT, hypotheses=3)
    assert len(made.others) == 2 and made.doubt.shape == (12, 3)
    assert all(pose_distance(made.bodies, other).mean() > 0.05 for other in made.others)
    _, _, doubt = propose(points, ASPECT)
    assert (doubt.diff(dim=1) >= 0).all()
    assert lift(points, ASPECT).others == ()


def test_lifting_works_where_comfyui_runs_its_nodes(crowd):
    points = crowd.source.keypoints[:2]
    expected = lift(points, ASPECT)
    lift_net.cache_clear()
    with torch.inference_mode():
        made = lift(points.clone(), ASPECT)
    assert torch.equal(made.bodies.theta, expected.bodies.theta)
    # The network that was loaded there may still take part in a gradient.
    x = torch.zeros(1, 54, requires_grad=True)
    lift_net()(x)[1].sum().backward()
    assert x.grad.abs().sum() > 0


# What is refused


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        (torch.ones(2, 25, 3), r"\(2, 25, 3\); expected \[N, 18, 3\]"),
        (torch.ones(18, 3), r"\(18, 3\)"),
        (torch.ones(1, 18, 2), r"\(1, 18, 2\)"),
        (torch.ones(0, 18, 3), r"\(0, 18, 3\).*N at least 1"),
        (torch.full((1, 18, 3), torch.nan), "NaN"),
        (torch.zeros(1, 18, 3), "person 0 has 0 visible body keypoints; expected at least 5"),
    ],
)
def test_what_cannot_be_lifted_is_refused(keypoints, message):
    for ask in (lift, propose):
        with pytest.raises(TruePoseError, match=message):
            ask(keypoints, ASPECT)


def test_the_person_who_shows_too_little_is_named():
    points = people().source.keypoints.clone()
    points[1, FEWEST - 1 :] = 0
    with pytest.raises(TruePoseError, match=rf"person 1 has {FEWEST - 1} visible"):
        lift(points, ASPECT)
    points[1, FEWEST - 1] = torch.tensor([0.5, 0.6, 1.0])
    assert len(lift(points, ASPECT).bodies) == 3


@pytest.mark.parametrize("shape", [(1, 10), (3, 10), (2, 9), (10,)])
def test_known_shapes_that_do_not_fit_are_refused(crowd, shape):
    with pytest.raises(TruePoseError, match=r"shapes are .*expected \[2, 10\]"):
        lift(crowd.source.keypoints[:2], ASPECT, shape=torch.zeros(shape))


@pytest.mark.parametrize("count", [0, 4])
def test_more_bodies_than_the_network_offers_are_refused(crowd, count):
    with pytest.raises(TruePoseError, match=f"{count} bodies were asked for; expected 1 to 3"):
        lift(crowd.source.keypoints, ASPECT, hypotheses=count)


def test_degenerate_keypoints_give_a_body_and_no_nan():
    """All of a person in one point, or on one line: no body looks like it, but none is impossible either."""
    point = torch.full((1, 18, 3), 0.5)
    line = torch.cat([point[..., :1], torch.linspace(0, 1, 18)[None, :, None], torch.ones(1, 18, 1)], -1)
    for given in (point, line):
        made = lift(given, ASPECT, hypotheses=3)
        assert isinstance(made.bodies, BodyPose) and made.error.isfinite().all()


# The asset


def test_held_out_people_are_lifted_to_within_nine_degrees():
    """Of the network alone; the doubt that it gives is about the error that it makes."""
    errors = angle_errors(lift_net(), people=800)
    assert errors["likeliest"] < 9 and errors["root"] < 9
    assert errors["best"] <= errors["likeliest"]
    assert errors["doubt"] == pytest.approx(errors["likeliest"], rel=0.3)


def test_the_asset_is_small_and_says_what_it_is():
    assert net_path() == bundled_path("lift")
    assert net_path().stat().st_size < 5e6
    net = lift_net()
    covariance = net.covariance
    assert covariance.shape == (82, 82)
    torch.testing.assert_close(covariance, covariance.mT, atol=1e-3, rtol=0)
    assert torch.linalg.eigvalsh(covariance.double() + 1e-3 * torch.eye(82)).min() > 0
    assert 0.05 < net.usual_doubt.item() < 0.3


def test_a_file_that_is_no_lifting_network_is_refused(tmp_path):
    net = LiftNet(width=8, depth=1, hypotheses=1)
    weights = net.state_dict()
    path = save_small(weights, tmp_path / "lift.safetensors", "lift", net.sizes, {})
    made = lift_net(str(path))
    assert made.sizes == net.sizes
    for name, value in weights.items():
        torch.testing.assert_close(made.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    bare = {name: x for name, x in weights.items() if name != "covariance"}
    plain = save_small(bare, tmp_path / "plain.safetensors", "lift", net.sizes, {})
    with pytest.raises(TruePoseError, match=r"the weights do not fit the model\. 1 missing: covariance"):
        lift_net(str(plain))
    other = save_small(weights, tmp_path / "field.safetensors", "field", net.sizes, {})
    with pytest.raises(TruePoseError, match="truepose-field; expected the weights of truepose train --row lift"):
        lift_net(str(other))
    wider = save_small(weights, tmp_path / "wider.safetensors", "lift", {**net.sizes, "width": 16}, {})
    with pytest.raises(TruePoseError, match="the weights do not fit"):
        lift_net(str(wider))
    with pytest.raises(TruePoseError, match="no model file"):
        lift_net(str(tmp_path / "none.safetensors"))


def test_lifted_one_by_one_nobody_depends_on_the_others():
    from truepose_core.body.lift import lift_each
    from truepose_core.mannequin import sample_pairs

    people = sample_pairs(3, "test").source.keypoints
    together = lift_each(people, 0.75)
    for i in range(3):
        alone = lift(people[i : i + 1], 0.75).bodies
        assert torch.equal(together.theta[i : i + 1], alone.theta) and torch.equal(together.camera[i], alone.camera[0])
    shaped = lift_each(people, 0.75, together.beta.flip(0))
    assert torch.equal(shaped.beta, together.beta.flip(0))
