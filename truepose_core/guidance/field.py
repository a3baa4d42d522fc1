"""Guidance by the pose interaction field: at every step the estimate of the clean picture is moved a little, so that
the pose it shows is a valid one, and the one asked for.

RePoseDM (arXiv 2310.16074) states gradient guidance from pose interaction fields on a predicted pose; the energy, how
the pose is read, and the limit of the step are ours. The gradient goes through two small networks and not through the
diffusion model, so a guided step costs milliseconds, and any sampler takes the moved estimate.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from truepose_core.alignment.field import PoseField, load_field
from truepose_core.body.lift import FEWEST, LiftNet, net_path, normalise
from truepose_core.errors import TruePoseError
from truepose_core.guidance.keypoints import PICTURES, KeypointPredictor, load_predictor, nearer_sides, picture_of

LIMIT = 0.05
"""The longest step: root mean square change of the latent's numbers, which are about 1 in size. Longer ones leave marks
that no picture has, and the sampler keeps them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FieldGuidance:
    """How the field guides. scale: >= 0 of the whole energy; 0 is off. mu: >= 0, weight of the squared distance to the
    target pose, per frame height squared, beside the field's radians. start, end: shares of the sampling, 0..1, between
    which it works. predictor: a file of `truepose train --row keypoints`; None is the one that ships, for pictures.

    Raises TruePoseError for numbers out of these ranges.
    """

    scale: float = 10.0
    mu: float = 20.0
    start: float = 0.0
    end: float = 1.0
    predictor: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("mu", self.mu)):
            if not 0 <= value < float("inf"):
                raise TruePoseError(f"the field's {name} is {value}; expected a number of at least 0")
        if not 0 <= self.start <= self.end <= 1:
            raise TruePoseError(
                f"the field works from {self.start} to {self.end} of the sampling; expected 0 <= start <= end <= 1"
            )

    def works_at(self, share: float) -> bool:
        """Whether it works at this share of the sampling, 0 (all noise) to 1 (none)."""
        return self.scale > 0 and self.start <= share <= self.end


class PoseEnergy(nn.Module):
    """E = f(lift(pose(x0))) + mu |pose(x0) - target|^2, one number a picture; sides as `nearer_sides` says.

    field: PoseField. predictor: KeypointPredictor, reads the pose. lift: LiftNet, keypoints -> joint rotations.
    """

    def __init__(self, field: PoseField, predictor: KeypointPredictor, lift: LiftNet):
        super().__init__()
        self.field, self.predictor, self.lift = field, predictor, lift
        self.eval().requires_grad_(False)

    def forward(self, x0: Tensor, aspect: float, patch: int | None, target: Tensor | None, mu: float) -> Tensor:
        """x0: an estimate of the clean latent [B, C, h, w]. aspect: width / height of the picture. patch: of a latent
        that is pixel patches, None for a VAE's. target: keypoints [B, 18, 3] normalised, or None. Returns [B]."""
        places, seen = self.predictor(x0 if patch is None else picture_of(x0, patch))
        unit = places.new_tensor([aspect, 1.0])
        energy = self.distance(places, seen, aspect)
        if target is not None and mu > 0:
            target = nearer_sides(places, target, aspect)
            wanted = (target[..., 2] > 0).to(places)
            off = ((places - target[..., :2]) * unit).square().sum(-1)
            energy = energy + mu * (off * wanted).sum(1) / wanted.sum(1).clamp(min=1)
        return energy

    def distance(self, places: Tensor, seen: Tensor, aspect: float) -> Tensor:
        """f of the likeliest body behind keypoints at places [B, 18, 2], seen by logits [B, 18]: [B] radians; 0 where
        too few are seen to lift a body."""
        visible = (seen > 0).to(places)
        rotation, _, doubt = self.lift(normalise(torch.cat([places, visible[..., None]], -1), aspect))
        likeliest = rotation[torch.arange(len(places), device=places.device), doubt.argmin(1)]
        return self.field(likeliest) * (visible.sum(1) >= FEWEST)


def check_predictor(predictor: str | Path | None, pixels: bool) -> None:
    """Raises TruePoseError where no predictor is given for a model of a VAE's latents: what ships reads pictures.
    pixels: the model works on pixel patches."""
    if predictor is None and not pixels:
        raise TruePoseError(
            "the keypoint predictor that ships reads pictures and this model works on a VAE's latents; train one "
            "with truepose train --row keypoints --vae FOLDER, and give its weights"
        )


def load_energy(predictor: str | Path | None, pixels: bool) -> PoseEnergy:
    """The networks of guidance. predictor: as of `FieldGuidance`. pixels: the model works on pixel patches, not on a
    VAE's latents. Raises TruePoseError where the predictor reads something else, and for missing files."""
    from truepose_core.weights.small import load_small

    check_predictor(predictor, pixels)
    read = load_predictor(predictor)
    if (read.space == PICTURES) != pixels:
        model = "pixel patches" if pixels else "a VAE's latents"
        raise TruePoseError(
            f"{predictor} reads {read.space} and this model works on {model}; give a predictor for those"
        )
    # A lifting network of its own: others share one and may move it to another device.
    return PoseEnergy(load_field(), read, load_small(net_path(), "lift", LiftNet))


def field_step(
    energy: PoseEnergy,
    x0: Tensor,
    options: FieldGuidance,
    *,
    aspect: float,
    patch: int | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """What guidance takes off an estimate of the clean latent: scale * grad E, at most `LIMIT` long (root mean square).

    x0: [B, C, h, w], which may be an inference tensor, on the networks' device; the rest as in `PoseEnergy`; target may
    be [T, 18, 3], T dividing B. Every picture is its own: a batch gives what its items give one by one. Returns the
    shape and type of x0.
    """
    # A node of ComfyUI runs in inference mode, where nothing can be differentiated; clones made outside are ordinary.
    with torch.inference_mode(False), torch.enable_grad():
        given = x0.detach().clone().float().requires_grad_()
        wanted = (
            None if target is None else target.detach().clone().to(given).repeat_interleave(len(x0) // len(target), 0)
        )
        (gradient,) = torch.autograd.grad(energy(given, aspect, patch, wanted, options.mu).sum(), given)
        step = options.scale * gradient
        length = step.square().mean((1, 2, 3), keepdim=True).sqrt()
        if bool((length > LIMIT).any()):
            _say_limited()
        return (step * (LIMIT / length.clamp(min=LIMIT))).to(x0.dtype)


@lru_cache(maxsize=1)
def _say_limited() -> None:
    log.warning("the pose field's step was longer than %g and was shortened; a smaller scale may do", LIMIT)


def signal_share(alphas: Tensor, timestep: Tensor | float) -> Tensor:
    """The share of signal at a timestep, also between whole ones, where the noise per signal is interpolated as
    diffusers' Euler scheduler does. alphas: [T], the scheduler's `alphas_cumprod`."""
    at, below = float(timestep), int(timestep)
    near = alphas[[below, min(below + 1, len(alphas) - 1)]].double()
    low, high = ((1 - near) / near).sqrt()
    return 1 / (1 + (low + (at - below) * (high - low)).square())


def clean_estimate(prediction: Tensor, x: Tensor, alpha: Tensor | float, kind: str) -> Tensor:
    """The clean latent that a prediction says. prediction, x: [B, C, h, w], x the network's input, sqrt(alpha) x0 +
    sqrt(1 - alpha) noise; kind: "sample", "epsilon" or "v_prediction" (Salimans and Ho, arXiv 2202.00512)."""
    signal, noise = _shares(alpha, x)
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (x - noise * prediction) / signal
    return signal * x - noise * prediction


def moved_prediction(prediction: Tensor, step: Tensor, alpha: Tensor | float, kind: str) -> Tensor:
    """The prediction whose `clean_estimate` is less by step [B, C, h, w]."""
    signal, noise = _shares(alpha, prediction)
    return prediction + step * {"sample": -1.0, "epsilon": signal / noise, "v_prediction": 1 / noise}[kind]


def _shares(alpha: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha = torch.as_tensor(alpha).to(like)
    return alpha.sqrt(), (1 - alpha).sqrt()
