"""Laws of posed bodies, lifting a person, girth, and carrying a picture: what nodes and command line share."""

import pytest
import torch
from body.test_smpl import box_body, saved

from truepose_core.body import person
from truepose_core.body.lift import lift
from truepose_core.body.person import PosedBody, carry_person, girth_of, joints_of, lift_person
from truepose_core.body.pictures import (
    CHAMP,
    CHAMP_MAPS,
    CONTROLNET,
    coordinate_picture,
    depth_picture,
    normal_picture,
    semantic_picture,
)
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import GenericBody, Girth
from truepose_core.body.smpl import SmplModel
from truepose_core.cli.transfer.inputs import fit_body
from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import crop_person
from truepose_core.mannequin import BodyPoses, ready_poses, render, sample_identities
from truepose_core.mannequin.body import rest_joints
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import warp
from truepose_core.regions import Region

HEIGHT, WIDTH = 128, 96
POSES = ("stand", "walk", "wave")


@pytest.fixture(scope="module")
def shown():
    """One mannequin in three poses."""
    poses = [ready_poses()[name] for name in POSES]
    both = BodyPoses(*(torch.cat([getattr(p, name) for p in poses]) for name in ("theta", "camera")))
    return render(sample_identities([5], 1).select([0, 0, 0]), both, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def truth(shown):
    return PosedBody(BodyPose(shown.theta, shown.beta, shown.camera), (WIDTH, HEIGHT))


@pytest.fixture
def boxes(tmp_path):
    return SmplModel.load(saved(tmp_path, box_body()))


def source(shown):
    return shown.image[:1], HumanParsing(shown.parsing[:1])


# ---------------------------------------------------------------------------------------------------- posed bodies


def test_keypoints_are_where_the_renderer_has_them(shown, truth):
    seen = shown.keypoints[..., 2] > 0
    torch.testing.assert_close(truth.keypoints()[seen], shown.keypoints[seen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(96, 128), (200, 128), (96, 400), (33, 57)])
def test_fitting_a_body_is_fitting_its_keypoints(truth, size):
    fitted = truth.fitted(size)
    wanted = torch.stack([fit_body(body, truth.canvas, size) for body in truth.keypoints()])
    assert fitted.canvas == size
    torch.testing.assert_close(fitted.keypoints(), wanted, atol=1e-5, rtol=0)


def test_cropping_a_body_is_cropping_its_keypoints(truth):
    crop = crop_person((HEIGHT, WIDTH), (20, 10, 70, 120), (256, 192), margin=0.1)
    cropped = truth.cropped(crop.box, crop.size_model[::-1])
    torch.testing.assert_close(cropped.keypoints(), crop.apply_keypoints(truth.keypoints()), atol=2e-3, rtol=0)


def test_bodies_are_drawn_on_their_own_canvas_only(truth):
    assert len(truth.render(64, 48)) == 3
    with pytest.raises(TruePoseError, match="canvas of 96x128 and the picture is 128x128"):
        truth.render(128, 128)
    with pytest.raises(TruePoseError, match=r"canvas of a body is \(0, 3\)"):
        PosedBody(truth.pose, (0, 3))


# ---------------------------------------------------------------------------------------------------- lifting


def test_the_likeliest_hypothesis_is_what_lift_gives(shown):
    one, other = lift(shown.keypoints, WIDTH / HEIGHT), lift_person(shown.keypoints, (WIDTH, HEIGHT))
    for name in ("theta", "beta", "camera"):
        assert torch.equal(getattr(one.bodies, name), getattr(other.body.pose, name))
    assert torch.equal(one.error, other.error) and torch.equal(one.doubt[:, 0], other.doubt)


def test_hypotheses_differ_and_come_in_the_order_of_doubt(shown):
    found = [lift_person(shown.keypoints, (WIDTH, HEIGHT), hypothesis=k, steps=20) for k in range(3)]
    assert bool((found[0].doubt <= found[1].doubt).all() and (found[1].doubt <= found[2].doubt).all())
    assert not torch.equal(found[0].body.pose.theta, found[1].body.pose.theta)
    with pytest.raises(TruePoseError, match="hypothesis is 3; expected 0 to 2"):
        lift_person(shown.keypoints, (WIDTH, HEIGHT), hypothesis=3)


def test_lifting_is_the_same_in_inference_mode(shown, boxes):
    for smpl in (None, boxes):
        plain = lift_person(shown.keypoints, (WIDTH, HEIGHT), steps=5, smpl=smpl)
        with torch.inference_mode():
            inside = lift_person(shown.keypoints.clone(), (WIDTH, HEIGHT), steps=5, smpl=smpl)
        assert torch.equal(plain.body.pose.theta, inside.body.pose.theta)


def test_a_known_person_keeps_shape_girth_and_model(shown, truth, boxes):
    like = PosedBody(truth.pose.select([0]), truth.canvas, boxes)
    found = lift_person(shown.keypoints, (WIDTH, HEIGHT), like=like, steps=5).body
    assert found.smpl is boxes and torch.equal(found.pose.beta, like.pose.beta.expand(3, -1))
    with pytest.raises(TruePoseError, match="2 bodies to keep the shape of and 3 poses"):
        lift_person(shown.keypoints, (WIDTH, HEIGHT), like=truth.of(torch.arange(2)))


def test_joints_of_a_model_are_its_own(boxes):
    beta = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert joints_of(None) is rest_joints
    torch.testing.assert_close(joints_of(boxes)(beta), boxes.joints(beta))
    torch.testing.assert_close(joints_of(boxes)(torch.zeros(1, 10)), rest_joints(torch.zeros(1, 10)), atol=1e-3, rtol=0)


def test_an_smpl_file_is_fitted_with_its_own_joints(shown, boxes):
    """The boxes have the generic body's mean joints: fitted to keypoints of that body, they come to lie on them."""
    found = lift_person(shown.keypoints, (WIDTH, HEIGHT), smpl=boxes)
    assert float(found.error.max()) < 0.02 and found.body.smpl is boxes
    off = (found.body.keypoints() - shown.keypoints)[..., :2] * shown.keypoints[..., 2:]
    assert float(off.abs().max()) < 0.06


@pytest.mark.parametrize("wide", [{"trunk": 1.45}, {"legs": 1.7}, {"arms": 1.25, "hair": 0.9}])
def test_girth_is_read_off_the_parsing(truth, wide):
    body = truth.of(torch.tensor([0]))
    drawn = Girth(**{name: torch.tensor([wide.get(name, 1.0)]) for name in ("trunk", "arms", "legs", "hair")})
    maps = GenericBody(drawn).render(body.pose, HEIGHT, WIDTH)
    found = girth_of(body, HumanParsing.from_labels(maps.region))
    for name, factor in vars(drawn).items():
        assert getattr(found, name).item() == pytest.approx(factor.item()), name


def test_what_is_out_of_the_picture_keeps_its_girth(truth):
    body = truth.of(torch.tensor([0])).cropped((0, 0, WIDTH, 48), (WIDTH, 48))
    labels = torch.full((1, 48, WIDTH), Region.UPPER)
    found = girth_of(body, HumanParsing.from_labels(labels))
    assert found.legs.item() == 1 and found.trunk.item() > 1


# ---------------------------------------------------------------------------------------------------- carrying


def test_its_own_pose_gives_the_person_back(shown, truth):
    image, parsing = source(shown)
    one = truth.of(torch.tensor([0]))
    made = carry_person(image, parsing, one, one)
    inside = parsing.masks[:, :1] < 0.5
    assert float((made.seen * inside).sum() / inside.sum()) > 0.85
    assert float(((made.picture - image).abs() * made.seen).sum() / made.seen.sum()) < 0.02
    assert not (made.picture * (1 - made.seen)).any()
    agree = made.parsing.labels() == parsing.labels()
    assert float(agree.float().mean()) > 0.95


def test_keypoints_are_carried_as_the_bodies_they_are_lifted_to(shown):
    image, parsing = source(shown)
    points = shown.keypoints
    made = carry_person(image, parsing, points[:1], points[1:])
    first = lift_person(points[:1], (WIDTH, HEIGHT)).body
    second = lift_person(points[1:], (WIDTH, HEIGHT), like=first).body
    given = carry_person(image, parsing, first, second)
    assert torch.equal(made.picture, given.picture) and torch.equal(made.seen, given.seen)
    assert torch.equal(made.depth, given.depth) and torch.equal(made.target.pose.beta, first.pose.beta.expand(2, -1))


def test_many_targets_are_each_alone_whatever_the_chunk(shown, truth, monkeypatch):
    image, parsing = source(shown)
    first = truth.of(torch.tensor([0]))
    together = carry_person(image, parsing, first, truth)
    monkeypatch.setattr(person, "_CHUNK", 1)
    chunked = carry_person(image, parsing, first, truth)
    for i in range(3):
        alone = carry_person(image, parsing, first, truth.of(torch.tensor([i])))
        for made in (together, chunked):
            assert torch.equal(made.picture[i : i + 1], alone.picture) and torch.equal(
                made.parsing[i].masks, alone.parsing.masks
            )


def test_a_batch_of_pictures_goes_to_one_target(shown, truth):
    image, parsing = shown.image, HumanParsing(shown.parsing)
    made = carry_person(image, parsing, truth, truth.of(torch.tensor([1])))
    for i in range(3):
        alone = carry_person(image[i : i + 1], parsing[i], truth.of(torch.tensor([i])), truth.of(torch.tensor([1])))
        assert torch.equal(made.picture[i : i + 1], alone.picture)


def test_the_target_takes_the_shape_of_the_source(shown, truth):
    image, parsing = source(shown)
    first = truth.of(torch.tensor([0]))
    other = PosedBody(BodyPose(truth.pose.theta, truth.pose.beta + 1, truth.pose.camera), truth.canvas)
    made, wanted = (carry_person(image, parsing, first, target) for target in (other, truth))
    assert torch.equal(made.picture, wanted.picture)


def test_a_result_of_another_size_and_shape(shown, truth):
    image, parsing = source(shown)
    target = truth.fitted((160, 128))
    made = carry_person(image, parsing, truth.of(torch.tensor([0])), target, (128, 160))
    assert made.picture.shape == made.depth.shape == (3, 3, 128, 160) and made.parsing.size == (128, 160)
    narrow = carry_person(image, parsing, truth.of(torch.tensor([0])), truth)
    # The same pixels, in the middle.
    assert float((made.picture[..., 32:-32] - narrow.picture).abs().mean()) < 2e-3


def test_mirrors_are_hypotheses_of_their_own(shown, truth):
    image, parsing = source(shown)
    first = truth.of(torch.tensor([0]))
    turned = BodyPose(first.pose.theta.clone(), first.pose.beta, first.pose.camera)
    turned.theta[:, 0] = torch.tensor([0.0, torch.pi, 0.0])
    back = PosedBody(turned, truth.canvas)
    shares = {m: float(carry_person(image, parsing, first, back, mirror=m).seen.mean()) for m in ("none", "front-back")}
    assert shares["front-back"] > 3 * shares["none"]


def test_the_skeleton_carries_as_the_skeleton_warp(shown):
    image, parsing = source(shown)
    points = shown.keypoints
    made = carry_person(image, parsing, points[:1], points[1:2], method="skeleton")
    wanted, certain = warp(image, parsing, points[:1], points[1:2])
    on = (made.seen > 0).expand_as(image) & (1 - made.parsing.masks[:, :1] > 0.99).expand_as(image)
    assert on.any() and made.depth is None and made.source is None
    assert bool((certain[made.seen > 0] > 0.75).all())
    torch.testing.assert_close(made.picture[on], wanted[on], atol=0.02, rtol=0)


def test_few_keypoints_are_for_the_skeleton(shown):
    image, parsing = source(shown)
    arm = shown.keypoints[:1].clone()
    arm[:, [i for i in range(18) if i not in (2, 3, 4)]] = 0
    assert carry_person(image, parsing, arm, shown.keypoints[1:2], method="skeleton").seen.any()
    with pytest.raises(TruePoseError, match=r"3 visible keypoints in common; expected at least 5.*method skeleton"):
        carry_person(image, parsing, arm, shown.keypoints[1:2])
    leg = shown.keypoints[1:2].clone()
    leg[:, :8] = 0
    with pytest.raises(TruePoseError, match="no limb in common"):
        carry_person(image, parsing, arm, leg, method="skeleton")


def test_what_is_refused(shown, truth, boxes):
    image, parsing = source(shown)
    points = shown.keypoints
    first = truth.of(torch.tensor([0]))
    far = BodyPose(first.pose.theta, first.pose.beta, first.pose.camera + torch.tensor([0.0, 4.0, 0.0]))
    for given, match in (
        ({"parsing": HumanParsing(shown.parsing)}, "the parsing"),
        ({"parsing": parsing.resize(64, 48)}, "and its parsing"),
        ({"method": "magic"}, "the method is 'magic'"),
        ({"mirror": "up-down"}, "mirror is 'up-down'"),
        ({"mirror": "both", "method": "skeleton"}, "the skeleton knows no other side"),
        ({"source": truth}, "1 pictures and 3 source people"),
        ({"source": first.fitted((128, 128))}, "the source body is on a canvas of 128x128 and the picture is 96x128"),
        ({"target": first.fitted((128, 128))}, "the target body is on a canvas of 128x128"),
        ({"target": PosedBody(far, truth.canvas)}, "body 0 of 1 is outside the picture"),
        ({"target": points[1:2] * torch.tensor([1.0, 1, 0])}, "0 visible keypoints in common"),
        ({"target": points[1:2] * float("nan")}, "in common|NaN"),
        ({"source": PosedBody(first.pose, truth.canvas, boxes), "target": first}, "bodies of two models"),
    ):
        with pytest.raises(TruePoseError, match=match):
            carry_person(**{"image": image, "parsing": parsing, "source": points[:1], "target": points[1:2]} | given)
    with pytest.raises(TruePoseError, match="2 pictures and 3 target poses"):
        carry_person(shown.image[:2], HumanParsing(shown.parsing[:2]), points[:2], points)


def test_an_smpl_file_carries_too(shown, boxes):
    image, parsing = source(shown)
    made = carry_person(image, parsing, shown.keypoints[:1], shown.keypoints[1:], smpl=boxes)
    assert made.source.smpl is not None and made.target.smpl is not None and made.source.girth is None
    assert bool(made.seen.flatten(1).any(1).all())


# ---------------------------------------------------------------------------------------------------- pictures


def test_depth_and_normals_in_both_conventions(truth):
    maps = truth.render(HEIGHT, WIDTH)
    on = maps.mask.expand(-1, 3, -1, -1) > 0
    for convention, farthest in ((CONTROLNET, 0.2), (CHAMP, 0.0)):
        depth = depth_picture(maps, convention)
        assert not depth[~on].any()
        for one, where in zip(depth, on, strict=True):
            assert one[where].max().item() == pytest.approx(1) and one[where].min().item() == pytest.approx(farthest)
    ours, theirs = normal_picture(maps, CONTROLNET), normal_picture(maps, CHAMP)
    assert not theirs[~on].any()
    # A point on the viewer's right of a limb faces right: red in champ's, no red in ControlNet's.
    right = (maps.normal[:, 0] > 0.9) & (maps.mask[:, 0] > 0)
    assert right.any() and bool((theirs[:, 0][right] > 0.9).all()) and bool((ours[:, 0][right] < 0.1).all())
    front = (maps.normal[:, 2] > 0.99) & (maps.mask[:, 0] > 0)
    for picture in (ours, theirs):
        assert bool((picture[:, 2][front] > 0.99).all())
    assert torch.equal(ours[:, :, 0, 0], torch.tensor([[0.5, 0.5, 1.0]]).expand(3, -1))
    with pytest.raises(TruePoseError, match="the convention is 'blender'"):
        depth_picture(maps, "blender")


def test_semantic_colours_are_champs(truth):
    maps = truth.render(HEIGHT, WIDTH)
    picture = semantic_picture(maps)
    # Read from the colours of champ's own mesh: pelvis, head, right fingers.
    places = {0: maps.part == 0, 15: maps.part == 15, 23: (maps.part == 21) & (maps.rest[:, 0] < -0.8)}
    for joint, colour in ((0, (68, 1, 84)), (15, (33, 165, 133)), (23, (189, 223, 38))):
        where = places[joint]
        found = picture.permute(0, 2, 3, 1)[where]
        assert len(found) and bool((found * 255 - torch.tensor(colour)).abs().max() < 1e-3)
    assert not picture.permute(0, 2, 3, 1)[maps.part < 0].any()
    assert set(CHAMP_MAPS) == {"depth", "normal", "semantic_map"}


def test_coordinates_do_not_move_with_the_pose(truth):
    maps = truth.render(HEIGHT, WIDTH)
    picture = coordinate_picture(maps)
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1
    for i in range(3):
        head = picture[i].permute(1, 2, 0)[maps.part[i] == 15]
        foot = picture[i].permute(1, 2, 0)[maps.part[i] == 7]
        assert float(head[:, 1].min()) > 0.6 and float(foot[:, 1].max()) < 0.2 and float(foot[:, 0].min()) > 0.5
