"""Laws of retargeting, and its error against true renderings of the mannequin."""

import numpy as np
import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import BodyPoses, render, rest_joints, sample_identities, sample_poses
from truepose_core.pose import Person, Pose, body_tensor
from truepose_core.pose.retarget import (
    FOREARM,
    HEAD_SIZE,
    LENGTHS,
    full_lengths,
    length_ratios,
    missing_parts,
    rescaled,
    retarget,
    retarget_as_shown,
    retarget_person,
    retarget_pose,
    retarget_video,
    stature,
)

HEIGHT, WIDTH = 64, 48
ASPECT = WIDTH / HEIGHT
ANKLES = [10, 13]


def people(count=48, proportions=2.0):
    """(target, source, truth): other people in other poses, and the source's person in the target's pose."""
    index = torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    one, other = sample_identities(index, 1), sample_identities(index + 5000, 1)
    one.beta.copy_((torch.rand(count, 10, generator=generator) * 2 - 1) * proportions)
    other.beta.copy_((torch.rand(count, 10, generator=generator) * 2 - 1) * proportions)
    pose, own_pose = sample_poses(index, 7), sample_poses(index + 9000, 7)
    return (
        render(one, pose, HEIGHT, WIDTH, 1),
        render(other, own_pose, HEIGHT, WIDTH, 1),
        render(other, pose, HEIGHT, WIDTH, 1),
    )


def standing(beta, aspect=ASPECT):
    """Keypoints [1, 18, 3] of a T-pose with these betas, 0.4 image heights a metre, the pelvis in the middle."""
    n = len(beta)
    theta = torch.zeros(n, 24, 3)
    people = sample_identities(range(n), 0)
    people.beta.copy_(beta)
    seen = render(people, BodyPoses(theta, torch.tensor([[0.5, 0.0, 0.0]]).expand(n, 3)), HEIGHT, round(HEIGHT * 2), 1)
    xy = seen.keypoints[..., :2] * torch.tensor([2.0, 1.0])
    scale = seen.camera[:, :1, None]
    xy = (xy - xy[:, [8, 11]].mean(1, keepdim=True)) / scale * 0.4 + 0.5
    return torch.cat([xy / torch.tensor([aspect, 1.0]), seen.keypoints[..., 2:]], -1)


def pixels(keypoints):
    return keypoints[..., :2] * torch.tensor([ASPECT, 1.0]) * 768


def error(got, truth, seen):
    """Mean distance in pixels of a picture 768 high; both stand on the same spot."""
    offset = got[:, ANKLES].mean(1, keepdim=True) - truth[:, ANKLES].mean(1, keepdim=True)
    distance = (got - offset - truth).norm(dim=-1)
    return float((distance * seen).sum() / seen.sum())


def true_stature(rendering):
    joints = rest_joints(rendering.beta)
    return (joints[:, 12, 1] - joints[:, 7, 1]) * rendering.camera[:, 0]


def test_nearer_to_the_truth_than_the_target_and_than_one_scale():
    target, source, truth = people()
    seen = (target.keypoints[..., 2] > 0) & (truth.keypoints[..., 2] > 0)
    metres = pixels(truth.keypoints) / truth.camera[:, :1, None]

    as_large = metres * (truth.camera[:, 0] * true_stature(target) / true_stature(truth))[:, None, None]
    kept = retarget(target.keypoints, source.keypoints, aspect=ASPECT)
    assert error(pixels(kept), as_large, seen) < 0.85 * error(pixels(target.keypoints), as_large, seen)

    as_seen = metres * source.camera[:, :1, None]
    sized = retarget(target.keypoints, source.keypoints, aspect=ASPECT, size="source")
    size = stature(full_lengths(source.keypoints, ASPECT)) / stature(full_lengths(target.keypoints, ASPECT))
    uniform = pixels(target.keypoints) * size[:, None, None]
    got = error(pixels(sized), as_seen, seen)
    assert got < 0.9 * error(uniform, as_seen, seen)
    assert got < 0.5 * error(pixels(target.keypoints), as_seen, seen)


def test_true_lengths_give_the_true_picture():
    """With the full lengths known, multiplying bones is what another body does to the picture."""
    target, _, truth = people(16)
    joints = [rest_joints(r.beta) * r.camera[:, :1, None] for r in (target, truth)]

    def lengths(j):
        def way(a, b):
            return (j[:, a] - j[:, b]).norm(dim=-1)

        neck, hips = (j[:, 16] + j[:, 17]) / 2, (j[:, 1] + j[:, 2]) / 2
        head = (j[:, 15] - neck).norm(dim=-1)
        parts = [way(16, 17), way(1, 2), (neck - hips).norm(dim=-1), way(16, 18), way(18, 20), way(1, 4), way(4, 7)]
        return torch.stack([*parts, head, head], -1)

    ratios = lengths(joints[1]) / lengths(joints[0])
    seen = (target.keypoints[..., 2] > 0) & (truth.keypoints[..., 2] > 0)
    seen[:, [0, 14, 15, 16, 17]] = False
    got = torch.stack(
        [
            torch.tensor(rescaled(Person(k.numpy()), r, aspect=ASPECT, anchor="feet").body)
            for k, r in zip(target.keypoints, ratios, strict=True)
        ]
    )
    assert error(pixels(got), pixels(truth.keypoints), seen) < 1


def test_lengths_of_a_plain_standing_body():
    generator = torch.Generator().manual_seed(3)
    beta = torch.rand(8, 10, generator=generator) * 2 - 1
    joints = rest_joints(beta) * 0.4
    got = full_lengths(standing(beta), ASPECT)
    torch.testing.assert_close(
        got[:, LENGTHS.index("thigh")], (joints[:, 1] - joints[:, 4]).norm(dim=-1), rtol=0.06, atol=0
    )
    torch.testing.assert_close(got[:, LENGTHS.index("torso")], torch.full((8,), 0.4 * 0.52), rtol=0.12, atol=0)


@pytest.mark.parametrize(
    ("parts", "factor"), [(("thigh", "shin"), 0.7), (("thigh", "shin"), 1.3), (("head",), 1.8), (("shoulders",), 1.4)]
)
def test_unlikely_proportions_are_seen_in_a_plain_pose(parts, factor):
    """Children and drawn figures: far from the mean person, but nothing else explains what is seen."""
    target = standing(torch.zeros(1, 10))
    true = torch.ones(len(LENGTHS))
    true[[LENGTHS.index(part) for part in parts]] = factor
    changed = rescaled(Person(target[0].numpy()), true, aspect=ASPECT, anchor="hips")
    ratios = length_ratios(target, body_tensor([changed]), aspect=ASPECT, size="source")[0]
    torch.testing.assert_close(ratios, true, rtol=0.1, atol=0)


@pytest.mark.parametrize("anchor", ["feet", "hips"])
@pytest.mark.parametrize("size", ["target", "source"])
def test_the_same_person_is_the_identity(anchor, size):
    target = people(6)[0].keypoints
    got = retarget(target, target, aspect=ASPECT, anchor=anchor, size=size)
    torch.testing.assert_close(got, target, atol=2e-6, rtol=0)


def test_size_and_place_of_the_source_do_not_matter():
    target, source, _ = (r.keypoints for r in people(6))
    smaller = torch.cat([source[..., :2] * 0.5 + 0.2, source[..., 2:]], -1) * (source[..., 2:] > 0)
    torch.testing.assert_close(
        retarget(target, smaller, aspect=ASPECT), retarget(target, source, aspect=ASPECT), atol=1e-5, rtol=0
    )
    ratio = length_ratios(target, smaller, aspect=ASPECT, size="source")
    torch.testing.assert_close(ratio * 2, length_ratios(target, source, aspect=ASPECT, size="source"))


def test_directions_and_foreshortening_stay():
    target, source, _ = (r.keypoints for r in people(8))
    ratios = length_ratios(target, source, aspect=ASPECT)
    got = retarget(target, source, aspect=ASPECT)
    stretch = torch.tensor([ASPECT, 1.0])
    for a, b, length in ((2, 3, 3), (3, 4, 4), (6, 7, 4), (8, 9, 5), (12, 13, 6), (1, 2, 0)):
        seen = (target[:, a, 2] > 0) & (target[:, b, 2] > 0)
        before = ((target[:, b] - target[:, a])[:, :2] * stretch)[seen]
        after = ((got[:, b] - got[:, a])[:, :2] * stretch)[seen]
        torch.testing.assert_close(after, before * ratios[seen, length, None], atol=1e-5, rtol=0)


def test_mirrored_in_mirrored_out():
    target, source, _ = (r.keypoints for r in people(6))
    order = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]

    def mirrored(body):
        body = body[:, order]
        return torch.cat([1 - body[..., :1], body[..., 1:]], -1) * (body[..., 2:] > 0)

    got = retarget(mirrored(target), mirrored(source), aspect=ASPECT)
    torch.testing.assert_close(got, mirrored(retarget(target, source, aspect=ASPECT)), atol=1e-5, rtol=0)


def test_anchors():
    target, source, _ = (r.keypoints for r in people(8))
    hips = retarget(target, source, aspect=ASPECT, anchor="hips")
    torch.testing.assert_close(hips[:, [8, 11], :2].mean(1), target[:, [8, 11], :2].mean(1), atol=1e-5, rtol=0)
    step = target.clone()
    step[:, 10, 1] = step[:, 13, 1] - 0.15
    feet = retarget(step, source, aspect=ASPECT)
    torch.testing.assert_close(feet[:, 13, :2], step[:, 13, :2], atol=2e-3, rtol=0)
    level = target.clone()
    level[:, 10, 1] = level[:, 13, 1]
    feet = retarget(level, source, aspect=ASPECT)
    torch.testing.assert_close(feet[:, ANKLES, :2].mean(1), level[:, ANKLES, :2].mean(1), atol=1e-5, rtol=0)


def test_missing_joints_stay_missing_and_the_rest_hardly_moves():
    target, source, _ = (r.keypoints for r in people(4))
    whole = retarget(target, source, aspect=ASPECT)
    for gone in ([3], [1], [8], [6, 7], [0, 14, 15, 16, 17], [10, 13, 9, 12]):
        less = target.clone()
        less[:, gone] = 0
        got = retarget(less, source, aspect=ASPECT, anchor="hips")
        assert got.isfinite().all()
        assert torch.equal(got[..., 2], less[..., 2])
        assert (got[:, gone] == 0).all()
        kept = [j for j in range(18) if j not in gone]
        near = retarget(target, source, aspect=ASPECT, anchor="hips")[:, kept] - got[:, kept]
        assert (near[..., :2].abs() * (got[:, kept, 2:] > 0)).max() < 0.05, gone
    assert torch.equal(whole[..., 2], target[..., 2])


def test_one_source_for_many_targets_and_a_batch_is_its_rows():
    target, source, _ = (r.keypoints for r in people(4))
    many = retarget(target, source[:1], aspect=ASPECT)
    for i in range(4):
        torch.testing.assert_close(many[i : i + 1], retarget(target[i : i + 1], source[:1], aspect=ASPECT))


def test_frames_of_one_person_share_their_lengths():
    index = torch.arange(12)
    person = sample_identities([3] * 12, 1)
    frames = render(person, sample_poses(index, 5), HEIGHT, WIDTH, 1)
    # One camera for all frames.
    xy = (frames.keypoints[..., :2] - 0.5) / frames.camera[:, :1, None] * 0.4 + 0.5
    frames = torch.cat([xy, frames.keypoints[..., 2:]], -1) * (frames.keypoints[..., 2:] > 0)
    together = full_lengths(frames, ASPECT, one_person=True)
    assert torch.equal(together, together[:1].expand(12, -1))
    joints = (rest_joints(person.beta) * 0.4)[:1]
    truth = torch.cat([(joints[:, a] - joints[:, b]).norm(dim=-1) for a, b in ((16, 18), (18, 20), (1, 4), (4, 7))])
    alone = (full_lengths(frames, ASPECT)[:, 3:7] / truth).log().abs().mean()
    assert (together[0, 3:7] / truth).log().abs().mean() < alone


def whole_person(body, seed=0):
    rng = np.random.default_rng(seed)

    def around(joint, n):
        xy = body[joint, :2] + rng.normal(size=(n, 2)) * 0.02
        return np.concatenate([xy, np.ones((n, 1))], 1)

    return Person(body, around(7, 21), around(4, 21), around(0, 70))


def test_hands_and_face_move_with_wrist_and_head():
    target, source, _ = (r.keypoints.numpy() for r in people(4))
    seen = next(i for i in range(4) if target[i, [0, 4, 7], 2].all())
    person, other = whole_person(target[seen]), Person(source[seen])
    got = retarget_person(person, other, aspect=ASPECT)
    bodies = body_tensor([person]), body_tensor([other])
    torch.testing.assert_close(torch.tensor(got.body)[None], retarget(*bodies, aspect=ASPECT), atol=1e-6, rtol=0)
    ratios = length_ratios(*bodies, aspect=ASPECT)[0].numpy()
    parts = (("hand_left", 7, FOREARM), ("hand_right", 4, FOREARM), ("face", 0, HEAD_SIZE))
    for name, joint, length in parts:
        before = getattr(person, name)[:, :2] - person.body[joint, :2]
        after = getattr(got, name)[:, :2] - got.body[joint, :2]
        np.testing.assert_allclose(after, before * ratios[length], atol=1e-6)


def test_groups():
    target, source, _ = (r.keypoints.numpy() for r in people(3))
    group = Pose(WIDTH, HEIGHT, tuple(Person(b) for b in target))
    sources = Pose(WIDTH, HEIGHT, tuple(Person(b) for b in source))
    got = retarget_pose(group, sources, target_person=1, source_person=2)
    assert got.people[0] is group.people[0] and got.people[2] is group.people[2]
    alone = retarget_person(group.people[1], sources.people[2], aspect=ASPECT)
    np.testing.assert_array_equal(got.people[1].body, alone.body)
    everybody = retarget_pose(group, sources, everybody=True)
    for i in range(3):
        alone = retarget_person(group.people[i], sources.people[i], aspect=ASPECT)
        np.testing.assert_array_equal(everybody.people[i].body, alone.body)
    with pytest.raises(TruePoseError, match="3 people and the source 1"):
        retarget_pose(group, Pose(WIDTH, HEIGHT, sources.people[:1]), everybody=True)
    with pytest.raises(TruePoseError, match="person 7"):
        retarget_pose(group, sources, target_person=7)
    with pytest.raises(TruePoseError, match="person 5"):
        retarget_pose(group, sources, source_person=5)
    with pytest.raises(TruePoseError, match="no person"):
        retarget_pose(Pose(8, 8), sources)


def test_videos():
    target, source, _ = (r.keypoints for r in people(3))
    poses = [Pose(WIDTH, HEIGHT, (Person(b.numpy()), Person(b.numpy() * (1, 0.5, 1)))) for b in target]
    (one,) = (Pose(WIDTH, HEIGHT, (Person(b.numpy()),)) for b in source[:1])
    got = retarget_video(poses, one, target_person=0)
    expected = retarget(target, source[:1], aspect=ASPECT, one_person=True)
    for before, after, body in zip(poses, got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(after.people[0].body), body, atol=1e-5, rtol=0)
        assert after.people[1] is before.people[1]
    with pytest.raises(TruePoseError, match="2 sizes"):
        retarget_video([poses[0], Pose(HEIGHT, HEIGHT, poses[1].people)], one)
    with pytest.raises(TruePoseError, match="no person"):
        retarget_video([poses[0], Pose(WIDTH, HEIGHT)], one)


def test_refuses():
    target, source, _ = (r.keypoints for r in people(2))
    with pytest.raises(TruePoseError, match="anchor is 'head'"):
        retarget(target, source, aspect=ASPECT, anchor="head")
    with pytest.raises(TruePoseError, match="size is 'big'"):
        retarget(target, source, aspect=ASPECT, size="big")
    with pytest.raises(TruePoseError, match="source keypoints are"):
        retarget(target, source[..., :2], aspect=ASPECT)
    with pytest.raises(TruePoseError, match="NaN"):
        retarget(target * torch.nan, source, aspect=ASPECT)
    with pytest.raises(TruePoseError, match="2 target poses and 3 source poses"):
        retarget(target, torch.cat([source, source[:1]]), aspect=ASPECT)
    with pytest.raises(TruePoseError, match="aspect"):
        retarget(target, source, aspect=0.0)
    alone = torch.zeros_like(source)
    alone[:, 4] = 1
    with pytest.raises(TruePoseError, match="no part of the body"):
        retarget(target, alone, aspect=ASPECT)


# ------------------------------------------------------------------------------------------------- half a person


def whole(beta=0.0, by=(0.0, 0.0), scale=1.0, width=96, height=64) -> Pose:
    """One standing person, scaled about the picture's middle and moved, on a canvas of width x height."""
    (body,) = standing(torch.full((1, 10), beta), width / height).numpy()
    xy = (body[:, :2] - 0.5) * scale + 0.5 + by
    return Pose(width, height, (Person(np.concatenate([xy, body[:, 2:]], 1)),))


def portrait(pose: Pose) -> Pose:
    """The same as an estimator finds it: what lies outside of the picture is missing."""
    (person,) = pose.people
    inside = ((person.body[:, :2] >= 0) & (person.body[:, :2] <= 1)).all(1, keepdims=True)
    return Pose(pose.width, pose.height, (Person(person.body * inside),))


def test_what_a_picture_leaves_out():
    assert missing_parts(whole().people[0]) == ()
    assert missing_parts(portrait(whole(by=(0, 0.45))).people[0]) == ("knees", "feet")
    assert missing_parts(whole(by=(0, 0.45)).people[0]) == ("knees", "feet")
    assert missing_parts(portrait(whole(by=(0, -0.5))).people[0]) == ("head",)


@pytest.mark.parametrize("height", [64, 128])
def test_a_pose_is_cut_where_the_source_is(height):
    """The same person standing, close up: the whole pose is laid over the photo's, whatever its own size and place."""
    photo = whole(by=(0.1, 0.7), scale=1.6)
    own = portrait(photo)
    assert missing_parts(own.people[0]) == ("hips", "knees", "feet")
    target = whole(scale=0.7, by=(-0.1, 0.05), width=96 * height // 64, height=height)
    (made,) = retarget_as_shown(target, own).people
    assert missing_parts(made) == missing_parts(own.people[0])
    np.testing.assert_allclose(made.body[1], photo.people[0].body[1], atol=1e-5)
    shown = own.people[0].body[:, 2] > 0
    np.testing.assert_allclose(made.body[shown, :2], photo.people[0].body[shown, :2], atol=0.05)


def test_hands_move_along_and_nothing_in_common_is_refused():
    target, own = whole(), portrait(whole(by=(0.1, 0.4)))
    (body,) = (one.body for one in target.people)
    hand = np.tile(body[7], (21, 1))
    (made,) = retarget_as_shown(Pose(96, 64, (Person(body, hand_left=hand),)), own).people
    np.testing.assert_allclose(made.hand_left, np.tile(made.body[7], (21, 1)), atol=1e-6)
    head, legs = np.zeros((18, 3), np.float32), np.array(body)
    head[[0, 14, 15]], legs[:8], legs[14:] = body[[0, 14, 15]], 0, 0
    with pytest.raises(TruePoseError, match="no joint in common"):
        retarget_as_shown(Pose(96, 64, (Person(legs),)), Pose(96, 64, (Person(head),)))
