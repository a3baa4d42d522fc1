"""`truepose train`: its options are TrainingConfig's, and Ctrl-C loses nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from truepose_core.cli import main
from truepose_core.cli.train import OPTIONS
from truepose_core.models.config import mannequin_config
from truepose_core.models.store import load_model, read_metadata
from truepose_core.training import train
from truepose_core.training.train import Trainer, TrainingConfig

SMALL = [*("--row", "pose", "--steps", "3", "--people", "2", "--poses", "2", "--fresh", "0"), "--quiet"]
SMALL += ["--sources", "1", "--targets", "1", "--warmup", "1"]


@pytest.fixture
def small_rows(monkeypatch):
    """The row "pose" with a small network."""
    monkeypatch.setitem(train.ROWS, "pose", lambda: mannequin_config("none", caa=False, widths=(32, 32)))


def test_every_field_is_an_option(capsys):
    assert set(OPTIONS) == {field.name for field in fields(TrainingConfig)}
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainingConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        default = {(): "none", "": "none", False: "off"}.get(field.default, field.default)
        assert f"(default: {default})" in text


def test_options_become_the_configuration(monkeypatch, tmp_path):
    seen = []

    def stop(self, config, out, **_):
        seen.append((config, out))
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", stop)
    out = tmp_path / "run"
    assert main(["train", "--out", str(out)]) == 130
    argv = ["--row", "concat", "--learning-rate", "2e-3", "--keep", "5", "10", "--ema", "0.9", "--seed", "4"]
    assert main(["train", "--out", str(out), *argv]) == 130
    expected = replace(TrainingConfig(), row="concat", learning_rate=2e-3, keep=(5, 10), ema=0.9, seed=4)
    assert seen == [(TrainingConfig(), out), (expected, out)]


def test_train_writes_weights_that_load(capsys, small_rows, tmp_path):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--json", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 3
    load_model(report["weights"], verify=True)
    story = json.loads(read_metadata(report["weights"])["training"])
    assert (story["row"], story["steps_done"]) == ("pose", 3)


def test_ctrl_c_leaves_a_checkpoint_that_goes_on_to_the_same_state(capsys, small_rows, monkeypatch, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["train", "--out", str(whole), *SMALL]) == 0
    optimise = Trainer._optimise

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return optimise(self)

    monkeypatch.setattr(Trainer, "_optimise", interrupted)
    assert main(["train", "--out", str(broken), *SMALL]) == 130
    err = capsys.readouterr().err
    assert "stopped by Ctrl-C; step 1 of 3 is saved in" in err
    assert "the same command goes on from there" in err
    assert (broken / "checkpoint" / "state.safetensors").is_file()
    assert not (broken / "weights.safetensors").exists()
    monkeypatch.setattr(Trainer, "_optimise", optimise)
    assert main(["train", "--out", str(broken), *SMALL]) == 0
    assert "going on from step 1" in capsys.readouterr().out
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (broken, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--row", "magic"), "unknown row 'magic'; expected one of pose, concat, HPFA"),
        (("--targets", "6", "--poses", "6"), "--poses 6 leaves no pose for the source beside --targets 6"),
        (("--drop-source", "0.8", "--drop-all", "0.5"), "make more than 1"),
        (("--precision", "fp8"), "--precision 'fp8'; expected no, fp16 or bf16"),
        (("--learning-rate", "nan"), "--learning-rate: 'nan' is not a number"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, options, message):
    assert main(["train", "--out", str(tmp_path / "run"), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_other_settings_than_the_checkpoints_are_refused(capsys, small_rows, tmp_path):
    assert main(["train", "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert main(["train", "--out", str(tmp_path / "run"), *SMALL, "--seed", "9"]) == 2
    assert "was made with other settings (seed: 0 then, 9 now)" in capsys.readouterr().err


def test_a_file_in_the_way_is_refused(capsys, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert main(["train", "--out", str(tmp_path / "run")]) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"
