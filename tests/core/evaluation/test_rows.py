"""The rows of the table, the table, its sheet, and the sample sheets of training."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.evaluate import GEOMETRY, evaluate
from truepose_core.evaluation.metrics import COLUMNS, area_masks, masked_psnr
from truepose_core.evaluation.pattern import pattern_score
from truepose_core.evaluation.rows import (
    BASELINES,
    BUNDLED_ROWS,
    ROWS,
    copy_source,
    make_rows,
    model_row,
    paint_regions,
    warp_source,
)
from truepose_core.evaluation.split import groups, views
from truepose_core.mannequin import VIEWS, PairBatch, sample_poses
from truepose_core.mannequin.split import split_pairs
from truepose_core.models.config import mannequin_config
from truepose_core.models.model import TruePoseModel
from truepose_core.models.store import save_model
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.sheet import label_strip, labelled_sheet, tile
from truepose_core.regions import Region
from truepose_core.training.samples import sample_sheet

SIZE = (64, 48)


def tiny_model():
    torch.manual_seed(0)
    return TruePoseModel(mannequin_config("hpfa", caa=False, widths=(16, 32)))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save_model(tiny_model(), tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture(scope="module")
def pairs():
    return split_pairs(6, SIZE)


@pytest.fixture(scope="module")
def report(model_file):
    return evaluate(
        pairs=6,
        steps=1,
        rows=["copy", "regions", "warp", "mine"],
        models={"mine": model_file},
        batch_size=4,
        quiet=True,
    )


def same_pose(pairs):
    return PairBatch(pairs.source, pairs.source, pairs.identity)


# The split


def test_the_first_pairs_are_the_first_pairs(pairs):
    few = split_pairs(torch.arange(2, 4), SIZE)
    assert torch.allclose(few.source.image, pairs.source.image[2:4], atol=1e-6)
    assert torch.allclose(few.target.image, pairs.target.image[2:4], atol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_those_the_poses_were_drawn_for(view):
    poses = sample_poses(range(200), 3, view)
    assert set(views(poses.theta)) == {view}


def test_groups_name_every_pair(pairs):
    for names in groups(pairs).values():
        assert len(names) == len(pairs)
    assert all(part in VIEWS for name in groups(pairs)["view"] for part in name.split(" to "))


# The rows without a network


def test_copy_is_the_source(pairs):
    assert torch.equal(copy_source(pairs).images, pairs.source.image)


def test_regions_keep_each_regions_mean_colour_and_carry_no_pattern(pairs):
    labels = HumanParsing(pairs.source.parsing).labels()
    hard = HumanParsing.from_labels(labels).masks
    source = type(pairs.source)(**{**vars(pairs.source), "parsing": hard})
    there = PairBatch(source, source, pairs.identity)
    images = paint_regions(there).images
    for region in Region:
        mask = hard[:, region][:, None]
        painted, true = ((x * mask).sum((2, 3)) for x in (images, source.image))
        assert torch.allclose(painted, true, atol=1e-2)
    assert pattern_score(images, source.image, HumanParsing(hard)) == 0


def test_regions_look_at_the_true_parsing_and_not_at_the_true_picture(pairs):
    target = type(pairs.target)(**{**vars(pairs.target), "image": torch.rand_like(pairs.target.image)})
    assert torch.equal(
        paint_regions(PairBatch(pairs.source, target, pairs.identity)).images, paint_regions(pairs).images
    )


def test_warping_to_the_same_pose_gives_the_person_back(pairs):
    there = same_pose(pairs)
    mask = area_masks(HumanParsing(pairs.source.parsing))["clothes"]
    psnr = masked_psnr(warp_source(there).images, pairs.source.image, mask)
    assert psnr.mean() > masked_psnr(paint_regions(there).images, pairs.source.image, mask).mean()


# The rows of models


def test_a_learned_row_does_not_depend_on_the_batch_it_is_in(pairs, model_file):
    row = model_row("mine", model_file, steps=2, seed=5)
    together = row.draw(pairs).images
    assert together.shape == pairs.target.image.shape
    assert together.min() >= 0 and together.max() <= 1
    alone = row.draw(split_pairs(torch.tensor([4]), SIZE)).images
    assert torch.allclose(alone[0], together[4], atol=1e-4)
    assert torch.equal(row.draw(pairs).images, together)


def test_a_learned_row_sees_no_truth_but_the_pose(pairs, model_file):
    row = model_row("mine", model_file, steps=1, seed=0)
    hidden = {
        **vars(pairs.target),
        "image": torch.zeros_like(pairs.target.image),
        "parsing": torch.zeros_like(pairs.target.parsing),
    }
    blind = PairBatch(pairs.source, type(pairs.target)(**hidden), pairs.identity)
    assert torch.equal(row.draw(blind).images, row.draw(pairs).images)


def test_another_seed_is_another_noise(pairs, model_file):
    first, second = (model_row("mine", model_file, steps=1, seed=s).draw(pairs).images for s in (0, 100))
    assert not torch.equal(first, second)


def test_rows_come_in_the_order_asked_for(model_file):
    rows = make_rows(["warp", "mine", "copy"], {"mine": model_file}, steps=1, seed=0)
    assert [row.name for row in rows] == ["warp", "mine", "copy"]
    assert [row.size for row in rows] == [None, SIZE, None]


def test_all_rows_are_the_known_ones_then_the_given_ones(model_file, tmp_path):
    models = dict.fromkeys([*BUNDLED_ROWS, "mine"], model_file)
    with pytest.raises(TruePoseError, match=r"row 'bundled-given': .* reads no body"):
        make_rows(None, models, steps=1, seed=0)
    by_surface = TruePoseModel(replace(tiny_model().config, match="surface"))
    models["bundled-given"] = save_model(by_surface, tmp_path / "surface.safetensors")
    rows = make_rows(None, models, steps=1, seed=0)
    assert [row.name for row in rows] == [*ROWS, "mine"]


def test_a_row_whose_file_is_missing_is_named(tmp_path):
    with pytest.raises(TruePoseError, match=r"row 'mine': .*nothing\.safetensors"):
        make_rows(["mine"], {"mine": tmp_path / "nothing.safetensors"}, steps=1, seed=0)


def test_a_bundled_row_whose_file_is_missing_is_named(monkeypatch, tmp_path):
    from truepose_core.weights import strict

    monkeypatch.setattr(strict.resources, "files", lambda package: tmp_path)
    for row in BUNDLED_ROWS:
        with pytest.raises(TruePoseError, match=f"row '{row.replace('+', '[+]')}': .*{BUNDLED_ROWS[row]}.safetensors"):
            make_rows([row], steps=1, seed=0)


@pytest.mark.parametrize("rows", [["cpoy"], [], ["copy", "copy"]])
def test_rows_that_make_no_table_are_refused(rows):
    with pytest.raises(TruePoseError, match=r"expected some of copy, regions"):
        make_rows(rows, steps=1, seed=0)


def test_a_model_cannot_take_the_name_of_a_row_without_one(model_file):
    with pytest.raises(TruePoseError, match="'warp'"):
        make_rows(None, {"warp": model_file}, steps=1, seed=0)


# The table


def test_the_report_holds_what_it_says(report):
    assert [row["name"] for row in report.rows] == ["copy", "regions", "warp", "mine"]
    assert report.size == SIZE and report.pairs == 6 and report.steps == 1
    for row in report.rows:
        assert set(row) == {"name", *COLUMNS, *GEOMETRY, "errors", "seconds_per_image"}
        assert row["seconds_per_image"] > 0
        assert 0 <= row["pattern"] <= 1
    assert report.models["mine"]["file"] == "tiny.safetensors"


def test_json_has_no_nan_and_reads_back(report):
    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(report.to_json(), parse_constant=refuse)
    assert read == json.loads(json.dumps(report.to_dict()))
    assert {"rows", "pairs", "size", "steps", "versions"} <= set(read)


def test_nothing_to_measure_is_none():
    # Nobody's face is seen from behind.
    index = next(i for i, name in enumerate(groups(split_pairs(30, SIZE))["view"]) if name.endswith("back"))
    report = evaluate(pairs=index + 1, rows=["copy"], quiet=True)
    back = next(part for name, part in report.breakdown["view"].items() if name.endswith("back"))
    assert back["rows"][0]["face_psnr"] is None
    assert "nan" not in report.markdown(details=True).lower()
    assert "NaN" not in report.to_json()


def test_neither_batch_size_nor_further_pairs_change_a_pair(model_file):
    few, all_ = (
        evaluate(pairs=n, steps=1, rows=["mine"], models={"mine": model_file}, batch_size=b, shown=2, quiet=True)
        for n, b in ((2, 1), (5, 3))
    )
    assert torch.allclose(few.pictures["mine"], all_.pictures["mine"], atol=1e-4)


def test_groups_make_up_the_table(report):
    for parts in report.breakdown.values():
        assert sum(part["pairs"] for part in parts.values()) == report.pairs
        for i, row in enumerate(report.rows):
            total = sum(part["pairs"] * part["rows"][i]["clothes_psnr"] for part in parts.values())
            assert total / report.pairs == pytest.approx(row["clothes_psnr"])


def test_markdown_has_a_line_for_each_row_and_marks_the_best(report):
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row["name"] for row in report.rows]
    assert len({line.count("|") for line in lines}) == 1
    best = max(row["clothes_psnr"] for row in report.rows)
    assert f"**{best:.2f}**" in report.markdown()


def test_the_contact_sheet_shows_source_skeleton_rows_and_truth(report):
    assert list(report.pictures) == ["source", "skeleton", "copy", "regions", "warp", "mine", "truth"]
    sheet = report.contact_sheet()
    assert sheet.shape[:2] == (1, 3) and sheet.min() >= 0 and sheet.max() <= 1
    assert sheet.shape[2] > 6 * 192 and sheet.shape[3] > 7 * 144


def test_the_size_is_that_of_the_models_and_can_be_chosen(model_file):
    report = evaluate(pairs=1, steps=1, rows=["mine"], models={"mine": model_file}, size=(96, 72), quiet=True)
    assert report.pictures["mine"].shape[-2:] == (96, 72)
    assert evaluate(pairs=1, rows=["copy"], quiet=True).size == SIZE


def test_measuring_leaves_global_state_alone(model_file):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    evaluate(pairs=1, steps=1, rows=["mine"], models={"mine": model_file}, quiet=True)
    assert torch.get_num_threads() == threads
    # Building a network draws its first weights; sampling and measuring draw nothing.
    torch.set_rng_state(state)
    evaluate(pairs=1, rows=list(BASELINES), quiet=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": "deepfashion"}, "'mannequin'"),
        ({"pairs": 0}, "pairs is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shown": 0}, "shown is 0"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(TruePoseError, match=message):
        evaluate(**{"rows": ["copy"], "quiet": True, **wrong})


def test_importing_the_evaluation_is_light():
    code = (
        "import sys, truepose_core.evaluation.evaluate, truepose_core.training.samples;"
        "print([m for m in ('torchmetrics', 'skimage', 'PIL', 'diffusers', 'tqdm.auto') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Sheets


def test_tiles_lie_where_they_should():
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.rand(3, 4, 5, generator=generator) for _ in range(3)] for _ in range(2)]
    sheet = tile(rows, scale=2, gap=1)
    assert sheet.shape == (1, 3, 2 * 9 + 1, 3 * 11 + 1)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            found = sheet[0, :, 1 + 9 * y : 9 * (y + 1), 1 + 11 * x : 11 * (x + 1)]
            assert torch.equal(found[:, ::2, ::2], picture) and torch.equal(found[:, 1::2, 1::2], picture)


def test_labels_stay_in_their_part():
    both, left = label_strip(["pose", ""], 200), label_strip(["pose"], 100)
    assert torch.equal(both[..., :100], left)
    assert bool((both[..., 100:] == 1).all()) and bool((left < 0.5).any())
    assert torch.equal(
        label_strip(["", "a label that is far too long for its part"], 100)[..., :50], torch.ones(1, 3, 23, 50)
    )


def test_a_labelled_sheet_is_as_large_as_it_has_to_be():
    columns = {"a": torch.rand(2, 3, 64, 48), "b": torch.rand(2, 3, 64, 48)}
    sheet = labelled_sheet(columns, ["first", "second"], least_height=100)
    assert sheet.shape[-1] == 2 * (2 * 48 + 2) + 2
    assert sheet.shape[-2] == 3 * 23 + 2 * (2 * 64 + 4)


def test_a_sample_sheet_shows_source_and_truth_and_leaves_the_model_alone(pairs):
    model = tiny_model().train()
    model.pose_encoder.eval()
    modes = [module.training for module in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    sheet = sample_sheet(model, pairs=2, seed=3, steps=1, scale=1)
    assert sheet.shape == (1, 3, 2 * 66 + 2, 4 * 50 + 2)
    assert sheet.min() >= 0 and sheet.max() <= 1
    assert torch.allclose(sheet[0, :, 2:66, 2:50], pairs.source.image[0], atol=1e-6)
    # The renderer rounds differently in batches of another length, by 1e-8.
    assert torch.allclose(sheet[0, :, 68:132, 152:200], pairs.target.image[1], atol=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample_sheet(model, pairs=2, seed=3, steps=1, scale=1), sheet)


def test_a_sample_sheet_of_nothing_is_refused():
    with pytest.raises(TruePoseError, match="at least 1"):
        sample_sheet(tiny_model(), pairs=0, seed=0)
