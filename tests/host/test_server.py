"""The pack in a running ComfyUI: it loads, its nodes run, and what they leave behind is nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
from prompts import transfer
from server import PACK_NAME, PromptFailed, Server

NODES = {
    "TruePoseSourceNetEncode",
    "TruePoseApplyHPFA",
    "TruePoseLoadOpenCLIPVision",
    "TruePoseLoadCAAAdapter",
    "TruePoseCAAEncode",
    "TruePoseApplyCAA",
    "TruePoseParsingFromMasks",
    "TruePoseParsingFromLabels",
    "TruePoseParsingToMasks",
    "TruePoseParsingToSEGS",
    "TruePoseHumanParsing",
    "TruePoseEditParsing",
    "TruePoseLoadPose",
    "TruePoseDrawSkeleton",
    "TruePoseEstimatePose",
    "TruePoseRetargetPose",
    "TruePoseInterpolatePoses",
    "TruePoseTransformPose",
    "TruePoseEditPose",
    "TruePosePoseGallery",
    "TruePoseLoadModel",
    "TruePosePictureContext",
    "TruePoseEmptyLatent",
    "TruePoseApplyPoseEncoder",
    "TruePoseGuider",
    "TruePoseHPFASampler",
    "TruePoseMannequin",
    "TruePoseAttentionView",
    "TruePoseFramePerson",
    "TruePosePasteBack",
    "TruePoseCombineSources",
    "TruePoseApply3DGuidance",
    "TruePoseLoadBodyPose",
    "TruePoseBodyPoseFromKeypoints",
    "TruePoseRenderBody",
    "TruePoseCarryAlongBody",
    "TruePoseAlignSource",
    "TruePosePoseFieldGuidance",
    "TruePoseGuideReferences",
    "TruePoseFreezeRegions",
    "TruePoseHandsAndFace",
    "TruePoseLoadCFLD",
    "TruePoseApplyCFLD",
    "TruePoseRestoreCFLD",
}


def picture(comfy: Server, prompt: dict) -> numpy.ndarray:
    return comfy.images(comfy.run(prompt), "save")[0]


def test_pack_loads_with_no_warning_of_ours(comfy: Server) -> None:
    log = comfy.log()
    assert PACK_NAME in log
    assert not [line for line in log.splitlines() if PACK_NAME in line and "IMPORT FAILED" in line]
    assert "Error while calling comfy_entrypoint in " + str(comfy.folder) not in log


def test_log_is_silent_about_us_while_starting(comfy: Server) -> None:
    starting, _, _ = comfy.log().partition("To see the GUI go to")
    assert comfy.our_lines(starting) == []


def test_object_info_is_complete(comfy: Server) -> None:
    info = comfy.object_info()
    ours = {name: node for name, node in info.items() if name.startswith("TruePose")}
    assert set(ours) == NODES
    for name, node in ours.items():
        assert node["category"].split("/")[0] == "TruePose", name
        assert node["description"] and node["display_name"] != name
        for kind in ("required", "optional"):
            for key, (_, settings) in node["input"].get(kind, {}).items():
                assert settings.get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]) and len(node["output_tooltips"]) == len(node["output"])


def test_help_pages_are_served(comfy: Server) -> None:
    for name in NODES:
        page = comfy.raw(f"/extensions/{PACK_NAME}/docs/{name}.md").decode()
        assert page.startswith("# ")


@pytest.mark.parametrize("cache", ["--cache-classic", "--cache-lru=10", "--cache-none"])
def test_transfer_under_every_cache(start_server: Callable[..., Server], cache: str) -> None:
    with start_server(*cache.split("=")) as server:
        plain = picture(server, transfer(hpfa=False))
        first = picture(server, transfer())
        other_seed = server.run(transfer(seed=2))
        again = picture(server, transfer())
        numpy.testing.assert_array_equal(first, again)
        assert (first != plain).any()
        numpy.testing.assert_array_equal(plain, picture(server, transfer(hpfa=False)))
        numpy.testing.assert_array_equal(plain, picture(server, transfer(strength=0.0)))
        # A new seed reads nothing again: only what comes after it runs.
        if cache != "--cache-none":
            assert server.executed(other_seed) == {"sampler", "decoded", "save"}
        assert "Traceback" not in server.log()


def test_a_failed_prompt_names_its_node_and_leaves_the_next_clean(comfy: Server) -> None:
    before = picture(comfy, transfer())
    plain = picture(comfy, transfer(hpfa=False))
    other = transfer()
    other["bigger"] = {"class_type": "TestModel", "inputs": {"seed": 0, "family": "SDXL"}}
    other["hpfa"]["inputs"]["model"] = ["bigger", 0]
    with pytest.raises(PromptFailed, match="same family") as failed:
        comfy.run(other)
    assert failed.value.node == "hpfa"
    small = transfer()
    small["parsing"]["inputs"] = {}
    with pytest.raises(PromptFailed, match="no mask is connected"):
        comfy.run(small)
    batch = transfer()
    batch["latent"]["inputs"]["batch_size"] = 3
    batch["two"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["image", 0], "amount": 2}}
    batch["source"]["inputs"]["image"] = ["two", 0]
    with pytest.raises(PromptFailed, match="2 source images and 3 latents") as failed:
        comfy.run(batch)
    assert failed.value.node == "sampler"
    numpy.testing.assert_array_equal(before, picture(comfy, transfer()))
    numpy.testing.assert_array_equal(plain, picture(comfy, transfer(hpfa=False)))


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({"upper": 1.5}, "value_bigger_than_max"),
        ({"strength": -1}, "value_smaller_than_min"),
        ({"start_percent": "x"}, "invalid_input_type"),
    ],
)
def test_values_out_of_range_are_refused_before_running(comfy: Server, inputs: dict, kind: str) -> None:
    with pytest.raises(PromptFailed) as failed:
        comfy.run(transfer(**inputs))
    assert (failed.value.node, failed.value.kind) == ("hpfa", kind)


def test_previews_are_shown_in_the_node(comfy: Server) -> None:
    prompt = transfer()
    prompt["pose"] = {
        "class_type": "TruePoseLoadPose",
        "inputs": {
            "file": "(pasted below)",
            "json": '{"canvas_width": 64, "canvas_height": 96, "people": [{"pose_keypoints_2d": ['
            + "32, 48, 1, " * 17
            + "32, 20, 1]}]}",
        },
    }
    prompt["drawn"] = {
        "class_type": "TruePoseDrawSkeleton",
        "inputs": {"pose": ["pose", 0], "width": 0, "height": 0, "hands": True, "face": True},
    }
    prompt["seen"] = {"class_type": "PreviewImage", "inputs": {"images": ["drawn", 0]}}
    prompt["save"]["inputs"]["filename_prefix"] = "previews"
    prompt["image"]["inputs"]["seed"] = 99  # not in the cache, which sends no previews
    entry = comfy.run(prompt)
    assert comfy.images(entry, "parsing")[0].shape == (96, 64, 3)
    assert comfy.images(entry, "drawn")[0].shape == (96, 64, 3)
    assert comfy.images(entry, "pose")[0].max() > 200
