"""`truepose train`: its options are TrainingConfig's, and Ctrl-C loses nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save

from truepose_core.cli import main
from truepose_core.cli.train import OPTIONS
from truepose_core.models.config import mannequin_config
from truepose_core.models.store import load_model
from truepose_core.pictures import files as images
from truepose_core.training import train
from truepose_core.training.small import SmallTrainer
from truepose_core.training.train import Trainer, TrainingConfig
from truepose_core.weights.strict import read_metadata

SMALL = [*("--row", "pose", "--steps", "3", "--people", "2", "--poses", "2", "--fresh", "0"), "--quiet"]
SMALL += ["--sources", "1", "--targets", "1", "--warmup", "1"]

FIELD = [*("--row", "field", "--steps", "3", "--batch", "2", "--width", "8", "--depth", "1"), "--quiet"]
FIELD += ["--valid", "16", "--noised", "4"]


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
        assert f"default: {default})" in text


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


def pressing(monkeypatch, name, when, presses=1):
    """Ctrl-C is pressed while a file of this name is written, at the `when`-th time."""
    write, times = images.atomic_write, []

    def watched(path, data, overwrite=False):
        if path.name == name:
            times.append(path)
            if len(times) == when:
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
        return write(path, data, overwrite)

    monkeypatch.setattr(images, "atomic_write", watched)


@pytest.mark.parametrize("row", ["pose", "field"])
def test_ctrl_c_while_it_saves_waits_for_the_save(capfd, small_rows, monkeypatch, tmp_path, row):
    """Also the second one, of who was told nothing for a while, and also in the save at the end."""
    argv, name = (SMALL, "state.safetensors") if row == "pose" else (FIELD, "checkpoint.safetensors")
    kind = Trainer if row == "pose" else SmallTrainer
    optimise = kind._optimise

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return optimise(self)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_optimise", interrupted)
        pressing(patch, name, when=1, presses=2)
        assert main(["train", "--out", str(tmp_path), *argv]) == 130
    err = capfd.readouterr().err
    assert "step 1 is being saved: a moment" in err and "stopped by Ctrl-C; step 1 of 3 is saved in" in err
    with monkeypatch.context() as patch:
        pressing(patch, name, when=1)
        assert main(["train", "--out", str(tmp_path), *argv]) == 130
    assert "step 3 of 3 is saved in" in capfd.readouterr().err
    assert not (tmp_path / "weights.safetensors").exists()
    assert main(["train", "--out", str(tmp_path), *argv]) == 0
    assert (tmp_path / "weights.safetensors").is_file()
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_was_not_saved_is_not_said_to_be(capsys, small_rows, monkeypatch, tmp_path):
    save = Trainer.save

    def gives_up(self):
        if self.step > 1:
            raise KeyboardInterrupt
        save(self)

    def disk_is_full(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", disk_is_full)
    assert main(["train", "--out", str(tmp_path), *SMALL]) == 130
    assert "stopped by Ctrl-C; nothing is saved; the same command begins anew" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "save", gives_up)
    assert main(["train", "--out", str(tmp_path), *SMALL, "--save-every", "1"]) == 130
    err = capsys.readouterr().err
    assert "step 1 of 3 is saved in" in err and "(the run had come to step 2); the same command goes on" in err


@pytest.mark.parametrize("row", ["pose", "field"])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_named(capsys, small_rows, tmp_path, row):
    argv = SMALL if row == "pose" else FIELD
    path = tmp_path / ("checkpoint/state.safetensors" if row == "pose" else "checkpoint.safetensors")
    assert main(["train", "--out", str(tmp_path), *argv]) == 0
    whole = path.read_bytes()
    tensors, story = load_file(path), json.loads(read_metadata(path)["story"])
    moment = next(name for name in tensors if name.startswith("optimizer.exp_avg."))
    less = {name: x for name, x in tensors.items() if name != moment}

    def written(tensors, story):
        return save(tensors, {} if story is None else {"story": story})

    def told(**changes):
        return written(tensors, json.dumps({**story, **changes}))

    for content in (
        whole[: len(whole) // 2],
        b"",
        written({"weight": torch.zeros(2)}, None),
        written({"weight": torch.zeros(2)}, json.dumps(story)),
        written(tensors, "{"),
        written(tensors, "[" * 100_000),
        written(tensors, "[]"),
        told(step=-1),
        told(step="many"),
        told(seconds=None),
        told(config=[]),
        written(less, json.dumps(story)),
        written({**tensors, moment: torch.zeros(1)}, json.dumps(story)),
        written({**less, "optimizer.sparkle.x": torch.zeros(1)}, json.dumps(story)),
        written({name: x for name, x in tensors.items() if not name.startswith(("ema", "average"))}, json.dumps(story)),
    ):
        path.write_bytes(content)
        capsys.readouterr()
        assert main(["train", "--out", str(tmp_path), *argv]) == 2
        err = capsys.readouterr().err
        assert str(path) in err and "delete that file to train anew, or use another --out folder" in err


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
