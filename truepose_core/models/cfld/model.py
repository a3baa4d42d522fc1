"""CFLD (Lu et al., arXiv 2402.18078) for diffusers: its model, and HPFA on top of it.

Without HPFA this computes what the published code does. The source reaches the UNet as 16 tokens and as biases on the
queries of the cross-attention on the way up, the pose as features added on the way down. With `strength` above 0 the
same UNet also reads the clean source as SourceNet, and HPFA fuses it into every self-attention; that needs no training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.errors import TruePoseError
from truepose_core.models.cfld.encoder import (
    CFLDConfig,
    CFLDEncoder,
    SourceCondition,
    is_cfld,
    pose_maps,
)
from truepose_core.models.codec import VAECodec
from truepose_core.models.processors import SourcePass, TargetPass, attention_sites, install, token_counts
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_prior
from truepose_core.pose.limbs import body_coordinates
from truepose_core.source.features import SourceFeatures
from truepose_core.weights.settings import check_described
from truepose_core.weights.strict import load_strict, open_tensors, read_shapes

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


@dataclass
class QueryBias:
    """biases: attention site -> [B, N, C], added to the queries of its cross-attention."""

    biases: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class CFLDSourcePass(QueryBias, SourcePass):
    """The UNet reads the clean source."""


@dataclass
class CFLDTargetPass(QueryBias, TargetPass):
    """The UNet denoises."""


class BiasedCrossAttention:
    """attn2 of one block, with the pass's bias on its queries."""

    def __init__(self, site: str):
        self.site = site

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        truepose: QueryBias | None = None,
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        if truepose is not None and self.site in truepose.biases:
            q = q + truepose.biases[self.site].to(q)
        projected = (q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        q, k, v = (split_heads(x, attn.heads) for x in projected)
        out = scaled_dot_product_attention(q, k, v, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](merge_heads(out)))


@dataclass(frozen=True, eq=False)
class CFLDSource:
    """What is computed once per source: its condition, and the features that HPFA reads (None where it is off).

    size: (height, width) of the source image in pixels.
    """

    condition: SourceCondition
    size: tuple[int, int]
    features: SourceFeatures | None = None


class CFLDModel(nn.Module):
    """The encoders, the UNet and the VAE that its latents belong to. Weights are random until loaded."""

    def __init__(self, config: CFLDConfig, vae: VAECodec | None = None):
        super().__init__()
        self.config = config
        self.encoder = CFLDEncoder(config)
        self.target_net = UNet2DConditionModel(**config.unet)
        self.codec = vae
        install(self.target_net)
        sites = attention_sites(self.target_net)
        for site, _ in config.sites:
            sites[site].attn2.set_processor(BiasedCrossAttention(site))

    @property
    def dtype(self) -> torch.dtype:
        return self.target_net.dtype

    @property
    def latent_size(self) -> tuple[int, int]:
        side = self.config.encoder_size // 4
        return side, side

    def no_source(self, batch: int) -> SourceCondition:
        """The learned condition of a row that sees no source."""
        return SourceCondition(self.encoder.learnable_vector.expand(batch, -1, -1), {})

    def encode_features(
        self,
        image: Tensor,
        parsing: HumanParsing,
        body: Tensor | None,
        condition: SourceCondition,
    ) -> SourceFeatures:
        """One pass of the UNet over the clean source at timestep 0, as HPFA's SourceNet. Training had such pairs: a
        picture that is its own source, in its own pose. image [B, 3, size, size] in [0, 1] and its parsing, squashed;
        body [B, 18, 3] or None (no pose, no skeleton prior, no body match)."""
        if self.codec is None:
            raise TruePoseError("HPFA reads the source's latent, which needs the VAE; none was given")
        latent = self.codec.encode(image).to(self.dtype)
        call = CFLDSourcePass(self.latent_size, biases=condition.biases)
        pose = None if body is None else self.encoder.encode_pose(pose_maps(body, self.config.encoder_size))
        self.denoise(latent, latent.new_zeros(latent.shape[0]).long(), call, condition.tokens, pose)
        return SourceFeatures(self.config.family, call.sites, self.latent_size, parsing, body)

    def target_pass(
        self,
        condition: SourceCondition,
        source: SourceFeatures | None = None,
        target_body: Tensor | None = None,
        target_parsing: HumanParsing | None = None,
        *,
        omega: Tensor | None = None,
        beta: float = 0.0,
        gamma: float = 0.0,
        strength: float = 1.0,
        kv: dict | None = None,
    ) -> CFLDTargetPass:
        """What the UNet needs beside noise, step, tokens and pose features. See `TargetPass`; target_body [B, 18, 3],
        B a multiple of the sources. Strength 0 or region weights that are all 0 leave CFLD alone."""
        call = CFLDTargetPass(self.latent_size, biases=condition.biases)
        if source is None or strength == 0 or (omega is not None and not bool(omega.any())):
            return call
        if source.family != self.config.family:
            raise TruePoseError(
                f"the source was encoded by a {source.family!r} model; this one is {self.config.family!r}. "
                "Encode the source again with this model"
            )
        parsing = target_parsing
        if parsing is None and target_body is not None and source.body is not None:
            times = target_body.shape[0] // source.batch
            masks, body = (x.repeat_interleave(times, 0) for x in (source.parsing.masks, source.body))
            parsing = region_prior(HumanParsing(masks), body, target_body, *self.latent_size)
        grids = token_counts(self.target_net, self.latent_size)
        call.source, call.omega, call.beta, call.gamma, call.strength, call.kv = (
            source,
            omega,
            beta,
            gamma,
            strength,
            kv,
        )
        call.given = target_parsing is not None
        if parsing is not None:
            call.prior = {n: parsing.tokens(h, w) for n, (h, w) in grids.items()}
        if target_body is not None:
            call.body = {n: body_coordinates(target_body, h, w) for n, (h, w) in grids.items()}
        return call

    def denoise(
        self, latent: Tensor, timestep: Tensor, call: QueryBias, tokens: Tensor, pose: list[Tensor] | None
    ) -> Tensor:
        """The UNet's prediction for latents [B, C, h, w] at timesteps [B]. tokens [B, T, c]: `SourceCondition`'s.
        pose: features of `CFLDEncoder.encode_pose`, or None."""
        return self.target_net(
            latent,
            timestep,
            tokens.to(latent),
            cross_attention_kwargs={"truepose": call},
            # The UNet empties the list that it is given.
            down_intrablock_additional_residuals=None if pose is None else [x.to(latent) for x in pose],
        ).sample


def load_cfld(path: str | Path, vae: str | Path | None = None) -> CFLDModel:
    """Load a converted CFLD file in float32, ready for inference.

    vae: a folder in diffusers format with the VAE of Stable Diffusion 1.5, which CFLD's files do not hold. Raises
    TruePoseError when the file is missing, damaged or of another kind, or when a weight is missing or unknown.
    """
    metadata, shapes = read_shapes(path)
    if not is_cfld(metadata):
        raise TruePoseError(f"{path} is no CFLD model file of this package; convert CFLD's two files first")
    config = CFLDConfig.from_json(metadata["config"])
    if vae is None:
        raise TruePoseError(
            f"{path} works on the latents of Stable Diffusion 1.5's VAE; name the folder that has it (--vae FOLDER)"
        )
    from truepose_core.models.folder import load_vae

    check_described(lambda: CFLDModel(config, nn.Identity()), shapes, str(path), ignore=("codec.",))
    model = CFLDModel(config, load_vae(vae))
    load_strict(model, open_tensors(path)[1], str(path), ignore=("codec.",))
    return model.eval()
