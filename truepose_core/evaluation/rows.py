"""The rows of the table: each makes target pictures from sources and target poses.

Some need no image network: "copy" is the source picture, "regions" the source's mean colour of each region painted on
the TRUE target parsing (what a model without patterns can reach at best), "warp" the skeleton prior; "body-lifted",
"body-given" and "surface" carry the source along a body (`bodies`), hidden places painted in region colours on the
carried parsing or, with "+parsing" behind the name, on the TRUE target parsing. "alignment-K" is recurrent alignment in
K steps on lifted bodies, no diffusion. The others are models. Those of `BUNDLED_ROWS` but the last were trained with
equal data, budget and seed; "aligned+field" is "aligned" under the pose field's guidance;
"bundled" is the model that ships, and "bundled-given" the same with true bodies. The rows of the relative depth
guidance's ablation (`ABLATION_ROWS`) were trained apart, also as equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.bodies import BodyRows, Difficulty, Drawn, skeleton_correspondence
from truepose_core.guidance.field import FieldGuidance
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_colors, warp

if TYPE_CHECKING:
    from truepose_core.mannequin import PairBatch

BUNDLED_ROWS = {
    "pose": "row-pose",
    "concat": "row-concat",
    "HPFA-skeleton": "row-hpfa-skeleton",
    "HPFA": "row-hpfa",
    "HPFA+CAA": "row-hpfa-caa",
    "aligned": "row-aligned",
    "aligned+field": "row-aligned",
    "aligned-3d": "row-aligned-3d",
    "bundled": "mannequin",
    "bundled-given": "mannequin",
}
"""Learned row -> name of the model that ships with the package (`models.store.bundled_path`)."""

ABLATION_ROWS = {
    "depth-base": "row-depth-base",
    "depth-decoupled": "row-depth-decoupled",
    "depth-2d": "row-depth-2d",
    "depth-3d": "row-depth-3d",
    "depth-3d-given": "row-depth-3d",
    "depth-3d-found": "row-depth-3d-found",
    "depth-3d-found-given": "row-depth-3d-found",
}
"""The same for the ablation of relative depth guidance, whose rows are measured when they are asked for."""
GIVEN = "-given"
"""Behind a row's name: the model is told the true bodies; else they are lifted from the keypoints."""
FIELD = "+field"
"""Behind a row's name: sampled under the pose interaction field's guidance, at its default scale."""


@dataclass(frozen=True)
class Row:
    """A row of the table. draw: pairs -> `Drawn` pictures on the CPU; it sees of the targets what a user gives:
    keypoints (for "regions" and "+parsing" also the parsing, for "body-given" body parameters, for "surface" the true
    person). size: (height, width) the model works at, None without a model. about: what the report tells of the
    model."""

    name: str
    draw: Callable[[PairBatch], Drawn]
    size: tuple[int, int] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def copy_source(pairs: PairBatch) -> Drawn:
    """The source picture as it is."""
    return Drawn(pairs.source.image)


def paint_regions(pairs: PairBatch) -> Drawn:
    """The source's mean colour of each region on the true target parsing; the person's mean for regions it hides."""
    colors, _ = region_colors(pairs.source.image, HumanParsing(pairs.source.parsing))
    return Drawn(torch.einsum("brc,brhw->bchw", colors, pairs.target.parsing).clamp(0, 1))


def warp_source(pairs: PairBatch) -> Drawn:
    """The source carried along the skeleton, `alignment.skeleton_prior.warp`. Background is the source's mean."""
    source = pairs.source
    images = warp(source.image, HumanParsing(source.parsing), source.keypoints, pairs.target.keypoints)[0]
    return Drawn(images, *skeleton_correspondence(pairs))


def align_source(pairs: PairBatch, steps: int, bodies: BodyRows) -> Drawn:
    """Recurrent alignment in `steps` steps on lifted bodies."""
    from truepose_core.alignment.recurrent import align, align_net

    source, target, model = bodies.bodies("body-lifted", pairs)
    with torch.no_grad():
        made = align(
            align_net(),
            pairs.source.image,
            HumanParsing(pairs.source.parsing),
            source,
            target,
            pairs.target.keypoints,
            steps,
            model=model,
        )[-1]
    return Drawn(made.picture.clamp(0, 1), made.looked_up, made.seen)


ALIGNMENTS = {"alignment-1": 1, "alignment-2": 2, "alignment-4": 4}
"""Row -> steps of recurrent alignment."""


def baselines(difficulty: Difficulty | None = None) -> dict[str, Callable[[PairBatch], Drawn]]:
    """The rows without a diffusion model, by name. difficulty: what the body rows are given instead of the truth."""
    bodies = BodyRows(difficulty or Difficulty())
    plain = {"copy": copy_source, "regions": paint_regions, "warp": warp_source}
    aligned = {name: partial(align_source, steps=steps, bodies=bodies) for name, steps in ALIGNMENTS.items()}
    return {**plain, **bodies.rows(), **aligned}


BASELINES = tuple(baselines())
ROWS = (*BASELINES, *BUNDLED_ROWS)
"""All rows, in the table's order."""


def model_row(name: str, path: str | Path, steps: int, seed: int, device: torch.device | str = "cpu") -> Row:
    """The row of a model file: `TruePosePipeline` with the model's own scheduler, `steps` steps and no guidance.

    seed: pair i starts from the noise of seed + i, whatever batch it is in. A name that ends in "-given" tells the
    model the true bodies of target and, where it goes by them, of source. Raises TruePoseError, naming the row, when
    the file is missing or is not a model, or when it reads no body.
    """
    from truepose_core.models.store import load_model
    from truepose_core.pipeline import TruePosePipeline
    from truepose_core.weights.strict import read_metadata

    try:
        metadata = read_metadata(path)
        model = load_model(path)
    except TruePoseError as error:
        raise TruePoseError(f"row {name!r}: {error}") from error
    given, surface = name.endswith(GIVEN), model.config.match == "surface"
    if given and not surface and (model.config.control3d is None or model.config.control3d.query != "body"):
        raise TruePoseError(f"row {name!r}: {path} reads no body, so none can be given to it")
    pipe = TruePosePipeline.from_model(model).to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(pairs: PairBatch) -> Drawn:
        source, target = pairs.source, pairs.target
        images = pipe(
            source.image,
            target.keypoints,
            HumanParsing(source.parsing),
            source.keypoints,
            num_inference_steps=steps,
            seed=[seed + i for i in pairs.identity.tolist()],
            target_pose=BodyPose(target.theta, target.beta, target.camera) if given else None,
            source_pose=BodyPose(source.theta, source.beta, source.camera) if given and surface else None,
            field_guidance=FieldGuidance() if name.endswith(FIELD) else None,
        ).images
        return Drawn(images)

    height, width = model.config.size
    about = {
        "file": Path(path).name,
        "sha256": metadata.get("sha256"),
        "size": f"{width}x{height}",
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return Row(name, draw, (height, width), about)


def make_rows(
    names: Iterable[str] | None,
    models: Mapping[str, str | Path] | None = None,
    *,
    steps: int,
    seed: int,
    device: torch.device | str = "cpu",
    difficulty: Difficulty | None = None,
) -> list[Row]:
    """The rows of these names (None: all of `ROWS`, then the further ones of `models`), with their models loaded.

    models: row -> model file. A name of `BUNDLED_ROWS` stands for another file than the one that ships; any other name
    is a row of its own. Raises TruePoseError for an unknown row, a row named twice, and, naming it, a row whose file
    is missing.
    """
    from truepose_core.weights.strict import bundled_path

    models = dict(models or {})
    taken = set(models) & set(BASELINES)
    if taken:
        raise TruePoseError(f"a model is given for row {min(taken)!r}, which has no model; choose another name")
    further = [name for name in models if name not in ROWS and name not in ABLATION_ROWS]
    names = [*ROWS, *further] if names is None else list(names)
    known = [*ROWS, *ABLATION_ROWS, *further]
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        what = f"unknown row {unknown[0]!r}" if unknown else f"rows are {', '.join(names) or 'none'}"
        raise TruePoseError(f"{what}; expected some of {', '.join(known)}, each once")
    rows = []
    plain = baselines(difficulty)
    for name in names:
        if name in plain:
            rows.append(Row(name, plain[name]))
            continue
        path = models.get(name)
        if path is None:
            try:
                path = bundled_path({**BUNDLED_ROWS, **ABLATION_ROWS}[name])
            except TruePoseError as error:
                raise TruePoseError(
                    f"row {name!r}: {error}; or leave the row out, or train it (truepose train --row) and give it with "
                    f"--model {name}=FILE"
                ) from error
        rows.append(model_row(name, path, steps, seed, device))
    return rows
