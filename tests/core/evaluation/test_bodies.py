"""Laws of the rows that carry along a body, and of how their geometry is measured."""

import pytest
import torch

from truepose_core.cli import main
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.bodies import (
    BODY_ROWS,
    EXACT,
    PLACES,
    BodyRows,
    Difficulty,
    Drawn,
    geometry_columns,
    place_columns,
    skeleton_correspondence,
    true_correspondence,
)
from truepose_core.evaluation.evaluate import GEOMETRY, QUARTILES, _quartiles, _standard_error, evaluate
from truepose_core.evaluation.metrics import area_masks, masked_psnr
from truepose_core.evaluation.rows import BASELINES, paint_regions
from truepose_core.evaluation.split import pose_distances
from truepose_core.mannequin import PairBatch, axis_angle_to_matrix
from truepose_core.mannequin.split import split_pairs
from truepose_core.parsing import HumanParsing

SIZE = (64, 48)


@pytest.fixture(scope="module")
def pairs():
    return split_pairs(12, SIZE)


@pytest.fixture(scope="module")
def truth(pairs):
    return true_correspondence(pairs)


@pytest.fixture(scope="module")
def plain(pairs):
    """Every body row of the pairs, nothing made harder."""
    return {name: draw(pairs) for name, draw in BodyRows().rows().items()}


def some(pairs, index):
    index = torch.tensor(index)
    return PairBatch(pairs.source.select(index), pairs.target.select(index), pairs.identity[index])


def endpoint(drawn, truth):
    return geometry_columns(drawn, truth)["endpoint"].nanmean().item()


# The rows


def test_rows_are_the_bodies_and_each_once_more_with_the_true_parsing(plain):
    assert list(plain) == [*BODY_ROWS, *(name + EXACT for name in BODY_ROWS)]
    assert set(plain) < set(BASELINES)
    for drawn in plain.values():
        assert drawn.images.shape == (12, 3, *SIZE) and drawn.images.min() >= 0 and drawn.images.max() <= 1
        assert drawn.grid.shape == (12, *SIZE, 2) and drawn.seen.shape == (12, 1, *SIZE)


def test_the_true_surface_has_no_endpoint_error(plain, truth):
    for name in ("surface", "surface" + EXACT):
        columns = geometry_columns(plain[name], truth)
        assert columns["endpoint"].nan_to_num().max() < 1e-4
    # The parsing says of each pixel what most of it is, so a rim of what is seen is left out.
    own = geometry_columns(Drawn(truth.seen, truth.grid, truth.seen), truth)["seen"]
    taken = geometry_columns(plain["surface"], truth)["seen"]
    assert (taken <= own).all() and taken.mean() > 0.85 * own.mean()


def test_the_nearer_to_the_truth_the_smaller_the_error(pairs, plain, truth):
    errors = [endpoint(plain[name], truth) for name in ("surface", "body-given", "body-lifted")]
    skeleton = Drawn(pairs.target.image, *skeleton_correspondence(pairs))
    errors.append(endpoint(skeleton, truth))
    assert errors == sorted(errors) and errors[-1] > 1.5 * errors[-2]


def test_hidden_places_are_painted_and_seen_ones_carried(pairs, plain):
    for name in BODY_ROWS:
        carried, exact = plain[name], plain[name + EXACT]
        seen = (carried.seen > 0).expand_as(carried.images)
        assert torch.equal(carried.images[seen], exact.images[seen])
        flat = paint_regions(pairs).images
        assert torch.equal(exact.images[~seen], flat[~seen])
        assert torch.equal(carried.grid, exact.grid) and torch.equal(carried.seen, exact.seen)


def test_patterns_arrive_where_painting_has_none(pairs, plain):
    mask = area_masks(HumanParsing(pairs.target.parsing))["clothes"]
    flat, carried = (
        masked_psnr(images, pairs.target.image, mask).nanmean()
        for images in (paint_regions(pairs).images, plain["surface" + EXACT].images)
    )
    assert carried > flat


def test_lifted_rows_see_no_truth_but_keypoints(pairs, plain):
    """Other true parameters and another true picture make no difference."""
    hidden = {"image": torch.rand(12, 3, *SIZE), "parsing": pairs.target.parsing.flip(0)}
    other = {name: torch.zeros_like(getattr(pairs.target, name)) for name in ("theta", "beta", "camera", "depth")}
    target = type(pairs.target)(**{**vars(pairs.target), **hidden, **other})
    source = type(pairs.source)(**{**vars(pairs.source), **other})
    blind = BodyRows().draw("body-lifted", False, PairBatch(source, target, pairs.identity))
    assert torch.equal(blind.images, plain["body-lifted"].images)


def test_a_row_does_not_depend_on_the_batch_it_is_in(pairs, plain):
    few = some(pairs, [7, 2])
    for name, draw in BodyRows().rows().items():
        torch.testing.assert_close(draw(few).images, plain[name].images[[7, 2]], atol=2e-2, rtol=0)


# Difficulty


HARD = Difficulty(noise=6, missing=0.25, angle=8)


def test_difficulty_is_a_pairs_own_whatever_batch_it_is_in(pairs):
    few = some(pairs, [7, 2])
    rows = BodyRows(HARD)
    for side, number in (("source", 0), ("target", 1)):
        whole, part = getattr(pairs, side), getattr(few, side)
        keypoints = rows._keypoints(whole, number, pairs.identity)
        assert torch.equal(rows._keypoints(part, number, few.identity), keypoints[[7, 2]])
        assert torch.equal(BodyRows(HARD)._keypoints(whole, number, pairs.identity), keypoints)
        given = rows._given(whole, number, pairs.identity, keypoints)
        again = rows._given(part, number, few.identity, keypoints[[7, 2]])
        torch.testing.assert_close(again.theta, given.theta[[7, 2]], atol=1e-6, rtol=0)
    # The two sides of a pair are noised in their own ways.
    noise = [
        rows._keypoints(getattr(pairs, side), number, pairs.identity) - getattr(pairs, side).keypoints
        for number, side in enumerate(("source", "target"))
    ]
    assert (noise[0] - noise[1]).abs().max() > 1e-3


def test_noise_is_in_pixels_of_a_picture_768_high_at_any_size(pairs):
    moved = BodyRows(Difficulty(noise=8))._keypoints(pairs.source, 0, pairs.identity)
    seen = pairs.source.keypoints[..., 2] > 0
    off = (moved - pairs.source.keypoints)[..., :2] * torch.tensor([576.0, 768.0])
    assert off[seen].std().item() == pytest.approx(8, rel=0.1)
    assert torch.equal(moved[..., 2], pairs.source.keypoints[..., 2]) and not moved[~seen].any()
    large = split_pairs(12, (128, 96))
    torch.testing.assert_close(
        BodyRows(Difficulty(noise=8))._keypoints(large.source, 0, large.identity), moved, atol=1e-4, rtol=0
    )


def test_missing_keypoints_are_a_share_of_each_persons(pairs):
    left = BodyRows(Difficulty(missing=1 / 3))._keypoints(pairs.source, 0, pairs.identity)
    before = (pairs.source.keypoints[..., 2] > 0).sum(1)
    after = (left[..., 2] > 0).sum(1)
    assert torch.equal(after, before - (before / 3).round().long())
    kept = left[..., 2] > 0
    assert torch.equal(left[kept], pairs.source.keypoints[kept]) and not left[~kept].any()


def test_nothing_made_harder_is_the_truth(pairs):
    rows = BodyRows()
    assert rows._keypoints(pairs.source, 0, pairs.identity) is pairs.source.keypoints
    first, second, _ = rows.bodies("body-given", pairs)
    assert torch.equal(first.theta, pairs.source.theta) and torch.equal(second.camera, pairs.target.camera)


def test_given_angles_are_off_by_as_much_as_is_said(pairs):
    made = BodyRows(Difficulty(angle=5))._given(pairs.source, 0, pairs.identity, pairs.source.keypoints)
    turn = axis_angle_to_matrix(pairs.source.theta.double()).mT @ axis_angle_to_matrix(made.theta.double())
    angle = torch.rad2deg(((turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos())
    assert angle.square().mean().sqrt().item() == pytest.approx(5, rel=0.15)
    assert torch.equal(made.camera, pairs.source.camera)


def test_noisy_bodies_are_worse_and_the_fit_makes_them_better(pairs, plain, truth):
    exact = endpoint(plain["body-given"], truth)
    noisy = endpoint(BodyRows(Difficulty(angle=8)).draw("body-given", False, pairs), truth)
    refit = endpoint(BodyRows(Difficulty(angle=8, refit=True)).draw("body-given", False, pairs), truth)
    assert exact < refit < noisy
    fitted = BodyRows(Difficulty(angle=8, refit=True)).bodies("body-given", pairs)[0]
    assert torch.equal(fitted.beta, pairs.source.beta)


def test_noisy_keypoints_make_lifted_bodies_worse(pairs, plain, truth):
    noisy = BodyRows(Difficulty(noise=8)).draw("body-lifted", False, pairs)
    assert endpoint(noisy, truth) > endpoint(plain["body-lifted"], truth)
    assert torch.equal(BodyRows(Difficulty(noise=8)).draw("surface", False, pairs).images, plain["surface"].images), (
        "the truth has no noise"
    )


def test_too_many_missing_keypoints_are_refused(pairs):
    with pytest.raises(TruePoseError, match="visible body keypoints; expected at least 5"):
        BodyRows(Difficulty(missing=0.9)).draw("body-lifted", False, pairs)


# The measures


def test_geometry_of_a_planted_miss_is_the_miss(pairs, truth):
    off = truth.grid + torch.tensor([2 * 3 / SIZE[1], 2 * 4 / SIZE[0]])
    columns = geometry_columns(Drawn(pairs.target.image, off, truth.seen), truth)
    shown = truth.seen.flatten(1).sum(1) > 0
    torch.testing.assert_close(columns["endpoint"][shown], torch.full_like(columns["endpoint"][shown], 5.0))
    share = truth.seen.flatten(1).sum(1) / truth.target.mask.flatten(1).sum(1)
    torch.testing.assert_close(columns["seen"], share.double())


def test_rows_that_look_nothing_up_have_no_geometry(pairs, truth):
    columns = geometry_columns(Drawn(pairs.target.image), truth)
    assert set(columns) == set(GEOMETRY) - set(PLACES) and all(
        x.isnan().all() and len(x) == 12 for x in columns.values()
    )
    nothing = geometry_columns(Drawn(pairs.target.image, truth.grid, torch.zeros_like(truth.seen)), truth)
    assert nothing["endpoint"].isnan().all() and not nothing["seen"].any()


def test_places_shown_and_hidden_are_measured_apart(pairs, truth):
    target = pairs.target.image
    shown = truth.target.mask * truth.seen
    hidden = truth.target.mask - shown
    columns = place_columns(target + 0.1 * shown + 0.01 * hidden, target, truth)
    for name, wanted in zip(PLACES, (20.0, 40.0), strict=True):
        known = ~columns[name].isnan()
        assert known.any()
        torch.testing.assert_close(
            columns[name][known], torch.full_like(columns[name][known], wanted), atol=1e-3, rtol=0
        )


def test_the_standard_error_is_of_the_mean_over_pairs_that_count():
    values = torch.tensor([1.0, 2.0, torch.nan, 4.0, 9.0], dtype=torch.float64)
    # Mean 4, squared deviations 9 + 4 + 0 + 25, over 3, over 4, root.
    assert _standard_error(values) == pytest.approx((38 / 3 / 4) ** 0.5)
    assert _standard_error(values[:1]) is None and _standard_error(values[2:3]) is None
    assert _standard_error(torch.full((5,), 2.0)) == 0


@pytest.mark.parametrize("count", [4, 7, 8, 30])
def test_quarters_are_equal_in_size_and_in_the_order_of_distance(count):
    distances = torch.rand(count, generator=torch.Generator().manual_seed(count))
    names = _quartiles(distances)
    sizes = [names.count(name) for name in QUARTILES]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    ranks = [QUARTILES.index(names[i]) for i in distances.argsort().tolist()]
    assert ranks == sorted(ranks)


def test_pose_distances_are_those_of_the_true_bodies(pairs):
    distances = pose_distances(pairs)
    assert distances.shape == (12,) and distances.min() > 0.05 and distances.max() < torch.pi
    same = PairBatch(pairs.source, pairs.source, pairs.identity)
    assert pose_distances(same).max() < 1e-3


# The table


@pytest.fixture(scope="module")
def report():
    return evaluate(pairs=8, rows=["copy", "warp", "body-lifted", "surface"], size=(32, 24), batch_size=5, quiet=True)


def test_the_table_has_geometry_errors_and_quarters(report):
    rows = {row["name"]: row for row in report.rows}
    assert report.size == (32, 24)
    assert rows["copy"]["endpoint"] is None and rows["surface"]["endpoint"] < 1e-3
    assert rows["surface"]["endpoint"] < rows["body-lifted"]["endpoint"] < rows["warp"]["endpoint"]
    assert all(rows["warp"]["errors"][column] > 0 for column in ("clothes_psnr", "endpoint", "seen"))
    quarters = report.breakdown["distance"]
    assert {name: part["pairs"] for name, part in quarters.items()} == dict.fromkeys(QUARTILES, 2)
    text = report.markdown(details=True)
    assert "24x32 (width x height)" in text and "standard error" in text and "by distance" in text
    # Less is better: the best endpoint is the surface's.
    (line,) = [line for line in text.splitlines() if line.startswith("| surface")][:1]
    assert "**0.00**" in line


def test_a_table_without_lookups_has_no_columns_for_them():
    report = evaluate(pairs=1, rows=["copy"], size=(32, 24), quiet=True)
    assert "endpoint" not in report.markdown().splitlines()[0]
    assert report.rows[0]["errors"]["clothes_psnr"] is None, "one pair has no standard error"


def test_the_command_line_takes_a_size_and_a_difficulty(capsys):
    argv = ["eval", "--pairs", "2", "--rows", "body-given", "--size", "32x24"]
    assert main([*argv, "--angle-noise", "8", "--refit"]) == 0
    assert "24x32 (width x height)" in capsys.readouterr().out
    for size in ("32", "8x8", "32x2000", "axb", "32x24x3"):
        assert main(["eval", "--rows", "copy", "--size", size]) == 2
        assert f"'{size}' is not HEIGHTxWIDTH of 16 to 1024 pixels" in capsys.readouterr().err
