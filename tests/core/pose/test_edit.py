"""Laws of mirroring, moving, editing and interpolating poses."""

import math

import numpy as np
import pytest

from truepose_core.errors import TruePoseError
from truepose_core.pose import Person, Pose
from truepose_core.pose.edit import (
    ABOUT,
    FACE_MIRROR,
    PARENTS,
    anchor_point,
    bounds,
    edit_joint,
    interpolate_persons,
    interpolate_poses,
    mirror_person,
    mirror_pose,
    transform_pose,
)
from truepose_core.pose.keypoints import BODY_KEYPOINTS, LIMBS

WIDTH, HEIGHT = 512, 768
ASPECT = WIDTH / HEIGHT
STRETCH = np.array([ASPECT, 1.0])
PARTS = ("body", "hand_left", "hand_right", "face")
JOINT = {name: i for i, name in enumerate(BODY_KEYPOINTS)}


def points(rng, n, missing):
    xyc = np.concatenate([rng.uniform(0.2, 0.8, (n, 2)), np.ones((n, 1))], 1)
    xyc[rng.uniform(size=n) < missing] = 0
    return xyc


def person(seed=0, missing=0.0):
    rng = np.random.default_rng(seed)
    return Person(*(points(rng, n, missing) for n in (18, 21, 21, 70)))


def pose(*people):
    return Pose(WIDTH, HEIGHT, people or (person(),))


def standing():
    """Somebody who stands upright and faces us, in torso lengths of 0.25 image heights."""
    xy = {
        **{"nose": (0, -0.5), "neck": (0, 0), "r_shoulder": (-0.4, 0), "r_elbow": (-0.5, 0.55), "r_wrist": (-0.5, 1.0)},
        **{"l_shoulder": (0.4, 0), "l_elbow": (0.5, 0.55), "l_wrist": (0.5, 1.0), "r_hip": (-0.2, 1)},
        **{
            "r_knee": (-0.2, 1.8),
            "r_ankle": (-0.2, 2.6),
            "l_hip": (0.2, 1),
            "l_knee": (0.2, 1.8),
            "l_ankle": (0.2, 2.6),
        },
        **{"r_eye": (-0.1, -0.6), "l_eye": (0.1, -0.6), "r_ear": (-0.2, -0.5), "l_ear": (0.2, -0.5)},
    }
    body = np.array([(*xy[name], 1) for name in BODY_KEYPOINTS], dtype=float)
    body[:, :2] = body[:, :2] * 0.2 / STRETCH + (0.5, 0.3)
    return Person(body)


def same(a, b, atol=1e-6):
    for name in PARTS:
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_allclose(one, other, atol=atol, err_msg=name)


def at(person, joint):
    return person.body[JOINT[joint], :2]


def test_parents_are_the_limbs():
    assert {(PARENTS[j], j) for j in range(18) if PARENTS[j] >= 0} == set(LIMBS)


# Mirror


def test_mirror_twice_is_the_pose():
    one = person(1, missing=0.2)
    same(mirror_person(mirror_person(one)), one)
    group = pose(one, person(2))
    same(mirror_pose(mirror_pose(group)).people[1], group.people[1])


def test_mirror_changes_names():
    one = person(3, missing=0.2)
    got = mirror_person(one)
    for name in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle", "eye", "ear"):
        before, after = one.body[JOINT[f"r_{name}"]], got.body[JOINT[f"l_{name}"]]
        assert after[2] == before[2]
        if before[2]:
            np.testing.assert_allclose(after[:2], (1 - before[0], before[1]), atol=1e-6)
    seen = one.hand_left[:, 2] > 0
    np.testing.assert_allclose(got.hand_right[seen, 0], 1 - one.hand_left[seen, 0], atol=1e-6)
    np.testing.assert_array_equal(got.hand_right[:, 2], one.hand_left[:, 2])


def test_face_mirror():
    places = np.array(FACE_MIRROR)
    assert sorted(places) == list(range(70)) and (places[places] == np.arange(70)).all()
    assert [i for i in range(70) if places[i] == i] == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]
    # Pairs of the iBUG markup: jaw, brows, eye corners, nostrils, mouth corners, pupils.
    for a, b in (
        (0, 16),
        (17, 26),
        (21, 22),
        (36, 45),
        (39, 42),
        (41, 46),
        (31, 35),
        (48, 54),
        (60, 64),
        (59, 55),
        (68, 69),
    ):
        assert places[a] == b


def test_mirror_of_one_person_is_on_the_spot():
    group = pose(person(1), person(2))
    got = mirror_pose(group, person=1)
    assert got.people[0] is group.people[0]
    np.testing.assert_allclose(bounds(got.people[1]), bounds(group.people[1]), atol=1e-6)


# Move and scale


def test_nothing_moved_is_the_pose():
    same(transform_pose(pose()).people[0], person())


@pytest.mark.parametrize("about", ABOUT)
def test_scale_about_a_point(about):
    group = pose(person(1), person(2))
    got = transform_pose(group, scale=1.5, about=about)
    for before, after in zip(group.people, got.people, strict=True):
        np.testing.assert_allclose(anchor_point(after, about), anchor_point(before, about), atol=1e-6)
        for name in PARTS:
            a, b = (getattr(one, name)[:, :2] - anchor_point(before, about) for one in (before, after))
            np.testing.assert_allclose(b, 1.5 * a, atol=1e-5)
    back = transform_pose(got, scale=1 / 1.5, about=about)
    same(back.people[0], group.people[0], 1e-5)


def test_move_one_person():
    group = pose(person(1, missing=0.3), person(2))
    got = transform_pose(group, move=(0.1, -0.2), person=0)
    assert got.people[1] is group.people[1]
    for name in PARTS:
        before, after = getattr(group.people[0], name), getattr(got.people[0], name)
        seen = before[:, 2] > 0
        np.testing.assert_allclose(after[seen, :2], before[seen, :2] + np.float32((0.1, -0.2)), atol=1e-6)
        assert (after[~seen] == 0).all()


def test_transform_refuses():
    body = person().body.copy()
    body[[10, 13]] = 0
    with pytest.raises(TruePoseError, match="ankles are missing"):
        transform_pose(pose(Person(body)), scale=2.0)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(TruePoseError, match="scale is"):
            transform_pose(pose(), scale=scale)
    with pytest.raises(TruePoseError, match="person 3"):
        transform_pose(pose(), person=3)
    with pytest.raises(TruePoseError, match="about is"):
        transform_pose(pose(), about="head")


# One joint


def test_a_joint_alone():
    got = edit_joint(pose(), "l_elbow", to=(0.1, 0.9), follow="stay").people[0]
    np.testing.assert_allclose(at(got, "l_elbow"), (0.1, 0.9), atol=1e-6)
    others = [j for j in range(18) if j != JOINT["l_elbow"]]
    np.testing.assert_array_equal(got.body[others], person().body[others])
    same(Person(person().body, got.hand_left, got.hand_right, got.face), person())


def test_children_move_along():
    got, before = edit_joint(pose(), "r_elbow", by=(0.1, 0.05), follow="move along").people[0], person()
    for joint in ("r_elbow", "r_wrist"):
        np.testing.assert_allclose(at(got, joint), at(before, joint) + np.float32((0.1, 0.05)), atol=1e-6)
    np.testing.assert_allclose(got.hand_right[:, :2], before.hand_right[:, :2] + np.float32((0.1, 0.05)), atol=1e-6)
    np.testing.assert_array_equal(got.hand_left, before.hand_left)
    np.testing.assert_array_equal(got.body[[0, 1, 2, 5, 6, 7]], before.body[[0, 1, 2, 5, 6, 7]])


def test_children_turn_along_rigidly():
    before = person(4)
    shoulder, elbow = at(before, "r_shoulder") * STRETCH, at(before, "r_elbow") * STRETCH
    # A quarter turn about the shoulder.
    x, y = elbow - shoulder
    got = edit_joint(pose(before), "r_elbow", to=(shoulder + np.array([-y, x])) / STRETCH).people[0]

    def turned(xy):
        offset = xy * STRETCH - shoulder
        return (shoulder + np.stack([-offset[..., 1], offset[..., 0]], -1)) / STRETCH

    np.testing.assert_allclose(at(got, "r_wrist"), turned(at(before, "r_wrist")), atol=1e-6)
    np.testing.assert_allclose(got.hand_right[:, :2], turned(before.hand_right[:, :2]), atol=1e-6)


def test_the_neck_takes_everything_along():
    before = person(5)
    same(
        edit_joint(pose(before), "neck", by=(0.1, 0.1)).people[0],
        transform_pose(pose(before), move=(0.1, 0.1)).people[0],
    )


def test_a_missing_joint_can_be_placed():
    body = person().body.copy()
    body[JOINT["l_wrist"]] = 0
    one = pose(Person(body))
    got = edit_joint(one, "l_wrist", to=(0.5, 0.5)).people[0]
    assert got.body[JOINT["l_wrist"]].tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(TruePoseError, match="l_wrist of person 0 is missing"):
        edit_joint(one, "l_wrist", by=(0.1, 0.0))


def test_edit_refuses():
    with pytest.raises(TruePoseError, match="no joint 'tail'"):
        edit_joint(pose(), "tail", by=(0.0, 0.0))
    with pytest.raises(TruePoseError, match="follow is"):
        edit_joint(pose(), "nose", by=(0.0, 0.0), follow="run")
    with pytest.raises(TruePoseError, match="either"):
        edit_joint(pose(), "nose")
    with pytest.raises(TruePoseError, match="person 2"):
        edit_joint(pose(), "nose", by=(0.0, 0.0), person=2)


# Interpolation


def arm(person, side="l"):
    way = (at(person, f"{side}_elbow") - at(person, f"{side}_shoulder")) * STRETCH
    return math.degrees(math.atan2(way[1], way[0])), math.hypot(*way)


def with_arm(angle, length, side="l"):
    """Standing, with the arm stretched at an angle in degrees, 0 to the right and 90 downwards."""
    body = standing().body.copy()
    way = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))]) * length / STRETCH
    for k, joint in enumerate(("elbow", "wrist"), 1):
        body[JOINT[f"{side}_{joint}"], :2] = body[JOINT[f"{side}_shoulder"], :2] + k * way
    return Person(body)


def test_ends_are_exact():
    a, b = person(1, missing=0.2), person(2, missing=0.2)
    frames = interpolate_poses(pose(a), pose(b), 5)
    assert len(frames) == 5
    assert frames[0].people[0] is a and frames[-1].people[0] is b


def test_ends_are_limits():
    a, b = person(1), person(2)
    same(interpolate_persons(a, b, 1e-9, aspect=ASPECT), a, 1e-5)
    same(interpolate_persons(a, b, 1 - 1e-9, aspect=ASPECT), b, 1e-5)


def test_back_is_the_same_way():
    a, b = person(3, missing=0.1), person(4, missing=0.1)
    same(interpolate_persons(a, b, 0.3, aspect=ASPECT), interpolate_persons(b, a, 0.7, aspect=ASPECT), 1e-5)


def test_a_pose_and_itself():
    one = person(5, missing=0.2)
    same(interpolate_persons(one, one, 0.4, aspect=ASPECT), one, 1e-6)


def test_angles_and_lengths_go_evenly():
    a, b = with_arm(80, 0.10), with_arm(-20, 0.14)
    for t in (0.25, 0.5, 0.75):
        angle, length = arm(interpolate_persons(a, b, t, aspect=ASPECT))
        assert angle == pytest.approx(80 - 100 * t, abs=1e-2)
        assert length == pytest.approx(0.10 + 0.04 * t, abs=1e-5)


def test_the_shortest_way_round():
    half = interpolate_persons(with_arm(170, 0.1), with_arm(-170, 0.1), 0.5, aspect=ASPECT)
    assert abs(arm(half)[0]) == pytest.approx(180, abs=1e-2)


def test_turning_around_is_about_the_vertical():
    front = standing()
    back = Person(np.concatenate([1 - front.body[:, :1], front.body[:, 1:]], 1) * (np.arange(18) != 0)[:, None])
    half = interpolate_persons(front, back, 0.5, aspect=ASPECT)
    for name in ("shoulder", "hip"):
        np.testing.assert_allclose(at(half, f"r_{name}"), at(half, f"l_{name}"), atol=1e-5)
        assert at(half, f"r_{name}")[1] == pytest.approx(at(front, f"r_{name}")[1], abs=1e-5)


def test_a_tilted_trunk_turns_as_a_whole():
    a = standing()
    angle = math.radians(80)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    body = a.body.astype(float)
    body[:, :2] = ((body[:, :2] - body[1, :2]) * STRETCH) @ turn.T / STRETCH + body[1, :2]
    half = interpolate_persons(a, Person(body), 0.5, aspect=ASPECT)
    for one, other in LIMBS:
        before, after = (math.hypot(*((p.body[other, :2] - p.body[one, :2]) * STRETCH)) for p in (a, half))
        assert after == pytest.approx(before, abs=1e-5)


def test_standing_feet_do_not_slide():
    body = standing().body.copy()
    body[:10, 1] += 0.05
    crouched = Person(body)
    for t in (0.3, 0.6):
        feet = interpolate_persons(standing(), crouched, t, aspect=ASPECT).body[[10, 13], :2].mean(0)
        np.testing.assert_allclose(feet, standing().body[[10, 13], :2].mean(0), atol=1e-6)


def test_what_one_pose_misses_is_shown_in_the_other_half():
    a, b = person(6), person(7)
    less = Person(b.body * (np.arange(18) != JOINT["l_wrist"])[:, None], hand_right=b.hand_right)
    early = interpolate_persons(a, less, 0.25, aspect=ASPECT)
    late = interpolate_persons(a, less, 0.75, aspect=ASPECT)
    assert early.body[JOINT["l_wrist"], 2] and not late.body[JOINT["l_wrist"], 2]
    assert early.hand_left is not None and late.hand_left is None
    assert early.face is not None and late.face is None
    assert early.hand_right is not None and late.hand_right is not None


def test_interpolation_refuses():
    with pytest.raises(TruePoseError, match="at least 2"):
        interpolate_poses(pose(), pose(), 1)
    with pytest.raises(TruePoseError, match="1 people and the second 2"):
        interpolate_poses(pose(), pose(person(1), person(2)), 3)
    with pytest.raises(TruePoseError, match="canvas is 512x768 and the second 512x512"):
        interpolate_poses(pose(), Pose(512, 512, (person(),)), 3)
    with pytest.raises(TruePoseError, match="second pose has no person"):
        interpolate_poses(pose(), Pose(WIDTH, HEIGHT), 3)
    with pytest.raises(TruePoseError, match="second pose has no visible"):
        interpolate_poses(pose(), pose(Person(np.zeros((18, 3)))), 3)
