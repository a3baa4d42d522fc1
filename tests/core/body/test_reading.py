"""Laws of body files: our own come back exactly, and what a tool projects somewhere, we project there too."""

import json
import logging

import numpy as np
import pytest
import torch

from truepose_core.body.mhr import smpl_pose_of_keypoints
from truepose_core.body.pose import BodyPose
from truepose_core.body.reading import read_body, write_body
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import (
    axis_angle_to_matrix,
    forward_kinematics,
    matrix_to_axis_angle,
    project,
    rest_joints,
)
from truepose_core.mannequin.poses import sample_poses

CANVAS = (640, 960)
# The neutral mean bodies' pelvis, as SMPL's and SMPL-X's users print it.
SMPL_PELVIS = np.array([-0.001795, -0.223333, 0.028219])
SMPLX_PELVIS = np.array([0.003123, -0.351407, 0.012037])
LEVEL = np.diag([1.0, -1.0, -1.0])


def save(path, **values):
    """By the suffix, as a tool would."""
    if path.suffix == ".npz":
        np.savez(path, **values)
    else:
        path.write_text(json.dumps(values, default=np.ndarray.tolist))
    return path


def standing(count, seed=0):
    """Rotations of upright people as a tool has them [N, 24, 3]: its camera sees y down and z away."""
    theta = sample_poses(range(count), seed).theta.double()
    root = torch.from_numpy(LEVEL) @ axis_angle_to_matrix(theta[:, 0])
    theta[:, 0] = matrix_to_axis_angle(root)
    # Lift the hands out of the plane too.
    theta[:, 20:] += 0.2
    return theta.numpy()


def tool_joints(theta, translation, pelvis):
    """Where a tool's own body model has its joints, camera axes (y down) [24, 3]: SMPL turns about its pelvis."""
    joints = rest_joints(torch.zeros(1, 10, dtype=torch.float64)) + torch.from_numpy(pelvis)
    _, position = forward_kinematics(torch.as_tensor(theta, dtype=torch.float64)[None], joints)
    return position[0].numpy() + translation


def our_points(body, canvas=CANVAS):
    _, position = forward_kinematics(body.theta, rest_joints(torch.zeros(1, 10)))
    x, y = project(position, body.camera, canvas[0] / canvas[1])
    return torch.stack([x * canvas[0], y * canvas[1]], -1)[0].numpy()


def perspective(points, focal, centre):
    return focal * points[:, :2] / points[:, 2:] + centre


def magnified_as_the_pelvis(points, focal, centre):
    return focal * points[:, :2] / points[0, 2] + centre


def rotations(theta):
    return axis_angle_to_matrix(torch.as_tensor(theta)).numpy()


def hmr(seed=0):
    """One person's output of HMR2 and where its own formulas put the joints, perspective and at the pelvis' depth."""
    rng = np.random.default_rng(seed)
    theta = standing(1, seed)[0]
    scale, shift = rng.uniform(0.7, 1.1), rng.uniform(-0.1, 0.1, 2)
    centre, size = rng.uniform((200, 300), (440, 660)), rng.uniform(300, 700)
    image = np.array(CANVAS, dtype=np.float64)
    focal = 5000 / 256 * image.max()
    # cam_crop_to_full of 4D-Humans.
    translation = np.array([*(2 * (centre - image / 2) / (size * scale) + shift), 2 * focal / (size * scale)])
    values = {
        "global_orient": rotations(theta[:1]),
        "body_pose": rotations(theta[1:]),
        "betas": rng.normal(size=10),
    }
    crop = {
        "pred_cam": np.array([scale, *shift]),
        "box_center": centre,
        "box_size": np.array(size),
        "img_size": image,
    }
    points = tool_joints(theta, translation, SMPL_PELVIS)
    return values, crop, translation, focal, points


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("seed", range(3))
def test_4d_humans_crop_camera(tmp_path, suffix, seed):
    values, crop, _, focal, points = hmr(seed)
    body, canvas = read_body(save(tmp_path / f"x{suffix}", **values, **crop))
    assert canvas == CANVAS and len(body) == 1
    centre = np.array(CANVAS) / 2
    np.testing.assert_allclose(our_points(body), magnified_as_the_pelvis(points, focal, centre), atol=2e-2)
    # Its camera is far away, so that perspective itself is not far off.
    assert np.abs(our_points(body) - perspective(points, focal, centre)).max() < 0.03 * CANVAS[1]
    np.testing.assert_allclose(body.beta[0].numpy(), values["betas"], atol=1e-6)


def test_4d_humans_full_camera_equals_the_crop_camera(tmp_path):
    values, crop, translation, focal, _ = hmr(4)
    one, _ = read_body(save(tmp_path / "crop.npz", **values, **crop))
    full = {"cam_t": translation, "scaled_focal_length": np.array(focal), "render_res": crop["img_size"]}
    two, canvas = read_body(save(tmp_path / "full.npz", **values, **full))
    nested = {"pred_smpl_params": values, "pred_cam_t_full": translation[None], "focal_length": [focal, focal]}
    three, none = read_body(save(tmp_path / "nested.json", **nested), canvas=CANVAS)
    assert canvas == CANVAS and none is None
    for other in (two, three):
        torch.testing.assert_close(other.camera, one.camera, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.theta, one.theta, atol=1e-5, rtol=0)


def test_axis_angle_and_matrices_are_the_same_body(tmp_path):
    values, crop, *_ = hmr(5)
    theta = matrix_to_axis_angle(torch.from_numpy(np.concatenate([values["global_orient"], values["body_pose"]])))
    one, _ = read_body(save(tmp_path / "a.npz", **values, **crop))
    for i, pose in enumerate((theta[1:].numpy(), theta[1:].flatten().numpy(), theta[None, 1:].numpy())):
        vectors = values | {"global_orient": theta[:1].numpy(), "body_pose": pose}
        two, _ = read_body(save(tmp_path / f"b{i}.npz", **vectors, **crop))
        torch.testing.assert_close(rotation_of(two), rotation_of(one), atol=1e-5, rtol=0)
    whole = {"betas": values["betas"], "body_pose": np.concatenate([values["global_orient"], values["body_pose"]])}
    two, _ = read_body(save(tmp_path / "c.npz", **whole, **crop))
    torch.testing.assert_close(rotation_of(two), rotation_of(one), atol=1e-5, rtol=0)


def rotation_of(body):
    return axis_angle_to_matrix(body.theta)


def test_4d_humans_keypoints_say_where_the_pelvis_is(tmp_path):
    """A tall person's pelvis is elsewhere than the mean one's."""
    values, crop, translation, focal, _ = hmr(6)
    pelvis = SMPL_PELVIS + np.array([0.002, -0.04, 0.01])
    keypoints = np.random.default_rng(0).normal(size=(1, 44, 3))
    keypoints[0, 8] = pelvis
    body, _ = read_body(save(tmp_path / "x.npz", **values, **crop, pred_keypoints_3d=keypoints))
    theta = matrix_to_axis_angle(torch.from_numpy(np.concatenate([values["global_orient"], values["body_pose"]])))
    points = tool_joints(theta, translation, pelvis)
    expected = magnified_as_the_pelvis(points, focal, np.array(CANVAS) / 2)
    np.testing.assert_allclose(our_points(body), expected, atol=2e-2)


def test_far_away_perspective_becomes_our_camera(tmp_path):
    """Ten times as far with ten times the focal length: a tenth of the difference."""
    theta, errors = standing(1, 7)[0], []
    for far in (1, 10):
        translation, focal = np.array([0.3, 0.1, 4.0 * far]), 1800.0 * far
        values = {"global_orient": theta[:1], "body_pose": theta[1:], "betas": np.zeros(10)}
        camera = {"cam_t": translation, "focal_length": np.array(focal), "img_size": np.array(CANVAS)}
        body, _ = read_body(save(tmp_path / f"{far}.npz", **values, **camera))
        points = tool_joints(theta, translation, SMPL_PELVIS)
        errors.append(np.abs(our_points(body) - perspective(points, focal, np.array(CANVAS) / 2)).max())
    assert errors[0] > 10
    assert errors[1] < 0.15 * errors[0]


def smplx(seed=0):
    rng = np.random.default_rng(seed)
    theta = standing(1, seed)[0]
    translation = np.array([*rng.uniform(-0.3, 0.3, 2), rng.uniform(8, 20)])
    focal, centre = np.full(2, rng.uniform(3000, 6000)), rng.uniform((200, 300), (440, 660))
    values = {
        "global_orient": theta[:1],
        "body_pose": theta[1:22],
        "left_hand_pose": np.zeros((15, 3)),
        "betas": rng.normal(size=(1, 10)),
        "expression": np.zeros((1, 10)),
        "transl": translation[None],
    }
    return values, {"focal": focal.tolist(), "princpt": centre.tolist()}, theta, translation


@pytest.mark.parametrize("seed", range(3))
def test_smpler_x_with_its_meta_folder(tmp_path, seed, caplog):
    values, meta, theta, translation = smplx(seed)
    (tmp_path / "smplx").mkdir()
    (tmp_path / "meta").mkdir()
    path = save(tmp_path / "smplx" / "00001_0.npz", **values)
    save(tmp_path / "meta" / "00001_0.json", **meta, bbox=[1, 2, 3, 4])
    with caplog.at_level(logging.WARNING):
        body, canvas = read_body(path, canvas=CANVAS)
    assert canvas is None and "SMPL-X" in caplog.text
    assert not body.theta[0, 22:].any()
    points = tool_joints(theta, translation, SMPLX_PELVIS)
    expected = magnified_as_the_pelvis(points, meta["focal"][0], meta["princpt"])
    np.testing.assert_allclose(our_points(body)[:22], expected[:22], atol=2e-2)
    # The same numbers in one file are the same body.
    single, _ = read_body(save(tmp_path / "one.npz", **values, **meta), canvas=CANVAS)
    assert torch.equal(single.camera, body.camera) and torch.equal(single.theta, body.theta)


def keypoints70(theta):
    """MHR70 keypoints [P, 70, 3] of our skeleton, our axes; those that are not needed lie somewhere."""
    rotation, position = forward_kinematics(theta, rest_joints(theta.new_zeros(len(theta), 10)))
    points = torch.randn(len(theta), 70, 3, dtype=theta.dtype, generator=torch.Generator().manual_seed(0))

    def on(joint, *place):
        return position[:, joint] + rotation[:, joint] @ theta.new_tensor(place)

    for left, joint in ((5, 16), (7, 18), (9, 1), (11, 4), (13, 7)):
        points[:, left], points[:, left + 1] = position[:, joint], position[:, joint + 1]
    points[:, 69] = position[:, 12]
    for sign, eye, ear in ((1, 1, 3), (-1, 2, 4)):
        points[:, eye], points[:, ear] = on(15, sign * 0.038, 0.112, 0.112), on(15, sign * 0.104, 0.1, 0.003)
    for side, sign, toe, wrist, knuckles in ((0, 1, 15, 62, (49, 53, 61)), (1, -1, 18, 41, (28, 32, 40))):
        points[:, toe] = on(7 + side, -sign * 0.02, -0.06, 0.2)
        points[:, toe + 1] = on(7 + side, sign * 0.05, -0.06, 0.17)
        points[:, toe + 2] = on(7 + side, sign * 0.015, -0.06, -0.05)
        points[:, wrist] = position[:, 20 + side]
        for knuckle, place in zip(knuckles, ((0.08, 0, 0.03), (0.09, 0, 0), (0.07, 0, -0.04)), strict=True):
            points[:, knuckle] = on(20 + side, sign * place[0], *place[1:])
    return points


def bent(count=20, seed=0):
    """Poses with rigid collars and toes, a turned trunk, and elbows and knees that are bent."""
    rng = np.random.default_rng(seed)
    theta = sample_poses(range(count), seed).theta.double()
    theta[:, [3, 6, 9, 10, 11, 13, 14]] = 0
    theta[:, [3, 6, 9], 1] = torch.from_numpy(rng.uniform(-0.2, 0.2, (count, 1)))
    for left, axis, sign in ((4, 0, 1), (18, 1, -1)):
        angle = torch.from_numpy(rng.uniform(0.3, 2.0, (2, count)))
        theta[:, [left, left + 1]] = 0
        theta[:, left, axis], theta[:, left + 1, axis] = sign * angle[0], (sign if axis else 1) * angle[1]
    theta[:, 19] *= -1
    theta[:, [20, 21]] = torch.from_numpy(rng.normal(size=(count, 2, 3)) * 0.4)
    theta[:, [7, 8]] = torch.from_numpy(rng.normal(size=(count, 2, 3)) * 0.3)
    return theta


LIMBS = ((16, 18), (17, 19), (18, 20), (19, 21), (1, 4), (2, 5), (4, 7), (5, 8), (1, 2))


def test_keypoints_of_a_pose_give_the_pose_back():
    theta = bent()
    found, pelvis, size = smpl_pose_of_keypoints(keypoints70(theta) + torch.tensor([3.0, -2.0, 1.0]))
    wrong = matrix_to_axis_angle(axis_angle_to_matrix(found).mT @ axis_angle_to_matrix(theta)).norm(dim=-1)
    # The thighs of our skeleton lean by a degree, which the bend of a knee alone cannot say.
    assert wrong[:, 1:9].max() < np.radians(3.5)
    assert wrong[:, [0, 3, 6, 9, 12, 13, 14, 15, *range(16, 24)]].max() < 1e-5
    torch.testing.assert_close(pelvis, torch.tensor([3.0, -2.0, 1.0]).double().expand(20, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(size, torch.ones(20).double(), atol=1e-6, rtol=0)


def test_limbs_of_any_pose_keep_their_directions():
    """Also bent trunks and straight limbs, which keypoints do not say everything about."""
    theta = sample_poses(range(60), 3).theta.double()
    theta[:8, [4, 5, 18, 19]] = 0
    points = keypoints70(theta) * 1.3
    found, _, size = smpl_pose_of_keypoints(points)
    rest = rest_joints(torch.zeros(60, 10, dtype=torch.float64))
    _, there = forward_kinematics(theta, rest)
    _, here = forward_kinematics(found, rest)
    for a, b in LIMBS:
        one, two = (torch.nn.functional.normalize(p[:, b] - p[:, a], dim=-1) for p in (there, here))
        torch.testing.assert_close(two, one, atol=1e-6, rtol=0)
    torch.testing.assert_close(size, torch.full((60,), 1.3).double(), atol=1e-6, rtol=0)
    assert found.norm(dim=-1).max() <= np.pi + 1e-6


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_sam_3d_body(tmp_path, suffix):
    """Its keypoints, a third larger than our skeleton, land where its camera sees them."""
    theta = bent(1, 5)
    theta[:, [3, 6, 9]] = 0
    points = (keypoints70(theta)[0].numpy() * 1.3) @ LEVEL + (0.02, -0.1, 0.05)
    translation, focal = np.array([0.2, 0.3, 6.0]), 1500.0
    seen = points + translation
    values = {
        "pred_keypoints_3d": points,
        "pred_keypoints_2d": perspective(seen, focal, np.array(CANVAS) / 2),
        "pred_cam_t": translation,
        "focal_length": np.array(focal),
        "mhr_model_params": np.zeros(204),
    }
    body, canvas = read_body(save(tmp_path / f"x{suffix}", **values), canvas=CANVAS)
    assert canvas is None and not body.beta.any()
    pelvis = translation + np.array([0.02, -0.1, 0.05])
    expected = focal * seen[:, :2] / pelvis[2] + np.array(CANVAS) / 2
    found = our_points(body)
    for joint, keypoint in ((16, 5), (17, 6), (18, 7), (20, 62), (21, 41), (1, 9), (12, 69)):
        np.testing.assert_allclose(found[joint], expected[keypoint], atol=0.1)
    # Thighs may be off by their degree.
    for joint, keypoint in ((4, 11), (8, 14)):
        np.testing.assert_allclose(found[joint], expected[keypoint], atol=6)
    with pytest.raises(TruePoseError, match="do not lie where a picture of 960x640"):
        read_body(tmp_path / f"x{suffix}", canvas=CANVAS[::-1])


def test_sam_3d_body_lists_people_and_keeps_pickled_masks_shut(tmp_path):
    points = keypoints70(bent(2, 1)).numpy() @ LEVEL
    people = [
        {"pred_keypoints_3d": p, "pred_cam_t": [0, 0, z], "focal_length": 900.0, "mask": None}
        for p, z in zip(points.tolist(), (8.0, 4.0), strict=True)
    ]
    path = tmp_path / "people.json"
    path.write_text(json.dumps(people))
    near, _ = read_body(path, canvas=CANVAS, person=1)
    assert torch.equal(read_body(path, canvas=CANVAS)[0].theta, near.theta)
    np.savez(
        tmp_path / "one.npz", **{k: np.array(v, dtype=object if v is None else None) for k, v in people[1].items()}
    )
    alone, _ = read_body(tmp_path / "one.npz", canvas=CANVAS)
    torch.testing.assert_close(alone.theta, near.theta)


def test_parameters_of_the_mhr_rig_alone_are_refused(tmp_path):
    path = save(tmp_path / "x.npz", body_pose_params=np.zeros(133), shape_params=np.zeros(45))
    with pytest.raises(TruePoseError, match="save pred_keypoints_3d"):
        read_body(path, canvas=CANVAS)
    path = save(tmp_path / "y.npz", pred_keypoints_3d=np.zeros((70, 3)), pred_cam_t=[0, 0, 5.0], focal_length=900.0)
    with pytest.raises(TruePoseError, match=r"y.npz: keypoints of the .* coincide"):
        read_body(path, canvas=CANVAS)
    path = save(tmp_path / "z.npz", pred_keypoints_3d=np.zeros((17, 3)), pred_cam_t=[0, 0, 5.0], focal_length=900.0)
    with pytest.raises(TruePoseError, match=r"\[17, 3\]; expected \[N, 70, 3\]"):
        read_body(path, canvas=CANVAS)


def test_plain_poses_stand_in_the_middle(tmp_path, caplog):
    theta = sample_poses([0], 1).theta[0].numpy()
    with caplog.at_level(logging.WARNING):
        body, canvas = read_body(save(tmp_path / "x.json", poses=theta.reshape(72), betas=np.arange(16) / 10))
    assert canvas is None and "no camera" in caplog.text
    torch.testing.assert_close(body.theta[0], torch.from_numpy(theta), atol=1e-6, rtol=0)
    np.testing.assert_allclose(body.beta[0].numpy(), np.arange(10) / 10, atol=1e-6)
    points = our_points(body)
    assert (points > 0).all() and (points < CANVAS).all()
    rows = np.zeros((1, 156))
    rows[0, :66] = theta[:22].ravel()
    hands, _ = read_body(save(tmp_path / "h.npz", poses=rows, betas=np.zeros(10)))
    torch.testing.assert_close(hands.theta[0, :22], body.theta[0, :22], atol=1e-6, rtol=0)
    assert not hands.theta[0, 22:].any()


def test_amass_has_z_up(tmp_path):
    """A body that stands along z comes out standing along y."""
    upright = matrix_to_axis_angle(axis_angle_to_matrix(torch.tensor([[np.pi / 2, 0, 0]])))[0].numpy()
    poses = np.zeros((3, 156))
    poses[:, :3] = upright
    body, _ = read_body(
        save(tmp_path / "walk.npz", poses=poses, betas=np.zeros(16), mocap_framerate=120.0, gender="male"), person=2
    )
    torch.testing.assert_close(body.theta, torch.zeros(1, 24, 3), atol=1e-6, rtol=0)


def own(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = sample_poses(range(count), seed).theta
    beta = torch.randn((count, 10), generator=generator)
    camera = torch.stack([torch.tensor([0.3 + 0.1 * i, 0.02, -0.03 * i]) for i in range(count)])
    return BodyPose(theta, beta, camera)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("canvas", [CANVAS, None])
def test_our_own_files_come_back_exactly(tmp_path, suffix, canvas):
    body = own(3)
    path = write_body(tmp_path / f"body{suffix}", body, canvas)
    for i in range(3):
        found, size = read_body(path, person=i)
        assert size == canvas
        for name in ("theta", "beta", "camera"):
            assert torch.equal(getattr(found, name), getattr(body, name)[i : i + 1])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_files_canvas_goes_before_the_callers(tmp_path):
    path = write_body(tmp_path / "a.json", own(1), CANVAS)
    assert read_body(path, canvas=(10, 20))[1] == CANVAS


def test_the_largest_of_several_is_taken_and_said(tmp_path, caplog):
    path = write_body(tmp_path / "two.npz", own(2), CANVAS)
    with caplog.at_level(logging.WARNING):
        body, _ = read_body(path)
    assert body.camera[0, 0] == pytest.approx(0.4)
    assert "2 people; taking person 1, the largest" in caplog.text
    caplog.clear()
    read_body(path, person=0)
    assert not caplog.text
    for person in (2, -1):
        with pytest.raises(TruePoseError, match=f"person {person} was asked for, but .* has 2"):
            read_body(path, person=person)


def test_people_of_one_array_keep_their_order(tmp_path):
    values, crop, *_ = hmr(8)
    other, crop2, *_ = hmr(9)
    joined = {k: np.stack([values[k], other[k]]) for k in values} | {k: np.stack([crop[k], crop2[k]]) for k in crop}
    path = save(tmp_path / "both.npz", **joined)
    for i, (v, c) in enumerate(((values, crop), (other, crop2))):
        alone, _ = read_body(save(tmp_path / f"{i}.npz", **v, **c))
        both, _ = read_body(path, person=i)
        torch.testing.assert_close(both.camera, alone.camera)
        torch.testing.assert_close(both.theta, alone.theta)


def test_writing_refuses_and_leaves_nothing_half_done(tmp_path):
    path = write_body(tmp_path / "a.json", own(1), CANVAS)
    before = path.read_bytes()
    with pytest.raises(TruePoseError, match="exists already"):
        write_body(path, own(2), CANVAS)
    assert path.read_bytes() == before
    write_body(path, own(1, 1), CANVAS, overwrite=True)
    assert path.read_bytes() != before
    with pytest.raises(TruePoseError, match=r"expected one of \.json, \.npz"):
        write_body(tmp_path / "a.pkl", own(1), CANVAS)
    for canvas in ((0, 10), (10.5, 10), (10,), "ab"):
        with pytest.raises(TruePoseError, match="whole numbers of pixels"):
            write_body(tmp_path / "b.json", own(1), canvas)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def changed(**changes):
    values, crop, *_ = hmr(0)
    merged = values | crop | changes
    return {key: value for key, value in merged.items() if value is not None}


NOT_A_ROTATION = np.tile(np.eye(3), (23, 1, 1)) * 1.5
MIRRORED = np.tile(np.diag([-1.0, 1.0, 1.0]), (23, 1, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(body_pose=np.zeros((17, 3))), "has 17 joints below the root; expected 23 .SMPL. or 21 .SMPL-X."),
        (changed(body_pose=np.zeros((23, 4))), r"\[23, 4\]"),
        (changed(body_pose=NOT_A_ROTATION), "no rotations"),
        (changed(body_pose=MIRRORED), "no rotations"),
        (changed(body_pose=np.full((23, 3), 40.0)), "degrees: multiply by pi / 180"),
        (changed(global_orient=[[0.0, 170.0, 0.0]]), "degrees"),
        (changed(body_pose=np.full((23, 3), np.nan)), "body_pose of .* holds NaN"),
        (changed(body_pose=np.zeros((0, 23, 3))), "holds nobody"),
        (changed(body_pose="standing"), "no array of numbers"),
        (changed(global_orient=np.zeros((2, 3))), "one rotation for each of 1 people"),
        (changed(global_orient=None), "has 22 joints below the root"),
        (changed(betas=np.zeros(6)), r"betas of .* is \[6\]; expected 10 numbers"),
        (changed(betas=None), "has no betas; it holds"),
        (changed(pred_cam=[-0.5, 0.0, 0.0]), "expected more than 0"),
        (changed(pred_cam=[900.0, 0.0, 0.0]), "camera of a body"),
        (changed(pred_cam=[0.9, np.inf, 0.0]), "pred_cam of .* NaN or infinite"),
        (changed(pred_cam=None), "has no camera"),
        (changed(img_size=None), "give canvas"),
        (changed(img_size=[640, -1]), "whole numbers of pixels"),
        (changed(pred_cam=None, cam_t=[0, 0, -3.0], focal_length=900.0), "depth of the pelvis of .* is -2.9"),
        (changed(pred_cam=None, cam_t=[0, 0, 3.0], focal_length=-900.0), "focal length"),
        (changed(pred_cam=None, cam_t=[0, 0, 3.0], focal_length=[900.0, 500.0]), "square pixels"),
        (changed(pred_cam=None, cam_t=[0, 0, 3.0]), "has no camera"),
        ({"poses": np.zeros(69), "betas": np.zeros(10)}, "poses of .* has 23 joints; expected 24"),
        ({"poses": np.full(72, 30.0), "betas": np.zeros(10)}, "degrees"),
        ({"poses": np.zeros(72), "shapes": np.zeros(10), "Rh": np.zeros(3)}, "EasyMocap"),
        ({"theta": np.zeros((1, 22, 3)), "beta": np.zeros((1, 10)), "camera": [[0.5, 0, 0]]}, r"\(1, 22, 3\)"),
        ({"theta": np.zeros((1, 24, 3)), "beta": np.zeros((1, 10))}, "has no camera; it holds beta, theta"),
        ({"theta": np.zeros((1, 24, 3)), "beta": np.zeros((1, 10)), "camera": [[-1.0, 0, 0]]}, "scale above 0"),
        ({"theta": np.full((1, 24, 3), 90.0), "beta": np.zeros((1, 10)), "camera": [[0.5, 0, 0]]}, "degrees"),
        ({"theta": np.zeros((1, 24, 3)), "beta": np.zeros((1, 10)), "camera": [[0.5, 9e9, 0]]}, "shifts"),
        ({"vertices": np.zeros((5, 3))}, "holds vertices; expected theta"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_bad_numbers_are_named(tmp_path, values, message, suffix):
    path = save(tmp_path / f"bad{suffix}", **values)
    with pytest.raises(TruePoseError, match=message) as caught:
        read_body(path)
    assert f"bad{suffix}" in str(caught.value)


def test_files_of_another_kind(tmp_path):
    def refused(name, data, message):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(TruePoseError, match=message) as caught:
            read_body(path)
        assert name in str(caught.value)

    whole = write_body(tmp_path / "whole.npz", own(1), CANVAS).read_bytes()
    refused("cut.npz", whole[:-300], "damaged|no npz")
    refused("empty.npz", b"", "empty")
    refused("pickle.npz", b"\x80\x04K\x01.", "Pickles .* never opened")
    refused("pickle.pkl", b"\x80\x04K\x01.", "suffix '.pkl'.* never opened")
    refused("list.json", "[]", "holds nobody")
    refused("numbers.json", "[1, 2]", "person 0 is a int")
    refused("word.json", '"body"', "is a str")
    refused("broken.json", '{"theta": [', "not valid JSON")
    refused("empty.json", "", "is empty")
    refused("other.json", '{"shop": 1}', "holds shop; expected theta")
    refused("pose.json", '{"people": [{"pose_keypoints_2d": []}]}', "OpenPose keypoints")
    refused("nan.json", '{"theta": [[[NaN]]], "beta": [[0]], "camera": [[1, 0, 0]]}', "NaN")
    refused("ragged.json", '{"poses": [[1, 2], [3]], "betas": [0]}', "no array of numbers")
    with pytest.raises(TruePoseError, match="does not exist"):
        read_body(tmp_path / "none.npz")
    with pytest.raises(TruePoseError, match=r"none\.json cannot be read"):
        read_body(tmp_path / "none.json")


def test_pickled_arrays_stay_shut(tmp_path):
    """The danger itself: an array that would run code when it is unpickled."""

    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "x.npz", theta=np.array([Runs()], dtype=object), beta=np.zeros((1, 10)), camera=np.ones((1, 3)))
    with pytest.raises(TruePoseError, match=r"theta of .* pickled object"):
        read_body(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()
