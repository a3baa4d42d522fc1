"""Pose estimation against an implementation of its original written here, on the same tiny networks."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx_pose_models import save_boxes, save_detector, save_pose  # noqa: E402

from truepose_core.errors import TruePoseError  # noqa: E402
from truepose_core.networks.onnx import close_sessions  # noqa: E402
from truepose_core.pose import estimation as pose_estimation  # noqa: E402
from truepose_core.pose.estimation import (  # noqa: E402
    choose_estimator,
    detect_people,
    estimate_pose,
    keypoints,
    open_estimator,
    wholebody_person,
)
from truepose_core.pose.keypoints import BODY_KEYPOINTS  # noqa: E402

# COCO's own order of its 17 body points.
COCO = (
    *("nose", "l_eye", "r_eye", "l_ear", "r_ear", "l_shoulder", "r_shoulder", "l_elbow", "r_elbow"),
    *("l_wrist", "r_wrist", "l_hip", "r_hip", "l_knee", "r_knee", "l_ankle", "r_ankle"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    save_detector(folder / "yolox_l.onnx")
    save_pose(folder / "dw-ll_ucoco_384.onnx")
    yield folder
    close_sessions()


@pytest.fixture(scope="module")
def estimator(folder):
    return choose_estimator([folder], provider="CPU")


def picture(height, width, seed=0):
    """Blobs of colour, 8 bit, [3, H, W] in 0..255."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator) * 255
    blobs = torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=True)[0]
    return (blobs + torch.randn(blobs.shape, generator=generator) * 10).clamp(0, 255).round()


# The original, written plainly: RGB pixels [H, W, 3].


def sample(image, x, y):
    """Bilinear, black outside, rounded to whole levels; pixel centres at whole numbers."""
    height, width = image.shape[:2]
    result = np.zeros((*x.shape, 3))
    for dx in (0, 1):
        for dy in (0, 1):
            xi, yi = np.floor(x).astype(int) + dx, np.floor(y).astype(int) + dy
            weight = (1 - np.abs(x - xi)) * (1 - np.abs(y - yi))
            inside = (xi >= 0) & (xi < width) & (yi >= 0) & (yi < height)
            colour = image[yi.clip(0, height - 1), xi.clip(0, width - 1)]
            result += (weight * inside)[..., None] * colour
    return np.round(result)


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    return shared / (sum((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)) - shared)


def original_boxes(image, session):
    height, width = image.shape[:2]
    ratio = min(640 / height, 640 / width)
    rows, columns = int(height * ratio), int(width * ratio)
    # Resizing keeps the corners of the picture on the corners and takes the nearest pixel beyond the border.
    y = ((np.arange(rows) + 0.5) * height / rows - 0.5).clip(0, height - 1)
    x = ((np.arange(columns) + 0.5) * width / columns - 0.5).clip(0, width - 1)
    padded = np.full((640, 640, 3), 114.0)
    padded[:rows, :columns] = sample(image, *np.meshgrid(x, y))
    bgr = padded[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    output = session.run(None, {"images": bgr})[0][0]
    found, row = [], 0
    for stride in (8, 16, 32):
        for cell in range((640 // stride) ** 2):
            left_over, score = output[row], float(output[row, 4] * output[row, 5])
            row += 1
            if score > 0.3:
                cy, cx = divmod(cell, 640 // stride)
                cx, cy = (left_over[0] + cx) * stride, (left_over[1] + cy) * stride
                w, h = math.exp(left_over[2]) * stride, math.exp(left_over[3]) * stride
                found.append((score, [v / ratio for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)]))
    kept = []
    for _, box in sorted(found, key=lambda f: -f[0]):
        if all(iou(box, other) <= 0.45 for other in kept):
            kept.append(box)
    return sorted(kept, key=lambda b: -(b[2] - b[0]) * (b[3] - b[1]))


def original_keypoints(image, box, session):
    centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    w, h = (box[2] - box[0]) * 1.25, (box[3] - box[1]) * 1.25
    w, h = (w, w / 0.75) if w > h * 0.75 else (h * 0.75, h)
    x, y = np.meshgrid((np.arange(288) - 144) * w / 288 + centre[0], (np.arange(384) - 192) * h / 384 + centre[1])
    crop = (sample(image, x, y) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    simcc_x, simcc_y = session.run(["simcc_x", "simcc_y"], {"input": crop.transpose(2, 0, 1)[None].astype(np.float32)})
    rows = []
    for along, down in zip(simcc_x[0], simcc_y[0], strict=True):
        at = along.argmax() / 2 / 288 * w + centre[0] - w / 2, down.argmax() / 2 / 384 * h + centre[1] - h / 2
        rows.append((*at, min(along.max(), down.max())))
    return np.array(rows)


@pytest.mark.parametrize("size", [(640, 640), (900, 640), (480, 700)])
def test_detector_is_the_original(folder, estimator, size):
    pixels = picture(*size)
    session = ort.InferenceSession(str(folder / "yolox_l.onnx"), providers=["CPUExecutionProvider"])
    expected = original_boxes(pixels.permute(1, 2, 0).double().numpy(), session)
    got = detect_people(pixels, estimator.detector)
    assert len(expected) > 1 and got.shape == (len(expected), 4)
    np.testing.assert_allclose(got, expected, atol=0.1)


@pytest.mark.parametrize("box", [(100.3, 120.7, 300.2, 420.1), (-30.0, 10.0, 200.0, 330.5), (50.0, 60.0, 90.0, 150.0)])
def test_keypoints_are_the_originals(folder, estimator, box):
    pixels = picture(500, 400, seed=1)
    session = ort.InferenceSession(str(folder / "dw-ll_ucoco_384.onnx"), providers=["CPUExecutionProvider"])
    expected = original_keypoints(pixels.permute(1, 2, 0).double().numpy(), box, session)
    got = keypoints(pixels, np.array(box), estimator.pose)
    np.testing.assert_allclose(got[:, 2], expected[:, 2], atol=1e-3)
    # Two responses of almost the same height may change places.
    assert (np.abs(got[:, :2] - expected[:, :2]).max(1) < 1e-6).mean() > 0.97


def test_a_large_picture_is_seen_as_its_small_copy(estimator):
    """Four times as large, smoothly: averaging, not skipping pixels."""
    small = picture(500, 400, seed=2)
    large = torch.nn.functional.interpolate(small[None], scale_factor=4, mode="nearest")[0]
    large = large + torch.tensor([[20.0, -20.0], [-20.0, 20.0]]).repeat(1000, 800)
    box = np.array([90.0, 110.0, 330.0, 430.0])
    got, expected = (keypoints(p, b, estimator.pose) for p, b in ((large, box * 4 + 1.5), (small, box)))
    near = np.abs((got[:, :2] - 1.5) / 4 - expected[:, :2]).max(1) < 2
    assert near.mean() > 0.9


def test_non_maximum_suppression_inside_the_network(tmp_path):
    boxes = np.array([[10, 10, 100, 300, 0.9], [300, 20, 620, 600, 0.8], [5, 5, 50, 50, 0.1]])
    session = open_estimator(save_pose(tmp_path / "p.onnx"), save_boxes(tmp_path / "d.onnx", boxes)).detector
    got = detect_people(picture(320, 320), session)
    np.testing.assert_allclose(got, boxes[[1, 0], :4] / 2, atol=1e-3)


# COCO-WholeBody to OpenPose


def wholebody(seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, 100, (133, 2)), np.ones((133, 1))], 1)


def test_body_by_name():
    points = wholebody()
    person = wholebody_person(points, 100, 200)
    for number, name in enumerate(COCO):
        expected = points[number, :2] / (100, 200)
        np.testing.assert_allclose(person.body[BODY_KEYPOINTS.index(name), :2], expected, atol=1e-6, err_msg=name)
    shoulders = (points[5, :2] + points[6, :2]) / 2 / (100, 200)
    np.testing.assert_allclose(person.body[1, :2], shoulders, atol=1e-6)
    np.testing.assert_allclose(person.face[:68, :2], points[23:91, :2] / (100, 200), atol=1e-6)
    np.testing.assert_allclose(person.face[68:, :2], points[[2, 1], :2] / (100, 200), atol=1e-6)
    np.testing.assert_allclose(person.hand_left[:, :2], points[91:112, :2] / (100, 200), atol=1e-6)
    np.testing.assert_allclose(person.hand_right[:, :2], points[112:, :2] / (100, 200), atol=1e-6)


def test_thresholds():
    points = wholebody()
    points[[6, 9], 2] = 0.29
    points[10, 2] = 0.3
    points[91:112, 2] = 0.1
    points[30, 2] = 7.0
    person = wholebody_person(points, 100, 100)
    gone = {BODY_KEYPOINTS[i] for i in np.flatnonzero(person.body[:, 2] == 0)}
    assert gone == {"r_shoulder", "l_wrist", "neck"}
    assert person.hand_left is None and person.hand_right is not None
    assert person.face[7, 2] == 1
    points[:, 2] = 0
    nobody = wholebody_person(points, 100, 100)
    assert not nobody.is_visible and nobody.face is None


# The whole


def test_whole_pictures_one_by_one(estimator):
    batch = torch.stack([picture(640, 480, seed) for seed in (3, 4)]) / 255
    together = estimate_pose(batch, estimator)
    for image, pose in zip(batch, together, strict=True):
        assert (pose.width, pose.height) == (480, 640)
        boxes = detect_people(image * 255, estimator.detector)
        assert len(pose.people) == len(boxes) > 1
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (np.diff(sides.prod(1)) <= 0).all()
        (alone,) = estimate_pose(image[None], estimator)
        for one, other in zip(pose.people, alone.people, strict=True):
            np.testing.assert_array_equal(one.body, other.body)


def test_a_box_and_the_whole_picture(folder):
    alone = choose_estimator([folder], detect=False)
    image = picture(384, 288, seed=5)[None] / 255
    whole, boxed = estimate_pose(image, alone)[0], estimate_pose(image, alone, box=(0, 0, 288, 384))[0]
    np.testing.assert_array_equal(whole.people[0].body, boxed.people[0].body)
    small = estimate_pose(image, alone, box=(50, 60, 150, 200))[0].people[0].body
    xy = small[small[:, 2] > 0, :2] * (288, 384)
    # The crop is the box, a quarter larger, in the network's shape.
    assert (np.abs(xy - (100, 130)) <= (105 * 1.25 / 2 + 1e-3, 140 * 1.25 / 2 + 1e-3)).all()


def test_nobody(tmp_path, estimator):
    with pytest.raises(TruePoseError, match="nobody was found in picture 0: no body keypoint is sure enough"):
        estimate_pose(picture(100, 100)[None] / 255, open_estimator(estimator.pose.path), threshold=1.0)
    nothing = open_estimator(estimator.pose.path, save_boxes(tmp_path / "d.onnx", np.array([[0, 0, 9, 9, 0.1]])))
    with pytest.raises(TruePoseError, match="nobody was found in picture 0: no person was detected"):
        estimate_pose(picture(100, 100)[None] / 255, nothing)


def test_refuses(tmp_path, folder, estimator):
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(TruePoseError, match="shows nothing of the 64x64"):
        estimate_pose(image, estimator, box=(70, 0, 90, 20))
    with pytest.raises(TruePoseError, match="shows nothing"):
        estimate_pose(image, estimator, box=(20, 0, 10, 20))
    with pytest.raises(TruePoseError, match="expected left, top"):
        estimate_pose(image, estimator, box=(1, 2, 3))
    with pytest.raises(TruePoseError, match="threshold is 0"):
        estimate_pose(image, estimator, threshold=0)
    with pytest.raises(TruePoseError, match=r"expected \[B, 3, H, W\]"):
        estimate_pose(image[0], estimator)
    with pytest.raises(TruePoseError, match="no DWPose network"):
        open_estimator(folder / "yolox_l.onnx")
    body_only = open_estimator(save_pose(tmp_path / "body.onnx", points=17))
    with pytest.raises(TruePoseError, match=r"\[1, 17, 576\]; expected \[1, 133"):
        estimate_pose(image, body_only)
    other = open_estimator(estimator.pose.path, save_pose(tmp_path / "p.onnx", height=64, width=64))
    with pytest.raises(TruePoseError, match="expected YOLOX's"):
        estimate_pose(image, other)
    with pytest.raises(TruePoseError, match=r"dw-ll_ucoco_384\.onnx"):
        choose_estimator([tmp_path / "empty"])


def test_says_what_computes(estimator):
    assert estimator.description == "yolox_l.onnx on CPU and dw-ll_ucoco_384.onnx on CPU"
    assert pose_estimation.THRESHOLD == 0.3
