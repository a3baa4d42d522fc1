"""Nodes that make and change poses, called as the host calls them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pack.nodes import TruePoseExtension, pose_edit
from pack.nodes import pose as pose_nodes
from pack.nodes.host import files as host_files
from pack.nodes.pose import ALL_PEOPLE, WHOLE_PICTURE, DrawSkeleton, EstimatePose, PoseGallery
from pack.nodes.pose_edit import (
    EVERYBODY,
    MOVE_TO,
    VIDEO,
    EditPose,
    InterpolatePoses,
    RetargetPose,
    TransformPose,
)

from truepose_core.errors import TruePoseError
from truepose_core.networks import known
from truepose_core.pose import Person, Pose, read_pose, write_pose
from truepose_core.pose.estimation import PoseEstimator, wholebody_person
from truepose_core.pose.gallery import NAMES, gallery_pose
from truepose_core.pose.retarget import retarget_pose

WIDTH, HEIGHT = 128, 192


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


def group(*names: str, frames: int = 1) -> list[dict]:
    people = tuple(gallery_pose(name, WIDTH, HEIGHT, 0.9 - 0.1 * i).people[0] for i, name in enumerate(names))
    return write_pose([Pose(WIDTH, HEIGHT, people)] * frames)


def bodies(pose: list[dict]) -> np.ndarray:
    """[frames, people, 18, 3], normalised."""
    return np.array([[person.body for person in one.people] for one in read_pose(pose)])


def check(pose: list[dict], image: torch.Tensor, frames: int = 1) -> None:
    """Strict POSE_KEYPOINT, and its picture."""
    assert pose == write_pose(read_pose(json.loads(json.dumps(pose)))) and len(pose) == frames
    for frame in pose:
        assert (frame["canvas_width"], frame["canvas_height"]) == (WIDTH, HEIGHT)
        for person in frame["people"]:
            assert {key: len(values) for key, values in person.items()} == {
                "pose_keypoints_2d": 54,
                "face_keypoints_2d": 210,
                "hand_left_keypoints_2d": 63,
                "hand_right_keypoints_2d": 63,
            }
    assert image.shape == (frames, HEIGHT, WIDTH, 3) and image.dtype == torch.float32
    assert torch.equal(image, run(DrawSkeleton, pose=pose)[0])


def test_nodes_are_listed() -> None:
    names = {node.GET_SCHEMA().node_id for node in asyncio.run(TruePoseExtension().get_node_list())}
    ours = [*pose_nodes.NODES, *pose_edit.NODES]
    assert {node.GET_SCHEMA().node_id for node in ours} <= names and len(ours) == 8


@pytest.mark.parametrize("mirror", [False, True])
def test_gallery(mirror: bool) -> None:
    options = {i.id: i for i in PoseGallery.define_schema().inputs}["name"].options
    assert list(options) == list(NAMES) and len(options) == 24
    for name in ("standing", "back", "running"):
        pose, image = run(PoseGallery, name=name, width=WIDTH, height=HEIGHT, mirror=mirror)
        check(pose, image)
        expected = gallery_pose(name, WIDTH, HEIGHT).people[0].body
        nose = bodies(pose)[0, 0, 0]
        assert nose[2] == expected[0, 2]
        if nose[2]:
            assert nose[0] == pytest.approx(1 - expected[0, 0] if mirror else expected[0, 0], abs=1e-5)
    output = PoseGallery.execute(name="sitting", width=WIDTH, height=HEIGHT)
    assert output.ui is not None


def test_retarget() -> None:
    target, source = group("walking", "standing"), group("sitting", "hands on hips")
    pose, image = run(RetargetPose, target=target, source=source, target_person=1, source_person=1, anchor="hips")
    check(pose, image)
    core = retarget_pose(read_pose(target)[0], read_pose(source)[0], target_person=1, source_person=1, anchor="hips")
    np.testing.assert_allclose(bodies(pose)[0, 1], core.people[1].body, atol=1e-6)
    np.testing.assert_allclose(bodies(pose)[0, 0], bodies(target)[0, 0], atol=1e-6)
    pose, image = run(RetargetPose, target=target, source=source, people=EVERYBODY, size="source")
    check(pose, image)
    frames = group("walking", frames=2) + group("side") + group("running")
    check(*run(RetargetPose, target=frames, source=source, people=VIDEO), frames=4)
    check(*run(RetargetPose, target=frames, source=frames), frames=4)
    np.testing.assert_allclose(bodies(run(RetargetPose, target=frames, source=frames)[0]), bodies(frames), atol=1e-5)


def test_retarget_refuses() -> None:
    two = group("standing", "walking")
    for match, inputs in (
        ("person 5 was asked for", {"target_person": 5}),
        ("person 3 was asked for", {"source_person": 3}),
        ("no person", {"target": write_pose(Pose(64, 64))}),
        ("2 people and the source 1", {"source": group("standing"), "people": EVERYBODY}),
        ("target has 1 frames and the source 2", {"source": group("standing", frames=2)}),
        ("for a video expected one", {"source": group("standing", frames=2), "people": VIDEO}),
        (r"frame 1: person 1 was asked for", {"target": two + group("standing"), "target_person": 1}),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(RetargetPose, **({"target": two, "source": two} | inputs))
    dot = Pose(64, 64, (Person(np.eye(18)[:, :1] * (0.5, 0.5, 1.0)),))
    with pytest.raises(TruePoseError, match="no part of the body can be measured"):
        run(RetargetPose, target=two, source=write_pose(dot))


def test_interpolate() -> None:
    first, second = group("standing"), group("walking")
    pose, image = run(InterpolatePoses, first=first, second=second, steps=5)
    check(pose, image, frames=5)
    assert pose[0] == first[0] and pose[-1] == second[0]
    with pytest.raises(TruePoseError, match="first pose has 2 frames"):
        run(InterpolatePoses, first=first * 2, second=second)
    with pytest.raises(TruePoseError, match="1 people and the second 2"):
        run(InterpolatePoses, first=first, second=group("walking", "standing"))
    with pytest.raises(TruePoseError, match="canvas is 128x192 and the second 64x64"):
        run(InterpolatePoses, first=first, second=write_pose(gallery_pose("back", 64, 64)))


def test_transform() -> None:
    given = group("walking", "waving", frames=2)
    pose, image = run(TransformPose, pose=given)
    check(pose, image, frames=2)
    np.testing.assert_allclose(bodies(pose), bodies(given), atol=1e-6)
    once, _ = run(TransformPose, pose=given, mirror=True, person=1)
    twice, image = run(TransformPose, pose=once, mirror=True, person=1)
    check(twice, image, frames=2)
    np.testing.assert_allclose(bodies(twice), bodies(given), atol=1e-6)
    assert np.abs(bodies(once)[:, 1] - bodies(given)[:, 1]).max() > 0.1
    moved, image = run(TransformPose, pose=given, move_x=0.25, move_y=-0.1, person=0)
    check(moved, image, frames=2)
    seen = bodies(given)[:, 0, :, 2:] > 0
    np.testing.assert_allclose(
        bodies(moved)[:, 0, :, :2], (bodies(given)[:, 0, :, :2] + (0.25, -0.1)) * seen, atol=1e-6
    )
    check(*run(TransformPose, pose=given, scale=0.5, about="hips"), frames=2)
    with pytest.raises(TruePoseError, match="frame 0: person 2 was asked for"):
        run(TransformPose, pose=given, person=2, mirror=True)
    with pytest.raises(TruePoseError, match="no person"):
        run(TransformPose, pose=write_pose(Pose(64, 64)))
    body = np.array(gallery_pose("standing", WIDTH, HEIGHT).people[0].body)
    body[[10, 13]] = 0
    cut = write_pose(Pose(WIDTH, HEIGHT, (Person(body),)))
    with pytest.raises(TruePoseError, match="ankles are missing"):
        run(TransformPose, pose=cut, scale=2.0)
    check(*run(TransformPose, pose=cut, move_x=0.1))


def test_edit() -> None:
    given = group("standing", "sitting")
    pose, image = run(EditPose, pose=given, joint="l_wrist", move=MOVE_TO, x=64.0, y=48.0, person=1)
    check(pose, image)
    np.testing.assert_allclose(bodies(pose)[0, 1, 7], (0.5, 0.25, 1), atol=1e-6)
    pose, image = run(EditPose, pose=given, joint="r_elbow", x=-12.8, y=-19.2, children="move along")
    check(pose, image)
    np.testing.assert_allclose(bodies(pose)[0, 0, [3, 4], :2], bodies(given)[0, 0, [3, 4], :2] - 0.1, atol=1e-5)
    hidden = group("back")
    with pytest.raises(TruePoseError, match="nose of person 0 is missing"):
        run(EditPose, pose=hidden, joint="nose", x=5.0)
    check(*run(EditPose, pose=hidden, joint="nose", move=MOVE_TO, x=64.0, y=20.0))
    with pytest.raises(TruePoseError, match="person 4"):
        run(EditPose, pose=given, person=4)


# Estimation: networks that say what we tell them; the real ones are tested without the host.


class Network:
    """Stands in for an OnnxSession."""

    provider = "CPU"

    def __init__(self, path: Path, size: tuple[int, int], answer: Callable[[], dict[str, np.ndarray]]) -> None:
        self.path, self.inputs, self.answer = path, {"input": (1, 3, *size)}, answer

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert arrays["input"].shape == self.inputs["input"]
        return self.answer()


PEAK = 0.8
# Two people in the detector's pixels, of 640 for a picture 192 high, the smaller one first.
BOXES = np.array([[[20, 100, 60, 200, 0.9], [100, 30, 400, 600, 0.7], [0, 0, 640, 640, 0.1]]], np.float32)


def peaks() -> dict[str, np.ndarray]:
    """Keypoint k in the k-th bin of 300 from the left and the top."""
    x, y = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
    x[0, range(133), range(133)] = y[0, range(133), range(133)] = PEAK
    return {"simcc_x": x, "simcc_y": y}


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder, and networks in place of its files."""
    for name in ("dw-ll_ucoco_384.onnx", "yolox_l.onnx"):
        (tmp_path / name).touch()

    def open_networks(folders: list[Path], *, detect: bool, **options: object) -> PoseEstimator:
        assert folders == [tmp_path] and options["provider"] == "auto"
        pose = Network(tmp_path / "dw-ll_ucoco_384.onnx", (384, 288), peaks)
        finder = Network(tmp_path / "yolox_l.onnx", (640, 640), lambda: {"dets": BOXES})
        return PoseEstimator(pose, finder if detect else None)

    monkeypatch.setattr(host_files, "folders", lambda: [tmp_path])
    monkeypatch.setattr(pose_nodes, "choose_estimator", open_networks)
    return tmp_path


def photo(batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    blobs = torch.rand(batch, 3, 14, 10, generator=generator)
    return torch.nn.functional.interpolate(blobs, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1).movedim(1, -1)


def nose(pose: list[dict], person: int = 0) -> list[float]:
    return pose[0]["people"][person]["pose_keypoints_2d"][:2]


def test_estimate(networks: Path) -> None:
    image = photo(3)
    pose, skeletons, count, info = run(EstimatePose, image=image, find=WHOLE_PICTURE)
    check(pose, skeletons, frames=3)
    assert count == 1 and info == "dw-ll_ucoco_384.onnx on CPU"
    # The picture, a quarter larger and in the network's shape, has its corner here.
    assert nose(pose) == pytest.approx([64 - 0.5 * 1.25 * 192 * 0.75, 96 - 0.5 * 1.25 * 192], abs=1e-3)
    pose, skeletons, count, info = run(EstimatePose, image=image, find=ALL_PEOPLE, threshold=0.2)
    check(pose, skeletons, frames=3)
    assert count == len(pose[0]["people"]) == 2
    assert info == "yolox_l.onnx on CPU and dw-ll_ucoco_384.onnx on CPU"
    middle, high = np.array([250, 315]) * 0.3, 570 * 0.3 * 1.25
    assert nose(pose) == pytest.approx(middle - np.array([0.75, 1]) * high / 2, abs=1e-3)
    assert nose(pose, 1)[0] < 20
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 20:150, 30:100] = 1
    pose, skeletons, count, info = run(EstimatePose, image=image, mask=mask)
    check(pose, skeletons, frames=3)
    assert count == 1 and "yolox" not in info
    assert nose(pose) == pytest.approx([65 - 130 * 1.25 * 0.75 / 2, 85 - 130 * 1.25 / 2], abs=1e-3)
    assert EstimatePose.execute(image=image, find=WHOLE_PICTURE).ui is not None


def test_estimate_refuses(networks: Path) -> None:
    with pytest.raises(TruePoseError, match="mask 0 is empty"):
        run(EstimatePose, image=photo(), mask=torch.zeros(1, HEIGHT, WIDTH))
    with pytest.raises(TruePoseError, match="mask is 32x32 and the image 128x192"):
        run(EstimatePose, image=photo(), mask=torch.ones(1, 32, 32))
    with pytest.raises(TruePoseError, match="2 masks and 3 pictures"):
        run(EstimatePose, image=photo(3), mask=torch.ones(2, HEIGHT, WIDTH))
    for find in (ALL_PEOPLE, WHOLE_PICTURE):
        with pytest.raises(TruePoseError, match="nobody was found in picture 0"):
            run(EstimatePose, image=photo(), find=find, threshold=0.95)
    (networks / "yolox_l.onnx").unlink()
    with pytest.raises(TruePoseError, match=r"yolox-l is not there yet.*whole picture"):
        run(EstimatePose, image=photo())
    (networks / "dw-ll_ucoco_384.onnx").unlink()
    with pytest.raises(TruePoseError, match=r"dwpose is not there yet.* at .*dw-ll_ucoco_384\.onnx; or .*download on"):
        run(EstimatePose, image=photo(), find=WHOLE_PICTURE)


def test_half_a_source_is_said_and_the_pose_can_be_cut_likewise(caplog: pytest.LogCaptureFixture) -> None:
    whole = gallery_pose("standing", 512, 768)
    (person,) = whole.people
    body = np.array(person.body)
    body[[9, 10, 12, 13]] = 0
    source = write_pose([Pose(512, 768, (Person(body),))])
    run(RetargetPose, target=write_pose([whole]), source=source)
    assert "the source shows no knees, no feet, and the pose has them" in caplog.text
    caplog.clear()
    cut = run(RetargetPose, target=write_pose([whole]), source=source, shows=pose_edit.AS_SOURCE)[0]
    assert not caplog.records
    (made,) = read_pose(cut)[0].people
    np.testing.assert_allclose(made.body[1], body[1], atol=2e-3)
    with pytest.raises(TruePoseError, match="is for one person"):
        run(
            RetargetPose,
            target=write_pose([whole]),
            source=source,
            shows=pose_edit.AS_SOURCE,
            people=VIDEO,
        )


@pytest.mark.parametrize("download", [False, True])
def test_missing_onnxruntime_is_said_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(known, "download", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(TruePoseError, match="onnxruntime, which is not installed"):
        run(EstimatePose, image=photo(), download=download)


def test_the_hosts_own_sdpose_is_read_with_the_right_hands() -> None:
    sdpose = pytest.importorskip("comfy_extras.nodes_sdpose")
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(20, 480, (133, 2)), np.ones((133, 1))], 1)
    # The wrists of COCO, and a hand on each.
    for wrist, hand in ((9, slice(91, 112)), (10, slice(112, 133))):
        points[hand, :2] = points[wrist, :2] + rng.uniform(0, 40, (21, 2))
        points[hand.start, :2] = points[wrist, :2] + 1
    points[13, 2] = 0.1
    (frame,) = sdpose._to_openpose_frames([[points[:, :2]]], [[points[:, 2]]], 512, 512)
    (one,) = read_pose(frame)[0].people
    expected = wholebody_person(points, 512, 512)
    for name in ("body", "hand_left", "hand_right", "face"):
        np.testing.assert_allclose(getattr(one, name), getattr(expected, name), atol=1e-5, err_msg=name)
    assert one.body[12, 2] == 0
