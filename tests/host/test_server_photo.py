"""A real photograph through the nodes of a running ComfyUI: parsed from keypoints, framed, pasted back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest
from server import Server

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

import photo

REGIONS = {name: name != "background" for name in ("background", "face", "hair", "upper", "lower", "skin", "accessory")}


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(name: str, keypoints: str) -> dict:
    parsing = {**REGIONS, "parser": "from keypoints (no model)", "download": False}
    frame = {"sizes": "SD1.5", "width": 512, "height": 768, "margin": 0.1, "person": -1}
    frame |= {"enlarge": False, "steady": False, "padding": "white"}
    return {
        "photo": node("LoadImage", image=name),
        "pose": node("TruePoseLoadPose", file="(pasted below)", json=keypoints),
        "parsing": node("TruePoseHumanParsing", image=["photo", 0], pose=["pose", 0], **parsing),
        "frame": node("TruePoseFramePerson", image=["photo", 0], parsing=["parsing", 0], pose=["pose", 0], **frame),
        "back": node("TruePosePasteBack", photo=["photo", 0], image=["frame", 0], crop=["frame", 3], **PASTE),
        "result": node("SaveImage", images=["back", 0], filename_prefix="back"),
        "crop": node("SaveImage", images=["frame", 0], filename_prefix="crop"),
        "colours": node("SaveImage", images=["parsing", 2], filename_prefix="regions"),
    }


PASTE = {"feather": 16, "background": "keep", "color": "#ffffff"}


def test_a_photograph_is_parsed_framed_and_comes_back_as_it_was(
    comfy: Server, photo_libraries: None, tmp_path: Path
) -> None:
    pytest.importorskip("skimage")
    file, _, pose, _ = photo.make(tmp_path)
    (comfy.folder / "input").mkdir(exist_ok=True)
    (comfy.folder / "input" / "astronaut.png").write_bytes(file.read_bytes())
    entry = comfy.run(graph("astronaut.png", pose.read_text()))
    original = numpy.asarray(photo.Image.open(file).convert("RGB"))
    back, crop, colours = (comfy.images(entry, name)[0] for name in ("result", "crop", "colours"))
    numpy.testing.assert_array_equal(back, original)
    # SD1.5's tall buckets: nothing is stretched.
    assert crop.shape[0] % 64 == 0 and crop.shape[1] % 64 == 0
    face, chest, corner = colours[150, 222], colours[400, 222], colours[40, 450]
    assert face[0] > face[2] and chest[2] > chest[0], (face, chest)
    assert (corner == colours[5, 505]).all() and not (corner == chest).all()
