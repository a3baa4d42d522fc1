"""What all commands share: options that mean the same everywhere, help that says ranges, errors that say what is
written."""

from __future__ import annotations

import argparse
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from truepose_core.cli import COMMANDS, build_parser, demo, main
from truepose_core.cli.console import MIN_SIDE, Console, HelpFormatter
from truepose_core.cli.transfer import command
from truepose_core.errors import TruePoseError
from truepose_core.pictures import files as images


def options(command):
    parser = build_parser(command)
    (choices,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return choices.choices[command]._actions


@pytest.mark.parametrize("command", COMMANDS)
def test_json_and_quiet_are_flags_in_every_command(command):
    for name in ("--json", "--quiet"):
        (option,) = (action for action in options(command) if name in action.option_strings)
        assert option.nargs == 0 and option.default is False


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_the_range_of_every_number(command):
    for action in options(command):
        if hasattr(action.type, "range"):
            told = HelpFormatter("truepose")._expand_help(action)
            assert f"({action.type.range}; default" in told or told.endswith(f"({action.type.range})"), told
    plain = [action.option_strings for action in options(command) if action.type in (int, float)]
    assert plain in ([], [["--repeats"]])  # whose help says it in words


def test_ranges_are_in_what_is_printed(capsys):
    assert main(["demo", "--help"]) == 0
    assert "sampling steps (1 to 1000; default: 1)" in " ".join(capsys.readouterr().out.split())


def test_the_smallest_side_is_that_of_images():
    assert MIN_SIDE == images.MIN_SIDE


@pytest.mark.parametrize(
    ("argv", "place"),
    [
        (("transfer", "a.png", "--sparkle"), "truepose transfer --help"),
        (("demo",), "truepose demo --help"),
        (("eval", "--steps", "0"), "truepose eval --help"),
        (("inspect", "a", "--depth", "2"), "truepose inspect --help"),
        (("paint",), "truepose --help"),
    ],
)
def test_an_option_that_is_wrong_points_at_the_commands_own_help(argv, place, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.strip().endswith(f"; see {place}")


def test_progress_is_said_unless_quiet(capsys):
    with Console() as console:
        console.doing("opening the model")
    assert capsys.readouterr().err == "opening the model ...\n"
    with Console(quiet=True) as console:
        console.doing("opening the model")
        console.note("something")
    assert capsys.readouterr().err == "note: something\n"


def test_json_of_a_table_is_one_object_on_stdout_and_what_is_in_the_file(capsys, tmp_path):
    argv = ["eval", "--rows", "copy", "--pairs", "2", "--json", "--quiet", "--report", str(tmp_path / "t.json")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    printed, written = json.loads(out), json.loads((tmp_path / "t.json").read_text())
    assert printed["rows"][0]["name"] == "copy" and printed["pairs"] == written["pairs"] == 2
    assert err == ""


@pytest.fixture
def full_disk(monkeypatch):
    """The disk takes this many files and is full then."""
    fsync = os.fsync

    def fill(files):
        left = [files]

        def limited(fd):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(fd)

        monkeypatch.setattr(images.os, "fsync", limited)

    return fill


@dataclass
class Named:
    out: Path


def test_a_full_disk_in_a_transfer_of_many_poses_says_what_is_written(full_disk, tmp_path):
    pictures = [torch.rand(1, 3, 16, 16)] * 3
    targets = [Named(tmp_path / "out" / f"{name}.png") for name in ("kick", "wave", "walk")]
    full_disk(2)
    with pytest.raises(
        TruePoseError, match=r"walk\.png cannot be written: No space.*so far: .*kick\.png, .*wave\.png$"
    ):
        command._write(pictures, targets, tmp_path / "out", overwrite=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["kick.png", "wave.png"]
    full_disk(0)
    with pytest.raises(TruePoseError, match=r"kick\.png cannot be written: No space.*so far: nothing$"):
        command._write(pictures, targets, tmp_path / "out", overwrite=True)


def test_a_full_disk_in_the_demo_says_what_is_written(full_disk, tmp_path):
    sheet, made = torch.rand(1, 3, 16, 16), {"person.png": torch.rand(1, 3, 16, 16), "kick.json": "{}"}
    full_disk(1)
    with pytest.raises(TruePoseError, match=r"kick\.json cannot be written.*so far: .*person\.png$"):
        demo._write(sheet, {}, made, tmp_path / "demo.png", tmp_path / "demo.json", overwrite=False)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["person.png"]


def test_the_first_line_comes_before_anything_heavy_is_imported(monkeypatch, capsys):
    """Whoever waits for the networks to be imported knows what for."""
    said = []
    monkeypatch.setattr(Console, "doing", lambda self, text: said.append(text))

    def heavy(*_, **__):
        assert said
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "choose_model", heavy)
    assert main(["transfer", "a.png", "--pose", "b.json", "--out", "c.png"]) == 130
    assert said == ["reading a.png"]


def test_eval_offers_every_world():
    from truepose_core.mannequin.world import WORLDS

    (option,) = (action for action in options("eval") if "--world" in action.option_strings)
    assert option.choices == WORLDS
