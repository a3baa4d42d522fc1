"""Finding a ComfyUI, and the tables of what was measured in it. (Measuring: tests/host/inside/benchmark_host.py.)"""

from __future__ import annotations

import json
import sys

import pytest

from truepose_core.benchmark import host as module
from truepose_core.benchmark.host import choose_host, editor_tables, find_host, find_pack, host_tables, measure_host
from truepose_core.errors import TruePoseError

RESULT = {
    "machine": {
        "comfyui": "1.2.3",
        "torch": "2.0",
        "device": "one",
        "device_type": "cpu",
        "dtype": "float32",
        "attention": "attention_x",
        "repeats": 1,
    },
    "model": "a UNet",
    "size": "8x16",
    "person": 0.4,
    "source_mb": 12.0,
    "source_dtype": "float32",
    "steps": [
        {"what": "plain", "counted": 1.0, "timed": 1.0, "seconds": 2.0, "extra_peak_mb": 0.0},
        {"what": "person", "counted": 1.1, "timed": 1.2, "seconds": 2.4, "extra_peak_mb": None},
    ],
    "run_steps": 25,
    "run_poses": 4,
    "runs": [
        {
            **{"tokens": "person", "reading": "4 noise levels"},
            **{"counted_1": 1.2, "timed_1": 1.3, "counted_4": 1.12, "timed_4": 1.15},
        }
    ],
}


def make_comfyui(folder, python=False):
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text('__version__ = "0.19.3"\n')
    if python:
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A home without ComfyUI."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)


def test_the_environment_is_asked_first_and_a_wrong_folder_there_is_no_host(tmp_path, monkeypatch, nowhere):
    real = make_comfyui(tmp_path / "real")
    pack = make_comfyui(tmp_path / "other") / "custom_nodes" / "pack"
    monkeypatch.setenv("COMFYUI_DIR", str(real))
    assert find_host(pack).folder == real.resolve()
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    assert find_host(pack) is None


def test_a_pack_in_custom_nodes_finds_the_host_above_it_and_its_own_python(tmp_path, monkeypatch, nowhere):
    folder = make_comfyui(tmp_path / "comfy_folder", python=True)
    host = find_host(folder / "custom_nodes" / "pack")
    assert host.folder == folder.resolve() and host.python == folder / ".venv" / "bin" / "python"
    assert host.version == "0.19.3" and host.at_least(0, 19, 3) and not host.at_least(0, 20)
    assert find_host(tmp_path / "elsewhere") is None


def test_what_is_no_comfyui_is_refused_with_what_to_do(tmp_path, nowhere):
    with pytest.raises(TruePoseError, match="is no ComfyUI"):
        choose_host(str(tmp_path))
    with pytest.raises(TruePoseError, match="--host FOLDER"):
        choose_host("")


def test_a_host_without_the_pack_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path / "site-packages")
    folder = make_comfyui(tmp_path / "comfy_folder")
    host = choose_host(str(folder))
    with pytest.raises(TruePoseError, match="install it in ComfyUI"):
        find_pack(host)
    copy = folder / "custom_nodes" / "truepose"
    script = copy / "nodes" / "host" / "benchmark" / "run.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    assert find_pack(host) == copy


def test_the_child_is_told_what_to_do_and_its_last_line_is_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path / "pack")
    script = tmp_path / "pack" / "nodes" / "host" / "benchmark" / "run.py"
    script.parent.mkdir(parents=True)
    script.write_text("import json, sys\nprint('chatter')\nprint(json.dumps({'given': json.load(sys.stdin)}))\n")
    host = choose_host(str(make_comfyui(tmp_path / "comfy_folder")))
    result = measure_host(host, quick=True, device="cpu", repeats=2)
    given = {"folder": str(host.folder), "quick": True, "device": "cpu", "repeats": 2}
    assert result == {"given": {**given, "what": "steps"}}
    assert measure_host(host, quick=True, device="cpu", repeats=2, what="editors")["given"]["what"] == "editors"
    script.write_text("print('no room')\nraise SystemExit(3)\n")
    with pytest.raises(TruePoseError, match=r"ended with 3.*no room"):
        measure_host(host, quick=True, device="cpu", repeats=None)


def test_the_table_shows_every_step_and_what_the_columns_mean():
    text = host_tables(json.loads(json.dumps(RESULT)))
    assert "ComfyUI 1.2.3" in text and "40% of them" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| p")]
    assert [row[1].strip() for row in rows] == ["plain", "person", "person"]
    assert [c.strip() for c in rows[1][2:6]] == ["1.100", "1.200", "2.400", "-"]
    assert [c.strip() for c in rows[2][2:7]] == ["4 noise levels", "1.200", "1.300", "1.120", "1.150"]
    assert "25 steps x 4 poses, counted" in text


def test_the_tables_of_editors_say_what_was_counted_and_what_was_not():
    row = {"model": "an editor", "references": 2, "tokens": 0.4, "box": 0.9, "kept": 0.5, "match": 0.51, "cropped": 0.9}
    timed = {"model": "a small editor", "references": 1, "tokens": 0.4, "what": "kept", "counted": 0.6, "timed": 0.61}
    result = {
        "machine": RESULT["machine"],
        "size": "1024x1024",
        "steps": 20,
        "fill": 0.41,
        "counted": [{**row, "cache": None, "cache_kept": None}, {**row, "cache": 0.4, "cache_kept": 0.3}],
        "timed": [{**timed, "seconds": 1.5, "saved_peak_mb": None}],
    }
    text = editor_tables(result)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["an editor", "2", "40%", "0.500", "0.510", "0.900", "-", "-"] in lines
    assert ["an editor", "2", "40%", "0.500", "0.510", "0.900", "0.400", "0.300"] in lines
    assert ["a small editor", "1", "40%", "kept", "0.600", "0.610", "1.500", "-"] in lines
    assert "fills 41%" in text and "over 20 steps" in text


def test_two_measurements_at_once_are_refused():
    import argparse

    from truepose_core import benchmark

    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    with pytest.raises(TruePoseError, match="choose one"):
        benchmark.run(parser.parse_args(["--host", "--editors"]))
