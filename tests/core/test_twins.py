"""Laws of depth twins: the same keypoints, the mirrored depth, and back again."""

from __future__ import annotations

import pytest
import torch

from truepose_core.mannequin import BodyPoses, mirror_arm, mirror_body, render, sample_identities, sample_poses
from truepose_core.mannequin.body import forward_kinematics, rest_joints
from truepose_core.mannequin.twins import ARMS, FACE_POINTS, ambiguous_poses, hide_faces
from truepose_core.mannequin.world import render_people

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


def test_the_share_of_ambiguous_poses_is_what_was_asked_for_and_each_is_its_own():
    index = torch.arange(4000)
    poses = sample_poses(index, WORLD)
    changed, faceless = ambiguous_poses(poses, index, WORLD, 0.5)
    moved = (changed.theta - poses.theta).abs().amax((1, 2)) > 1e-6
    # One kind in five is left as it is but for its face.
    assert moved.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert faceless.float().mean().item() == pytest.approx(0.2, abs=0.03)
    some, _ = ambiguous_poses(poses.select([5, 900]), torch.tensor([5, 900]), WORLD, 0.5)
    assert torch.equal(some.theta, changed.theta[[5, 900]])
    same, none = ambiguous_poses(poses, index, WORLD, 0.0)
    assert torch.equal(same.theta, poses.theta) and not none.any()


def test_faces_are_hidden_in_the_pictures_keypoints_too():
    plain = render_people(torch.arange(8), 2)
    assert torch.equal(render_people(torch.arange(8), 2, ambiguous=0.0).keypoints, plain.keypoints)
    made = render_people(torch.arange(8), 2, ambiguous=1.0)
    assert (made.keypoints[:, list(FACE_POINTS), 2].sum(1) == 0).sum() > (
        plain.keypoints[:, list(FACE_POINTS), 2].sum(1) == 0
    ).sum()
    hidden = hide_faces(plain.keypoints, torch.ones(16, dtype=torch.bool))
    assert not hidden[:, list(FACE_POINTS)].any() and torch.equal(hidden[:, 1:14], plain.keypoints[:, 1:14])
