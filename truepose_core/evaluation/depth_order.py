"""`truepose eval --depth-order`: who is in front, where the keypoints do not say.

Every target comes twice: as it is, and mirrored in depth so that its keypoints stay where they are
(`mannequin.twins`): an arm before the trunk or behind it, or the whole body turned to the other side with its face
points missing. In the disputed pixels, where the two true pictures show two places of the body, in two colours, a
result is closer to the one or to the other. What knows the keypoints alone makes one picture for both and is right in
half of all, whatever it makes; how often it is right on the targets as they are tells what it takes for usual.

"told apart" asks less: of the two results of a pair, whether each is closer to its own truth than the other result is,
all four distances taken together. A picture that is too blurred to be near to either may still change in the right way.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truepose_core.alignment.control3d import target_bodies
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyMaps, GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import (
    BodyPoses,
    Rendering,
    mirror_arm,
    mirror_body,
    render,
    sample_identities,
    sample_poses,
)
from truepose_core.mannequin.identity import Identities
from truepose_core.mannequin.split import TEST_SEED
from truepose_core.mannequin.twins import ARMS, hide_faces
from truepose_core.mannequin.world import _STRIDE, split_seed
from truepose_core.parsing import HumanParsing

_log = logging.getLogger(__name__)

KINDS = ("arm", "turn")
COLOUR = 0.15
"""Two colours differ where any channel does by more than this."""
APART = 0.12
"""Metres on the body at rest, from which on two places are two: an arm and the trunk, chest and back, one leg and the
other. A garment's pattern that moves with a turned body is not disputed."""
LEAST = 0.004
"""Share of the picture that has to be disputed for a pair to count: 13 pixels of 64x48."""
PAIRS = 128
_CHUNK = 32
_MOST = 80
"""Chunks of people looked through for pairs."""


@dataclass(frozen=True, eq=False)
class TwinPairs:
    """N people: a source, and a target in two depths, `first` as the world poses it. keypoints: [N, 18, 3], of both.
    disputed: [N, H, W] bool, pixels that are on both bodies and show other places in other colours. people: the people.
    index: their numbers."""

    source: Rendering
    first: Rendering
    second: Rendering
    keypoints: Tensor
    disputed: Tensor
    people: Identities
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)


def twin_pairs(kind: str, count: int, size: tuple[int, int]) -> TwinPairs:
    """The first `count` people of the test split whose targets are ambiguous in this way ("arm" or "turn"), as pictures
    of (height, width). Raises TruePoseError for another kind, fewer than 1, or where there are not so many."""
    if kind not in KINDS:
        raise TruePoseError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if count < 1:
        raise TruePoseError(f"{count} pairs; expected at least 1")
    found: list[TwinPairs] = []
    for number in range(_MOST):
        pairs = _of_people(kind, torch.arange(number * _CHUNK, (number + 1) * _CHUNK), size)
        found.append(pairs)
        if sum(len(x) for x in found) >= count:
            return _first(found, count)
    raise TruePoseError(
        f"{sum(len(x) for x in found)} of the first {_MOST * _CHUNK} people have ambiguous targets; ask for fewer pairs"
    )


def _of_people(kind: str, index: Tensor, size: tuple[int, int]) -> TwinPairs:
    world = split_seed("test", TEST_SEED)
    people = sample_identities(index, world)
    poses = sample_poses(index * _STRIDE + 1, world)
    first = render(people, poses, *size)
    theta = poses.theta
    tried = [mirror_body(theta)] if kind == "turn" else [mirror_arm(theta, side) for side in ARMS]
    made = [render(people, BodyPoses(theta, poses.camera), *size, camera=first.camera) for theta in tried]
    maps = [GenericBody(people=people).render(_bodies(x), *size) for x in (first, *made)]
    pairs = zip(made, maps[1:], strict=True)
    disputes = torch.stack([_disputed(first, maps[0], other, shown) for other, shown in pairs])
    best = disputes.flatten(2).sum(2).argmax(0)
    rows = torch.arange(len(index))
    second = Rendering(**{name: torch.stack([getattr(x, name) for x in made])[best, rows] for name in vars(first)})
    # A point that one of the two hides is told by neither.
    seen = (first.keypoints[..., 2:] > 0) & (second.keypoints[..., 2:] > 0)
    keypoints = hide_faces(first.keypoints * seen, torch.full((len(index),), kind == "turn"))
    disputed = disputes[best, rows]
    kept = (disputed.flatten(1).float().mean(1) >= LEAST).nonzero().flatten()
    people, index = people.select(kept), index[kept]
    source = render(people, sample_poses(index * _STRIDE, world), *size)
    return TwinPairs(source, first.select(kept), second.select(kept), keypoints[kept], disputed[kept], people, index)


def _disputed(a: Rendering, on_a: BodyMaps, b: Rendering, on_b: BodyMaps) -> Tensor:
    on_both = (a.parsing[:, 0] < 0.5) & (b.parsing[:, 0] < 0.5) & (on_a.mask[:, 0] > 0) & (on_b.mask[:, 0] > 0)
    apart = (on_a.rest - on_b.rest).norm(dim=1) > APART
    return ((a.image - b.image).abs().amax(1) > COLOUR) & apart & on_both


def _first(found: list[TwinPairs], count: int) -> TwinPairs:
    def join(name: str) -> Any:
        values = [getattr(x, name) for x in found]
        if isinstance(values[0], Tensor):
            return torch.cat(values)[:count]
        whole = {key: torch.cat([getattr(x, key) for x in values])[:count] for key in vars(values[0])}
        return replace(values[0], **whole)

    return TwinPairs(**{name: join(name) for name in vars(found[0])})


def closer(result: Tensor, truth: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """1 where a result is closer to the truth than to the other over the pixels `where`, 0 where it is not, 0.5 for a
    tie: [N]. Values [N, C, H, W], where [N, H, W]; squared distances summed."""

    def distance(values: Tensor) -> Tensor:
        return ((result - values).square().sum(1) * where).flatten(1).sum(1)

    gain = distance(other) - distance(truth)
    return torch.where(gain == 0, 0.5, (gain > 0).float())


@dataclass(frozen=True)
class Order:
    """first, second: whether the result for each depth of a pair is right; told: whether the two are told apart.
    [N] each, 1 for yes and 0.5 for a tie."""

    first: Tensor
    second: Tensor
    told: Tensor

    def shares(self) -> dict[str, float]:
        """Means: {"as posed", "mirrored", "both", "told apart"} in 0..1."""
        both = torch.cat([self.first, self.second])
        return {
            name: x.mean().item() for name, x in zip(COLUMNS, (self.first, self.second, both, self.told), strict=True)
        }


COLUMNS = ("as posed", "mirrored", "both", "told apart")
Draw = Callable[[TwinPairs, BodyPose | None], Tensor]


def _bodies(shown: Rendering) -> BodyPose:
    return BodyPose(shown.theta, shown.beta, shown.camera)


def body_order(pairs: TwinPairs, given: bool) -> Order:
    """Whether the drawn generic body has the right surface in front: its places at rest against the true person's.
    given: drawn from the true parameters, else lifted."""
    height, width = pairs.disputed.shape[-2:]
    own = GenericBody(people=pairs.people)
    truths = [own.render(_bodies(x), height, width) for x in (pairs.first, pairs.second)]
    lifted = target_bodies(pairs.keypoints, width / height, pairs.source.keypoints)
    drawn = [
        GenericBody().render(_bodies(shown) if given else lifted, height, width)
        for shown in (pairs.first, pairs.second)
    ]
    where = pairs.disputed
    for maps in (*truths, *drawn):
        where = where & (maps.mask[:, 0] > 0)
    return order(*(maps.rest for maps in (*drawn, *truths)), where)


def picture_order(pairs: TwinPairs, draw: Draw, given: bool) -> Order:
    """Whether a model's picture has the right one in front, as `body_order`. given: it is told the true body."""
    results = [draw(pairs, _bodies(shown) if given else None) for shown in (pairs.first, pairs.second)]
    return order(*results, pairs.first.image, pairs.second.image, pairs.disputed)


def order(one: Tensor, two: Tensor, first: Tensor, second: Tensor, where: Tensor) -> Order:
    """Two results [N, C, H, W] of pairs against their truths, over the pixels `where` [N, H, W]."""
    # |one - first|^2 + |two - second|^2 < |one - second|^2 + |two - first|^2, multiplied out.
    apart = (((one - two) * (first - second)).sum(1) * where).flatten(1).sum(1)
    told = torch.where(apart == 0, 0.5, (apart > 0).float())
    return Order(closer(one, first, second, where), closer(two, second, first, where), told)


def model_draw(path: str | Path, steps: int, seed: int, device: torch.device | str) -> Draw:
    """The pictures of a model file from a source and keypoints, and from bodies where they are given."""
    from truepose_core.models.store import load_model
    from truepose_core.pipeline import TruePosePipeline

    pipe = TruePosePipeline.from_model(load_model(path)).to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(pairs: TwinPairs, body: BodyPose | None) -> Tensor:
        source = pairs.source
        return pipe(
            source.image,
            pairs.keypoints,
            HumanParsing(source.parsing),
            source.keypoints,
            num_inference_steps=steps,
            seed=[seed + i for i in pairs.index.tolist()],
            target_pose=body,
        ).images

    return draw


LEARNED = {
    "concatenation": ("row-depth-base", False),
    "decoupled attention": ("row-depth-decoupled", False),
    "2D prior": ("row-depth-2d", False),
    "3D guidance, lifted": ("row-depth-3d", False),
    "3D guidance, given": ("row-depth-3d", True),
    "3D guidance without its query, given": ("row-depth-3d-found", True),
}
"""Row -> (the model that ships, whether it is told the true body)."""


@dataclass(frozen=True)
class DepthOrderReport:
    """rows: kind ("arm", "turn") -> row -> {a name of `COLUMNS`: share in 0..1 that is right}. disputed: kind -> mean
    number of disputed pixels. pairs: of each kind. size (height, width), steps, seed, seconds: how it was made."""

    rows: dict[str, dict[str, dict[str, float]]]
    disputed: dict[str, float]
    pairs: int
    size: tuple[int, int]
    steps: int
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        height, width = self.size
        return {**vars(self), "size": f"{width}x{height}"}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def markdown(self) -> str:
        """The table."""
        columns = [f"{kind}: {name}" for kind in KINDS for name in COLUMNS]
        lines = ["| right order in front | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for row in self.rows[KINDS[0]]:
            cells = [f"{100 * x:.1f} %" for kind in KINDS for x in self.rows[kind][row].values()]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        height, width = self.size
        pixels = ", ".join(f"{kind} {self.disputed[kind]:.0f}" for kind in KINDS)
        lines += [
            "",
            f"{self.pairs} pairs of each kind at {width}x{height} (width x height), disputed pixels in the mean: "
            f"{pixels}; {self.steps} sampling steps, seed {self.seed}. One picture for both is right in half.",
        ]
        return "\n".join(lines) + "\n"


def evaluate_depth_order(
    pairs: int = PAIRS,
    *,
    steps: int = 2,
    seed: int = 0,
    size: tuple[int, int] = (64, 48),
    models: Mapping[str, str | Path] | None = None,
    device: torch.device | str = "cpu",
) -> DepthOrderReport:
    """Measure who is in front, on `pairs` ambiguous targets of each kind.

    models: model -> file, in place of those that ship ("depth-base", "depth-decoupled", "depth-2d", "depth-3d",
    "depth-3d-found"); rows of models that neither ship nor are given are left out, which the log says. Raises
    TruePoseError for other names, numbers below 1, and a given file that is missing.
    """
    from truepose_core.weights.strict import bundled_path

    started = time.perf_counter()
    models = dict(models or {})
    names = {file.removeprefix("row-") for file, _ in LEARNED.values()}
    unknown = sorted(set(models) - names)
    if unknown:
        raise TruePoseError(f"unknown model {unknown[0]!r}; expected some of {', '.join(sorted(names))}")
    if steps < 1:
        raise TruePoseError(f"{steps} sampling steps; expected at least 1")
    paths: dict[str, str | Path] = {}
    for file in dict.fromkeys(file for file, _ in LEARNED.values()):
        name = file.removeprefix("row-")
        try:
            paths[file] = models.get(name) or bundled_path(file)
        except TruePoseError:
            _log.warning("no weights of %s ship: its rows are left out. Give yours with --model %s=FILE", name, name)
    draws = {file: model_draw(path, steps, seed, device) for file, path in paths.items()}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    disputed = {}
    for kind in KINDS:
        twins = twin_pairs(kind, pairs, size)
        disputed[kind] = twins.disputed.flatten(1).sum(1).float().mean().item()
        table = {f"body {how}, drawn": body_order(twins, given) for how, given in (("lifted", False), ("given", True))}
        for row, (file, given) in LEARNED.items():
            if file not in draws:
                continue
            table[row] = picture_order(twins, draws[file], given)
        rows[kind] = {row: found.shares() for row, found in table.items()}
    return DepthOrderReport(rows, disputed, pairs, size, steps, seed, time.perf_counter() - started)
