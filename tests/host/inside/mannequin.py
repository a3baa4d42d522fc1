"""The Mannequin node: what it shows, that all its outputs agree, and that the same inputs give the same picture."""

from __future__ import annotations

import math

import pytest
import torch
from pack.nodes.mannequin import AS_POSED, LARGEST, RANDOM, READY_POSES, YAW, Mannequin, chosen_pose, facing
from pack.nodes.schema import read_bodies

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import VIEWS, axis_angle_to_matrix, ready_poses, render_people
from truepose_core.pose import read_pose


def run(**inputs: object) -> tuple:
    return Mannequin.execute(**{"width": 48, "height": 64, **inputs}).result


def test_the_poses_and_views_offered_are_the_cores() -> None:
    assert tuple(ready_poses()) == READY_POSES
    assert tuple(YAW) == VIEWS
    options = {one.id: one.options for one in Mannequin.define_schema().inputs if hasattr(one, "options")}
    assert options == {"pose": [*READY_POSES, RANDOM], "view": [AS_POSED, *VIEWS]}


@pytest.mark.parametrize(("width", "height"), [(48, 64), (40, 40), (104, 72)])
def test_outputs_agree(width: int, height: int) -> None:
    image, parsing, pose, mask, depth = run(seed=3, width=width, height=height)
    assert image.shape == depth.shape == (1, height, width, 3) and mask.shape == (1, height, width)
    assert parsing.size == (height, width)
    for picture in (image, mask, depth):
        assert picture.dtype == torch.float32 and float(picture.min()) >= 0 and float(picture.max()) <= 1
    assert torch.allclose(mask, 1 - parsing.mask("background"))
    assert torch.equal(depth[..., 0] > 0, mask > 0)
    (read,) = read_pose(pose)
    assert (read.width, read.height, len(read.people)) == (width, height, 1)
    # Every visible joint of the limbs and the neck lies on the figure.
    xy = read_bodies(pose, "it")[0]
    seen = xy[1:14][xy[1:14, 2] > 0]
    at = (seen[:, 1] * height).long().clamp(max=height - 1), (seen[:, 0] * width).long().clamp(max=width - 1)
    assert len(seen) >= 10 and float(mask[0][at].mean()) > 0.9


def test_same_inputs_same_picture_and_others_another() -> None:
    first = run(seed=5)[0]
    assert torch.equal(first, run(seed=5)[0])
    # A named pose does not know of pose_seed.
    assert torch.equal(first, run(seed=5, pose_seed=9)[0])
    for other in ({"seed": 6}, {"seed": 5, "pose": "walk"}, {"seed": 5, "view": "back"}):
        assert not torch.equal(first, run(**other)[0])
    posed = run(seed=5, pose=RANDOM, pose_seed=1)[0]
    assert torch.equal(posed, run(seed=5, pose=RANDOM, pose_seed=1)[0])
    assert not torch.equal(posed, run(seed=5, pose=RANDOM, pose_seed=2)[0])


def test_the_people_are_those_the_bundled_model_has_never_seen() -> None:
    for seed in (0, 7):
        trained = render_people([seed], 1, "train")
        unseen = render_people([seed], 1, "test")
        shown = run(seed=seed, pose=RANDOM, pose_seed=seed << 20)[0].movedim(-1, 1)
        assert torch.equal(shown, unseen.image)
        assert not torch.equal(shown, trained.image)


@pytest.mark.parametrize("pose", READY_POSES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_turns_the_body_and_nothing_else(pose: str, view: str) -> None:
    before, after = ready_poses()[pose], chosen_pose(pose, 0, view)
    assert torch.equal(before.theta[:, 1:], after.theta[:, 1:])
    forward = axis_angle_to_matrix(after.theta[:, 0])[0, :, 2]
    heading = math.degrees(math.atan2(forward[0], forward[2]))
    assert abs((heading - YAW[view] + 180) % 360 - 180) < 0.1
    # The inclination of the pelvis stays.
    upright = axis_angle_to_matrix(before.theta[:, 0])[0, 1], axis_angle_to_matrix(after.theta[:, 0])[0, 1]
    assert torch.allclose(upright[0], upright[1], atol=1e-5)
    again = facing(after, YAW[view])
    assert torch.allclose(axis_angle_to_matrix(again.theta), axis_angle_to_matrix(after.theta), atol=1e-5)


def test_the_face_is_seen_from_the_front_and_not_from_behind() -> None:
    for seed in range(4):
        front, back = (run(seed=seed, view=view)[1].mask("face").sum() for view in ("front", "back"))
        assert float(front) > 10 * float(back)


def test_the_ends_of_the_ranges() -> None:
    image, parsing, *_ = run(seed=LARGEST, pose=RANDOM, pose_seed=LARGEST, width=16, height=16)
    assert bool(image.isfinite().all()) and not parsing.is_empty


@pytest.mark.parametrize(("inputs", "match"), [({"pose": "fly"}, "stand, turn"), ({"view": "top"}, "front, side")])
def test_unknown_names_are_refused(inputs: dict, match: str) -> None:
    with pytest.raises(TruePoseError, match=match):
        run(**inputs)
