"""Laws of the figures of `truepose eval --parts`."""

import json
import math

import pytest
import torch

from truepose_core.cli import main
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.surroundings import (
    _per_region,
    evaluate_parts,
    joint_error,
    paste_back_error,
    region_iou,
    retarget_error,
)
from truepose_core.mannequin import render_people
from truepose_core.parsing import HumanParsing
from truepose_core.regions import REGION_NAMES, Region


def parsing(rows):
    labels = torch.zeros(1, 40, 40, dtype=torch.int64)
    labels[:, :rows] = int(Region.UPPER)
    return HumanParsing.from_labels(labels)


def test_iou_is_the_share_of_the_union():
    values = region_iou(parsing(10), parsing(20))[0]
    assert values[Region.UPPER].item() == pytest.approx(0.5)
    assert values[Region.BACKGROUND].item() == pytest.approx(20 / 30)
    assert values[Region.FACE].isnan()
    assert region_iou(parsing(10), parsing(10))[0].nanmean() == 1
    with pytest.raises(TruePoseError, match="one shape"):
        region_iou(parsing(10), HumanParsing.from_labels(torch.zeros(1, 40, 41, dtype=torch.int64)))


def test_joint_error_knows_no_shift_and_no_scale():
    true = torch.rand(3, 18, 3, generator=torch.Generator().manual_seed(0))
    true[..., 2] = 1
    moved = true.clone()
    moved[..., :2] = 0.5 * true[..., :2] + 0.2
    assert joint_error(moved, true, (100, 100)) < 1e-4
    # Pixels: two of four joints that lie 10 apart are moved by 4 towards each other.
    square = torch.zeros(1, 18, 3)
    square[0, :4] = torch.tensor([[0, 0, 1], [0.1, 0, 1], [0, 0.1, 1], [0.1, 0.1, 1]])
    assert joint_error(square, square, (100, 100)) == pytest.approx(0, abs=1e-9)
    bent = square.clone()
    bent[0, 0, 0] = 0.02
    assert 0 < joint_error(bent, square, (100, 100)) < 2
    missing = square.clone()
    missing[0, 0] = torch.tensor([0.9, 0.9, 0.0])
    assert joint_error(missing, square, (100, 100)) == pytest.approx(0, abs=1e-9)


def test_retargeting_comes_nearer_to_the_truth():
    error = retarget_error(24)
    assert error["retargeted"] < 0.85 * error["without"]


def test_pasting_back_changes_nothing_at_the_same_scale_and_nothing_outside():
    people = render_people([0, 1], 1, "test", 0, 128, 96)
    for i in range(2):
        error = paste_back_error(people, i)
        assert error["same scale"] == 0 and error["outside"] == 0
        assert error["enlarged 2x PSNR"] > error["reduced 2x PSNR"] > 20


def test_a_region_that_nobody_shows_has_no_figure():
    empty = region_iou(parsing(10), parsing(10))
    assert _per_region(empty)["face"] is None and _per_region(empty)["mean"] == 1


def test_the_report_is_printed_and_written(capsys, tmp_path):
    report = evaluate_parts(2, (128, 96), refine=False, swap=False)
    assert set(report.parsing) == {"shapes"} and set(report.parsing["shapes"]) == {*REGION_NAMES, "mean"}
    values = json.loads(report.to_json())
    assert values["size"] == "96x128" and values["pairs"] == 2
    assert all(math.isfinite(v) for part in ("retarget", "paste_back") for v in values[part].values())
    path = tmp_path / "parts.json"
    assert main(["eval", "--data", "mannequin", "--parts", "--pairs", "1", "--report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "mean IoU" in printed and "retargeted" in printed and "same scale: 0\n" in printed
    assert json.loads(path.read_text())["pairs"] == 1
    with pytest.raises(TruePoseError, match="at least 1"):
        evaluate_parts(0)


def test_options_of_the_other_table_are_refused(capsys):
    assert main(["eval", "--parts", "--rows", "copy"]) == 2
    assert "--rows belongs to the table of models" in capsys.readouterr().err
