"""The workflows that come with the pack: they load, validate, say what they miss, and run."""

from __future__ import annotations

import itertools
import json
import re
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from browser import Browser, find_browser
from graph import (
    CORE_VERSION,
    EXAMPLES,
    FACES,
    INPUTS,
    NOTE,
    OUTPUTS,
    SCREEN,
    all_nodes,
    blueprint,
    declared,
    fits,
    is_widget,
    kind_of,
    pack_identity,
    to_api,
)
from make_workflows import (
    BLOCKS,
    BUILDERS,
    FILES,
    FRAMES,
    IP_ADAPTER,
    MANY,
    POSE_FILES,
    SUBGRAPHS,
    WORKFLOWS,
    build,
    known_photo,
    text,
)
from photos import FOLDER, PEOPLE, person_photo
from pictures import LARGE
from PIL import Image
from server import PACK_NAME, Server
from small_files import save_ip_adapter, save_networks

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
    """The photo [H, W, 3] that the workflows start on, and networks that know it and the other one."""
    save_networks(comfy.folder / "models" / "truepose", *known_photo())
    with Image.open(FOLDER / "person.jpg") as picture:
        return numpy.asarray(picture)


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


@pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)
def test_blueprints_are_as_they_are_built(make: Callable[[dict], object], info: dict) -> None:
    block = make(info)
    assert text(blueprint(block)) == (SUBGRAPHS / f"{block.name}.json").read_text(encoding="utf-8")
    (one,) = blueprint(block)["nodes"]
    assert one["type"] == blueprint(block)["definitions"]["subgraphs"][0]["id"]


def test_a_newcomers_graph_is_five_boxes() -> None:
    boxes = [node["type"] for node in read("photo_to_pose")["nodes"] if node["type"] != NOTE]
    assert len(boxes) == 5 and {"CheckpointLoaderSimple", "LoadImage", "SaveImage"} < set(boxes)


def test_photo_workflows_start_on_a_person_that_the_pack_brings(comfy: Server, photo: numpy.ndarray) -> None:
    used = {
        node["widgets_values"][0] for name in PHOTO_NAMES for node in read(name)["nodes"] if node["type"] == "LoadImage"
    }
    assert used == set(EXAMPLES)
    for name, seed in PEOPLE.items():
        with Image.open(FOLDER / name) as picture:
            apart = numpy.abs(numpy.asarray(picture).astype(float) - person_photo(seed)[0])
        assert apart.mean() < 2, "run python workflows/source/photos.py"
        query = f"/view?filename={name}&subfolder=truepose&type=temp"
        assert comfy.raw(query) == (FOLDER / name).read_bytes()
    # Nothing is put among the user's own pictures.
    assert not [file for file in (comfy.folder / "input").rglob("*") if file.name in PEOPLE]


def test_the_host_offers_the_blueprints(comfy: Server) -> None:
    try:
        found = comfy.get("/global_subgraphs")
    except urllib.error.HTTPError as error:
        assert error.code == 404
        pytest.skip("this version of the host has no blueprints")
    ours = {key: entry for key, entry in found.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK_NAME}"}
    assert {entry["name"] for entry in ours.values()} == {file.stem for file in SUBGRAPHS.glob("*.json")}
    for key, entry in ours.items():
        data = comfy.get(f"/global_subgraphs/{key}")["data"]
        assert data == (SUBGRAPHS / f"{entry['name']}.json").read_text(encoding="utf-8")


LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


@pytest.mark.parametrize("name", NAMES)
def test_structure(name: str, info: dict) -> None:
    workflow = read(name)
    assert workflow["version"] == 0.4
    assert any(node["type"] == NOTE for node in workflow["nodes"])
    blocks = workflow.get("definitions", {}).get("subgraphs", [])
    check_graph(workflow, info | {block.id: block.info for block in (make(info) for make in BLOCKS)})
    for block in blocks:
        links = [[link[key] for key in LINK] for link in block["links"]]
        check_graph(block | {"links": links, "last_node_id": block["state"]["lastNodeId"]}, info)


def check_graph(graph: dict, info: dict) -> None:
    """Nodes, links and places of a workflow or of a block."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) == graph["last_node_id"]
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"])
    for number, source, output, target, slot, kind in graph["links"]:
        sends = graph["inputs"][output] if source == INPUTS else nodes[source]["outputs"][output]
        takes = graph["outputs"][slot] if target == OUTPUTS else nodes[target]["inputs"][slot]
        assert number in sends["linkIds" if source == INPUTS else "links"]
        assert number in takes["linkIds"] if target == OUTPUTS else takes["link"] == number
        assert sends["type"] == kind and fits(kind, [takes["type"]])
    sent = [side["linkIds"] for side in graph.get("inputs", [])]
    sent += [output["links"] for node in nodes.values() for output in node["outputs"]]
    assert sorted(number for ids in sent for number in ids) == sorted(links)
    pack, version = pack_identity()
    for node in nodes.values():
        if node["type"] == NOTE:
            continue
        assert node["mode"] == 0
        properties = node["properties"]
        is_block = "python_module" not in info[node["type"]]
        ours = is_block or node["type"].startswith("TruePose")
        assert (properties["cnr_id"], properties["ver"]) == ((pack, version) if ours else ("comfy-core", CORE_VERSION))
        kinds = [output["type"] for output in node["outputs"]]
        # The host's own nodes may have more outputs in another version, after those that are linked.
        assert kinds == info[node["type"]]["output"][: None if ours else len(kinds)]
        inputs = {n: (kind_of(d), is_widget(d)) for n, d, _ in declared(info[node["type"]])}
        for socket in node["inputs"]:
            assert inputs[socket["name"]] == (socket["type"], "widget" in socket)
        # A node that loads a model file says where the file is to be had.
        named = {value for value in node["widgets_values"] if value in MODEL_FILES and not is_block}
        if node["type"] == "TruePoseEstimatePose":
            named = {model["name"] for model in POSE_FILES}
        assert named == {model["name"] for model in properties.get("models", [])}
    assert not overlaps([(*node["pos"], *node["size"]) for node in nodes.values()])
    assert max(group["bounding"][3] for group in graph["groups"]) <= SCREEN + 110, "a column longer than a screen"


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
    used = {node["type"] for name in NAMES for node in all_nodes(read(name))}
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
            prompt[key] = {"class_type": name, "inputs": {"seed": int(key.split(":")[-1]), **more}}
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
    body = person_photo(PEOPLE["person.jpg"])[1]
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


RUN_WHAT_CAN = """
const [large, done] = arguments;
const graph = window.app.graph, lacking = new Set(graph._nodes.filter(n => large.includes(n.type)).map(n => n.id));
for (const node of graph._nodes) if (node.isSubgraphNode?.()) lacking.add(node.id);
const links = [...(graph.links.values?.() ?? Object.values(graph.links))];
for (let before = -1; before !== lacking.size; ) {
  before = lacking.size;
  links.filter(link => lacking.has(link.origin_id)).forEach(link => lacking.add(link.target_id));
}
graph._nodes.filter(n => lacking.has(n.id)).forEach(n => { n.mode = 2; });
for (const node of graph._nodes.filter(n => !lacking.has(n.id))) {
  const slot = (node.outputs ?? []).findIndex(output => output.type === 'IMAGE');
  if (slot < 0) continue;
  const probe = window.LiteGraph.createNode('PreviewImage');
  probe.title = 'probe';
  graph.add(probe);
  node.connect(slot, probe, 0);
}
done(true);
"""
"""Mutes what needs files that are not here, and what comes after it, and makes the host run all that is left."""
WITHOUT_PROBES = "window.app.graph._nodes.filter(n => n.title === 'probe').forEach(n => window.app.graph.remove(n))"
BOXES = "return window.app.graph._nodes.map(n => [...n.pos, ...n.size])"
DRAWN = "return window.app.graph._nodes.every(n => n.mode !== 0 || !arguments[0].includes(n.type) || n.imgs?.length)"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps_after_a_run_on_the_page(name: str, page: Browser, photo: numpy.ndarray) -> None:
    """The page gives nodes more room than they ask for, and those that show a picture grow when they have one."""
    page.driver.execute_async_script(LOAD, read(name))
    page.driver.execute_async_script(RUN_WHAT_CAN, list(LARGE))
    assert page.queue()["kind"] == "success"
    end = time.monotonic() + 60
    while not page.script(DRAWN, sorted(FACES)) and time.monotonic() < end:
        time.sleep(0.5)
    assert page.script(DRAWN, sorted(FACES))
    page.script(WITHOUT_PROBES)
    boxes = [tuple(box) for box in page.script(BOXES)]
    assert not overlaps(boxes)
    assert max(box[3] for box in boxes) <= SCREEN


NOTE_LINKS = """
return [...document.querySelectorAll('.comfy-markdown a')].map(a => getComputedStyle(a).color);
"""


def test_links_in_notes_can_be_read(page: Browser) -> None:
    page.driver.execute_async_script(LOAD, read("photo_to_pose"))
    colors = page.script(NOTE_LINKS)
    assert colors and all(sum(map(int, re.findall(r"\d+", color)[:3])) > 400 for color in colors), colors


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
