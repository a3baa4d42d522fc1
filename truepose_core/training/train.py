"""`truepose train`: one loop for the bundled model from scratch and for real ones from SD1.5, on accelerate.

Loss (defaults in TrainingConfig):
* mean squared error of the model's prediction, weighted by what a pixel shows (region weights: ours) and, for
  epsilon and v prediction, by min-SNR-5 (Hang et al., arXiv 2303.09556, section 3.4; x0 prediction with a plain
  square error is SNR-weighted already);
* alignment: cross-entropy of CAA's alignment map with the target's parsing (ours), where the model has CAA;
* L_HPL of the 3D guidance's heads (`alignment.control3d`), where the model has them;
* twins: the squared error of the difference between two predictions whose targets differ in depth alone, from the same
  noise (ours): what a body says about depth is a small part of all other errors.

Conditions are dropped as guidance drops them: the source alone, or source and pose together (design, Guidance).
Timesteps are drawn with density proportional to t^(1/power - 1); power 1 is uniform (Ho et al., arXiv 2006.11239).
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pixel_unshuffle

from truepose_core.alignment.control3d import Control3DConfig, human_prior_loss, target_bodies
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import TruePoseConfig, large_config, mannequin_config
from truepose_core.models.model import TruePoseModel
from truepose_core.models.store import save_model
from truepose_core.pose.skeleton import draw_skeleton
from truepose_core.regions import Region
from truepose_core.training.checkpoint import (
    of_this_run,
    optimizer_state,
    read_checkpoint,
    uninterrupted,
    write_checkpoint,
)
from truepose_core.training.data import MannequinPool, TrainingBatch
from truepose_core.training.folder import FolderPairs, pairs_of
from truepose_core.training.lora import add_lora, merge_lora
from truepose_core.weights.settings import compare_shapes
from truepose_core.weights.strict import load_strict

REGION_LOSS = {
    Region.BACKGROUND: 0.5,
    Region.FACE: 4.0,
    Region.HAIR: 2.0,
    Region.UPPER: 2.0,
    Region.LOWER: 2.0,
    Region.SKIN: 2.0,
    Region.ACCESSORY: 2.0,
}


@dataclass(frozen=True)
class TrainingConfig:
    """What a run is made of. Two runs with equal configurations see the same data and start from the same weights.

    row: one of `ROWS`. steps: optimiser steps. sources, targets: people per step and target poses of each. keep: steps
    after which the averaged weights are written aside (for a table at equal budget). start: a model file of this row to
    go on from with a fresh optimiser, or "" for random weights. base: a Stable Diffusion folder whose UNet both nets
    start from, or "" for random weights. data: "mannequin", or a folder of pairs (`pairs_of`). lora: rank of the nets'
    updates where they alone learn (`training.lora`), 0 trains the nets.
    height, width: of the training pictures; 0 is the model's own size. first_source: a person's first pose in the
    mannequin's pool is always the source, so that its alignment to the others is made once. aligned_tokens: the
    source's tokens are also read aligned to the target pose (`source.align`; RePoseDM's form). human_prior: weight of
    L_HPL, where the model has 3D guidance. twins: share of the mannequin's target pairs that differ in depth alone
    (`mannequin.twins`). twin_weight: of the loss on their difference. decay: share of the steps, at the end, over which
    the learning rate falls to zero.

    Raises TruePoseError for an unknown row and for a height without a width.
    """

    row: str = "HPFA+CAA"
    steps: int = 2000
    sources: int = 8
    targets: int = 3
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: float = 0.2
    weight_decay: float = 0.01
    ema: float = 0.998
    drop_source: float = 0.05
    drop_all: float = 0.05
    alignment: float = 0.05
    human_prior: float = 0.002
    twin_weight: float = 10.0
    timestep_power: float = 0.5
    accumulate: int = 1
    clip: float = 1.0
    seed: int = 0
    people: int = 1024
    poses: int = 6
    fresh: int = 4
    precision: str = "no"
    sample_every: int = 250
    save_every: int = 250
    keep: tuple[int, ...] = ()
    start: str = ""
    base: str = ""
    data: str = "mannequin"
    first_source: bool = False
    aligned_tokens: bool = False
    twins: float = 0.0
    height: int = 0
    width: int = 0
    gradient_checkpointing: bool = False
    lora: int = 0

    def __post_init__(self) -> None:
        if self.row not in ROWS:
            raise TruePoseError(f"unknown row {self.row!r}; expected one of {', '.join(ROWS)}")
        if bool(self.height) != bool(self.width):
            raise TruePoseError(f"height is {self.height} and width {self.width}; give both, or neither")

    def build(self) -> TruePoseModel:
        """The model at the start of training: random weights, or those of the base folder."""
        config = ROWS[self.row]()
        if self.aligned_tokens:
            config = replace(config, aligned_tokens=True)
        size = (self.height, self.width) if self.height else None
        if self.start:
            return self._started(config if size is None else replace(config, size=size))
        if not self.base:
            return TruePoseModel(config if size is None else replace(config, size=size))
        if config.caa is not None:
            raise TruePoseError(
                f"row {self.row} trains a CLIP tower from scratch, which a base folder has no use for; "
                "with --base take pose, concat or HPFA"
            )
        from truepose_core.models.folder import trainable_from_folder

        return trainable_from_folder(self.base, config.fusion, size or (512, 384), self.aligned_tokens)

    def _started(self, config: TruePoseConfig) -> TruePoseModel:
        """The model of `start`. Raises TruePoseError for one of another configuration, its size aside."""
        from truepose_core.models.store import load_model

        if self.base:
            raise TruePoseError(f"--start {self.start} and --base {self.base} both say where the weights come from")
        model = load_model(self.start)
        # As text: lists and tuples are the same there.
        if replace(model.config, size=config.size).to_json() != config.to_json():
            raise TruePoseError(
                f"{self.start} is no model of row {self.row}: its configuration is another. Start from a file that "
                "this row wrote"
            )
        model.config = config
        return model.train()


_SMALL = (32, 48)
"""Widths of the rows of the table."""
ROWS = {
    "pose": lambda: large_config("none", caa=False, widths=_SMALL, match="skeleton"),
    "concat": lambda: large_config("concat", caa=False, widths=_SMALL, match="skeleton"),
    "HPFA-skeleton": lambda: large_config("hpfa", caa=False, widths=_SMALL, match="skeleton"),
    "HPFA": lambda: large_config("hpfa", caa=False, widths=_SMALL),
    "HPFA+CAA": lambda: large_config("hpfa", caa=True, widths=_SMALL),
    "aligned": lambda: large_config("hpfa", caa=True, widths=_SMALL, aligned=True),
    "aligned-3d": lambda: large_config(
        "hpfa", caa=True, widths=_SMALL, aligned=True, control3d=Control3DConfig(width=64, scale=DEPTH_SCALE)
    ),
    "full": lambda: large_config("hpfa", caa=True, aligned=True),
    "depth-base": lambda: _depth_row(None),
    "depth-decoupled": lambda: _depth_row(Control3DConfig(query="source", scale=DEPTH_SCALE)),
    "depth-2d": lambda: _depth_row(Control3DConfig(query="keypoints", scale=DEPTH_SCALE)),
    "depth-3d": lambda: _depth_row(Control3DConfig(scale=DEPTH_SCALE)),
    "depth-3d-found": lambda: _depth_row(Control3DConfig(keep_query=False, scale=DEPTH_SCALE)),
}
"""The learned rows of the evaluation table (pose alone; + the source by concatenation; HPFA with body match on the
skeleton, and on the surface; + CAA; + recurrent alignment; + 3D guidance), the bundled model, and the ablation of
relative depth guidance: plain
concatenation, with the source carried along the skeleton; + a decoupled attention to the lifted source; + asked by the
target's keypoints (the 2D prior); asked by its body, with L_HPL; and the last without what asks in the tokens, as the
published formula has them."""
DEPTH_SCALE = 1.0
"""lambda at the start: from 0 it takes longer to grow than these short runs last."""


def _depth_row(control3d: Control3DConfig | None) -> TruePoseConfig:
    return mannequin_config("concat", caa=False, widths=(32, 48), aligned=True, control3d=control3d)


def draw_timesteps(count: int, train_steps: int, power: float, generator: torch.Generator) -> Tensor:
    """[count] integer timesteps in [0, train_steps); larger steps are likelier for power < 1."""
    u = torch.rand(count, generator=generator).pow(power)
    return (u * train_steps).long().clamp(max=train_steps - 1)


def draw_dropout(count: int, drop_source: float, drop_all: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(keep_source, keep_pose), each [count] bool. The pose is only ever dropped together with the source."""
    u = torch.rand(count, generator=generator)
    return u >= drop_source + drop_all, u >= drop_all


def shared_by_twins(x: Tensor, twin: Tensor) -> Tensor:
    """Rows [B, ...] of which each second one of a pair of twins is its first one's. twin: [B / 2] bool."""
    first, second = x[::2], x[1::2]
    same = twin.view(-1, *(1,) * (x.ndim - 1))
    return torch.stack([first, torch.where(same, first, second)], 1).flatten(0, 1)


def region_loss_weight(masks: Tensor) -> Tensor:
    """[B, 7, H, W] -> [B, 1, H, W], mean 1 over each image."""
    weight = torch.tensor([REGION_LOSS[r] for r in Region], device=masks.device, dtype=masks.dtype)
    weight = torch.einsum("r,brhw->bhw", weight, masks)[:, None]
    return weight / weight.mean((1, 2, 3), keepdim=True)


def alignment_loss(alignments: dict[str, Tensor], target: Any, latent_size: tuple[int, int], keep: Tensor) -> Tensor:
    """Mean cross-entropy of the alignment maps with the target's region rows, over the rows that see the source."""
    from truepose_core.source.features import grid_of

    total = keep.new_zeros((), dtype=torch.float32)
    for rows in alignments.values():
        truth = target.tokens(*grid_of(rows.shape[1], latent_size)).to(rows)
        entropy = -(truth * rows.clamp(min=1e-4).log()).sum(-1).mean(1)
        total = total + (entropy * keep).sum() / keep.sum().clamp(min=1)
    return total / max(len(alignments), 1)


def checkpoint_of(out: Path) -> Path:
    """Where the run of this folder keeps what it goes on from."""
    return out / "checkpoint" / "state.safetensors"


class Trainer:
    """One training run in a folder: `run()` trains, from the last checkpoint if there is one."""

    def __init__(self, config: TrainingConfig, out: Path, *, quiet: bool = False):
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.config, self.out, self.quiet = config, Path(out), quiet
        self.out.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            # Nothing reads what SourceNet computes behind its last self-attention: weights there have no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        torch.manual_seed(config.seed)
        self.model = config.build()
        if config.lora:
            add_lora(self.model, config.lora)
        model_config = self.model.config
        if config.gradient_checkpointing:
            for net in (self.model.source_net, self.model.target_net):
                if net is not None:
                    net.enable_gradient_checkpointing()
        self.scheduler = DDPMScheduler(**model_config.scheduler, prediction_type=model_config.prediction_type)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=torch.__version__ >= (2, 4),
        )
        self.ema = EMAModel(parameters, decay=config.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.step, self.seconds = 0, 0.0
        self._resume()
        self.ema.to(self.accelerator.device)
        self.net, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        start = self.step * config.accumulate
        self.pool: MannequinPool | FolderPairs
        if config.data == "mannequin":
            self.pool = MannequinPool(
                config.people,
                config.poses,
                model_config.size,
                seed=config.seed,
                fresh=config.fresh,
                step=start,
                device=self.accelerator.device,
                twins=config.twins,
                first_source=config.first_source,
                prepare=self._prepared(),
                quiet=self.quiet or not self.accelerator.is_main_process,
            )
        else:
            processes = self.accelerator.num_processes
            self.pool = pairs_of(config.data, model_config.size, config.seed, start, processes)

    def _prepared(self) -> str:
        """What the pool has ready for the model of this run."""
        config = self.model.config
        if config.match != "surface" or self.config.twins > 0:
            return "nothing"
        return "alignment" if config.recurrent and self.config.first_source else "bodies"

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return checkpoint_of(self.out)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to zero over the last `decay` of the steps."""
        c = self.config
        down = (c.steps - step) / max(1, round(c.decay * c.steps)) if c.decay else 1.0
        return c.learning_rate * min(1.0, (step + 1) / max(1, c.warmup), down)

    def loss(self, batch: TrainingBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch; every random draw comes from (seed, step), each process's part."""
        c, scheduler = self.config, self.scheduler
        # One generator on the CPU, so that any device sees the same noise; each process takes its part of what one
        # process would draw for all.
        generator = torch.Generator().manual_seed((c.seed * 7_919 + step) * 4099)
        clean = self.model.codec.encode(batch.target_image)
        count, world = clean.shape[0], self.accelerator.num_processes
        part = slice(count * self.accelerator.process_index, count * (self.accelerator.process_index + 1))
        noise = torch.randn((count * world, *clean.shape[1:]), generator=generator)[part].to(clean)
        drawn = draw_timesteps(count * world, scheduler.config.num_train_timesteps, c.timestep_power, generator)
        steps = drawn[part].to(clean.device)
        kept = draw_dropout(count * world, c.drop_source, c.drop_all, generator)
        keep_source, keep_pose = (x[part].to(clean.device) for x in kept)
        if batch.twin is not None:
            noise, steps, keep_source, keep_pose = (
                shared_by_twins(x, batch.twin) for x in (noise, steps, keep_source, keep_pose)
            )
        noisy = scheduler.add_noise(clean, noise, steps)
        pose_map = draw_skeleton(batch.target_body, *batch.target_image.shape[-2:])
        source_pose, target_pose = self._bodies(batch)
        prediction, alignments, regressed = self.net(
            batch.source_image,
            batch.source_parsing,
            batch.source_body,
            noisy,
            steps,
            pose_map,
            batch.target_body,
            keep_source,
            keep_pose,
            target_pose,
            batch.lifted,
            batch.aligned,
        )
        kind = self.model.config.prediction_type
        wanted = {"sample": clean, "epsilon": noise}.get(kind)
        if wanted is None:
            wanted = scheduler.get_velocity(clean, noise, steps)
        weight = region_loss_weight(batch.target_parsing.masks)
        if isinstance(self.model.codec, PixelCodec):
            weight = pixel_unshuffle(weight.expand(-1, 3, -1, -1), self.model.codec.patch)
        else:
            weight = adaptive_avg_pool2d(weight, clean.shape[-2:])
        error = (weight * (prediction.float() - wanted).square()).mean((1, 2, 3))
        if kind != "sample":
            alpha = scheduler.alphas_cumprod.to(clean.device)[steps]
            snr = alpha / (1 - alpha)
            error = error * snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
        loss = error.mean()
        figures = {"loss/denoise": loss.item()}
        if alignments and c.alignment > 0:
            size = (clean.shape[-2], clean.shape[-1])
            aligned = alignment_loss(alignments, batch.target_parsing, size, keep_source)
            figures["loss/alignment"] = aligned.item()
            loss = loss + c.alignment * aligned
        if batch.twin is not None and c.twin_weight > 0:
            apart = prediction.float() - wanted
            apart = (weight[::2] * (apart[::2] - apart[1::2]).square()).mean((1, 2, 3))
            twins = (apart * batch.twin).sum() / batch.twin.sum().clamp(min=1)
            figures["loss/twins"] = twins.item()
            loss = loss + c.twin_weight * twins
        if regressed is not None and c.human_prior > 0:
            prior = human_prior_loss(regressed, source_pose)
            figures["loss/human prior"] = prior.item()
            loss = loss + c.human_prior * prior
        return loss, figures

    def _bodies(self, batch: TrainingBatch) -> tuple[BodyPose | None, BodyPose | None]:
        """Source and target bodies of a batch for a model that reads them: its own, else lifted from the keypoints."""
        control = self.model.config.control3d
        if control is None or control.query != "body":
            return None, None
        if batch.lifted is not None:
            source, target = batch.lifted
            return source.select(range(0, len(target), len(target) // len(batch.source_body))), target
        if batch.target_pose is not None:
            return batch.source_pose, batch.target_pose
        height, width = batch.target_image.shape[-2:]
        source = target_bodies(batch.source_body, width / height)
        return source, target_bodies(batch.target_body, width / height, source=source)

    def run(self) -> Path:
        """Train to the last step. Ctrl-C writes a checkpoint first. Returns the path of the final weights."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm.auto import tqdm

        c, main = self.config, self.accelerator.is_main_process
        writer = SummaryWriter(str(self.out / "curves")) if main else None
        bar = tqdm(total=c.steps, initial=self.step, disable=self.quiet or not main, unit="step")
        started = time.perf_counter() - self.seconds
        try:
            while self.step < c.steps:
                figures = self._optimise()
                self.seconds = time.perf_counter() - started
                bar.update()
                bar.set_postfix(loss=f"{figures['loss/denoise']:.4f}")
                if writer is not None:
                    for name, value in figures.items():
                        writer.add_scalar(name, value, self.step)
                if self.step in c.keep:
                    self.export(self.out / f"weights-{self.step}.safetensors")
                if self.step % c.sample_every == 0:
                    self._sample(writer)
                if self.step % c.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        self.save()
        return self.export(self.out / "weights.safetensors")

    def _optimise(self) -> dict[str, float]:
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        for _ in range(c.accumulate):
            batch = self.pool.batch(c.sources, c.targets, self.accelerator.process_index)
            # The net alone runs in mixed precision (accelerate wraps its forward); the loss is float32.
            with self.accelerator.accumulate(self.net):
                loss, figures = self.loss(batch.to(self.accelerator.device), self.pool.step)
                self.accelerator.backward(loss)
            if not torch.isfinite(loss):
                raise TruePoseError(
                    f"the loss became {loss.item()} at step {self.step}; lower the learning rate "
                    f"(now {c.learning_rate}) and resume from {self.checkpoint}"
                )
            self.pool.advance()
        figures["norm/gradient"] = float(self.accelerator.clip_grad_norm_(self.net.parameters(), c.clip))
        # A checkpoint on Ctrl-C must not hold new weights beside old averages or an old count.
        with uninterrupted():
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(p for p in self.model.parameters() if p.requires_grad)
            self.step += 1
        return figures

    def averaged(self) -> TruePoseModel:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(p for p in model.parameters() if p.requires_grad)
        if self.config.lora:
            merge_lora(model)
        return model.eval()

    def export(self, path: Path) -> Path:
        """Write the averaged weights in float16, with the story of the run in the metadata."""
        story = {
            # Of files and folders the names, not where they lie on this machine.
            **{k: Path(v).name if isinstance(v, str) else v for k, v in asdict(self.config).items()},
            "size": list(self.model.config.size),
            "steps_done": self.step,
            "seconds": round(self.seconds),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }
        if self.accelerator.is_main_process:
            save_model(self.averaged(), path, training=story, dtype=torch.float16, overwrite=True)
        return path

    def _sample(self, writer: Any) -> None:
        """A sample sheet: source | skeleton | result | truth, on people of the test split or the folder's own pairs."""
        if writer is None:
            return
        from truepose_core.pictures.files import save_image
        from truepose_core.training.samples import sample_sheet

        own = self.pool.batch(8, 1) if isinstance(self.pool, FolderPairs) else None
        sheet = sample_sheet(self.averaged(), pairs=8, seed=self.config.seed, batch=own)
        save_image(sheet, self.out / f"sample-{self.step:06d}.png", overwrite=True)
        writer.add_image("samples", sheet[0], self.step)

    def save(self) -> None:
        """Write a checkpoint from which `Trainer` continues to the same state."""
        if not self.accelerator.is_main_process:
            return
        with uninterrupted(f"step {self.step} is being saved: a moment"):
            self.checkpoint.parent.mkdir(exist_ok=True)
            parameters = [n for n, p in self.model.named_parameters() if p.requires_grad]
            tensors = {
                f"model.{k}": v.detach().cpu().contiguous().clone()
                for k, v in self.model.state_dict().items()
                if not k.startswith("codec.")
            }
            for name, average in zip(parameters, self.ema.shadow_params, strict=True):
                tensors[f"ema.{name}"] = average.detach().cpu().contiguous().clone()
            state = self.optimizer.state_dict()["state"]
            for index, name in enumerate(parameters):
                for key, value in state.get(index, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
            story = {
                "step": self.step,
                "seconds": self.seconds,
                "ema_steps": self.ema.optimization_step,
                "config": asdict(self.config),
            }
            # One file holds all, so that a checkpoint is either the old one or the new one.
            write_checkpoint(self.checkpoint, tensors, story)

    def _resume(self) -> None:
        path = self.checkpoint
        if not path.is_file():
            return
        story, tensors = read_checkpoint(path)
        free = {"steps", "keep", "sample_every", "save_every"}
        # A setting that an older version did not have was at its default.
        mine, theirs = asdict(self.config), {**asdict(TrainingConfig()), **story["config"]}
        other = [
            f"{k}: {theirs.get(k)!r} then, {v!r} now"
            for k, v in json.loads(json.dumps(mine)).items()
            if k not in free and theirs.get(k) != v
        ]
        if other:
            raise TruePoseError(
                f"{path} was made with other settings ({'; '.join(other)}); use those, or another --out folder"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        averages = part("ema.")
        with of_this_run():
            compare_shapes(
                {n: tuple(p.shape) for n, p in named},
                {n: tuple(x.shape) for n, x in averages.items()},
                f"{path}, averages",
            )
            state = optimizer_state(part("optimizer."), named, str(path))
            load_strict(self.model, part("model."), str(path), ignore=("codec.",))
        self.ema.shadow_params = [averages[n].clone() for n, _ in named]
        self.ema.optimization_step = story.get("ema_steps", 0)
        if state:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step, self.seconds = story["step"], story["seconds"]


def trainable(model: nn.Module) -> int:
    """Number of weights that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
