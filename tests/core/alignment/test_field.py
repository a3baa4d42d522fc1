"""The pose field: its distance, its labels, the poses it may learn from, and what the shipped one knows."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from truepose_core.alignment.field import PoseField, load_field, pose_distance, read_poses
from truepose_core.body import BodyPose
from truepose_core.cli import main
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.field import descend, evaluate_field, swap_sides
from truepose_core.mannequin import axis_angle_to_matrix, sample_poses
from truepose_core.training import field as training
from truepose_core.training.field import (
    HELD_OUT_LEVELS,
    LEVELS,
    FieldConfig,
    FieldTrainer,
    NearestPoses,
    labelled_poses,
    mannequin_poses,
    mix_poses,
    noise_poses,
)
from truepose_core.weights.strict import bundled_path, read_metadata

SMALL = [
    "--row",
    "field",
    "--steps",
    "6",
    "--valid",
    "64",
    "--noised",
    "128",
    "--batch",
    "16",
    "--width",
    "16",
    "--quiet",
]


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    return axis_angle_to_matrix(torch.randn((count, 23, 3), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def valid() -> torch.Tensor:
    return mannequin_poses(400, "train")


# ------------------------------------------------------------------------------------------------------ the distance


def test_distance_is_a_metric():
    a, b, c = (rotations(50, seed) for seed in range(3))
    assert pose_distance(a, a).max() < 1e-3
    torch.testing.assert_close(pose_distance(a, b), pose_distance(b, a))
    assert (pose_distance(a, b) <= pose_distance(a, c) + pose_distance(c, b) + 1e-5).all()
    # It does not matter in which frame rotations are told.
    turn = rotations(1, 9)
    torch.testing.assert_close(pose_distance(turn @ a, turn @ b), pose_distance(a, b), atol=1e-4, rtol=0)


def test_distance_equals_an_independent_reference():
    scipy = pytest.importorskip("scipy.spatial.transform")
    a, b = rotations(20, 3), rotations(20, 4)
    turn = (a.mT @ b).double().numpy().reshape(-1, 3, 3)
    angle = scipy.Rotation.from_matrix(turn).magnitude().reshape(20, 23)
    np.testing.assert_allclose(pose_distance(a, b).numpy(), np.sqrt((angle**2).mean(1)), atol=1e-5)


@pytest.mark.parametrize("angle", [1e-4, 0.01, 1.0, 3.1])
def test_all_joints_off_by_an_angle_are_that_far(angle):
    turn = torch.zeros(1, 23, 3)
    turn[..., 1] = angle
    eye = torch.eye(3).expand(1, 23, 3, 3)
    assert pose_distance(eye, axis_angle_to_matrix(turn)).item() == pytest.approx(angle, rel=1e-3)


# -------------------------------------------------------------------------------------------------------- the labels


def test_the_tree_finds_what_looking_at_all_finds(valid):
    noised = noise_poses(valid[:60], torch.full((60,), 0.2), torch.Generator().manual_seed(0))
    true = torch.stack([pose_distance(one, valid).min() for one in noised])
    torch.testing.assert_close(NearestPoses(valid).distance(noised), true, atol=2e-3, rtol=0)


def test_valid_poses_are_at_no_distance(valid):
    assert NearestPoses(valid).distance(valid[:20]).max() < 1e-3
    other = mannequin_poses(20, "test")
    assert NearestPoses(valid).distance(other).min() > 1e-3
    assert NearestPoses(valid).distance(other, other).max() < 1e-3


def test_labels_are_never_more_than_the_noise_itself(valid):
    noised, distance, level = labelled_poses(valid, NearestPoses(valid), 200, LEVELS, seed=1)
    again = labelled_poses(valid, NearestPoses(valid), 200, LEVELS, seed=1)
    assert torch.equal(noised, again[0]) and torch.equal(distance, again[1])
    assert distance[level == 0].max() < 1e-3
    # The longest of 23 x 3 draws is beyond five standard deviations next to never.
    assert (distance <= 5 * 3**0.5 * level + 1e-3).all()
    assert not set(LEVELS) & set(HELD_OUT_LEVELS)


def test_noise_turns_and_does_not_stretch(valid):
    noised = noise_poses(valid[:40], torch.linspace(0, 2, 40), torch.Generator().manual_seed(0))
    eye = torch.eye(3).expand_as(noised)
    torch.testing.assert_close(noised @ noised.mT, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(noised[0], valid[0])


# ------------------------------------------------------------------------------------------------------- the network


def test_the_global_orientation_is_free():
    torch.manual_seed(0)
    field = PoseField(32, 2).eval()
    theta = sample_poses(range(8), 1).theta
    turned = theta.clone()
    turned[:, 0] = torch.randn(8, 3)
    here, there = field(axis_angle_to_matrix(theta)), field(axis_angle_to_matrix(turned))
    assert torch.equal(here, there) and (here >= 0).all()
    assert torch.equal(here, field(axis_angle_to_matrix(theta)[:, 1:]))
    body = BodyPose(theta, torch.zeros(8, 10), torch.tensor([[0.5, 0, 0]]).expand(8, 3))
    assert torch.equal(here, field.distance(body))
    torch.testing.assert_close(field(axis_angle_to_matrix(theta[3:4])), here[3:4])


def test_mixing_and_swapping_say_what_they_do(valid):
    one, other = valid[:20], valid[20:40]
    same = mix_poses(one, one, torch.ones(20, 2))
    assert pose_distance(same, one).max() < 1e-3
    eye = torch.eye(3).expand(20, 23, 3, 3)
    mixed = mix_poses(one, other, torch.tensor([[1.0, 0.0]]).expand(20, 2))
    knees, elbows = [3, 4], [17, 18]
    torch.testing.assert_close(mixed[:, knees], one[:, knees], atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed[:, elbows], eye[:, elbows])
    swapped = swap_sides(one)
    assert torch.equal(swapped[:, 17], one[:, 18]) and torch.equal(swap_sides(swapped), one)


def test_the_gradient_is_there_at_rest_too():
    theta = torch.zeros(2, 24, 3, requires_grad=True)
    torch.manual_seed(0)
    PoseField(16, 2)(axis_angle_to_matrix(theta)).sum().backward()
    assert theta.grad.isfinite().all() and theta.grad[:, 1:].abs().max() > 0 and theta.grad[:, 0].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 22, 3, 3), (24, 3, 3), (2, 24, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(TruePoseError, match=r"expected \[N, 24, 3, 3\]"):
        PoseField(8, 1)(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------- poses of people


def write(path, poses, **more):
    np.savez(path, poses=poses, **more)
    return path


def test_amass_files_are_read(tmp_path):
    generator = np.random.default_rng(0)
    long, short = generator.normal(size=(12, 156)) * 0.3, generator.normal(size=(5, 72)).astype(np.float32) * 0.3
    long[:, :3] += 20  # somebody who turned on the spot
    paths = [write(tmp_path / "a.npz", long, mocap_framerate=120.0), write(tmp_path / "b.npz", short)]
    theta = read_poses(paths)
    assert theta.shape == (17, 24, 3) and theta.dtype == torch.float32
    np.testing.assert_allclose(theta[2].numpy().ravel(), long[2, :72], rtol=1e-6)
    np.testing.assert_allclose(theta[12].numpy().ravel(), short[0], rtol=1e-6)
    assert torch.equal(read_poses(paths, every=5), theta[[0, 5, 10, 12]])


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (np.zeros((4, 66)), r"expected floats \[T, >= 72\]"),
        (np.zeros((0, 72)), r"expected floats \[T, >= 72\]"),
        (np.zeros((4, 72), dtype=np.int64), "expected floats"),
        (np.full((4, 72), np.nan), "holds NaN"),
        (np.full((4, 72), 45.0), "These look like degrees"),
    ],
)
def test_poses_of_another_kind_are_refused(tmp_path, poses, message):
    with pytest.raises(TruePoseError, match=message):
        read_poses([write(tmp_path / "a.npz", poses)])


def test_files_that_are_none_are_refused(tmp_path):
    whole = write(tmp_path / "a.npz", np.zeros((40, 72))).read_bytes()
    torn, other, pickled, bomb = (tmp_path / f"{name}.npz" for name in ("torn", "other", "pickled", "bomb"))
    torn.write_bytes(whole[: len(whole) // 2])
    np.savez(other, trans=np.zeros(3))
    np.savez(pickled, poses=np.array([{"x": 1}], dtype=object))
    bomb.write_bytes(pickle.dumps(Exploding(str(tmp_path / "exploded"))))
    for path, message in (
        (tmp_path / "gone.npz", "does not exist"),
        (torn, "is damaged or no npz archive"),
        (bomb, "is damaged or no npz archive"),
        (pickled, "is a pickled object"),
        (other, "holds no `poses`"),
    ):
        with pytest.raises(TruePoseError, match=message):
            read_poses([path])
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(TruePoseError, match="no pose file was given"):
        read_poses([])


class Exploding:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---------------------------------------------------------------------------------------------------------- training


def test_a_run_that_was_stopped_ends_in_the_same_weights(tmp_path):
    config = FieldConfig(steps=6, valid=64, noised=128, batch=16, width=16)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    FieldTrainer(config, whole, quiet=True).run()
    first = FieldTrainer(config, broken, quiet=True)
    for _ in range(3):
        first._optimise()
    first.save()
    second = FieldTrainer(config, broken, quiet=True)
    assert second.step == 3
    second.run()
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (broken, whole))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_the_command_trains_and_says_how(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--json", "--seed", "3", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["row"], report["steps"]) == ("field", 6)
    assert load_field(report["weights"]).sizes == {"width": 16, "depth": 3}
    story = json.loads(read_metadata(report["weights"])["training"])
    assert (story["seed"], story["steps_done"], story["valid"]) == (3, 6, 64)
    assert (out / "log.jsonl").is_file()
    assert main(["train", "--out", str(out), *SMALL, "--seed", "4"]) == 2
    assert "was made with other settings (seed: 3 then, 4 now)" in capsys.readouterr().err


def test_the_command_learns_from_peoples_poses(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "AMASS" / "subject"
    folder.mkdir(parents=True)
    poses = sample_poses(range(60), 5).theta.flatten(1).numpy()
    write(folder / "walk_poses.npz", poses)
    np.savez(folder / "neutral_shape.npz", betas=np.zeros(16))
    seen = []
    label = training.labelled_poses
    monkeypatch.setattr(
        training, "labelled_poses", lambda valid, *rest, **how: seen.append(valid) or label(valid, *rest, **how)
    )
    assert main(["train", "--out", str(tmp_path / "run"), *SMALL, "--data", str(folder.parent), "--every", "2"]) == 0
    expected = axis_angle_to_matrix(torch.from_numpy(poses[::2]).unflatten(1, (24, 3))[:, 1:])
    torch.testing.assert_close(seen[0], expected)
    assert main(["train", "--out", str(tmp_path / "other"), *SMALL, "--data", str(tmp_path / "run")]) == 2
    assert "there is no npz file with poses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--row", "field", "--people", "4"), "--people has no meaning for row field; its options are --batch"),
        (("--row", "HPFA", "--valid", "64"), "--valid has no meaning for row HPFA"),
        (("--row", "keypoints", "--widths", "8", "8", "9"), "expected three multiples of 8"),
        (("--row", "keypoints", "--vae", "sd"), "768 people in 4 poses at 384x512 take 5.6 GiB"),
    ],
)
def test_options_of_other_rows_are_refused(capsys, tmp_path, options, message):
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the shipped one


def test_the_shipped_field_knows_distance_on_noise_it_never_saw():
    path = bundled_path("field")
    assert path.stat().st_size < 1e6
    report = evaluate_field(600, valid=4000)
    assert report.spearman >= 0.95
    assert report.valid < 0.02
    assert report.descent["after"] < report.descent["before"]
    assert set(report.levels) == {f"{x:g}" for x in HELD_OUT_LEVELS}
    told = report.markdown()
    assert f"Spearman {report.spearman:.4f}" in told and json.loads(report.to_json())["poses"] == 600


def test_the_command_measures_the_field(capsys, tmp_path):
    out = tmp_path / "field.json"
    assert main(["eval", "--data", "mannequin", "--field", "--pairs", "60", "--report", str(out)]) == 0
    assert "All held-out levels together: Spearman" in capsys.readouterr().out
    assert json.loads(out.read_text())["spearman"] > 0.9
    assert main(["eval", "--field", "--parts"]) == 2
    assert main(["eval", "--field", "--rows", "copy"]) == 2
    assert main(["eval", "--field", "--pairs", "3"]) == 2
    err = capsys.readouterr().err
    assert "--parts and --field are two measurements" in err
    assert "--rows belongs to the table of models; leave it out with --field" in err
    assert "expected at least 12" in err


def test_mixed_poses_are_rotations_and_descent_stays_on_them(valid):
    strange = mix_poses(valid[:30], valid[30:60], torch.rand(30, 2) * 2)
    torch.manual_seed(0)
    moved = descend(PoseField(16, 1).eval().requires_grad_(False), strange, steps=2)
    for found in (strange, moved):
        torch.testing.assert_close(found @ found.mT, torch.eye(3).expand_as(found), atol=1e-4, rtol=0)
