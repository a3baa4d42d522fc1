"""Small random models, and people to show with them, for the tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from truepose_core.body.pose import BodyPose
from truepose_core.mannequin import PairBatch, Rendering, sample_pairs, sample_poses
from truepose_core.models.config import mannequin_config
from truepose_core.models.model import TruePoseModel
from truepose_core.parsing import HumanParsing


def small_model(fusion: str = "hpfa", caa: bool = True, seed: int = 0, **changes) -> TruePoseModel:
    """A random model of the bundled kind whose every part has a say in the result (training starts some at zero)."""
    torch.manual_seed(seed)
    config = replace(mannequin_config(fusion, caa, widths=(32, 32)), **changes)
    model = TruePoseModel(config).eval()
    parts = [model.pose_encoder.conv_out]
    if model.aligned_encoder is not None:
        parts.append(model.aligned_encoder.conv_out)
    with torch.no_grad():
        for part in parts:
            part.weight.normal_(std=0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("region_log_weight"):
                parameter.normal_(std=0.5)
    return model.requires_grad_(False)


@cache
def people(count: int = 3) -> PairBatch:
    """Pairs of the test split at the small models' size."""
    return sample_pairs(count, "test")


def source_of(pairs: PairBatch, rows: slice = slice(None)) -> tuple[torch.Tensor, HumanParsing, torch.Tensor]:
    """(image, parsing, keypoints) of the sources."""
    source = pairs.source
    return source.image[rows], HumanParsing(source.parsing[rows]), source.keypoints[rows]


def body_of(side: Rendering) -> BodyPose:
    """The true bodies of rendered people."""
    return BodyPose(side.theta, side.beta, side.camera)


def standing(count: int, seed: int = 0, scale: float = 0.42) -> BodyPose:
    """Poses of the world on average bodies, each about in the middle of its frame."""
    camera = torch.tensor([[scale, 0.01, -0.06]]).repeat(count, 1)
    return BodyPose(sample_poses(range(count), seed).theta, torch.zeros(count, 10), camera)
