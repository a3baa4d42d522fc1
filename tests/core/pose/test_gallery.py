"""The gallery: every pose is one that a body can take, seen the way its name says."""

import json

import numpy as np
import pytest

from truepose_core.errors import TruePoseError
from truepose_core.mannequin.gallery import build, contact_sheet, main, write_gallery
from truepose_core.pose.gallery import FILE, NAMES, gallery_pose
from truepose_core.pose.keypoints import BODY_KEYPOINTS

JOINT = {name: i for i, name in enumerate(BODY_KEYPOINTS)}
WIDTH, HEIGHT = 512, 768
BONES = (
    ("shoulder", "elbow", 0.16),
    ("elbow", "wrist", 0.15),
    ("hip", "knee", 0.25),
    ("knee", "ankle", 0.25),
)


def body(name):
    """[18, 3] in statures."""
    return np.array(json.loads(FILE.read_text())[name])


def test_there_are_24_and_the_file_is_the_tables():
    stored = json.loads(FILE.read_text())
    assert len(NAMES) == 24 == len(set(NAMES))
    assert stored == build()


@pytest.mark.parametrize("name", NAMES)
def test_proportions(name):
    points = body(name)
    for side in "lr":
        for start, end, longest in BONES:
            a, b = points[JOINT[f"{side}_{start}"]], points[JOINT[f"{side}_{end}"]]
            if a[2] and b[2]:
                assert np.hypot(*(a - b)[:2]) < longest, (side, start)
    assert np.hypot(*(points[JOINT["l_shoulder"]] - points[JOINT["r_shoulder"]])[:2]) < 0.22
    trunk = points[JOINT["neck"]] - (points[JOINT["l_hip"]] + points[JOINT["r_hip"]]) / 2
    assert 0.2 < np.hypot(*trunk[:2]) < 0.32 and trunk[1] < 0
    ankles = points[[JOINT["l_ankle"], JOINT["r_ankle"]], 1]
    assert ankles.max() < -0.03


@pytest.mark.parametrize("name", NAMES)
def test_facing(name):
    """Left is on the viewer's right from the front; faces are hidden from behind."""
    points = body(name)
    shoulders, hips = (points[JOINT[f"l_{j}"], 0] - points[JOINT[f"r_{j}"], 0] for j in ("shoulder", "hip"))
    face = [points[JOINT[j], 2] for j in ("nose", "l_eye", "r_eye", "l_ear", "r_ear")]
    if name in ("back", "three-quarter back", "over the shoulder"):
        assert shoulders < 0 and hips < 0
        assert name == "over the shoulder" or face[:3] == [0, 0, 0]
        assert any(face)
    elif "side" in name:
        assert abs(shoulders) < 0.06 and face[0] == 1
        assert sum(face[1:3]) == 1 and sum(face[3:]) == 1
    elif name != "running":
        assert shoulders > 0.05 and hips > 0
        assert face[:3] == [1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_noses_point_where_the_body_goes(name):
    points = body(name)
    ears = [points[JOINT[j]] for j in ("l_ear", "r_ear") if points[JOINT[j], 2]]
    nose = points[JOINT["nose"]]
    if nose[2] and len(ears) == 1:
        # Of one ear the side is known: the left one is seen by somebody on the person's left.
        left = points[JOINT["l_ear"], 2] == 1
        assert (nose[0] < ears[0][0]) == left


def test_hidden_hands():
    points = body("hands behind the back")
    assert not points[[JOINT["l_wrist"], JOINT["r_wrist"]], 2].any()
    assert points[[JOINT["l_elbow"], JOINT["r_elbow"]], 2].all()


@pytest.mark.parametrize("size", [(512, 768), (768, 512), (1024, 1024), (256, 1024)])
@pytest.mark.parametrize("name", NAMES)
def test_everybody_is_on_the_canvas_undistorted(name, size):
    pose = gallery_pose(name, *size)
    assert (pose.width, pose.height) == size
    points = pose.people[0].body
    seen = points[:, 2] > 0
    assert (points[seen, :2] > 0).all() and (points[seen, :2] < 1).all()
    square = gallery_pose(name, 1000, 1000).people[0].body
    across, down = points[:, 0] * size[0], points[:, 1] * size[1]
    scale = np.ptp(down[seen]) / np.ptp(square[seen, 1])
    np.testing.assert_allclose(np.ptp(across[seen]), scale * np.ptp(square[seen, 0]), rtol=1e-3, atol=0.05)


def test_one_ground_and_size():
    for name in ("standing", "side", "sitting", "walking"):
        ankles = gallery_pose(name, WIDTH, HEIGHT, 0.8).people[0].body[[10, 13], 1].max()
        assert ankles == pytest.approx(0.9 - 0.043 * 0.8, abs=0.01)


def test_refuses():
    with pytest.raises(TruePoseError, match="no pose 'flying'"):
        gallery_pose("flying", 512, 512)
    with pytest.raises(TruePoseError, match="fill is 0"):
        gallery_pose("standing", 512, 512, 0)
    with pytest.raises(TruePoseError, match="canvas width"):
        gallery_pose("standing", 0, 512)


def test_the_sheet_and_the_file(tmp_path, monkeypatch):
    sheet = contact_sheet(columns=6, cell=(48, 72))
    assert sheet.shape == (4 * (72 + 24), 6 * 48, 3) and sheet.max() > 100
    write_gallery(tmp_path / "poses.json")
    assert (tmp_path / "poses.json").read_bytes() == FILE.read_bytes()
    assert [f.name for f in tmp_path.iterdir()] == ["poses.json"]
    assert main([]) == 2
