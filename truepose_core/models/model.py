"""TruePoseModel: SourceNet, TargetNet, pose encoder, HPFA's learned weights and CAA as one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from truepose_core.alignment.control3d import Control3D, ControlTokens
from truepose_core.alignment.recurrent import AlignedPerson
from truepose_core.attention.caa import RegionTokens
from truepose_core.body.places import places_of
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.models.beside import AlignedEncoder, middle_site, nearest, noised, scale_densepose
from truepose_core.models.codec import PixelCodec, VAECodec
from truepose_core.models.config import SKELETON, Behaviour, TruePoseConfig
from truepose_core.models.pose_encoder import encode_maps, make_pose_encoder
from truepose_core.models.processors import (
    HPFASite,
    PassOn,
    SourcePass,
    TargetPass,
    attention_sites,
    install,
    key_of,
    token_counts,
)
from truepose_core.models.region_reader import CAA
from truepose_core.models.styling import add_style_places, styling
from truepose_core.parsing import HumanParsing
from truepose_core.source.align import with_aligned_tokens
from truepose_core.source.features import Level, SourceFeatures

_pose_embedding: ContextVar[Tensor | None] = ContextVar("pose_embedding", default=None)


@contextmanager
def _pose_added(embedding: Tensor | None) -> Iterator[None]:
    token = _pose_embedding.set(embedding)
    try:
        yield
    finally:
        _pose_embedding.reset(token)


def _add_pose(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    embedding = _pose_embedding.get()
    return output if embedding is None else output + embedding.to(output)


class TruePoseModel(nn.Module):
    """The whole network. See `TruePoseConfig` for sizes; weights are random until loaded or trained.

    `context` of both nets is one zero token unless the caller gives another [B, T, cross_attention_dim].
    """

    def __init__(
        self,
        config: TruePoseConfig,
        *,
        source_net: nn.Module | None = None,
        target_net: nn.Module | None = None,
        codec: nn.Module | None = None,
    ):
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.config = config
        behaviour = config.behaviour
        self.target_net = UNet2DConditionModel(**config.unet) if target_net is None else target_net
        self.source_net: nn.Module | None = None
        if config.fusion != "none" or config.caa is not None:
            self.source_net = UNet2DConditionModel(**config.source_unet) if source_net is None else source_net
        if self.source_net is not None and not behaviour.source_head:
            self.source_net.conv_norm_out, self.source_net.conv_out = None, nn.Identity()
        if behaviour.cross_attention == "pass":
            for net in filter(None, (self.target_net, self.source_net)):
                for block in attention_sites(net).values():
                    block.attn2 = PassOn()
        if codec is None and config.vae is not None:
            from diffusers import AutoencoderKL

            codec = VAECodec(AutoencoderKL(**config.vae))
        if codec is None:
            if config.codec != "pixels":
                raise TruePoseError(f"a model with codec {config.codec!r} needs its VAE; none was given")
            codec = PixelCodec(config.patch)
        self.codec = codec
        self.pose_encoder = make_pose_encoder(
            self.target_net.config.block_out_channels[0], config.pose_widths, behaviour
        )
        self.aligned_encoder: AlignedEncoder | None = None
        if config.aligned:
            net = self.target_net.config
            self.aligned_encoder = AlignedEncoder(net.out_channels, net.block_out_channels[0], config.recurrent)
            if config.recurrent and target_net is None:
                # What is aligned is nearly right: what is added to it starts at nothing.
                nn.init.zeros_(self.target_net.conv_out.weight)
                nn.init.zeros_(self.target_net.conv_out.bias)
        self.controlnet: nn.Module | None = None
        self.hpfa: nn.ModuleDict | None = None
        if config.fusion == "hpfa":
            self.hpfa = nn.ModuleDict(
                {
                    key_of(name): HPFASite(block.attn1.heads, config.beta, config.gamma)
                    for name, block in attention_sites(self.target_net).items()
                }
            )
        self.caa: CAA | None = None
        if config.caa is not None:
            self.caa = CAA(config.caa, self.context_width, self.source_net, self.target_net)
        self.control3d: Control3D | None = None
        if config.control3d is not None:
            blocks = attention_sites(self.target_net)
            sizes = {key_of(name): (block.attn2.inner_dim, block.attn2.heads) for name, block in blocks.items()}
            self.control3d = Control3D(config.control3d, blocks[middle_site(blocks)].attn1.query_dim, sizes)
        install(
            self.target_net,
            self.hpfa,
            self.caa.target_sites if self.caa else None,
            self.control3d.target_sites if self.control3d else None,
        )
        # One net may play both parts (training-free use); it keeps TargetNet's processors.
        if self.source_net is not None and self.source_net is not self.target_net:
            install(self.source_net, None, self.caa.source_sites if self.caa else None)
        self.target_net.conv_in.register_forward_hook(_add_pose)
        for net in {self.target_net, self.source_net} - {None}:
            add_style_places(net)

    @property
    def context_width(self) -> int:
        width = self.target_net.config.cross_attention_dim
        return width if isinstance(width, int) else width[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.target_net.dtype

    def _extra_conditions(self, like: Tensor, size: tuple[int, int], pooled: Tensor | None) -> dict[str, Tensor]:
        """SDXL's micro-conditioning (original size, crop, target size; pooled text or zeros); {} for other nets."""
        net = self.target_net.config
        if net.addition_embed_type != "text_time":
            return {}
        batch = like.shape[0]
        ids = like.new_tensor([[*size, 0, 0, *size]]).expand(batch, -1)
        width = net.projection_class_embeddings_input_dim - 6 * net.addition_time_embed_dim
        text = like.new_zeros((batch, width)) if pooled is None else pooled.to(like).expand(batch, -1)
        return {"text_embeds": text, "time_ids": ids}

    def _context(self, context: Tensor | None, like: Tensor) -> Tensor:
        if context is None:
            return like.new_zeros((like.shape[0], 1, self.context_width))
        return context.to(like).expand(like.shape[0], -1, -1)

    def encode_source(
        self,
        image: Tensor,
        parsing: HumanParsing,
        body: Tensor | None = None,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        *,
        pose: BodyPose | None = None,
        noised_at: Sequence[tuple[int, float]] = (),
        keep_latent: bool = False,
    ) -> SourceFeatures:
        """What SourceNet knows of the clean source, after one pass at timestep 0. image [B, 3, H, W] in [0, 1], parsing
        of the same size, body [B, 18, 3] normalised keypoints or None. context, pooled: what the model reads beside the
        picture, [B or 1, T, c] text, or [B, 1, c] where that is an embedding of the picture. pose: the sources' bodies,
        for a model that goes by the body's surface, where they are known; else they are lifted from `body`.

        A model that reads the source at the sampler's timestep gets it later: see `source_at`. noised_at: (timestep,
        sigma) of the noise levels at which the noised source is read instead, from the highest. keep_latent: keep it
        for `read_noised`, and read nothing here.
        """
        behaviour = self.config.behaviour
        latent = self.codec.encode(image).to(self.dtype)
        caa = self.caa(image.to(self.dtype), parsing) if self.caa is not None else None
        features = SourceFeatures(
            self.config.family,
            {},
            (latent.shape[-2], latent.shape[-1]),
            parsing,
            body,
            caa,
            image if self.config.aligned or self.config.aligned_tokens else None,
            self._context(context, latent) if behaviour.context == "image" else None,
            latent if behaviour.keeps_latent or keep_latent else None,
            places_of(self.config.match, body, image.shape[-1] / image.shape[-2], pose),
            align=self.config.aligns,
            beside=self.config.aligned_tokens,
        )
        if self.config.fusion == "none" or behaviour.source_timestep == "step" or keep_latent:
            return features
        size = (image.shape[-2], image.shape[-1])
        if noised_at:
            levels = tuple(
                self._read(noised(latent, sigma), t, features.latent_size, caa, context, pooled, size, sigma)
                for t, sigma in noised_at
            )
            return replace(features.with_level(levels[len(levels) // 2]), levels=levels)
        return features.with_level(self._read(latent, 0, features.latent_size, caa, context, pooled, size))

    def _read(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        latent_size: tuple[int, int],
        caa: RegionTokens | None,
        context: Tensor | None,
        pooled: Tensor | None,
        size: tuple[int, int],
        sigma: float = 0.0,
    ) -> Level:
        """What SourceNet reads of a latent noised to sigma. size: (height, width) of the picture."""
        call = SourcePass(latent_size, caa)
        when = torch.as_tensor(timestep, device=latent.device).long().expand(latent.shape[0])
        with styling(call):
            self.source_net(
                latent,
                when,
                self._context(context, latent),
                cross_attention_kwargs={"truepose": call},
                added_cond_kwargs=self._extra_conditions(latent, size, pooled),
            )
        return Level(sigma, call.sites, call.style)

    def source_at(self, source: SourceFeatures, timestep: int | Tensor, *, nothing: bool = False) -> SourceFeatures:
        """The source as SourceNet reads it at a timestep, for a model that wants it so (`Behaviour.keeps_latent`).
        nothing: a latent of zeros in its place, which is what the unconditional row of such a model reads."""
        if source.latent is None:
            raise TruePoseError("these SourceFeatures hold no latent to read anew; encode the source with this model")
        latent = torch.zeros_like(source.latent) if nothing else source.latent
        size = tuple(side * self.codec.patch for side in source.latent_size)
        when = timestep if self.config.behaviour.source_timestep == "step" else 0
        level = self._read(latent.to(self.dtype), when, source.latent_size, source.caa, source.context, None, size)
        return source.with_level(level)

    def read_noised(
        self,
        source: SourceFeatures,
        timestep: int | Tensor,
        sigma: float,
        context: Tensor | None,
        pooled: Tensor | None,
    ) -> Level:
        """The source noised to sigma and read at a timestep, by a net that was not trained to read it clean. context,
        pooled: as in `encode_source`."""
        if source.latent is None:
            raise TruePoseError("these SourceFeatures hold no latent to read anew; encode the source for every step")
        size = tuple(side * self.codec.patch for side in source.latent_size)
        latent = noised(source.latent.to(self.dtype), sigma)
        return self._read(latent, timestep, source.latent_size, source.caa, context, pooled, size, sigma)

    def target_pass(
        self,
        latent_size: tuple[int, int],
        source: SourceFeatures | None,
        target_body: Tensor | None = None,
        target_parsing: HumanParsing | None = None,
        *,
        keep: Tensor | None = None,
        kv: dict | None = None,
        omega: Tensor | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        strength: float = 1.0,
        style: float = 0.0,
        alignments: dict[str, Tensor] | None = None,
    ) -> TargetPass:
        """What TargetNet needs beside noise, step and pose map.

        target_body: [B, 18, 3], keypoints on the target image, B a multiple of the sources. target_parsing: if the user
        has one. keep: [B] bool, rows that see the source. The rest: see `TargetPass`. Strength 0, or region weights
        that are all 0 without style, are no source at all. Raises TruePoseError for a source of another model family.
        """
        if source is not None and source.family != self.config.family:
            raise TruePoseError(
                f"the source was encoded by a {source.family!r} model; this one is {self.config.family!r}. "
                "Encode the source again with this model"
            )
        unread = omega is not None and not bool(omega.any()) and style == 0
        if source is None or strength == 0 or unread:
            return TargetPass(latent_size)
        source = with_aligned_tokens(source, target_body)
        prior: dict[int, Tensor] = {}
        body: dict[int, Tensor] = {}
        counts = token_counts(self.target_net, latent_size)
        aspect = latent_size[1] / latent_size[0]
        with torch.no_grad():
            parsing = target_parsing
            if parsing is None and target_body is not None:
                parsing = source.prior(target_body, *latent_size)
            for n, (h, w) in counts.items():
                if parsing is not None:
                    prior[n] = parsing.tokens(h, w)
                if target_body is not None:
                    places = source.target_coordinates(target_body, h, w, aspect)
                    if places is not None:
                        body[n] = places
        caa = source.caa
        if caa is not None:
            if target_body is not None and target_body.shape[0] != caa.tokens.shape[0]:
                caa = caa.repeat(target_body.shape[0] // caa.tokens.shape[0])
            if keep is not None:
                caa = caa.rows(keep)
        return TargetPass(
            latent_size,
            source if self.config.fusion != "none" else None,
            omega=omega,
            keep=keep,
            beta=beta,
            gamma=gamma,
            strength=strength,
            prior=prior,
            given=target_parsing is not None,
            body=body,
            caa=caa,
            kv=kv,
            alignments=alignments,
            style=style,
        )

    def control_tokens(
        self,
        source: SourceFeatures | None,
        target_body: Tensor | None,
        latent_size: tuple[int, int],
        target_pose: BodyPose | None = None,
        *,
        keep_source: Tensor | None = None,
        keep_pose: Tensor | None = None,
        omega: Tensor | None = None,
        strength: float = 1.0,
    ) -> ControlTokens | None:
        """What `TargetPass.control` is for these targets: keypoints [B, 18, 3] and, for a model that reads them, their
        bodies, in the model's canvas. source: None for what the pose alone says. keep_source, keep_pose: [B] bool, as
        in `forward`. omega: region weights [7]. strength: a factor >= 0 on what is added. None for a model without 3D
        guidance, and for nothing."""
        if self.control3d is None or strength == 0:
            return None
        asked = self.control3d.ask(target_body, latent_size[1] / latent_size[0], target_pose)
        features = weights = None
        if source is not None:
            site = middle_site(source.sites)
            features, weights = source.sites[site], source.token_weights(site, omega)
        if keep_source is None and target_body is not None:
            keep_source = torch.ones(len(target_body), dtype=torch.bool, device=target_body.device)
        tokens = self.control3d.tokens(features, asked, keep_source, keep_pose, weights)
        return tokens if tokens is None or strength == 1 else replace(tokens, shown=strength * tokens.shown)

    def encode_pose(self, pose_map: Tensor | Mapping[str, Tensor]) -> Tensor | None:
        """Pose pictures [B, 3, H, W] in [0, 1], by name or the skeleton alone -> what `denoise` takes as pose: the
        embedding that is added after TargetNet's conv_in or, where a ControlNet carries the pose, the skeleton itself.
        None for a model that has no pose encoder. Raises TruePoseError for a map that the model does not read."""
        maps = pose_map if isinstance(pose_map, Mapping) else {SKELETON: pose_map}
        if self.controlnet is not None:
            return maps[SKELETON].to(self.dtype)
        if self.pose_encoder is None:
            return None
        return encode_maps(self.pose_encoder, {name: x.to(self.dtype) for name, x in maps.items()})

    def encode_channels(self, densepose: Tensor | None, canvas: Tensor, mask: Tensor) -> Tensor | None:
        """What conv_in reads beside the noisy latent, [B, C', h, w]; None where it reads nothing else.

        densepose: picture [B, 3, H, W] in [0, 1] (its channels 0..255 over 255), None for nobody. canvas: the picture
        to keep outside the mask, [B, 3, H, W] in [0, 1]; mask: [B, 1, H, W], 1 where the picture is to be made.
        """
        behaviour = self.config.behaviour
        if not behaviour.channels:
            return None
        # Zero where the mask is, on the scale -1..1 that the VAE reads.
        kept = torch.where(mask < 0.5, canvas, 0.5)
        latent = self.codec.encode(kept)
        size = latent.shape[-2:]
        made = {"mask": (nearest(mask, size) >= 0.5).to(latent), "masked latent": latent}
        if "densepose" in behaviour.channels:
            picture = torch.zeros_like(canvas) if densepose is None else densepose
            made["densepose"] = scale_densepose(nearest(picture, size), behaviour.densepose)
        return torch.cat([made[name].to(self.dtype) for name in behaviour.channels], 1)

    def encode_aligned(
        self, source: SourceFeatures, target_body: Tensor, omega: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """What the carried source adds to the pose embedding [B, C0, h, w] and to the prediction [B, C, h, w].

        None for a model without alignment, a source without keypoints, or when the region weights omega [7] leave
        nothing. target_body: [B, 18, 3] on the target image, which has the source image's size.
        """
        if self.aligned_encoder is None or (omega is not None and bool((omega == 0).all())):
            return None
        with torch.no_grad():
            made = source.carried(target_body, omega)
            if made is None:
                return None
            latent = self.codec.encode(made[0]).to(self.dtype)
            cells = (latent.shape[-2], latent.shape[-1])
            certain = nn.functional.adaptive_avg_pool2d(made[1], cells).to(self.dtype)
            regions = source.prior(target_body, *cells).masks.to(self.dtype) if self.config.recurrent else None
        return self.aligned_encoder(latent, certain, regions)

    def denoise(
        self,
        latent: Tensor,
        timestep: Tensor,
        call: TargetPass,
        pose: Tensor | None,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        aligned: tuple[Tensor, Tensor] | None = None,
        channels: Tensor | None = None,
    ) -> Tensor:
        """TargetNet's prediction for noisy latents [B, C, h, w] at timesteps [B]. pose: from `encode_pose`, or None;
        aligned: from `encode_aligned`, or None; channels: from `encode_channels`."""
        size = (latent.shape[-2] * self.codec.patch, latent.shape[-1] * self.codec.patch)
        text, extra = self._context(context, latent), self._extra_conditions(latent, size, pooled)
        residuals: dict[str, Any] = {}
        if self.controlnet is not None and pose is not None:
            down, middle = self.controlnet(latent, timestep, text, pose, added_cond_kwargs=extra, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            pose = None
        if aligned is not None:
            pose = aligned[0] if pose is None else pose + aligned[0]
        with _pose_added(pose), styling(call) if call.style > 0 else nullcontext():
            prediction = self.target_net(
                latent if channels is None else torch.cat([latent, channels], 1),
                timestep,
                text,
                cross_attention_kwargs={"truepose": call},
                added_cond_kwargs=extra,
                **residuals,
            ).sample
        return prediction if aligned is None else prediction + aligned[1]

    def forward(
        self,
        source_image: Tensor,
        source_parsing: HumanParsing,
        source_body: Tensor | None,
        noisy: Tensor,
        timestep: Tensor,
        pose_map: Tensor,
        target_body: Tensor,
        keep_source: Tensor,
        keep_pose: Tensor,
        target_pose: BodyPose | None = None,
        lifted: tuple[BodyPose, BodyPose] | None = None,
        aligned: AlignedPerson | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """One training pass: (prediction [B, C, h, w], alignments per site, the source's body as the 3D guidance
        regresses it, see `Control3D.regress`). S sources serve B = S r targets, r each in a row. keep_source,
        keep_pose: [B] bool, False where the condition is dropped. target_pose: the targets' bodies, for 3D guidance.
        lifted: the bodies of sources and targets [B] each, and aligned: what alignment makes of each pair, where that
        was prepared; else it is made here.
        Raises TruePoseError for a model whose behaviour is another system's."""
        if self.config.behaviour != Behaviour():
            raise TruePoseError(f"a {self.config.family} model is for use as it is; train one of this package's own")
        source = None
        if self.source_net is not None:
            times = len(noisy) // len(source_image)
            first = None if lifted is None else lifted[0].select(range(0, len(noisy), times))
            source = self.encode_source(source_image, source_parsing, source_body, pose=first)
            if lifted is not None:
                source.know(target_body, lifted[1], aligned)
        alignments: dict[str, Tensor] = {}
        call = self.target_pass(
            (noisy.shape[-2], noisy.shape[-1]), source, target_body, keep=keep_source, alignments=alignments
        )
        pose = self.encode_pose(pose_map) * keep_pose[:, None, None, None]
        carried = None if source is None else self.encode_aligned(source, target_body)
        if carried is not None:
            carried = tuple(x * keep_source[:, None, None, None] for x in carried)
        regressed = None
        if self.control3d is not None:
            control = self.control_tokens(
                source, target_body, call.latent_size, target_pose, keep_source=keep_source, keep_pose=keep_pose
            )
            call = replace(call, control=control)
            regressed = self.control3d.regress(source.sites[middle_site(source.sites)])
        return self.denoise(noisy, timestep, call, pose, aligned=carried), alignments, regressed
