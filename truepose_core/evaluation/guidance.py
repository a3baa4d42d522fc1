"""`truepose eval --field-guidance`: does the pose field's guidance help a model to show the pose asked for, and what
does it cost? On easy and on extreme poses of the test split.

The keypoints of the results are read by a second predictor, the judge: other people, another seed and another size than
the one that guides. (A guide that judged itself would praise whatever it was led to.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truepose_core.alignment.field import pose_distance
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.metrics import area_masks, masked_psnr
from truepose_core.guidance.field import FieldGuidance, field_step
from truepose_core.guidance.keypoints import load_predictor, nearer_sides
from truepose_core.mannequin import axis_angle_to_matrix, ready_poses
from truepose_core.mannequin.split import split_pairs
from truepose_core.models.store import load_model
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.weights.strict import BUNDLED, bundled_path

PAIRS = 128
EASY, EXTREME = "easy", "extreme"
THRESHOLDS = (0.1, 0.2)
"""Of the torso: PCK counts the joints that lie no farther from their place than this share of the torso's length."""
_TORSO = ((2, 11), (5, 8))
_BATCH = 16
_TIMED = 20


@dataclass(frozen=True)
class GuidanceReport:
    """The result of `evaluate_guidance`.

    rows: name -> "easy" | "extreme" -> {"pck@0.1", "pck@0.2": share of the joints in 0..1, "error": mean distance in
    picture heights, "field": mean field value of the results in radians, "psnr": of the person in dB}, and for each of
    them "... se": the standard error, of guided rows that of the difference to the same pictures without guidance. The
    row "truth" is the judge on the true pictures. options: row -> its `FieldGuidance`. step: {"seconds", "kept_mib":
    what guidance adds to a step of one picture: time and the tensors kept for the gradient; "weights_mib";
    "plain_seconds": of a step without it}. pairs: of each kind; how they were chosen is said in `markdown`.
    """

    rows: dict[str, dict[str, dict[str, float]]]
    options: dict[str, dict[str, Any]]
    step: dict[str, float]
    pairs: int
    size: tuple[int, int]
    steps: int
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        height, width = self.size
        return {**asdict(self), "size": f"{width}x{height}"}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, default=str)

    def markdown(self) -> str:
        """The table."""
        names = {f"pck@{x:g}": 3 for x in THRESHOLDS} | {"error": 4, "field": 4, "psnr": 2}
        lines = []
        for kind in (EASY, EXTREME):
            lines += [f"| {kind} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
            for row, kinds in self.rows.items():
                found = kinds[kind]
                cells = [f"{found[n]:.{digits}f} ± {found[f'{n} se']:.{digits}f}" for n, digits in names.items()]
                lines.append(f"| {row} | {' | '.join(cells)} |")
            lines.append("")
        step = self.step
        lines += [
            f"{self.model} at {self.size[1]}x{self.size[0]} (width x height), {self.steps} steps, {self.pairs} pairs "
            "of each kind: of four times as many pairs of the test split, those whose target is nearest to standing "
            "(easy) and farthest from it (extreme). Keypoints read by the judge, which is not asked which side is the "
            "left one; error in picture heights, field in "
            "radians, PSNR of the person in dB; ± is the standard error, of guided rows that of the "
            "difference to without.",
            f"Guidance of one picture takes {1000 * step['seconds']:.1f} ms a step, beside the "
            f"{1000 * step['plain_seconds']:.1f} ms of the step itself, and keeps {step['kept_mib']:.1f} MiB for the "
            f"gradient; the networks are {step['weights_mib']:.1f} MiB.",
        ]
        return "\n".join(lines) + "\n"


def evaluate_guidance(
    options: Mapping[str, FieldGuidance],
    pairs: int = PAIRS,
    *,
    model: str | Path = BUNDLED,
    judge: str | Path | None = None,
    steps: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> GuidanceReport:
    """Measure rows of guidance (name -> options), and the same without.

    pairs: of each kind. model: a model of pixel patches. judge: the predictor that reads the results, None for the one
    that ships for this. seed: of the noise. Raises TruePoseError for fewer than 2 pairs and for a model of a VAE's
    latents, whose pictures are not mannequins.
    """
    if pairs < 2:
        raise TruePoseError(f"pairs is {pairs}; expected at least 2 of each kind")
    net = load_model(model)
    if net.config.codec != "pixels":
        raise TruePoseError(f"{model} works on a VAE's latents; expected a model of the mannequin world")
    pipe = TruePosePipeline.from_model(net).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = net.config.size
    reader = load_predictor(judge or bundled_path("keypoints-judge")).to(device)
    chosen = choose_pairs(pairs)
    every: dict[str, FieldGuidance | None] = {"without": None, **options}
    rows: dict[str, dict[str, list[dict[str, Tensor]]]] = {}
    for kind, indices in chosen.items():
        for index in indices.split(_BATCH):
            batch = split_pairs(index, size)
            pictures = {"truth": batch.target.image}
            for name, how in every.items():
                pictures[name] = pipe(
                    batch.source.image,
                    batch.target.keypoints,
                    HumanParsing(batch.source.parsing),
                    batch.source.keypoints,
                    num_inference_steps=steps,
                    seed=[seed + i for i in index.tolist()],
                    field_guidance=how,
                ).images
            energy = pipe._pose_energy(next(iter(options.values())), torch.device(device))
            for name, images in pictures.items():
                with torch.no_grad():
                    places, seen = reader(images.to(device) * 2 - 1)
                    field = energy.distance(places, seen, size[1] / size[0])
                found = measure_keypoints(places.cpu(), batch.target.keypoints, size[1] / size[0])
                mask = area_masks(HumanParsing(batch.target.parsing))["foreground"]
                found |= {"field": field.cpu(), "psnr": masked_psnr(images, batch.target.image, mask).float()}
                rows.setdefault(name, {}).setdefault(kind, []).append(found)
    joined = {
        name: {
            kind: {column: torch.cat([part[column] for part in parts]) for column in parts[0]}
            for kind, parts in kinds.items()
        }
        for name, kinds in rows.items()
    }
    return GuidanceReport(
        rows={
            name: {
                kind: summary(joined[name][kind], None if how is None else joined["without"][kind]) for kind in chosen
            }
            for name, how in {"truth": None, **every}.items()
        },
        options={name: asdict(how) for name, how in options.items()},
        step=measure_step(pipe, next(iter(options.values())), device),
        pairs=pairs,
        size=size,
        steps=steps,
        model=Path(model).name,
    )


def summary(values: dict[str, Tensor], base: dict[str, Tensor] | None) -> dict[str, float]:
    """Means of columns [N], and their standard errors "... se": of the difference to base where that is given."""
    result = {}
    for column, x in values.items():
        varied = x if base is None else x - base[column]
        varied = varied[~varied.isnan()]
        result[column] = x.nanmean().item()
        result[f"{column} se"] = (varied.std() / len(varied) ** 0.5).item()
    return result


def choose_pairs(count: int) -> dict[str, Tensor]:
    """Numbers of pairs of the test split: {"easy", "extreme": [count]}, the quarters of 4 x count pairs whose targets
    are nearest to the ready pose "stand" and farthest from it; the turn of the whole body does not count."""
    few = split_pairs(4 * count, (16, 12))
    local = axis_angle_to_matrix(few.target.theta[:, 1:])
    stand = axis_angle_to_matrix(ready_poses()["stand"].theta[:, 1:])
    order = pose_distance(local, stand).argsort()
    return {EASY: order[:count].sort().values, EXTREME: order[-count:].sort().values}


def measure_keypoints(places: Tensor, truth: Tensor, aspect: float) -> dict[str, Tensor]:
    """{"pck@...": shares, "error": mean distance in picture heights}, each [B], over the joints that the truth shows,
    whose sides are as `nearer_sides` says; NaN for a picture that shows none. places: [B, 18, 2] normalised; truth:
    [B, 18, 3]; aspect: width / height."""
    unit = places.new_tensor([aspect, 1.0])
    truth = nearer_sides(places, truth, aspect)
    shown = truth[..., 2] > 0
    away = ((places - truth[..., :2]) * unit).norm(dim=-1)
    at = truth[..., :2] * unit
    torso = torch.stack([(at[:, a] - at[:, b]).norm(dim=-1) * (shown[:, a] & shown[:, b]) for a, b in _TORSO], 1).amax(
        1
    )
    count = torch.where(torso > 0, shown.sum(1), torch.nan)
    result = {f"pck@{share:g}": ((away <= share * torso[:, None]) & shown).sum(1) / count for share in THRESHOLDS}
    return {**result, "error": (away * shown).sum(1) / count}


def measure_step(pipe: TruePosePipeline, options: FieldGuidance, device: torch.device | str) -> dict[str, float]:
    """What one guided step of one picture costs, see `GuidanceReport`."""
    config = pipe.model.config
    energy = pipe._pose_energy(options, torch.device(device))
    pair = split_pairs(1, config.size)
    x0 = pipe.model.codec.encode(pair.target.image).to(device)
    body = pair.target.keypoints.to(device)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def guided() -> None:
        field_step(energy, x0, options, aspect=config.size[1] / config.size[0], patch=config.patch, target=body)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        guided()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in energy.parameters()}
    source = pair.source
    features = pipe.encode_source(source.image, HumanParsing(source.parsing), source.keypoints)

    def sample(steps: int) -> float:
        started = time.perf_counter()
        pipe(features, pair.target.keypoints, height=config.size[0], width=config.size[1], num_inference_steps=steps)
        return time.perf_counter() - started

    sample(1)
    plain = (sample(_TIMED + 1) - sample(1)) / _TIMED
    started = time.perf_counter()
    for _ in range(_TIMED):
        guided()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / _TIMED
    return {
        "seconds": seconds,
        "plain_seconds": plain,
        "kept_mib": sum(size for where, size in kept.items() if where not in weights) / 2**20,
        "weights_mib": sum(weights.values()) / 2**20,
    }
