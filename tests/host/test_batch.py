"""A batch on a running ComfyUI: pictures and pose files go in, and what the workflow made of them comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image
from server import Server

from truepose_core.cli import main
from truepose_core.cli.batch.store import Store
from truepose_core.pose import write_pose
from truepose_core.pose.gallery import gallery_pose
from truepose_core.pose.skeleton import draw_pose

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
SIZE = 64, 96


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


WORKFLOW = {
    "photo": node("LoadImage", image="{{source}}"),
    "pose": node("TruePoseLoadPose", file="(pasted below)", json="{{pose:text}}"),
    "skeleton": node("TruePoseDrawSkeleton", pose=["pose", 0], width=SIZE[0], height=SIZE[1], hands=True, face=True),
    "both": node(
        "ImageBlend", image1=["photo", 0], image2=["skeleton", 0], blend_factor="{{blend}}", blend_mode="normal"
    ),
    "save": node("SaveImage", images=["both", 0], filename_prefix="batch"),
}


def test_rows_are_made_by_the_server(comfy: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = numpy.random.default_rng(0)
    pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    poses = {name: gallery_pose(name, *SIZE) for name in ("walking", "waving")}
    for name, pose in poses.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(write_pose(pose)[0]))
    rows = [f"{name},{tmp_path}/photo.png,{tmp_path}/{name}.json,0.5" for name in poses]
    rows += [f"bad,{tmp_path}/photo.png,{tmp_path}/walking.json,many"]
    (tmp_path / "t.csv").write_text("id,source,pose,blend\n" + "\n".join(rows) + "\n")
    (tmp_path / "api.json").write_text(json.dumps(WORKFLOW))
    argv = ["batch", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--comfyui", comfy.url, "--quiet"]
    assert main([*argv, "--workflow", str(tmp_path / "api.json")]) == 2
    assert "1 of 3 rows failed, first bad: ComfyUI refuses the workflow: ImageBlend: " in capsys.readouterr().err
    records = Store(str(tmp_path / "out")).records()
    assert {name: record["status"] for name, record in records.items()} == {
        "bad": "failed",
        "walking": "done",
        "waving": "done",
    }
    for name, pose in poses.items():
        made = numpy.asarray(Image.open(tmp_path / "out" / "pictures" / f"{name}.png")).astype(float)
        drawn = draw_pose(pose, SIZE[1], SIZE[0])[0].permute(1, 2, 0).numpy() * 255
        assert numpy.abs(made - (pixels + drawn) / 2).max() <= 1.5
