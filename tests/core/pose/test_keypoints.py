"""Laws of the pose reader and writer."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truepose_core.errors import TruePoseError
from truepose_core.pose import Person, Pose, body_tensor, read_pose, write_pose
from truepose_core.pose.keypoints import BODY_KEYPOINTS, LIMBS
from truepose_core.pose.openpose import BODY_25_TO_18

BODY, HAND, FACE = 18, 21, 70

# OpenPose's own list of its 25 body points, in our spelling.
BODY_25 = (
    *("nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist"),
    *("mid_hip", "r_hip", "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle"),
    *("r_eye", "l_eye", "r_ear", "l_ear"),
    *("l_big_toe", "l_small_toe", "l_heel", "r_big_toe", "r_small_toe", "r_heel"),
)


def points(rng, n, missing=0.3):
    xy = rng.uniform(-0.5, 1.5, (n, 2))
    visible = (rng.uniform(size=(n, 1)) > missing).astype(float)
    return np.concatenate([xy, visible], 1) * visible


def person(seed, missing=0.3):
    rng = np.random.default_rng(seed)
    body = points(rng, BODY, missing)
    body[seed % BODY] = (0.9, 0.9, 1)
    return Person(body, points(rng, HAND), points(rng, HAND), points(rng, FACE))


def frame(body, width=512, height=768, **arrays):
    people = [{"pose_keypoints_2d": body, **arrays}]
    return {"canvas_width": width, "canvas_height": height, "people": people}


def flat(array):
    return np.asarray(array, dtype=float).ravel().tolist()


def pixels(n=BODY, seed=0, width=512, height=768):
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0.1, 0.9, (n, 2)) * (width, height)
    return np.concatenate([xy, np.ones((n, 1))], 1)


def same(a, b, tolerance=1e-6):
    for field in ("body", "hand_left", "hand_right", "face"):
        x, y = getattr(a, field), getattr(b, field)
        if x is None or y is None:
            assert x is y, field
        else:
            np.testing.assert_allclose(x, y, atol=tolerance, err_msg=field)


def only_body(body, **options):
    (pose,) = read_pose(frame(body), **options)
    return pose.people[0].body


# Words


def test_keypoints_and_limbs():
    assert len(BODY_KEYPOINTS) == 18 and len(LIMBS) == 17
    # A tree: every keypoint is reached once from the neck.
    reached = {1}
    for a, b in LIMBS:
        assert a in reached and b not in reached
        reached.add(b)
    assert reached == set(range(18))
    assert [BODY_25[i] for i in BODY_25_TO_18] == list(BODY_KEYPOINTS)


# Round trip


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=3),
    st.integers(16, 4096),
    st.integers(16, 4096),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_reads_back(seeds, width, height):
    pose = Pose(width, height, tuple(person(seed) for seed in seeds))
    (back,) = read_pose(json.loads(json.dumps(write_pose(pose))))
    assert (back.width, back.height, len(back.people)) == (width, height, len(seeds))
    for a, b in zip(pose.people, back.people, strict=True):
        same(a, b)


def test_the_writer_is_strict():
    one = Person(points(np.random.default_rng(0), BODY) * (1, 1, 0.5))
    frames = write_pose([Pose(512, 768, (one,)), Pose(100, 50)])
    assert [set(f) for f in frames] == [{"canvas_width", "canvas_height", "people"}] * 2
    assert frames[1]["people"] == []
    (written,) = frames[0]["people"]
    lengths = {key: len(values) for key, values in written.items()}
    assert lengths == {
        "pose_keypoints_2d": 54,
        "face_keypoints_2d": 210,
        "hand_left_keypoints_2d": 63,
        "hand_right_keypoints_2d": 63,
    }
    body = np.array(written["pose_keypoints_2d"]).reshape(18, 3)
    assert set(body[:, 2]) == {0.0, 1.0}
    assert not body[body[:, 2] == 0].any()
    np.testing.assert_allclose(body[:, :2], one.body[:, :2] * (512, 768), rtol=1e-6)
    assert write_pose(Pose(100, 50)) == frames[1:]


def test_left_and_right_hands_are_kept_apart():
    left, right = flat(pixels(HAND, 1)), flat(pixels(HAND, 2))
    (pose,) = read_pose(frame(flat(pixels()), hand_left_keypoints_2d=left, hand_right_keypoints_2d=right))
    (again,) = write_pose(pose)[0]["people"]
    np.testing.assert_allclose(again["hand_left_keypoints_2d"], left, rtol=1e-6)
    np.testing.assert_allclose(again["hand_right_keypoints_2d"], right, rtol=1e-6)


# Tolerance: the same pose in other spellings


@pytest.mark.parametrize("spell", [dict, lambda f: [f], lambda f: (f,)])
def test_one_frame_or_a_list(spell):
    given_frame = frame(flat(pixels()))
    assert len(read_pose(spell(given_frame))) == 1
    np.testing.assert_allclose(
        read_pose(spell(given_frame))[0].people[0].body[:, :2],
        pixels()[:, :2] / (512, 768),
        atol=1e-6,
    )


def test_a_list_of_frames_gives_one_pose_each():
    poses = read_pose([frame(flat(pixels(seed=i)), width=100 + i) for i in range(3)])
    assert [pose.width for pose in poses] == [100, 101, 102]


def test_normalised_and_pixels_agree():
    body = pixels()
    normalised = body / (512, 768, 1)
    np.testing.assert_allclose(only_body(flat(normalised)), only_body(flat(body)), atol=1e-6)


def test_a_normalised_foot_below_the_canvas_stays_normalised():
    body = pixels() / (512, 768, 1)
    body[10, 1] = 1.08
    np.testing.assert_allclose(only_body(flat(body))[10], body[10], atol=1e-6)


def test_the_whole_frame_decides_whether_it_is_normalised():
    # A person in a corner beside a person far from it: both are in pixels.
    corner = np.concatenate([np.random.default_rng(0).uniform(0, 1, (18, 2)), np.ones((18, 1))], 1)
    two = frame(flat(corner))
    two["people"].append({"pose_keypoints_2d": flat(pixels())})
    (pose,) = read_pose(two)
    assert pose.people[0].body[:, 0].max() < 1 / 256


def test_body_25_and_nested_rows_read_as_body_18():
    body = pixels()
    long = np.full((25, 3), 77.0)
    long[list(BODY_25_TO_18)] = body
    for spelled in (flat(long), long.tolist(), body.tolist(), body, flat(body), tuple(flat(body))):
        np.testing.assert_allclose(only_body(spelled), only_body(flat(body)))


def test_68_face_points_have_no_pupils():
    face = pixels(68)
    (pose,) = read_pose(frame(flat(pixels()), face_keypoints_2d=flat(face)))
    read = pose.people[0].face
    np.testing.assert_allclose(read[:68, :2], face[:, :2] / (512, 768), atol=1e-6)
    assert not read[68:].any()


@pytest.mark.parametrize(
    "missing",
    [
        *((0, 0, 0), (-1, -1, -1), (-1, -1, 0), (-1, -1, 1), (55, 66, 0), (55, 66, -0.5)),
        *((None, None, None), (None, 5.0, 1.0), (5.0, 5.0, None), (float("nan"), 5.0, 0)),
    ],
)
def test_every_spelling_of_missing(missing):
    body = pixels().tolist()
    body[4] = list(missing)
    for spelled in (body, [value for row in body for value in row]):
        read = only_body(spelled)
        assert not read[4].any()
        assert read[[i for i in range(18) if i != 4], 2].all()


def test_a_missing_row_may_be_none():
    body = pixels().tolist()
    body[4] = None
    assert not only_body(body)[4].any()


@pytest.mark.parametrize("nothing", [None, [], np.zeros(0), [0.0] * 63])
def test_missing_hands_are_none(nothing):
    (pose,) = read_pose(frame(flat(pixels()), hand_left_keypoints_2d=nothing))
    assert pose.people[0].hand_left is None


def test_confidences_are_clipped_and_kept():
    body = pixels()
    body[:, 2] = 0.25
    body[3, 2] = 2
    read = only_body(flat(body))
    assert read[3, 2] == 1 and read[0, 2] == 0.25


def test_nobody_is_allowed_until_a_person_is_asked_for():
    for people in (
        [],
        None,
        [{}],
        [{"pose_keypoints_2d": None}],
        [{"pose_keypoints_2d": [0] * 54}],
    ):
        (pose,) = read_pose({"canvas_width": 8, "canvas_height": 8, "people": people})
        for index in (None, 0):
            with pytest.raises(TruePoseError, match=r"no person|no visible"):
                pose.person(index)


# Canvas


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="truepose_core")
    return caplog


def test_openpose_json_takes_the_callers_canvas_silently(said):
    plain = {"version": 1.3, "people": [{"pose_keypoints_2d": flat(pixels())}]}
    (pose,) = read_pose(plain, canvas=(512, 768))
    assert (pose.width, pose.height) == (512, 768)
    assert not said.records


def test_a_frames_own_canvas_wins():
    (pose,) = read_pose(frame(flat(pixels()), 512, 768), canvas=(10, 10))
    assert (pose.width, pose.height) == (512, 768)


def test_an_inferred_canvas_holds_the_keypoints_and_is_said(said):
    plain = {"people": [{"pose_keypoints_2d": flat(pixels())}]}
    (pose,) = read_pose(plain)
    body = pose.people[0].body
    assert pose.width % 8 == pose.height % 8 == 0
    assert body[:, :2].min() > 0 and body[:, :2].max() <= 1
    np.testing.assert_allclose(body[:, :2] * (pose.width, pose.height), pixels()[:, :2], rtol=1e-5)
    assert f"{pose.width}x{pose.height}" in said.text
    assert (pose.width - pixels()[:, 0].max()) < 8


def test_a_normalised_pose_without_a_canvas_is_square_and_said(said):
    plain = {"people": [{"pose_keypoints_2d": flat(pixels() / (512, 768, 1))}]}
    (pose,) = read_pose(plain)
    assert (pose.width, pose.height) == (512, 512)
    assert "512x512" in said.text


@pytest.mark.parametrize("width", [0, -5, 1.5, "512", None, True, float("nan"), 10**12])
def test_bad_canvas_sizes_are_refused(width):
    with pytest.raises(TruePoseError, match="canvas width"):
        read_pose(frame(flat(pixels()), width=width))


# Choosing a person


def boxed(left, top, right, bottom):
    body = np.zeros((18, 3))
    body[0], body[1] = (left, top, 1), (right, bottom, 1)
    return Person(body)


def test_the_largest_person_is_taken_in_pixels_and_said(said):
    # On a wide canvas the wide box is the larger one, though not in normalised coordinates.
    tall, wide = boxed(0, 0, 0.1, 0.9), boxed(0, 0, 0.5, 0.1)
    pose = Pose(1000, 100, (tall, wide))
    assert pose.largest() == 1
    assert pose.person() is wide
    assert "2 people" in said.text and "person 1" in said.text
    assert Pose(100, 100, (tall, wide)).largest() == 0


def test_one_person_is_taken_without_a_word(said):
    pose = Pose(10, 10, (boxed(0, 0, 1, 1),))
    assert pose.person() is pose.person(0) is pose.people[0]
    assert not said.records


def test_the_first_of_equals_is_the_largest():
    assert Pose(10, 10, (boxed(0, 0, 1, 1), boxed(0, 0, 1, 1))).largest() == 0


@pytest.mark.parametrize("index", [2, -1, 100])
def test_a_person_that_is_not_there(index):
    pose = Pose(10, 10, (boxed(0, 0, 1, 1), boxed(0, 0, 1, 1)))
    with pytest.raises(TruePoseError, match=f"person {index}.*has 2.*0 to 1"):
        pose.person(index)


def test_body_tensor_stacks_people():
    people = [person(1), person(2)]
    stacked = body_tensor(people)
    assert stacked.shape == (2, 18, 3) and stacked.dtype == torch.float32
    assert np.array_equal(stacked[1].numpy(), people[1].body)
    stacked[0] = 0  # the people are not touched
    assert people[0].body.any()
    with pytest.raises(TruePoseError):
        body_tensor([])


# Types


def test_missing_keypoints_become_zero_and_arrays_are_read_only():
    body = np.full((18, 3), 0.5)
    body[3, 2] = 0
    one = Person(body)
    assert not one.body[3].any() and one.body.dtype == np.float32
    with pytest.raises(ValueError):
        one.body[0, 0] = 1
    assert body[3, 0] == 0.5  # the caller's array is not touched


@pytest.mark.parametrize(
    "arguments",
    [
        {"body": np.zeros((25, 3))},
        {"body": np.zeros((18, 2))},
        {"body": np.full((18, 3), np.nan)},
        {"body": np.full((18, 3), 2.0)},
        {"body": np.zeros((18, 3)), "hand_left": np.zeros((20, 3))},
        {"body": np.zeros((18, 3)), "face": np.zeros((68, 3))},
    ],
)
def test_a_person_of_another_shape_is_refused(arguments):
    with pytest.raises(TruePoseError):
        Person(**arguments)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5.5, 5), ("5", 5), (True, 5)])
def test_a_pose_needs_a_canvas(size):
    with pytest.raises(TruePoseError, match="canvas"):
        Pose(*size)


def test_people_are_persons():
    with pytest.raises(TruePoseError, match="dict"):
        Pose(5, 5, ({},))


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_and_infinity_are_refused_with_the_keypoints_name(value, place):
    body = pixels().tolist()
    body[7][place] = value
    with pytest.raises(TruePoseError, match=r"body keypoint 7 \(l_wrist\)"):
        only_body(body)


def test_a_confidence_of_nan_is_refused():
    body = pixels().tolist()
    body[7][2] = float("nan")
    with pytest.raises(TruePoseError, match="l_wrist"):
        only_body(body)


@pytest.mark.parametrize(
    ("point", "fine"),
    [
        ((512 * 4.99, 5), True),
        ((512 * 5.01, 5), False),
        ((-512 * 3.99, 5), True),
        ((-512 * 4.01, 5), False),
        ((5, 768 * 5.01), False),
        ((5, -768 * 4.01), False),
    ],
)
def test_more_than_four_canvas_sizes_away_is_refused_with_the_keypoints_name(point, fine):
    body = pixels()
    body[2, :2] = point
    if fine:
        assert only_body(flat(body))[2, 2] == 1
        return
    with pytest.raises(TruePoseError, match=r"body keypoint 2 \(r_shoulder\).*4 canvas sizes"):
        only_body(flat(body))


def test_far_out_is_found_in_hands_and_without_a_canvas_too():
    hand = pixels(HAND)
    hand[20, 0] = 1e6
    with pytest.raises(TruePoseError, match="hand left keypoint 20"):
        read_pose(frame(flat(pixels()), hand_left_keypoints_2d=flat(hand)))
    body = pixels()
    body[0, 0] = 1e9
    with pytest.raises(TruePoseError, match="nose"):
        read_pose({"people": [{"pose_keypoints_2d": flat(body)}]})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "empty list"),
        (5, "int"),
        (None, "NoneType"),
        ({}, "people"),
        ([[1, 2, 3]], "people"),
        ([{"people": []}, 5], "frame 1"),
        ({"people": {}}, "list"),
        ({"people": "all"}, "list"),
        ({"people": [[1, 2]]}, "dictionary"),
        (frame([1.0] * 53), "53 values"),
        (frame([1.0] * 51), "51 values.*18 or 25"),
        (frame([[1.0, 2.0]] * 18), "18 values"),
        (frame({"x": 1}), "dict"),
        (frame("0,0,0"), "str"),
        (frame([True] * 54), "True"),
        (frame(["1"] * 54), "'1'"),
        (frame(flat(pixels()), face_keypoints_2d=[1.0] * 63), "face_keypoints_2d.*68 or 70"),
        (frame(flat(pixels()), hand_left_keypoints_2d=[1.0] * 54), "hand_left.*21"),
    ],
)
def test_other_shapes_are_refused(source, said):
    with pytest.raises(TruePoseError, match=said):
        read_pose(source)


def test_the_second_of_two_people_is_named():
    two = frame(flat(pixels()))
    two["people"].append({"pose_keypoints_2d": [1.0]})
    with pytest.raises(TruePoseError, match="person 1"):
        read_pose(two)


def test_files_read_as_their_content(tmp_path):
    content = [frame(flat(pixels()))]
    path = tmp_path / "pose.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(content), encoding=encoding)
        for name in (path, str(path)):
            same(read_pose(name)[0].people[0], read_pose(content)[0].people[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not valid JSON"),
        (b"\xff\xd8\xff\xe0 a jpeg", "not a text file"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" + b"9" * 10_000 + b"]", "float"),
        (b'{"people": 5}', "list"),
        (b"NaN", "float"),
        (b'"text"', "str"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, said):
    path = tmp_path / "pose.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TruePoseError, match=rf"pose\.json.*{said}"):
        read_pose(path)


def test_a_folder_is_not_a_pose(tmp_path):
    with pytest.raises(TruePoseError, match="cannot be read"):
        read_pose(tmp_path)


def test_an_oversized_file_is_refused_unread(tmp_path):
    path = tmp_path / "pose.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(TruePoseError, match="bytes"):
        read_pose(path)


def test_reading_poses_needs_no_torch():
    code = "import sys, truepose_core.pose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Hands


def with_hands(left_at, right_at, wrists=((150.0, 400.0), (350.0, 420.0)), **more):
    """Somebody with a left and a right wrist, and a hand of 40 pixels at each of two places (or None)."""
    body = pixels()
    body[[7, 4], :2] = wrists
    hands = {}
    for name, place, seed in (("left", left_at, 1), ("right", right_at, 2)):
        if place is not None:
            hand = np.concatenate([np.random.default_rng(seed).uniform(0, 40, (HAND, 2)), np.ones((HAND, 1))], 1)
            hand[:, :2] += np.asarray(place) - hand[0, :2] + (2, -3)
            hands[f"hand_{name}_keypoints_2d"] = flat(hand)
    return frame(flat(body), **hands, **more)


def roots(given_frame):
    (one,) = read_pose(given_frame)[0].people
    hands = one.hand_left, one.hand_right
    return [None if hand is None else (hand[0, :2] * (512, 768)).round().tolist() for hand in hands]


def test_hands_on_their_own_wrists_stay():
    assert roots(with_hands((150, 400), (350, 420))) == [[152, 397], [352, 417]]
    assert roots(with_hands((150, 400), None)) == [[152, 397], None]


def test_hands_on_the_other_wrists_change_sides():
    assert roots(with_hands((350, 420), (150, 400))) == [[152, 397], [352, 417]]
    assert roots(with_hands((350, 420), None)) == [None, [352, 417]]
    assert roots(with_hands(None, (150, 400))) == [[152, 397], None]


def test_hands_near_no_wrist_stay():
    assert roots(with_hands((300, 100), (100, 100))) == [[302, 97], [102, 97]]
    assert roots(with_hands((340, 300), None)) == [[342, 297], None]


def test_unsure_keypoints_of_sdpose_are_missing():
    body = pixels()
    body[5, 2], body[6, 2] = 0.29, 0.31
    assert (only_body(flat(body))[[5, 6], 2] > 0).all()
    (one,) = read_pose(frame(flat(body), foot_keypoints_2d=[0.0] * 18))[0].people
    assert (one.body[[5, 6], 2] > 0).tolist() == [False, True]
