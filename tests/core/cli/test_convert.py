"""`truepose convert` and `truepose inspect`: what they print, and that wrong input is one line."""

from __future__ import annotations

import json

import pytest
import torch
from foreign import Toy, animate_anyone, flat, ip_adapter, toy_files
from safetensors.torch import load_file, save_file

from truepose_core.cli import main
from truepose_core.importing import families as importing
from truepose_core.models.store import load_model
from truepose_core.weights.strict import bundled_path


@pytest.fixture
def files(monkeypatch, tmp_path):
    monkeypatch.setattr(importing, "FAMILIES", (*importing.FAMILIES, Toy()))
    left, right = toy_files()
    torch.save({"state_dict": left, "epoch": 2}, tmp_path / "a.pth")
    save_file(right, tmp_path / "b.safetensors")
    return [tmp_path / "a.pth", tmp_path / "b.safetensors"]


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command line."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_convert_prints_what_was_found_taken_and_left_out(capsys, files, tmp_path):
    out = tmp_path / "out.safetensors"
    code, text, _ = run(capsys, "convert", *files, "--out", out, "--quiet")
    assert code == 0
    lines = [line.split() for line in text.splitlines()]
    left, right = (len(half) for half in toy_files())
    assert "Toy 1; licence of the weights: not stated" in text
    assert ["a.pth", "left", str(left), str(left - 1), "1"] in lines
    assert ["b.safetensors", "right", str(right), str(right), "0"] in lines
    assert "  1 left out: a toy" in text.splitlines()
    assert "  epoch is not read: no weights (int)" in text.splitlines()
    assert f"wrote {out}" in text
    load_model(out, verify=True)


def test_convert_reports_as_json(capsys, files, tmp_path):
    out = tmp_path / "out.safetensors"
    options = ("--dtype", "bfloat16", "--choose", "family=toy", "taste=sweet", "--json", "--quiet")
    code, text, _ = run(capsys, "convert", *files, "--out", out, *options)
    report = json.loads(text)
    assert code == 0
    assert (report["family"], report["title"], report["licence"]) == ("toy", "Toy 1", "not stated")
    assert report["bytes"] == out.stat().st_size
    assert report["files"][0]["left_out"] == {"a toy": 1}
    assert report["files"][1]["parts"] == [{"role": "right", "prefix": "right."}]
    assert {x.dtype for x in load_file(out).values()} == {torch.bfloat16}


def test_convert_keeps_an_output_that_exists(capsys, files, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    code, text, err = run(capsys, "convert", *files, "--out", out)
    assert (code, text) == (2, "")
    assert "exists already and is kept; choose another path, or add --overwrite" in err
    assert out.read_bytes() == b"mine"
    assert run(capsys, "convert", *files, "--out", out, "--overwrite", "--quiet")[0] == 0
    load_model(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x.pth"), "expected one of .safetensors"),
        (("--out", "x.safetensors", "--choose", "sweet"), "--choose 'sweet' is not NAME=VALUE"),
        (("--out", "x.safetensors", "--choose", "a=1", "a=2"), "'a' is given twice"),
        (("--out", "x.safetensors", "--choose", "a=1"), "the choice 'a' means nothing for these files"),
        (("--out", "x.safetensors", "--dtype", "fp8"), "invalid choice: 'fp8'"),
        ((), "required: --out"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(capsys, files, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    code, text, err = run(capsys, "convert", *files, *options)
    assert (code, text) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "b.safetensors"}


def test_inspect_knows_our_own_models(capsys):
    code, text, _ = run(capsys, "inspect", bundled_path())
    assert code == 0
    assert "a model of this package: --model" in text
    assert "says        architecture: truepose" in text
    assert "cannot be converted" not in text


def test_inspect_says_what_a_set_of_files_is_and_what_is_missing(capsys, tmp_path):
    nets = animate_anyone(context=768)
    paths = {name: tmp_path / f"{name}.pth" for name in ("reference", "denoising", "guider")}
    for name, path in paths.items():
        torch.save(nets[name], path)
    code, text, _ = run(capsys, "inspect", *paths.values())
    assert code == 0
    assert "found       AnimateAnyone (Moore): reference net" in text
    assert "looks like  a plain SD1.5 UNet" in text
    assert f"AnimateAnyone (Moore), complete: truepose convert {paths['reference']}" in text
    code, text, _ = run(capsys, "inspect", paths["reference"], paths["denoising"], "--json")
    report = json.loads(text)
    assert code == 0
    assert not report["together"]["convertible"]
    assert "the pose guider is missing" in report["together"]["verdict"]
    file = report["files"][0]
    assert (file["kind"], file["tensors"]) == ("torch pickle", len(nets["reference"]))
    assert file["dtypes"] == {"F32": file["tensors"]}
    assert {part["role"] for part in file["parts"]} == {"reference net"}


def test_inspect_knows_converted_ip_adapters(capsys, tmp_path):
    save_file(flat(ip_adapter()), tmp_path / "x.safetensors")
    assert run(capsys, "convert", tmp_path / "x.safetensors", "--out", tmp_path / "y.safetensors", "--quiet")[0] == 0
    code, text, _ = run(capsys, "inspect", tmp_path / "y.safetensors")
    assert code == 0
    assert "converted already: IP-Adapter Plus" in text


def test_inspect_says_why_a_file_is_not_recognised(capsys, tmp_path):
    save_file({"x.lora_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors", {"base": "sd15", "long": "x" * 999})
    save_file({"some.weight": torch.ones(1).to(torch.float8_e5m2)}, tmp_path / "odd.safetensors")
    code, text, _ = run(capsys, "inspect", tmp_path / "lora.safetensors", tmp_path / "odd.safetensors")
    assert code == 0
    assert "looks like  a LoRA" in text
    assert "says        base: sd15" in text
    assert "x" * 200 not in text
    assert "but         lora.safetensors looks like a LoRA, which is not a model" in text
    assert "some.weight (F8_E5M2); get the float32" in text


def test_inspect_tells_the_others_when_one_cannot_be_read(capsys, tmp_path):
    save_file({"some.weight": torch.ones(1)}, tmp_path / "odd.safetensors")
    (tmp_path / "empty.pth").write_bytes(b"")
    code, text, err = run(capsys, "inspect", tmp_path / "empty.pth", tmp_path / "odd.safetensors")
    assert code == 2
    assert "odd.safetensors is not recognised (keys such as some.weight)" in text
    assert err.startswith("error: ")
    assert "is empty (0 bytes)" in err
