"""Training of recurrent alignment, on people of the mannequin world whose bodies are lifted from their keypoints."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truepose_core.alignment.recurrent import AlignConfig, Aligned, AlignInputs, AlignNet, align, gradient
from truepose_core.body.carry import DEPTH_TOLERANCE, correspond
from truepose_core.body.lift import LiftNet, lift, lift_net
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyMaps, GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.identity import sample_identities
from truepose_core.mannequin.world import render_people, split_seed
from truepose_core.parsing import HumanParsing
from truepose_core.training.small import SmallConfig, SmallTrainer
from truepose_core.training.train import region_loss_weight


@dataclass(frozen=True)
class AlignTrainingConfig(SmallConfig):
    """height, width: of the pictures. people, poses: of the pool. refill: people replaced at once, as often as one
    person a step makes it. longer: share of the steps that go the path in two steps, not one. start: weights to go on
    from ("" is scratch). lift: the lifting network's file ("" is the one that ships). channels: of the network at half
    the picture's size; the other widths follow. varied: share of the people who stand in a light of their own, from
    anywhere above. recolored: share of the pairs in other colours, the same on both sides. square, edges: weights of
    the loss on squared differences, which serves PSNR, and on differences between neighbours, which serves patterns;
    beside 2 for absolute ones. precision: "no" (float32) or "bf16" for the network alone, which pays where the
    processor multiplies such matrices (AMX, a GPU)."""

    steps: int = 4000
    batch: int = 16
    learning_rate: float = 1.5e-3
    warmup: int = 100
    ema: float = 0.995
    save_every: int = 250
    height: int = 128
    width: int = 96
    people: int = 384
    poses: int = 4
    refill: int = 16
    longer: float = 0.15
    start: str = ""
    lift: str = ""
    channels: int = 64
    varied: float = 0.4
    recolored: float = 0.3
    square: float = 4.0
    edges: float = 1.0
    precision: str = "no"

    @property
    def widths(self) -> AlignConfig:
        """Of the network: 1, 2, 3 times the channels, and half of them at full size."""
        c = self.channels
        return AlignConfig(width=c, state=2 * c, deep=3 * c, head=c // 2)


@dataclass(frozen=True, eq=False)
class AlignBatch:
    """B pairs: source pictures with parsing and lifted bodies, targets with the same and the truth about where each of
    their pixels was in the source: true_grid [B, H, W, 2], true_seen [B, 1, H, W], true_mask [B, 1, H, W]."""

    image: Tensor
    parsing: HumanParsing
    source: BodyPose
    source_maps: BodyMaps
    target: BodyPose
    target_maps: BodyMaps
    target_body: Tensor
    truth: Tensor
    truth_parsing: Tensor
    true_grid: Tensor
    true_seen: Tensor
    true_mask: Tensor


_MAPS = ("rest", "normal", "depth")


class AlignPool:
    """People of the world in some poses each, rendered and lifted. What it holds at a step depends on (seed, step)."""

    def __init__(self, config: AlignTrainingConfig, net: LiftNet, step: int = 0, *, quiet: bool = True):
        from tqdm.auto import tqdm

        c = config
        if c.poses < 2:
            raise TruePoseError(f"a pair needs 2 poses of a person; got {c.poses}")
        if c.people % c.refill:
            raise TruePoseError(f"{c.people} people cannot be replaced {c.refill} at a time; expected a multiple")
        self.config, self.net = c, net
        size, count = (c.height, c.width), (c.people, c.poses)
        self.tensors: dict[str, Tensor] = {
            "image": torch.empty((*count, 3, *size), dtype=torch.uint8),
            "parsing": torch.empty((*count, 7, *size), dtype=torch.uint8),
            "body": torch.empty((*count, 18, 3)),
        }
        for name in ("lifted", "true"):
            self.tensors |= {
                f"{name}.theta": torch.empty((*count, 24, 3)),
                f"{name}.beta": torch.empty((*count, 10)),
                f"{name}.camera": torch.empty((*count, 3)),
                f"{name}.rest": torch.empty((*count, 3, *size), dtype=torch.float16),
                f"{name}.normal": torch.empty((*count, 3, *size), dtype=torch.float16),
                f"{name}.depth": torch.empty((*count, 1, *size)),
                f"{name}.part": torch.empty((*count, *size), dtype=torch.int8),
                f"{name}.region": torch.empty((*count, *size), dtype=torch.int8),
            }
        self.step = step
        # Slots are filled in turns of `refill`; turn t holds people t * refill and on.
        turns = c.people // c.refill
        newest = turns - 1 + step // c.refill
        with tqdm(total=c.people, desc="rendering people", unit="person", disable=quiet, leave=False) as bar:
            for turn in range(newest - turns + 1, newest + 1):
                self._fill(turn)
                bar.update(c.refill)

    def _fill(self, turn: int) -> None:
        c = self.config
        people = torch.arange(turn * c.refill, (turn + 1) * c.refill)
        slots = people % c.people
        generator = torch.Generator().manual_seed(c.seed * 7919 + turn)
        light = light_from_above(generator) if torch.rand((), generator=generator) < c.varied else None
        made = render_people(people, c.poses, "train", seed=c.seed, height=c.height, width=c.width, light=light)
        who = torch.arange(c.refill).repeat_interleave(c.poses)
        points = made.keypoints.clone()
        # Estimated keypoints are never exact: up to half a percent of the height, on half of the people.
        noise = 0.005 * torch.rand((len(who), 1, 1), generator=generator)
        noise = noise * (torch.rand((len(who), 1, 1), generator=generator) < 0.5)
        shift = noise * torch.randn((len(who), 18, 2), generator=generator) * torch.tensor([c.height / c.width, 1.0])
        points[..., :2] += shift * (points[..., 2:] > 0)
        aspect = c.width / c.height
        # As at inference: a target takes its source's shape, here that of the person's first pose.
        first = lift(points[:: c.poses], aspect, net=self.net).bodies
        lifted = lift(points, aspect, shape=first.beta.repeat_interleave(c.poses, 0), net=self.net).bodies
        true = BodyPose(made.theta, made.beta, made.camera)
        persons = sample_identities(people, split_seed("train", c.seed)).select(who)
        shape = (c.refill, c.poses)
        t = self.tensors
        t["image"][slots] = (made.image * 255).round().byte().unflatten(0, shape)
        t["parsing"][slots] = (made.parsing * 255).round().byte().unflatten(0, shape)
        t["body"][slots] = points.unflatten(0, shape)
        for name, body, model in (("lifted", lifted, GenericBody()), ("true", true, GenericBody(people=persons))):
            maps = model.render(body, c.height, c.width)
            for field in ("theta", "beta", "camera"):
                t[f"{name}.{field}"][slots] = getattr(body, field).unflatten(0, shape)
            for field in (*_MAPS, "part", "region"):
                value = getattr(maps, field)
                t[f"{name}.{field}"][slots] = value.to(t[f"{name}.{field}"].dtype).unflatten(0, shape)

    def _body(self, name: str, index: tuple[Tensor, Tensor]) -> tuple[BodyPose, BodyMaps]:
        t = {key.split(".")[1]: value[index] for key, value in self.tensors.items() if key.startswith(f"{name}.")}
        mask = (t["part"] >= 0).float()[:, None]
        maps = BodyMaps(t["rest"].float(), t["part"].long(), t["normal"].float(), t["depth"], mask, t["region"].long())
        return BodyPose(t["theta"], t["beta"], t["camera"]), maps

    def batch(self, generator: torch.Generator) -> AlignBatch:
        """`config.batch` pairs."""
        c = self.config
        slot = torch.randint(c.people, (c.batch,), generator=generator)
        order = torch.rand((c.batch, c.poses), generator=generator).argsort(1)
        source, target = (slot, order[:, 0]), (slot, order[:, 1])
        parsing, truth_parsing = (self.tensors["parsing"][i].float() for i in (source, target))
        parsing, truth_parsing = (x / x.sum(1, keepdim=True) for x in (parsing, truth_parsing))
        source_body, source_maps = self._body("lifted", source)
        target_body, target_maps = self._body("lifted", target)
        true_source, true_source_maps = self._body("true", source)
        true_target, true_target_maps = self._body("true", target)
        true = correspond(true_source, true_target, true_source_maps, true_target_maps)
        images = torch.stack([self.tensors["image"][i].float() / 255 for i in (source, target)], 1)
        images = recolor(images, c.recolored, generator)
        return AlignBatch(
            images[:, 0],
            HumanParsing(parsing),
            source_body,
            source_maps,
            target_body,
            target_maps,
            self.tensors["body"][target],
            images[:, 1],
            truth_parsing,
            true.grid,
            true.seen,
            true_target_maps.mask,
        )

    def advance(self) -> None:
        """Go to the next step; every `refill` steps the oldest people are replaced."""
        c = self.config
        self.step += 1
        if self.step % c.refill == 0:
            self._fill(c.people // c.refill - 1 + self.step // c.refill)


def light_from_above(generator: torch.Generator) -> tuple[float, float, float]:
    """Where a light comes from that stands higher than the person, to the left or right: (right, up, towards)."""
    right, up, towards = torch.rand(3, generator=generator).tolist()
    return (1.6 * right - 0.8, 0.35 + 0.65 * up, 0.3 + 0.6 * towards)


def recolor(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the pairs in other colours: channels change places, each gets a strength of its own and all one gamma.

    images: pairs [B, 2, 3, H, W] in [0, 1]; both pictures of a pair change alike. The same draws for every share.
    """
    count = len(images)
    chosen = torch.rand(count, generator=generator) < share
    order = torch.rand((count, 3), generator=generator).argsort(1)
    strength = 0.55 + 0.45 * torch.rand((count, 3), generator=generator)
    gamma = 0.8 + 0.4 * torch.rand(count, generator=generator)
    mixed = images.gather(2, order[:, None, :, None, None].expand_as(images)) * strength[:, None, :, None, None]
    # At 0 the power's slope is endless; nothing is trained through it, but black stays black.
    mixed = mixed.clamp(min=1e-4) ** gamma[:, None, None, None, None]
    return torch.where(chosen[:, None, None, None, None], mixed, images)


def endpoint_error(grid: Tensor, flow: Tensor, true_grid: Tensor) -> Tensor:
    """Distance in pixels [B, 1, H, W] between where a pixel was looked up and where it really was in the source. grid,
    true_grid: [B, H, W, 2] in [-1, 1]; flow: [B, 2, H, W] in picture heights."""
    height, width = flow.shape[-2:]
    off = (grid - true_grid).permute(0, 3, 1, 2) * grid.new_tensor([width / 2, height / 2])[:, None, None]
    return (off + flow * height).square().sum(1, keepdim=True).clamp(min=1e-8).sqrt()


def alignment_losses(
    result: Aligned, batch: AlignBatch, square: float = 4.0, edges: float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a finished alignment and its parts. square, edges: as in `AlignTrainingConfig`."""
    weight = region_loss_weight(batch.truth_parsing)
    miss = (result.picture - batch.truth).abs()
    steps = (gradient(result.picture) - gradient(batch.truth)).abs()
    # The square is for what is far off: the light and the silhouette.
    picture = ((2 * miss + square * miss.square()) * weight).mean() + edges * (steps * weight[..., :-1, :-1]).mean()
    parsing = -(batch.truth_parsing * result.log_parsing.log_softmax(1)).sum(1, keepdim=True)
    parsing = (parsing * weight).mean()
    both = batch.true_mask * batch.target_maps.mask
    shown = both * batch.true_seen
    error = endpoint_error(result.grid, result.flow, batch.true_grid)
    # Parts that geometry takes for others are no flow to learn.
    near = shown * (error.detach() < 0.12 * error.shape[-2])
    flow = (error * near).sum() / near.sum().clamp(min=1)
    right = shown * (error.detach() < DEPTH_TOLERANCE * 0.5 * error.shape[-2])
    own = result.weights[:, :1].clamp(1e-4, 1 - 1e-4)
    seen = nn.functional.binary_cross_entropy(own, right, weight=both, reduction="sum") / both.sum().clamp(min=1)
    loss = picture + 0.1 * parsing + 0.3 * flow + 0.1 * seen
    return loss, {
        "picture": picture.item(),
        "parsing": parsing.item(),
        "pixels": flow.item(),
        "seen": seen.item(),
    }


class AlignTrainer(SmallTrainer):
    """Picture, parsing, flow and visibility against the world's truth."""

    kind = "alignment"
    config: AlignTrainingConfig

    def __init__(self, config: AlignTrainingConfig, out: Path, *, quiet: bool = False):
        super().__init__(config, out, quiet=quiet)
        net = lift_net(config.lift or None)
        self.pool = AlignPool(config, net, self.step, quiet=quiet)

    def build(self) -> nn.Module:
        from truepose_core.alignment.recurrent import align_net

        if self.config.start:
            return copy.deepcopy(align_net(self.config.start)).requires_grad_(True).train()
        return AlignNet(self.config.widths)

    def describe(self) -> dict[str, Any]:
        return asdict(self.net.config)

    def _mixed(self, inputs: AlignInputs, state: Tensor | None) -> Aligned:
        """The network in its precision; where things lie is always computed in float32."""
        kind = torch.device(self.config.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.net(inputs, state)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        generator = self.generator(step)
        batch = self.pool.batch(generator)
        count = 2 if torch.rand((), generator=generator).item() < self.config.longer else 1
        result = align(
            self._mixed,
            batch.image,
            batch.parsing,
            batch.source,
            batch.target,
            batch.target_body,
            count,
            source_maps=batch.source_maps,
            target_maps=batch.target_maps,
        )[-1]
        loss, figures = alignment_losses(result, batch, self.config.square, self.config.edges)
        self.pool.advance()
        return loss, figures
