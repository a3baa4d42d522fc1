"""Garment swap in the mannequin world: the top of another person on the source person, against a true rendering."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truepose_core.evaluation.metrics import area_masks, masked_psnr
from truepose_core.evaluation.pattern import mean_score, pattern_scores
from truepose_core.mannequin import Rendering, render, render_people, sample_identities, sample_poses
from truepose_core.mannequin.split import TEST_SEED
from truepose_core.mannequin.world import split_seed
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region
from truepose_core.source.combine import combine_sources

if TYPE_CHECKING:
    from truepose_core.mannequin import Identities
    from truepose_core.pipeline import TruePosePipeline

TOP = ("top_", "logo_", "sleeve_")
"""How the names of the numbers that make a top begin."""
_BATCH = 16


@dataclass(frozen=True)
class SwapReport:
    """Without and with the donor's top, means over pairs.

    pattern: score against the true picture of the source person in the donor's top (0 to 1). upper_psnr, face_psnr:
    in dB against the same picture, over its upper garment and its face. pairs: how many.
    """

    pattern: tuple[float | None, float | None]
    upper_psnr: tuple[float, float]
    face_psnr: tuple[float, float]
    pairs: int

    def markdown(self) -> str:
        """A small table."""

        def row(name: str, values: tuple[float | None, float | None], form: str) -> str:
            cells = ("-" if x is None else format(x, form) for x in values)
            return f"| {name} | " + " | ".join(cells) + " |"

        return "\n".join(
            [
                "| | source alone | with the donor's top |",
                "|---|---|---|",
                row("pattern score of the top", self.pattern, ".3f"),
                row("upper PSNR, dB", self.upper_psnr, ".2f"),
                row("face PSNR, dB", self.face_psnr, ".2f"),
            ]
        )


def dressed(people: Identities, donors: Identities) -> Identities:
    """`people` in the tops of `donors`, one each."""
    tops = {f.name: getattr(donors, f.name) for f in fields(people) if f.name.startswith(TOP)}
    return replace(people, **tops)


def evaluate_swap(pipe: TruePosePipeline, pairs: int = 64, steps: int = 12) -> SwapReport:
    """Person i of the test split in a new pose and in the top of person `pairs` + i.

    The result of `combine_sources` with the upper region from the donor, against the true rendering; beside it the
    source person's own top. Pictures have the model's size; `steps` steps without guidance, picture i from seed i.
    """
    height, width = pipe.model.config.size
    world = split_seed("test", TEST_SEED)
    found: dict[str, list[Tensor]] = {}
    for index in torch.arange(pairs).split(_BATCH):
        source, donor = (render_people(i, 1, "test", TEST_SEED, height, width) for i in (index, index + pairs))
        poses = sample_poses(index + 2 * pairs, world)
        people = dressed(sample_identities(index, world), sample_identities(index + pairs, world))
        truth = render(people, poses, height, width)
        own, other = (_encode(pipe, x) for x in (source, donor))
        upper = [float(r == Region.UPPER) for r in Region]
        parsing = HumanParsing(truth.parsing)
        areas = area_masks(parsing)
        upper_area = parsing.mask(Region.UPPER) >= 0.5
        for name, features in (("alone", own), ("swapped", combine_sources(own, other, upper))):
            images = pipe(
                features,
                truth.keypoints,
                height=height,
                width=width,
                num_inference_steps=steps,
                seed=index.tolist(),
            ).images
            only_top = HumanParsing.from_masks({Region.UPPER: parsing.mask(Region.UPPER)})
            found.setdefault(f"{name} pattern", []).append(pattern_scores(images, truth.image, only_top))
            found.setdefault(f"{name} upper", []).append(masked_psnr(images, truth.image, upper_area))
            found.setdefault(f"{name} face", []).append(masked_psnr(images, truth.image, areas["face"]))

    def both(what: str, how: object) -> tuple:
        return tuple(how(torch.cat(found[f"{name} {what}"])) for name in ("alone", "swapped"))

    def mean(values: Tensor) -> float:
        return values.nanmean().item()

    return SwapReport(both("pattern", mean_score), both("upper", mean), both("face", mean), pairs)


def _encode(pipe: TruePosePipeline, people: Rendering) -> object:
    return pipe.encode_source(people.image, HumanParsing(people.parsing), people.keypoints)
