"""The loop behind the small networks (lifting, pose field, alignment): one process, exact resume, averaged weights.

A subclass says what is trained and what the loss of a step is. Every random draw of a step comes from (seed, step),
so a run that was stopped and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.training.checkpoint import (
    of_this_run,
    optimizer_state,
    read_checkpoint,
    uninterrupted,
    write_checkpoint,
)


@dataclass(frozen=True)
class SmallConfig:
    """steps: optimiser steps. batch: samples of each. learning_rate: AdamW's, rising over `warmup` steps and falling to
    0 along a cosine. weight_decay, clip: AdamW's and the largest norm of the gradient. ema: decay of the averaged
    weights, which are what is kept. seed: fixes weights, data and noise. save_every: steps between checkpoints."""

    steps: int = 1000
    batch: int = 512
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_every: int = 500
    device: str = "cpu"


def checkpoint_of(out: Path) -> Path:
    """Where the run of this folder keeps what it goes on from."""
    return out / "checkpoint.safetensors"


class SmallTrainer(ABC):
    """`run()` trains `net` in a folder, from its last checkpoint if there is one, and writes weights.safetensors."""

    kind: ClassVar[str]
    """What the file says it is."""

    def __init__(self, config: SmallConfig, out: Path, *, quiet: bool = False):
        self.config, self.out, self.quiet = config, Path(out), quiet
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.net = self.build().to(config.device)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step, self.seconds = 0, 0.0
        self._resume()

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, with fresh weights."""

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step and figures to log; what is drawn depends on (seed, step) alone."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The network's own configuration, as JSON values."""

    def tensors(self) -> dict[str, Tensor]:
        """What the file of weights holds: the averaged ones."""
        return self.average.state_dict()

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of a step."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to 0."""
        c = self.config
        return (
            c.learning_rate * min(1.0, (step + 1) / max(1, c.warmup)) * 0.5 * (1 + math.cos(math.pi * step / c.steps))
        )

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return checkpoint_of(self.out)

    def run(self) -> Path:
        """Train to the last step; returns the path of the weights. Ctrl-C writes a checkpoint first."""
        from tqdm.auto import tqdm

        c = self.config
        started = time.perf_counter() - self.seconds
        bar = tqdm(total=c.steps, initial=self.step, disable=self.quiet, unit="step", mininterval=2)
        log = (self.out / "log.jsonl").open("a", encoding="utf-8")
        sums: dict[str, float] = {}
        since = 0
        try:
            while self.step < c.steps:
                for name, value in self._optimise().items():
                    sums[name] = sums.get(name, 0.0) + value
                since += 1
                self.seconds = time.perf_counter() - started
                bar.update()
                if self.step % max(1, c.save_every // 5) == 0 or self.step == c.steps:
                    means = {name: round(value / since, 6) for name, value in sums.items()}
                    print(
                        json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **means}),
                        file=log,
                        flush=True,
                    )
                    bar.set_postfix(means)
                    sums, since = {}, 0
                if self.step % c.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()
            log.close()
        self.save()
        return self.export(self.out / "weights.safetensors")

    def _optimise(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss, figures = self.loss(self.step)
        if not torch.isfinite(loss):
            raise TruePoseError(
                f"the loss became {loss.item()} at step {self.step}; lower the learning rate (now "
                f"{self.config.learning_rate}) and resume from {self.checkpoint}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        # A checkpoint on Ctrl-C must not hold new weights beside old averages or an old count.
        with uninterrupted():
            self.optimizer.step()
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
            self.step += 1
        return {"loss": loss.item(), **figures}

    def export(self, path: Path) -> Path:
        """Write the averaged weights in float16, with the story of the run in the metadata."""
        from truepose_core.weights.small import save_small

        settings = {k: Path(v).name if isinstance(v, str) else v for k, v in asdict(self.config).items()}
        story = {**settings, "steps_done": self.step, "seconds": round(self.seconds)}
        return save_small(self.tensors(), path, self.kind, self.describe(), story)

    def save(self) -> None:
        """Write a checkpoint from which a trainer of the same settings continues to the same state."""
        with uninterrupted(f"step {self.step} is being saved: a moment"):
            tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
            names = [name for name, _ in self.net.named_parameters()]
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{key}.{names[index]}": torch.as_tensor(x) for key, x in values.items()}
            story = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config)}
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            write_checkpoint(self.checkpoint, tensors, story)

    def _resume(self) -> None:
        path = self.checkpoint
        if not path.is_file():
            return
        from truepose_core.weights.strict import load_strict

        story, tensors = read_checkpoint(path)
        mine = json.loads(json.dumps(asdict(self.config)))
        free = {"save_every", "device"}
        other = [
            f"{k}: {story['config'].get(k)!r} then, {v!r} now"
            for k, v in mine.items()
            if k not in free and story["config"].get(k) != v
        ]
        if other:
            raise TruePoseError(
                f"{path} was made with other settings ({'; '.join(other)}); use those, or another --out folder"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        with of_this_run():
            state = optimizer_state(part("optimizer."), list(self.net.named_parameters()), str(path))
            load_strict(self.net, part("net."), str(path))
            load_strict(self.average, part("average."), str(path))
        if state:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step, self.seconds = story["step"], story["seconds"]
