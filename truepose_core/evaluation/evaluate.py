"""`truepose eval`: every row on the test split, as a table, JSON and a contact sheet."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.bodies import (
    PLACES,
    Difficulty,
    geometry_columns,
    place_columns,
    true_correspondence,
)
from truepose_core.evaluation.metrics import COLUMNS, library, measure
from truepose_core.evaluation.pattern import mean_score
from truepose_core.evaluation.rows import make_rows
from truepose_core.evaluation.split import groups, pose_distances
from truepose_core.mannequin.split import split_pairs
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.sheet import labelled_sheet
from truepose_core.pose.skeleton import draw_skeleton

if TYPE_CHECKING:
    from truepose_core.mannequin import PairBatch

PAIRS = 512
"""Pairs of the full test split."""
STEPS = 1
"""Sampling steps of the learned rows."""
SHOWN = 6
"""Pairs on the contact sheet."""
BASELINE_SIZE = (64, 48)
"""(height, width) where no model says another."""
GEOMETRY = ("endpoint", "seen", *PLACES)
"""Columns of rows that look their pixels up in the source: `bodies.geometry_columns`."""
QUARTILES = ("nearest quarter", "second quarter", "third quarter", "farthest quarter")
"""Groups of pairs by the mean angle between the two poses' joints."""
_BATCH = 32


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`.

    rows: {"name", the columns of `metrics.COLUMNS` and of `GEOMETRY`, "errors": the standard error of each of them,
        "seconds_per_image"}; PSNR in dB, SSIM, pattern and seen without unit, endpoint in pixels, None where no pair
        counts. pairs, size (height, width), steps, seed: how it was made.
    counted: column -> how many pairs count in it. breakdown: "view" | "top" | "bottom" | "distance" -> what is shown
        -> {"pairs", "rows"}. models: learned row -> its file. versions: of the software, and what it ran on.
    pictures: column of the contact sheet -> [n, 3, H, W]. captions: n of them.
    """

    rows: list[dict[str, Any]]
    pairs: int
    size: tuple[int, int]
    steps: int
    seed: int
    counted: dict[str, int]
    breakdown: dict[str, dict[str, dict[str, Any]]]
    models: dict[str, dict[str, Any]]
    versions: dict[str, str]
    pictures: dict[str, Tensor] = field(repr=False, compare=False)
    captions: list[str] = field(repr=False, compare=False)
    world: str = "usual"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values; no NaN (None instead)."""
        height, width = self.size
        return {
            "rows": self.rows,
            "pairs": self.pairs,
            "size": f"{width}x{height}",
            "world": self.world,
            "steps": self.steps,
            "seed": self.seed,
            "counted": self.counted,
            "breakdown": self.breakdown,
            "models": self.models,
            "versions": self.versions,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def markdown(self, details: bool = False) -> str:
        """The table in markdown; the best of each column is bold. details: also per view and per pattern."""
        height, width = self.size
        shown = [*COLUMNS, *(c for c in GEOMETRY if any(row[c] is not None for row in self.rows))]
        head = ["row", *(_title(c) for c in shown), "s / image"]
        best = {c: _best(c, [row[c] for row in self.rows if row[c] is not None]) for c in shown}
        body = [
            [row["name"], *(_cell(c, row[c], best[c]) for c in shown), f"{row['seconds_per_image']:.3f}"]
            for row in self.rows
        ]
        text = [
            _table(head, body),
            "",
            f"{self.pairs} pairs of the {'' if self.world == 'usual' else f'{self.world} '}test split at "
            f"{width}x{height} (width x height), {self.steps} steps, "
            f"seed {self.seed}, on {self.versions['device']}. PSNR in dB; pattern 0 to 1; more is better. endpoint: "
            "pixels between where a pixel was looked up and where it was, less is better; seen: share of the person "
            "taken from the source; shown and hidden PSNR: of what the source really shows and "
            "hides. The rows regions and NAME+parsing are given the true target parsing, body-given "
            "the true body parameters, surface the true person.",
        ]
        if details:
            head = ["standard error", *(_title(c) for c in shown)]
            body = [[row["name"], *(_cell(c, row["errors"][c], None) for c in shown)] for row in self.rows]
            text += ["", _table(head, body)]
            for kind, parts in self.breakdown.items():
                head = [kind, "pairs", *(row["name"] for row in self.rows)]
                body = [
                    [name, str(part["pairs"]), *(_pair_cell(row) for row in part["rows"])]
                    for name, part in parts.items()
                ]
                text += ["", f"Foreground PSNR / pattern by {kind}", "", _table(head, body)]
        return "\n".join(text) + "\n"

    def contact_sheet(self) -> Tensor:
        """source | skeleton | each row | truth for the first pairs, labelled: [1, 3, H, W] in [0, 1]."""
        return labelled_sheet(self.pictures, self.captions)


def evaluate(
    data: str = "mannequin",
    pairs: int = PAIRS,
    seed: int = 0,
    rows: Iterable[str] | None = None,
    steps: int = STEPS,
    *,
    models: Mapping[str, str | Path] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = _BATCH,
    device: torch.device | str = "cpu",
    shown: int = SHOWN,
    quiet: bool = False,
    difficulty: Difficulty | None = None,
    world: str = "usual",
) -> Report:
    """Measure rows on the first `pairs` pairs of the test split, which training never sees.

    data: "mannequin", the only test split so far. seed: of the sampling noise (the split itself is fixed); pair i has
    seed + i, so neither `pairs` nor `batch_size` changes a picture's noise. rows: names out of `rows.ROWS` and of
    `models`; None is all. steps: sampling steps of the learned rows. models: row -> model file, instead of the files
    that ship or beside them. size: (height, width) of the pictures; by default that of the largest chosen model (a
    smaller one's results are enlarged), or 64x48 without a model. difficulty: noise on what the body rows are given.
    world: one of `mannequin.world.WORLDS`: the same pairs in another world, or made hard.
    shown: pairs on the contact sheet. quiet: no progress bar.

    Raises TruePoseError for unknown data or rows, missing model files, numbers below 1, and without torchmetrics.
    """
    from tqdm.auto import tqdm

    if data != "mannequin":
        raise TruePoseError(f"data is {data!r}; expected 'mannequin'")
    for name, value in (("pairs", pairs), ("steps", steps), ("batch_size", batch_size), ("shown", shown)):
        if value < 1:
            raise TruePoseError(f"{name} is {value}; expected at least 1")
    library()
    chosen = make_rows(rows, models, steps=steps, seed=seed, device=device, difficulty=difficulty)
    if size is None:
        size = max((row.size for row in chosen if row.size), default=BASELINE_SIZE)
    values: dict[str, list[dict[str, Tensor]]] = {row.name: [] for row in chosen}
    seconds = dict.fromkeys(values, 0.0)
    shows: dict[str, list[str]] = {}
    pictures: dict[str, list[Tensor]] = {}
    distances: list[Tensor] = []
    with tqdm(total=pairs * len(chosen), disable=quiet, unit="image", desc="eval") as bar:
        for index in torch.arange(pairs).split(batch_size):
            batch = split_pairs(index, size, world)
            for kind, names in groups(batch).items():
                shows.setdefault(kind, []).extend(names)
            distances.append(pose_distances(batch))
            truth = true_correspondence(batch)
            results = {}
            for row in chosen:
                bar.set_postfix_str(row.name)
                started = time.perf_counter()
                drawn = row.draw(batch)
                seconds[row.name] += time.perf_counter() - started
                results[row.name] = drawn.images
                measured = measure(drawn.images, batch.target.image, HumanParsing(batch.target.parsing))
                places = place_columns(drawn.images, batch.target.image, truth)
                values[row.name].append(measured | geometry_columns(drawn, truth) | places)
                bar.update(len(index))
            _keep_pictures(pictures, batch, results, shown - int(index[0]))
    columns = {
        name: {column: torch.cat([part[column] for part in parts]) for column in (*COLUMNS, *GEOMETRY)}
        for name, parts in values.items()
    }
    captions = [", ".join(names) for names in list(zip(*shows.values(), strict=True))[:shown]]
    shows["distance"] = _quartiles(torch.cat(distances))
    return Report(
        rows=[{**_row(name, table), "seconds_per_image": seconds[name] / pairs} for name, table in columns.items()],
        pairs=pairs,
        size=size,
        steps=steps,
        seed=seed,
        # Which pairs count depends on the truth alone, so any row tells.
        counted={c: int((~x.isnan()).sum()) for c, x in next(iter(columns.values())).items() if c in COLUMNS},
        breakdown={kind: _split(names, columns) for kind, names in shows.items()},
        models={row.name: row.about for row in chosen if row.about},
        versions=_versions(device),
        pictures={name: torch.cat(parts) for name, parts in pictures.items()},
        captions=captions,
        world=world,
    )


def _keep_pictures(
    pictures: dict[str, list[Tensor]], batch: PairBatch, results: Mapping[str, Tensor], wanted: int
) -> None:
    """Add the first `wanted` pairs of a batch to the columns of the contact sheet."""
    if wanted < 1:
        return
    truth = batch.target.image
    columns = {"source": batch.source.image, "skeleton": draw_skeleton(batch.target.keypoints, *truth.shape[-2:])}
    for name, images in {**columns, **results, "truth": truth}.items():
        pictures.setdefault(name, []).append(images[:wanted])


def _row(name: str, table: Mapping[str, Tensor]) -> dict[str, Any]:
    means = {column: _mean(column, x) for column, x in table.items()}
    return {"name": name, **means, "errors": {column: _standard_error(x) for column, x in table.items()}}


def _standard_error(values: Tensor) -> float | None:
    """Of the mean over the pairs that count; None for fewer than two."""
    counted = values[~values.isnan()]
    return (counted.std() / len(counted) ** 0.5).item() if len(counted) > 1 else None


def _quartiles(distances: Tensor) -> list[str]:
    edges = torch.quantile(distances, distances.new_tensor([0.25, 0.5, 0.75]))
    return [QUARTILES[i] for i in torch.bucketize(distances, edges).tolist()]


def _best(column: str, values: list[float]) -> float | None:
    """Seen is a share, not a merit: none is the best."""
    if not values or column == "seen":
        return None
    return min(values) if column == "endpoint" else max(values)


def _mean(column: str, values: Tensor) -> float | None:
    if column == "pattern":
        return mean_score(values)
    counted = values[~values.isnan()]
    return counted.mean().item() if len(counted) else None


def _split(names: list[str], columns: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """The table again for each group of pairs."""
    parts = {}
    for name in sorted(set(names)):
        member = torch.tensor([other == name for other in names])
        rows = [_row(row, {c: x[member] for c, x in table.items()}) for row, table in columns.items()]
        parts[name] = {"pairs": int(member.sum()), "rows": rows}
    return parts


def _versions(device: torch.device | str) -> dict[str, str]:
    from importlib.metadata import version

    from truepose_core import __version__

    device = torch.device(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        where = f"cpu (threads: {torch.get_num_threads()})"
    libraries = {name: version(name) for name in ("torch", "diffusers", "torchmetrics")}
    return {"truepose": __version__, "python": platform.python_version(), **libraries, "device": where}


def _title(column: str) -> str:
    area, _, measured = column.partition("_")
    return f"{area} {measured.upper()}" if measured else area


def _number(column: str, value: float) -> str:
    return f"{value:.2f}" if column.endswith("psnr") or column == "endpoint" else f"{value:.3f}"


def _cell(column: str, value: float | None, best: float | None) -> str:
    if value is None:
        return "-"
    text = _number(column, value)
    return f"**{text}**" if best is not None and text == _number(column, best) else text


def _pair_cell(row: Mapping[str, Any]) -> str:
    parts = (row["foreground_psnr"], row["pattern"])
    return " / ".join("-" if x is None else _number(c, x) for c, x in zip(("psnr", "pattern"), parts, strict=True))


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
