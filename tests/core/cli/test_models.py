"""`truepose models`: the list, and getting one."""

from __future__ import annotations

import json

import pytest

from truepose_core.cli import main
from truepose_core.networks import known
from truepose_core.networks.known import KNOWN


def run(capsys, *argv):
    code = main(["models", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(known.MODELS_VARIABLE, str(tmp_path))
    return tmp_path


def no_download(*_, **__):
    raise AssertionError("nothing may be downloaded unasked")


def test_the_list_tells_everything_and_downloads_nothing(capsys, folder, monkeypatch):
    monkeypatch.setattr(known, "download", no_download)
    (folder / "parsing_atr.onnx").write_bytes(b"")
    code, out, _ = run(capsys)
    assert code == 0
    for model in KNOWN.values():
        assert all(text in out for text in (model.name, model.purpose, model.page, model.licence, model.how))
    assert out.count("not there") == len(KNOWN) - 1
    assert str(folder / "parsing_atr.onnx") in out


def test_json_has_the_same(capsys, folder, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "yolox_l.onnx").write_bytes(b"")
    code, out, _ = run(capsys, "--json")
    report = json.loads(out)
    assert code == 0 and report["folder"] == str(folder)
    assert [model["name"] for model in report["models"]] == list(KNOWN)
    there = {model["name"]: model["path"] for model in report["models"] if model["there"]}
    assert there == {"yolox-l": str(folder / "sub" / "yolox_l.onnx")}


def test_get_downloads_into_the_folder_with_progress(capsys, folder, monkeypatch):
    def download(model, into, *, progress):
        progress(5, 10)
        progress(10, 10)
        (into / model.file).write_bytes(b"x")
        return into / model.file

    monkeypatch.setattr(known, "download", download)
    (folder / "own").mkdir()
    code, out, err = run(capsys, "get", "dwpose", "dwpose", "--folder", folder / "own")
    assert code == 0
    assert out.splitlines() == [f"dwpose: {folder / 'own' / 'dw-ll_ucoco_384.onnx'}"]
    assert "dw-ll_ucoco_384.onnx" in err
    monkeypatch.setattr(known, "download", no_download)
    code, out, _ = run(capsys, "get", "dwpose", "--folder", folder / "own", "--json")
    assert code == 0 and [model["there"] for model in json.loads(out)["models"]] == [True]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["get"], "name what to get: schp-atr"),
        (["get", "nose"], "unknown model 'nose'; the known models are"),
        (["get", "dwpose", "nose"], "unknown model 'nose'"),
        (["list", "dwpose"], "write `truepose models get dwpose`"),
        (["dwpose"], "invalid choice: 'dwpose'"),
        (["get", "segformer-b3-clothes"], "optimum-cli export"),
    ],
)
def test_wrong_calls_are_one_line(capsys, monkeypatch, folder, argv, message):
    if argv[-1] != "segformer-b3-clothes":
        monkeypatch.setattr(known, "download", no_download)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and message in err and err.count("error: ") == 1
    assert not list(folder.iterdir())
