"""`truepose eval --parts`: what surrounds the model, measured against the mannequin world's ground truth.

Four parts, of which only the last runs a network, the bundled model:

* parsing from keypoints against the true parsing: intersection over union of each region;
* retargeting against true renderings: the source's person rendered in the target's pose, in pixels;
* framing and pasting back an untouched crop: how far the photo changes;
* swapping a garment (`swap`): the donor's top on the source person, against a true rendering.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.swap import SwapReport, evaluate_swap
from truepose_core.framing.crop import crop_person, paste_back, person_box
from truepose_core.mannequin import Rendering, render, render_people, sample_identities, sample_poses
from truepose_core.mannequin.split import TEST_SEED
from truepose_core.mannequin.world import split_seed
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.from_keypoints import parse_from_keypoints
from truepose_core.pose import Person
from truepose_core.pose.retarget import retarget
from truepose_core.regions import REGION_NAMES

SIZE = (256, 192)
"""(height, width) of the pictures: at the size of the model's bench a face has a dozen pixels."""
PROPORTIONS = 2.0
"""Source and target people differ by up to this many standard deviations in every number of their shape."""
MIN_PIXELS = 20
"""Regions with fewer true pixels are left out of a picture's IoU."""
FEATHER = 8.0
SCALES = {"same scale": 1.0, "enlarged 2x": 2.0, "reduced 2x": 0.5}
"""Model pixels per pixel of the photo, in the paste-back test."""
_BATCH = 16


@dataclass(frozen=True)
class PartsReport:
    """The result of `evaluate_parts`.

    parsing: {"shapes" | "refined": {region: mean IoU in 0..1 or None where it is not seen, "mean": over regions}};
        refined only with OpenCV.
    retarget: mean distance of joints to the true ones in pixels, {"without": as the target stands, "retargeted"}; both
        after the best shift and scale, which say nothing about proportions.
    paste_back: largest change of a photo in 0..1 by pasting an untouched crop, {"same scale", "enlarged 2x",
        "reduced 2x", "outside": of pixels outside of the crop}; and "enlarged 2x PSNR", "reduced 2x PSNR" in dB inside.
    swap: a swapped top, see `SwapReport`; None where it was not asked for.
    pairs, size (height, width), seconds: how it was made.
    """

    parsing: dict[str, dict[str, float | None]]
    retarget: dict[str, float]
    paste_back: dict[str, float]
    swap: SwapReport | None
    pairs: int
    size: tuple[int, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        height, width = self.size
        return {**asdict(self), "size": f"{width}x{height}"}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def markdown(self) -> str:
        """The tables."""
        height, width = self.size
        lines = [
            "Parsing from keypoints, mean IoU against the true parsing",
            "",
            "| | " + " | ".join([*REGION_NAMES, "mean"]) + " |",
            "|---|" + "---|" * (len(REGION_NAMES) + 1),
        ]
        for name, values in self.parsing.items():
            cells = ["-" if values[r] is None else f"{values[r]:.3f}" for r in (*REGION_NAMES, "mean")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if "refined" not in self.parsing:
            lines += ["", "(refined needs OpenCV: pip install opencv-python-headless)"]
        lines += ["", "Retargeting, mean distance of a joint to the true rendering's, in pixels", ""]
        lines += [f"* {name}: {value:.2f}" for name, value in self.retarget.items()]
        lines += ["", "Pasting back an untouched crop, largest change of the photo in 0..1 (PSNR in dB)", ""]
        lines += [f"* {name}: {value:.4g}" for name, value in self.paste_back.items()]
        if self.swap is not None:
            lines += ["", "Swapping the top, bundled model", "", self.swap.markdown()]
        lines += ["", f"{self.pairs} people of the test split at {width}x{height} (width x height)."]
        return "\n".join(lines) + "\n"


def evaluate_parts(
    pairs: int = 64, size: tuple[int, int] = SIZE, *, refine: bool | None = None, swap: bool = True
) -> PartsReport:
    """Measure the parts on the first `pairs` people of the test split, as pictures of (height, width).

    refine: also measure parsing with GrabCut; by default if OpenCV is there. swap: also swap garments, at the bundled
    model's own size. Raises TruePoseError for fewer than 1
    pair, and with refine but without OpenCV.
    """
    if pairs < 1:
        raise TruePoseError(f"pairs is {pairs}; expected at least 1")
    started = time.perf_counter()
    kinds = {"shapes": False, **({"refined": True} if (_has_opencv() if refine is None else refine) else {})}
    overlaps: dict[str, list[Tensor]] = {name: [] for name in kinds}
    pasted: list[dict[str, float]] = []
    for index in torch.arange(pairs).split(_BATCH):
        people = render_people(index, 1, "test", TEST_SEED, *size)
        for name, with_grab_cut in kinds.items():
            found = parse_from_keypoints(people.image, people.keypoints, refine=with_grab_cut)
            overlaps[name].append(region_iou(found, HumanParsing(people.parsing)))
        pasted += [paste_back_error(people, i) for i in range(len(index))]
    return PartsReport(
        parsing={name: _per_region(torch.cat(values)) for name, values in overlaps.items()},
        retarget=retarget_error(pairs, size),
        paste_back={key: _summary(key, [one[key] for one in pasted]) for key in pasted[0]},
        swap=_swap(pairs) if swap else None,
        pairs=pairs,
        size=size,
        seconds=time.perf_counter() - started,
    )


def _swap(pairs: int) -> SwapReport:
    from truepose_core.models.store import load_model
    from truepose_core.pipeline import TruePosePipeline

    pipe = TruePosePipeline.from_model(load_model("bundled"))
    pipe.set_progress_bar_config(disable=True)
    return evaluate_swap(pipe, pairs)


def _has_opencv() -> bool:
    from importlib.util import find_spec

    return find_spec("cv2") is not None


def region_iou(found: HumanParsing, true: HumanParsing) -> Tensor:
    """Intersection over union of each region's strongest pixels: float64 [B, 7]; NaN where the truth shows fewer than
    `MIN_PIXELS` of it. Raises TruePoseError for parsings of unlike shapes."""
    if found.masks.shape != true.masks.shape:
        raise TruePoseError(
            f"the parsings are {tuple(found.masks.shape)} and {tuple(true.masks.shape)}; expected one shape"
        )
    regions = torch.arange(len(REGION_NAMES))[:, None, None]
    a, b = found.labels()[:, None] == regions, true.labels()[:, None] == regions
    both, either = ((a & b).sum((2, 3)).double(), (a | b).sum((2, 3)).double())
    return (both / either).masked_fill(b.sum((2, 3)) < MIN_PIXELS, torch.nan)


def _per_region(values: Tensor) -> dict[str, float | None]:
    """Mean over pictures of each region, None where it counts in none, and the mean of those that count."""
    means = values.nanmean(0)
    result = {name: None if mean.isnan() else mean.item() for name, mean in zip(REGION_NAMES, means, strict=True)}
    return {**result, "mean": means.nanmean().item()}


def retarget_error(pairs: int, size: tuple[int, int] = SIZE) -> dict[str, float]:
    """{"without", "retargeted"}: mean distance in pixels to the true joints, see `PartsReport`.

    Target and source are two people of the test split in two poses; the truth is the source's person rendered in the
    target's pose. Joints that one of the three does not show do not count.
    """
    world = split_seed("test", TEST_SEED)
    index = torch.arange(pairs)
    poses, own_poses = sample_poses(index, world), sample_poses(index + pairs, world)
    targets, sources = sample_identities(index, world), sample_identities(index + pairs, world)
    generator = torch.Generator().manual_seed(TEST_SEED)
    for people in (targets, sources):
        people.beta.copy_((torch.rand(people.beta.shape, generator=generator) * 2 - 1) * PROPORTIONS)
    # Only keypoints are looked at, and they do not depend on the size.
    target, source, truth = (
        render(who, how, 64, 64 * size[1] // size[0], 1).keypoints
        for who, how in ((targets, poses), (sources, own_poses), (sources, poses))
    )
    aspect = size[1] / size[0]
    moved = retarget(target, source, aspect=aspect)
    return {name: joint_error(found, truth, size) for name, found in (("without", target), ("retargeted", moved))}


def joint_error(found: Tensor, true: Tensor, size: tuple[int, int]) -> float:
    """Mean distance in pixels between the joints of people [B, 18, 3] that both show, after the shift and the scale of
    `found` that fit each person best (least squares)."""
    scale = true.new_tensor([size[1], size[0]])
    weight = ((found[..., 2] > 0) & (true[..., 2] > 0)).double()[..., None]
    count = weight.sum(1, keepdim=True).clamp(min=1)
    a, b = (x[..., :2].double() * scale for x in (found, true))
    a, b = ((x - (x * weight).sum(1, keepdim=True) / count) * weight for x in (a, b))
    ratio = (a * b).sum((1, 2), keepdim=True) / a.square().sum((1, 2), keepdim=True).clamp(min=1e-9)
    return (((ratio * a - b).norm(dim=-1) * weight[..., 0]).sum() / weight.sum()).item()


def paste_back_error(people: Rendering, index: int) -> dict[str, float]:
    """What a photo loses when a crop of it, not changed, is pasted back; see `PartsReport`."""
    photo = people.image[index : index + 1]
    size = tuple(photo.shape[2:])
    person = Person(people.keypoints[index].numpy())
    box = person_box(size, HumanParsing(people.parsing[index : index + 1]), person)
    step = 2 * math.ceil(max((box[3] - box[1]) / 8, (box[2] - box[0]) / 6))
    result, outside = {}, 0.0
    for name, factor in SCALES.items():
        canvas = (int(4 * step * factor), int(3 * step * factor))
        crop = crop_person(size, box, canvas, margin=0, enlarge=factor > 1)
        back, weight = paste_back(photo, crop.apply(photo), [crop], feather=FEATHER)
        change = (back - photo).abs()
        inside = (weight > 0)[:, None].expand_as(change)
        result[name] = change.max().item()
        if factor == 1:
            continue
        error = change[inside].square().mean().item()
        result[f"{name} PSNR"] = -10 * math.log10(max(error, 1e-10))
        outside = max([outside, *change[~inside].tolist()])
    return {**result, "outside": outside}


def _summary(key: str, values: list[float]) -> float:
    return sum(values) / len(values) if key.endswith("PSNR") else max(values)
