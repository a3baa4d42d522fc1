"""The workflows that come with the pack: they load, validate, say what they miss, and run."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from browser import Browser, find_browser
from graph import CORE_VERSION, NOTE, declared, is_widget, pack_identity, to_api
from make_workflows import BUILDERS, FILES, MANY, WORKFLOWS, build, text
from server import PACK_NAME, Server

NAMES = sorted(BUILDERS)
NEEDS_NO_FILE = ("attention_view", "demo")
MODEL_FILES = {model["name"] for model in FILES}
"""Checkpoints, a LoRA and ControlNets, which a test has not got. A prompt may lack these and nothing else."""


def read(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(comfy: Server) -> dict:
    return comfy.object_info()


def test_every_workflow_has_a_file_and_a_picture() -> None:
    assert sorted(file.stem for file in WORKFLOWS.glob("*.json")) == NAMES
    for name in NAMES:
        picture = (WORKFLOWS / f"{name}.jpg").read_bytes()
        assert picture[:3] == b"\xff\xd8\xff" and len(picture) < 300_000, name


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_they_are_built(name: str, comfy: Server, info: dict) -> None:
    if comfy.host.version != CORE_VERSION:
        pytest.skip(f"built with ComfyUI {CORE_VERSION}; other versions have other widgets in nodes of the host")
    assert text(build(name, info)) == (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"), (
        "run python tests/host/make_workflows.py"
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
        assert sends["type"] == takes["type"] == kind
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
        sockets = {n: d[0] for n, d, _ in declared(info[node["type"]]) if not is_widget(d)}
        assert {s["name"]: s["type"] for s in node["inputs"]}.items() <= sockets.items()
        # A node that loads a model file says where the file is to be had.
        named = {value for value in node["widgets_values"] if value in MODEL_FILES}
        assert named == {model["name"] for model in properties.get("models", [])}
    boxes = [(*node["pos"], *node["size"]) for node in nodes.values()]
    for i, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[i + 1 :]:
            assert x + w <= a or a + c <= x or y + h + 30 <= b or b + d + 30 <= y, "two nodes overlap"


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


def with_fixtures(prompt: dict, family: str) -> dict:
    """The prompt at 64x96 with a tiny random model, without text encoder, ControlNet and LoRA."""
    prompt = json.loads(json.dumps(prompt))
    moved: dict[tuple[str, int], list] = {}
    for key, node in list(prompt.items()):
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            prompt[key] = {"class_type": "TestModel", "inputs": {"seed": 0, "family": family}}
            moved[key, 2] = [key, 1]
        elif node["class_type"] == "CLIPTextEncode":
            prompt[key] = {"class_type": "TestConditioning", "inputs": {"seed": int(key)}}
        elif node["class_type"] == "LoraLoader":
            moved[key, 0] = inputs["model"]
            del prompt[key]
        elif node["class_type"] == "ControlNetApplyAdvanced":
            moved[key, 0], moved[key, 1] = inputs["positive"], inputs["negative"]
            del prompt[key]
        elif node["class_type"] == "ControlNetLoader":
            del prompt[key]
        elif "steps" in inputs:
            inputs["steps"] = 2
        if inputs.get("width") and inputs.get("height"):
            inputs["width"], inputs["height"] = 64, 96
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and tuple(value) in moved:
                node["inputs"][name] = moved[tuple(value)]
    return prompt


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_NO_FILE])
def test_it_runs_with_a_tiny_model(name: str, comfy: Server, info: dict) -> None:
    prompt = with_fixtures(to_api(read(name), info), "SDXL" if "sdxl" in name else "SD15")
    entry = comfy.run(prompt)
    (save,) = (key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    pictures = comfy.images(entry, save)
    assert len(pictures) == (len(MANY) if name == "many_poses_one_source" else 1)
    for picture in pictures:
        assert picture.shape == (96, 64, 3) and picture.std() > 1
    # Every node of ours took part.
    ours = {key for key, node in prompt.items() if node["class_type"].startswith("TruePose")}
    drawn = {key for key in ours if prompt[key]["class_type"] == "TruePoseDrawSkeleton"}  # only for the ControlNet
    assert ours - drawn <= set(entry["prompt"][2])


@pytest.mark.parametrize("name", NEEDS_NO_FILE)
def test_it_runs_as_it_stands(name: str, comfy: Server, info: dict) -> None:
    prompt = to_api(read(name), info)
    entry = comfy.run(prompt, timeout=600)
    for key, node in prompt.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            (picture,) = comfy.images(entry, key)
            assert picture.std() > 10


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


def test_demo_dropped_on_the_page_runs(page: Browser, tmp_path: Path) -> None:
    page.driver.execute_async_script(LOAD, {**read("demo"), "nodes": [], "links": [], "groups": []})
    page.drop(WORKFLOWS / "demo.json", wait_for_node="TruePoseApplyHPFA")
    result = page.queue()
    assert result["kind"] == "success", result
