"""The command line and the nodes read the same photo as the same person: SourceFeatures of both hosts, float32."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from model import keypoints, loaded, person
from pack.nodes.caa import CAAEncode
from pack.nodes.host import features as host_features
from pack.nodes.host import nets as host_nets
from pack.nodes.source import ONCE, SourceNetEncode

pytest.importorskip("diffusers", reason="the pipeline of the command line is diffusers'")
sys.path.append(str(Path(__file__).resolve().parents[2] / "core"))
import systems as fam
from diffusers import AutoencoderKL, UNet2DConditionModel
from families import host_vae

from truepose_core.errors import TruePoseError
from truepose_core.models.codec import VAECodec
from truepose_core.models.config import SD_SCHEDULE, Behaviour, TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.models.store import load_model
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.pose import body_tensor, read_pose, write_pose
from truepose_core.source.features import SourceFeatures

LIMIT = 1e-5
# The host adds SDXL's pooled text and sizes at their real width.
XL_ADDED = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
NETS = {"sd15": fam.SMALL, "sdxl": {**fam.SMALL_XL, **XL_ADDED}}
SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
"""Of latents, as the host has them for each kind of checkpoint."""
SIZES = ((64, 48), (70, 51), (129, 100))
"""(height, width): whole latent cells, and not."""


@lru_cache
def checkpoint(family: str) -> tuple[TruePosePipeline, object, object]:
    """A small checkpoint without training: (the pipeline, MODEL, VAE)."""
    unet = fam.randomised(UNet2DConditionModel(**NETS[family]), 1)
    codec = VAECodec(fam.randomised(AutoencoderKL(**fam.SMALL_VAE, scaling_factor=SCALES[family]), 7))
    config = TruePoseConfig(
        family=family,
        unet={k: v for k, v in unet.config.items() if not k.startswith("_")},
        codec="vae",
        patch=codec.patch,
        fusion="concat",
        prediction_type="epsilon",
        scheduler=SD_SCHEDULE,
        size=(64, 64),
        match="surface",
        behaviour=Behaviour(source_timestep="noised"),
    )
    weights = {name: x.clone() for name, x in unet.state_dict().items()}
    core = TruePoseModel(config, source_net=unet, target_net=unet, codec=codec).eval().requires_grad_(False)
    return (
        TruePosePipeline.from_model(core),
        host_nets._make_model(config, "target_net", weights, "test"),
        host_vae(config),
    )


def read(family: str, size: tuple[int, int]) -> tuple[SourceFeatures, host_features.HostFeatures, dict[str, str]]:
    """(what the command line reads, what the nodes read, the pipeline's name of a site -> the host's)."""
    shown = person(3, "stand", *size)
    pose = keypoints(shown)
    body = body_tensor([p.people[0] for p in read_pose(pose)])
    parsing = HumanParsing(shown.parsing)
    if family == "bundled":
        pipe, model, vae, how = TruePosePipeline.from_model(load_model()), loaded().source, loaded().vae, {}
    else:
        pipe, model, vae = checkpoint(family)
        how = {"source_reading": ONCE}
    with torch.inference_mode(False):
        ours = pipe.encode_source(shown.image, parsing, body, **how)
    node = SourceNetEncode.execute(model, vae, shown.image.movedim(1, -1), parsing, pose=pose, **how)
    return ours, node.result[0], host_nets.host_sites(model.model.model_config.unet_config)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one.float().cpu() - other.float().cpu()).abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["bundled", "sd15", "sdxl"])
def test_command_line_and_nodes_make_the_same_source_features(family: str, size: tuple[int, int]) -> None:
    ours, theirs, names = read(family, size)
    assert ours.family == theirs.family and ours.latent_size == theirs.latent_size
    assert {names[site] for site in ours.sites} == theirs.sites.keys()
    assert difference(ours.parsing.masks, theirs.parsing.masks) <= LIMIT
    assert difference(ours.body, theirs.body) <= LIMIT
    for site, tokens in ours.sites.items():
        assert difference(tokens, theirs.sites[names[site]]) <= LIMIT, site
        assert difference(ours.regions(site), theirs.regions(names[site])) <= LIMIT, site
        assert difference(ours.coordinates(site), theirs.coordinates(names[site])) <= LIMIT, site
    for name in ("image", "context", "latent", "shown"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None) and (one is None or difference(one, other) <= LIMIT), name
    assert (ours.caa is None) == (theirs.caa is None)
    if ours.caa is not None:
        assert difference(ours.caa.tokens, theirs.caa.tokens) <= LIMIT
        assert torch.equal(ours.caa.shown, theirs.caa.shown)


@pytest.mark.parametrize("node", [SourceNetEncode, CAAEncode])
def test_a_pose_of_another_picture_is_refused_with_both_sizes(node: type) -> None:
    shown = person(3, "stand", 64, 48)
    (pose,) = read_pose(keypoints(shown))
    other = write_pose([type(pose)(60, 64, pose.people)])
    first = (loaded().source, loaded().vae) if node is SourceNetEncode else (loaded().adapter,)
    with pytest.raises(TruePoseError, match="canvas of 60x64 and the image is 48x64"):
        node.execute(*first, shown.image.movedim(1, -1), HumanParsing(shown.parsing), pose=other)
