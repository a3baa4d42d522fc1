"""Workflows that users saved with earlier versions still load, say the same, validate and run.

saved/first and saved/previous are the workflows of two earlier versions as they were; first.json and previous.json name
the widgets of each node of ours there, in order: a saved file holds values by place alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graph import NOTE, declared, fits, has_control, is_widget, options_of, to_api
from server import Server
from test_workflows import MODEL_FILES, errors_of, shown

SAVED = Path(__file__).resolve().parent / "saved"
FILES = sorted(path.relative_to(SAVED).as_posix() for path in SAVED.glob("*/*.json"))
NEEDS_NO_FILE = [name for name in FILES if Path(name).stem in ("attention_view", "demo", "pose_sequence")]


def read(name: str) -> dict:
    return json.loads((SAVED / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(comfy: Server) -> dict:
    return comfy.object_info()


def widgets(node: dict) -> list[tuple[str, list]]:
    """(name, declaration) of a node's widgets as the host has them, in the page's order."""
    return [(name, declaration) for name, declaration, _ in declared(node) if is_widget(declaration)]


def completed(workflow: dict, info: dict) -> dict:
    """The workflow with the widgets that came later at their defaults, as the page fills them in."""
    for node in workflow["nodes"]:
        if node["type"] == NOTE:
            continue
        values = node["widgets_values"]
        places = []
        for name, declaration in widgets(info[node["type"]]):
            settings = declaration[1] if len(declaration) > 1 else {}
            default = settings.get("default", next(iter(options_of(declaration) or ()), None))
            places += [default] + ["fixed"] * has_control(name, declaration)
        values += places[len(values) :]
    return workflow


@pytest.mark.parametrize("version", ["first", "previous"])
def test_no_node_is_gone_and_widgets_came_only_at_the_end(version: str, info: dict) -> None:
    for node, names in json.loads((SAVED / f"{version}.json").read_text(encoding="utf-8")).items():
        assert [name for name, _ in widgets(info[node])][: len(names)] == names, node


@pytest.mark.parametrize("name", FILES)
def test_every_socket_is_there_and_takes_what_it_took(name: str, info: dict) -> None:
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        if node["type"] == NOTE:
            continue
        host = info[node["type"]]
        taken = {key: declaration for key, declaration, _ in declared(host)}
        assert {socket["name"] for socket in node["inputs"]} <= set(taken), node["type"]
        # By place: a link names an output by its number.
        kinds = [output["type"] for output in node["outputs"]]
        assert host["output"][: len(kinds)] == kinds, node["type"]
    for _, source, output, target, slot, _ in workflow["links"]:
        socket = nodes[target]["inputs"][slot]["name"]
        declaration = next(d for key, d, _ in declared(info[nodes[target]["type"]]) if key == socket)
        assert fits(info[nodes[source]["type"]]["output"][output], declaration), (nodes[target]["type"], socket)


@pytest.mark.parametrize("name", FILES)
def test_the_host_takes_it_but_for_missing_files(name: str, comfy: Server, info: dict) -> None:
    for errors in errors_of(comfy, to_api(completed(read(name), info), info)).values():
        for error in errors:
            if error["type"] == "custom_validation_failed":
                assert "Invalid image file: example.png" in error["details"], error
            else:
                assert error["type"] == "value_not_in_list", error
                assert error["extra_info"]["received_value"] in MODEL_FILES, error


@pytest.mark.parametrize("name", NEEDS_NO_FILE)
def test_it_runs(name: str, comfy: Server, info: dict) -> None:
    prompt = to_api(completed(read(name), info), info)
    assert set(prompt) == shown(prompt)
    entry = comfy.run(prompt, timeout=600)
    pictured = [key for key, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage")]
    assert pictured
    for key in pictured:
        assert all(picture.std() > 10 for picture in comfy.images(entry, key))
