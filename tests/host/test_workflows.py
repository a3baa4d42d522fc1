"""The workflows that come with the pack: they load, validate, say what they miss, and run."""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from browser import Browser, find_browser
from graph import CORE_VERSION, NOTE, SCREEN, declared, fits, is_widget, pack_identity, to_api
from make_workflows import BUILDERS, FILES, FRAMES, IP_ADAPTER, MANY, POSE_FILES, WORKFLOWS, build, text
from PIL import Image
from server import PACK_NAME, Server
from small_files import PHOTOS, mannequin_photo, save_ip_adapter, save_photo

NAMES = sorted(BUILDERS)
NEEDS_NO_FILE = ("attention_view", "demo", "extreme_pose", "pose_sequence")
PASTED_NAMES = ("photo_to_pose", "restyle_region", "swap_garment_photo")
PHOTO_NAMES = ("carry_and_inpaint", *PASTED_NAMES)
MODEL_FILES = {model["name"] for model in FILES}
"""Checkpoints, a LoRA and ControlNets, which a test has not got. A prompt may lack these and nothing else."""
SHOW = ("MaskPreview", "PreviewImage", "SaveAnimatedWEBP", "SaveImage", "TruePoseAttentionView")


def read(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def photo(comfy: Server) -> numpy.ndarray:
    """The photo [H, W, 3] of the workflows and one of somebody else in the same pose, and networks that know it."""
    picture, body = mannequin_photo(5)
    save_photo(comfy.folder, picture, body)
    Image.fromarray(mannequin_photo(6)[0]).save(comfy.folder / "input" / PHOTOS[1])
    return picture


@pytest.fixture(scope="module")
def info(comfy: Server, photo: numpy.ndarray) -> dict:
    return comfy.object_info()


def test_every_workflow_has_a_file_and_a_picture() -> None:
    assert sorted(file.stem for file in WORKFLOWS.glob("*.json")) == NAMES
    for name in NAMES:
        picture = (WORKFLOWS / f"{name}.jpg").read_bytes()
        assert picture[:3] == b"\xff\xd8\xff" and len(picture) < 300_000, name


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_they_are_built(name: str, info: dict) -> None:
    assert text(build(name, info)) == (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"), (
        "run python workflows/source/make_workflows.py"
    )


@pytest.mark.parametrize("name", NAMES)
def test_structure(name: str, info: dict) -> None:
    workflow = read(name)
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"])
    for number, source, output, target, slot, kind in workflow["links"]:
        sends, takes = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in sends["links"] and takes["link"] == number
        assert sends["type"] == kind and fits(kind, [takes["type"]])
    assert sum(len(o["links"]) for n in nodes.values() for o in n["outputs"]) == len(links)
    assert any(node["type"] == NOTE for node in nodes.values())
    pack, version = pack_identity()
    for node in nodes.values():
        if node["type"] == NOTE:
            continue
        assert node["mode"] == 0
        properties = node["properties"]
        wanted = (pack, version) if node["type"].startswith("TruePose") else ("comfy-core", CORE_VERSION)
        assert (properties["cnr_id"], properties["ver"]) == wanted
        assert [o["type"] for o in node["outputs"]] == info[node["type"]]["output"]
        inputs = {n: (d[0], is_widget(d)) for n, d, _ in declared(info[node["type"]])}
        for socket in node["inputs"]:
            assert inputs[socket["name"]] == (socket["type"], "widget" in socket)
        # A node that loads a model file says where the file is to be had.
        named = {value for value in node["widgets_values"] if value in MODEL_FILES}
        if node["type"] == "TruePoseEstimatePose":
            named = {model["name"] for model in POSE_FILES}
        assert named == {model["name"] for model in properties.get("models", [])}
    assert not overlaps([(*node["pos"], *node["size"]) for node in nodes.values()])
    assert max(group["bounding"][3] for group in workflow["groups"]) <= SCREEN + 110, "a column longer than a screen"


def overlaps(boxes: list[tuple[float, float, float, float]]) -> list[tuple]:
    """Pairs of nodes [x, y, width, height] of which one lies on another or its title."""
    return [
        (one, other)
        for one, other in itertools.combinations(boxes, 2)
        if not (
            one[0] + one[2] <= other[0]
            or other[0] + other[2] <= one[0]
            or one[1] + one[3] + 30 <= other[1]
            or other[1] + other[3] + 30 <= one[1]
        )
    ]


def test_nothing_overlaps_after_a_run_on_the_page(browser: Browser) -> None:
    """Nodes that show a picture grow when they have one."""
    browser.drop(WORKFLOWS / "attention_view.json", wait_for_node="TruePoseAttentionView")
    assert browser.queue()["kind"] == "success"
    shown = "return window.app.graph._nodes.every(n => !n.type.includes('AttentionView') || n.imgs?.length)"
    end = time.monotonic() + 60
    while not browser.script(shown) and time.monotonic() < end:
        time.sleep(0.5)
    assert browser.script(shown)
    boxes = browser.script("return window.app.graph._nodes.map(n => [...n.pos, ...n.size])")
    assert not overlaps([tuple(box) for box in boxes])


WEIGHTS = ("background", "face", "hair", "upper", "lower", "skin", "accessory")
SPECIAL = {("attention_view", "match"), ("attention_view", "region_match")}
"""Where a workflow is about another value than the node's own."""


@pytest.mark.parametrize("name", NAMES)
def test_what_reads_the_source_has_the_nodes_own_values(name: str, info: dict) -> None:
    """So that what a workflow teaches is what one gets by adding the node; only region weights are chosen."""
    for node in to_api(read(name), info).values():
        if node["class_type"] not in ("TruePoseApplyHPFA", "TruePoseSourceNetEncode", "TruePoseHPFASampler"):
            continue
        for key, declaration, _ in declared(info[node["class_type"]]):
            own = declaration[1].get("default") if is_widget(declaration) else None
            if own is not None and key not in WEIGHTS and (name, key) not in SPECIAL:
                assert node["inputs"][key] == own, key


def test_the_background_has_one_default(info: dict) -> None:
    for name in ("TruePoseApplyHPFA", "TruePoseHPFASampler"):
        weights = {key: settings["default"] for key, (_, settings), _ in declared(info[name]) if key in WEIGHTS}
        assert weights == dict.fromkeys(WEIGHTS, 1.0)


def test_they_show_the_packs_nodes_and_need_no_other_pack(info: dict) -> None:
    used = {node["type"] for name in NAMES for node in read(name)["nodes"]}
    assert {t for t in used if t.startswith("TruePose")} >= {
        "TruePoseMannequin",
        "TruePoseSourceNetEncode",
        "TruePoseApplyHPFA",
        "TruePoseDrawSkeleton",
        "TruePoseLoadPose",
        "TruePoseLoadModel",
        "TruePoseApplyPoseEncoder",
        "TruePoseAttentionView",
        "TruePoseEstimatePose",
        "TruePoseHumanParsing",
        "TruePoseFramePerson",
        "TruePosePasteBack",
        "TruePoseHandsAndFace",
        "TruePosePoseGallery",
        "TruePoseRetargetPose",
        "TruePoseInterpolatePoses",
        "TruePoseCarryAlongBody",
        "TruePoseCombineSources",
        "TruePoseFreezeRegions",
        "TruePoseLoadCAAAdapter",
        "TruePoseCAAEncode",
        "TruePoseApplyCAA",
        "TruePoseGuideReferences",
    }
    for type_ in used - {NOTE}:
        module = info[type_]["python_module"]
        assert module == f"custom_nodes.{PACK_NAME}" or module.split(".")[0] in ("nodes", "comfy_extras"), type_


def errors_of(comfy: Server, prompt: dict) -> dict[str, list[dict]]:
    """What the host finds wrong with a prompt, by node; nothing of it is left in the queue."""
    try:
        answer = comfy.post("/prompt", {"prompt": prompt})
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
    comfy.post("/queue", {"clear": True})
    comfy.post("/interrupt", {})
    return {node: found["errors"] for node, found in answer.get("node_errors", {}).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_host_takes_it_but_for_missing_models(name: str, comfy: Server, info: dict) -> None:
    found = errors_of(comfy, to_api(read(name), info))
    missing = set()
    for errors in found.values():
        for error in errors:
            assert error["type"] == "value_not_in_list", error
            missing.add(error["extra_info"]["received_value"])
    assert missing <= MODEL_FILES
    assert bool(missing) == (name not in NEEDS_NO_FILE)


WIDTHS = (32, 32, 64, 64, 128, 128, *(128,) * 3, *(64,) * 3, *(32,) * 3, 128)
CONTEXT, EMBEDDING = 48, 40
"""Of the fixture model's cross-attentions, prompts, and CLIP vision."""


def with_fixtures(prompt: dict, family: str) -> dict:
    """The prompt at 64x96 with tiny random models, and without text encoder and LoRA."""
    prompt = json.loads(json.dumps(prompt))
    moved: dict[tuple[str, int], list] = {}
    stand_ins = {
        "UNETLoader": ("TestEditor", {"family": family}),
        "VAELoader": ("TestEditorVAE", {"family": family}),
        "TextEncodeQwenImageEditPlus": ("TestConditioning", {}),
        "CheckpointLoaderSimple": ("TestModel", {"family": family}),
        "ControlNetLoader": ("TestControlNet", {"family": family}),
        "CLIPVisionLoader": ("TestCLIPVision", {}),
        "CLIPTextEncode": ("TestConditioning", {}),
    }
    for key, node in list(prompt.items()):
        inputs, kind = node["inputs"], node["class_type"]
        if kind in stand_ins:
            name, more = stand_ins[kind]
            prompt[key] = {"class_type": name, "inputs": {"seed": int(key), **more}}
            if kind == "CheckpointLoaderSimple":
                moved[key, 2] = [key, 1]
        elif kind in ("CLIPLoader", "DualCLIPLoader"):
            del prompt[key]
        elif kind == "LoraLoader":
            moved[key, 0] = inputs["model"]
            del prompt[key]
        elif kind == "TruePoseFramePerson":
            inputs["sizes"] = "own size"
        elif "steps" in inputs:
            inputs["steps"] = 2
        if isinstance(inputs.get("width"), int) and inputs["width"] and inputs["height"]:
            inputs["width"], inputs["height"] = 64, 96
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and tuple(value) in moved:
                node["inputs"][name] = moved[tuple(value)]
    return prompt


def shown(prompt: dict) -> set[str]:
    """The nodes that a run needs: those that show something, and all behind them."""
    found: set[str] = set()
    waiting = [key for key, node in prompt.items() if node["class_type"] in SHOW]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += [value[0] for value in prompt[key]["inputs"].values() if isinstance(value, list)]
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_NO_FILE])
def test_it_runs_with_a_tiny_model(
    name: str, comfy: Server, info: dict, photo: numpy.ndarray, request: pytest.FixtureRequest
) -> None:
    if name in PHOTO_NAMES:
        request.getfixturevalue("photo_libraries")
    save_ip_adapter(comfy.folder / "models" / "ipadapter" / IP_ADAPTER["name"], WIDTHS, CONTEXT, EMBEDDING)
    families = {"sdxl_training_free": "SDXL", "flux_kontext_regions": "kontext", "qwen_edit_two_people": "qwen"}
    prompt = with_fixtures(to_api(read(name), info), families.get(name, "SD15"))
    for key, node in prompt.items():
        if node["class_type"] == "LoadImage" and "B" in read_title(name, key):
            node["inputs"]["image"] = PHOTOS[1]
    assert set(prompt) == shown(prompt), "a node that nothing needs"
    entry = comfy.run(prompt)
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    pictures = comfy.images(entry, save)
    assert len(pictures) == (len(MANY) if name == "many_poses_one_source" else 1)
    for picture in pictures:
        assert picture.shape == (photo.shape if name in PASTED_NAMES else (96, 64, 3)) and picture.std() > 1
    if name in PASTED_NAMES:
        changed = (pictures[0] != photo).any(-1)
        assert changed.any() and not changed[:, :64].any() and not changed[:, -64:].any()


def read_title(name: str, key: str) -> str:
    """The title of a node of a workflow."""
    return next(node for node in read(name)["nodes"] if str(node["id"]) == key).get("title", "")


def test_restyling_the_top_leaves_the_face(
    comfy: Server, info: dict, photo: numpy.ndarray, photo_libraries: None
) -> None:
    prompt = with_fixtures(to_api(read("restyle_region"), info), "SD15")
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    (freeze,) = (key for key, node in prompt.items() if node["class_type"] == "TruePoseFreezeRegions")
    # A pixel of this small crop is five of the photo's.
    prompt[freeze]["inputs"] |= {"grow": 0, "blur": 0.0}
    (picture,) = comfy.images(comfy.run(prompt), save)
    changed = (picture != photo).any(-1)
    body = mannequin_photo(5)[1]
    (x, y), (chest_x, chest_y) = body[0, :2].astype(int), body[[2, 5, 8, 11], :2].mean(0).astype(int)
    assert not changed[y - 8 : y + 8, x - 8 : x + 8].any()
    assert changed[chest_y - 8 : chest_y + 8, chest_x - 8 : chest_x + 8].all()


@pytest.mark.parametrize("name", NEEDS_NO_FILE)
def test_it_runs_as_it_stands(name: str, comfy: Server, info: dict) -> None:
    prompt = to_api(read(name), info)
    assert set(prompt) == shown(prompt), "a node that nothing needs"
    entry = comfy.run(prompt, timeout=600)
    for key, node in prompt.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            pictures = comfy.images(entry, key)
            assert len(pictures) == (FRAMES if name == "pose_sequence" else 1)
            assert all(picture.std() > 10 for picture in pictures)


def test_the_sequence_moves_evenly_and_is_saved_as_an_animation(comfy: Server, info: dict) -> None:
    prompt = to_api(read("pose_sequence"), info)
    entry = comfy.run(prompt, timeout=600)
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    (animate,) = (key for key, node in prompt.items() if node["class_type"] == "SaveAnimatedWEBP")
    frames = [frame.astype(float) for frame in comfy.images(entry, save)]
    ends = numpy.abs(frames[0] - frames[-1]).mean()
    for one, next_one in itertools.pairwise(frames):
        assert 0 < numpy.abs(one - next_one).mean() < ends
    (file,) = entry["outputs"][animate]["images"]
    with Image.open(comfy.folder / "output" / file["subfolder"] / file["filename"]) as animation:
        assert animation.n_frames == FRAMES and animation.size == (384, 512)


@pytest.mark.parametrize("cache", ["--cache-classic", "--cache-lru=10", "--cache-none"])
def test_demo_under_every_cache(start_server: Callable[..., Server], cache: str) -> None:
    with start_server(*cache.split("=")) as server:
        prompt = to_api(read("demo"), server.object_info())
        (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
        (sampler,) = (key for key, node in prompt.items() if node["class_type"] == "KSampler")

        def picture(seed: int) -> numpy.ndarray:
            prompt[sampler]["inputs"]["seed"] = seed
            return server.images(server.run(prompt, timeout=600), save)[0]

        first, other, again = picture(1), picture(2), picture(1)
        numpy.testing.assert_array_equal(first, again)
        assert (first != other).any()
        assert "Traceback" not in server.log()


def test_the_host_lists_them_as_templates(comfy: Server) -> None:
    assert sorted(comfy.get("/api/workflow_templates")[PACK_NAME]) == NAMES
    for name in NAMES:
        folder = f"/api/workflow_templates/{PACK_NAME}/{name}"
        assert json.loads(comfy.raw(folder + ".json")) == read(name)
        assert comfy.raw(folder + ".jpg") == (WORKFLOWS / f"{name}.jpg").read_bytes()


@pytest.fixture(scope="module")
def page(comfy: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One page for all workflows."""
    why = find_browser()
    if why is not None:
        pytest.skip(why)
    with Browser(comfy, tmp_path_factory.mktemp("page") / "profile") as page:
        yield page


LOAD = """
const [workflow, done] = arguments;
window.app.loadGraphData(workflow).then(() => done(window.app.graph._nodes.map(n => [n.id, n.type, n.title])));
"""


@pytest.mark.parametrize("name", NAMES)
def test_the_page_reads_it_as_we_do(name: str, page: Browser, info: dict) -> None:
    workflow = read(name)
    seen = page.driver.execute_async_script(LOAD, workflow)
    assert sorted((i, t) for i, t, _ in seen) == sorted((n["id"], n["type"]) for n in workflow["nodes"])
    sent = page.api_prompt()
    wanted = to_api(workflow, info)
    assert set(sent) == set(wanted)
    for key, node in wanted.items():
        assert sent[key]["class_type"] == node["class_type"]
        assert sent[key]["inputs"] == node["inputs"], node["class_type"]


BYPASS = """
const types = arguments[0];
window.app.graph._nodes.filter(n => types.includes(n.type)).forEach(n => { n.mode = 4; });
"""


def test_without_an_ip_adapter_its_nodes_can_be_bypassed(page: Browser, info: dict) -> None:
    workflow = read("with_lora_and_ipadapter")
    page.driver.execute_async_script(LOAD, workflow)
    gone = ("CLIPVisionLoader", "TruePoseLoadCAAAdapter", "TruePoseCAAEncode", "TruePoseApplyCAA")
    page.script(BYPASS, list(gone))
    wanted = to_api(workflow, info)
    of = {node["class_type"]: key for key, node in wanted.items()}
    wanted = {key: node for key, node in wanted.items() if node["class_type"] not in gone}
    wanted[of["TruePoseApplyHPFA"]]["inputs"]["model"] = [of["LoraLoader"], 0]
    del wanted[of["TruePoseSourceNetEncode"]]["inputs"]["caa"]
    sent = page.api_prompt()
    assert {key: node["inputs"] for key, node in sent.items()} == {k: n["inputs"] for k, n in wanted.items()}


def test_demo_dropped_on_the_page_runs(page: Browser, tmp_path: Path) -> None:
    page.driver.execute_async_script(LOAD, {**read("demo"), "nodes": [], "links": [], "groups": []})
    page.drop(WORKFLOWS / "demo.json", wait_for_node="TruePoseApplyHPFA")
    result = page.queue()
    assert result["kind"] == "success", result
