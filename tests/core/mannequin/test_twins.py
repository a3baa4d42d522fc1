"""Laws of depth twins: the same keypoints, the mirrored depth, and back again."""

from __future__ import annotations

import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import (
    BodyPoses,
    mirror_arm,
    mirror_body,
    render,
    render_people,
    render_twins,
    sample_identities,
    sample_poses,
)
from truepose_core.mannequin.body import forward_kinematics, rest_joints
from truepose_core.mannequin.twins import ARMS, hide_faces, twin_poses
from truepose_core.pose.keypoints import FACE_POINTS
from truepose_core.training.data import MannequinPool
from truepose_core.training.train import shared_by_twins

WORLD, N = 7, 24
PEOPLE, POSES = sample_identities(torch.arange(N), WORLD), sample_poses(torch.arange(N), WORLD)
MIRRORS = {
    "left": lambda theta: mirror_arm(theta, "left"),
    "right": lambda theta: mirror_arm(theta, "right"),
    "body": mirror_body,
}


def positions(theta):
    return forward_kinematics(theta, rest_joints(PEOPLE.beta))[1]


@pytest.mark.parametrize("kind", MIRRORS)
def test_twins_have_the_same_keypoints(kind):
    first = render(PEOPLE, POSES)
    second = render(PEOPLE, BodyPoses(MIRRORS[kind](POSES.theta), POSES.camera), camera=first.camera)
    points = [i for i in range(18) if kind != "body" or i not in FACE_POINTS]
    assert torch.allclose(first.keypoints[:, points], second.keypoints[:, points], atol=1e-5)
    # An arm may be hidden in both.
    assert ((first.image - second.image).abs().amax((1, 2, 3)) > 0.1).float().mean() > 0.9


@pytest.mark.parametrize("kind", MIRRORS)
def test_a_twins_twin_is_the_body_itself(kind):
    mirror = MIRRORS[kind]
    assert torch.allclose(positions(mirror(mirror(POSES.theta))), positions(POSES.theta), atol=1e-5)


def test_a_body_is_mirrored_about_its_pelvis_but_for_the_toes():
    depth = torch.tensor([1.0, 1.0, -1.0])
    was, now = positions(POSES.theta), positions(mirror_body(POSES.theta))
    others = [j for j in range(24) if j not in (10, 11)]
    assert torch.allclose(now[:, others], (was * depth)[:, others], atol=1e-5)


@pytest.mark.parametrize("side", ARMS)
def test_an_arm_is_mirrored_about_its_shoulder_alone(side):
    _, shoulder, below = ARMS[side]
    was, now = positions(POSES.theta), positions(mirror_arm(POSES.theta, side))
    others = [j for j in range(24) if j not in below]
    assert torch.allclose(now[:, others], was[:, others], atol=1e-5)
    apart = (was - was[:, shoulder, None])[:, list(below)], (now - now[:, shoulder, None])[:, list(below)]
    assert torch.allclose(apart[1], apart[0] * torch.tensor([1.0, 1.0, -1.0]), atol=1e-5)
    elbow = below[0]
    assert torch.allclose(mirror_arm(POSES.theta, side)[:, elbow].norm(dim=1), POSES.theta[:, elbow].norm(dim=1))


def test_the_share_of_twins_is_what_was_asked_for_and_each_is_its_own():
    index = torch.arange(4000)
    poses = sample_poses(index, WORLD)
    changed, twin, faceless = twin_poses(poses, index, WORLD, 0.5)
    moved = (changed.theta - poses.theta).abs().amax((1, 2)) > 1e-6
    assert not moved[::2].any() and torch.equal(moved[1::2], twin)
    assert twin.float().mean().item() == pytest.approx(0.5, abs=0.03)
    # One in four of them is a whole body, whose two faces are hidden.
    assert faceless.float().mean().item() == pytest.approx(0.125, abs=0.02)
    assert torch.equal(faceless[::2], faceless[1::2]) and not faceless[::2][~twin].any()
    assert torch.equal(changed.camera[1::2][twin], poses.camera[::2][twin])
    some, _, _ = twin_poses(poses.select([6, 7, 900, 901]), torch.tensor([6, 7, 900, 901]), WORLD, 0.5)
    assert torch.equal(some.theta, changed.theta[[6, 7, 900, 901]])
    same, none, _ = twin_poses(poses, index, WORLD, 0.0)
    assert torch.equal(same.theta, poses.theta) and not none.any()


def test_rendered_twins_have_one_camera_and_the_same_keypoints():
    plain = render_people(torch.arange(8), 5)
    made, twin = render_twins(torch.arange(8), 2, 0.7)
    first, second = (
        made.select((torch.arange(40).view(8, 5)[:, k::2][:, :2]).flatten()[twin.flatten()]) for k in (1, 2)
    )
    assert twin.shape == (8, 2) and 4 < twin.sum() < 16
    assert torch.equal(first.camera, second.camera)
    both = (first.keypoints[..., 2:] > 0) & (second.keypoints[..., 2:] > 0)
    assert torch.allclose(first.keypoints * both, second.keypoints * both, atol=1e-5)
    assert torch.equal(first.keypoints[..., 2] > 0, second.keypoints[..., 2] > 0)
    # What is no twin is the world's own.
    assert torch.equal(made.image[::5], plain.image[::5])
    assert torch.equal(made.image[1::5], plain.image[1::5])
    none, _ = render_twins(torch.arange(8), 2, 0.0)
    assert torch.equal(none.image, plain.image) and torch.equal(none.keypoints, plain.keypoints)


def test_hidden_faces_are_face_points_alone():
    plain = render_people(torch.arange(8), 1).keypoints
    hidden = hide_faces(plain, torch.ones(8, dtype=torch.bool))
    assert not hidden[:, list(FACE_POINTS)].any() and torch.equal(hidden[:, 1:14], plain[:, 1:14])
    assert torch.equal(hide_faces(plain, torch.zeros(8, dtype=torch.bool)), plain)


def test_a_pool_with_twins_gives_them_side_by_side():
    made = MannequinPool(8, 5, (64, 48), seed=0, twins=0.7)
    batch = made.batch(6, 4)
    assert batch.twin.shape == (12,) and 0 < batch.twin.sum() < 12
    first, second = batch.target_body[::2][batch.twin], batch.target_body[1::2][batch.twin]
    assert torch.allclose(first, second, atol=1e-5)
    assert (batch.target_pose.theta[::2] - batch.target_pose.theta[1::2]).abs().amax((1, 2)).min() > 1e-3
    assert (batch.target_image[::2] != batch.target_image[1::2]).flatten(1).any(1).all()
    noise = torch.randn(24, 3)
    shared = shared_by_twins(noise, batch.twin)
    assert torch.equal(shared[1::2][batch.twin], noise[::2][batch.twin])
    assert torch.equal(shared[1::2][~batch.twin], noise[1::2][~batch.twin]) and torch.equal(shared[::2], noise[::2])
    walked, gone = MannequinPool(8, 5, (64, 48), seed=0, twins=0.7, fresh=2), 3
    for _ in range(gone):
        walked.advance()
    there = MannequinPool(8, 5, (64, 48), seed=0, twins=0.7, fresh=2, step=gone)
    assert torch.equal(walked.image, there.image) and torch.equal(walked.twin, there.twin)
    with pytest.raises(TruePoseError, match="got 4 poses, expected an odd number"):
        MannequinPool(8, 4, (64, 48), twins=0.5)
    with pytest.raises(TruePoseError, match="3 targets of each source; expected an even number"):
        made.batch(2, 3)
