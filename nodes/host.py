"""The one room that knows ComfyUI's inside: reading a source with a MODEL, and patching a MODEL with HPFA.

Reading (`read_source`): one UNet pass over the clean source latent at timestep 0, through the host's own sampling
path, so that loading, offload, latent scaling, data types and LoRA are the host's.

Patching (`with_hpfa`): a `DIFFUSION_MODEL` wrapper that puts, for the time of one call, an attn1 `replace` on each
block the source knows. The replace projects the source's tokens with the block's own to_k and to_v and hands
longer keys and values to the host's attention. Nothing stays in the options between calls, patch objects never
change once made, and what a call needs lives in the call, so several threads may run at once.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from truepose_core.alignment.skeleton_prior import body_coordinates
from truepose_core.attention.hpfa import (
    SourceTokens,
    augment,
    gather_tokens,
    kept_tokens,
    match_channels,
    region_rows_weight,
)
from truepose_core.errors import TruePoseError
from truepose_core.features import SourceFeatures
from truepose_core.parsing import HumanParsing

KEY = "truepose_hpfa"
AREAS = "truepose_areas"
BLOCKS = ("all", "encoder", "middle", "decoder", "middle and decoder")
_PARTS = {
    "all": ("input", "middle", "output"),
    "encoder": ("input",),
    "middle": ("middle",),
    "decoder": ("output",),
    "middle and decoder": ("middle", "output"),
}
UNCONDITIONAL = 1
"""The host's number for negative rows in `cond_or_uncond`."""

Block = tuple[str, int, int]
Area = tuple[int, int, int, int]
"""(height, width, top, left) in latent cells."""

log = logging.getLogger("truepose")


@lru_cache(maxsize=256)
def say_once(message: str) -> None:
    """Log a warning the first time it is said; sampling would repeat it at every block and step."""
    log.warning(message)


class HostFeatures(SourceFeatures):
    """SourceFeatures keyed by the host's blocks ("input.1.0"), as it flows through a TRUEPOSE_SOURCE socket."""

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache that evicts by memory."""
        masks = self.parsing.masks
        return self.nbytes + masks.numel() * masks.element_size()


# ---------------------------------------------------------------------------------------------- what a model is


def site_name(block: Block) -> str:
    """("input", 1, 0) -> "input.1.0"."""
    return ".".join(str(part) for part in block)


def self_attentions(unet: UNetModel) -> dict[str, tuple[Block, torch.nn.Module]]:
    """Site name -> (the host's block, its attn1), in the order of the forward pass."""
    found: dict[str, tuple[Block, torch.nn.Module]] = {}
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for part, layers in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for number, layer in enumerate(layers):
            for module in layer:
                if not isinstance(module, host_attention.SpatialTransformer):
                    continue
                for index, block in enumerate(module.transformer_blocks):
                    if not block.disable_self_attn:
                        at = (part, number, index)
                        found[site_name(at)] = (at, block.attn1)
    return found


def unet_of(model: object, what: str) -> UNetModel:
    """The UNet of a MODEL. Raises for a model of another kind, saying which node input is meant by `what`."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise TruePoseError(
            f"{what} is a {type(unet).__name__} ({type(model.model.model_config).__name__}), not a UNet; "
            "HPFA needs a UNet with self-attention: use an SD1.5, SD2.x or SDXL checkpoint"
        )
    if any(isinstance(m, host_attention.SpatialVideoTransformer) for m in unet.modules()):
        raise TruePoseError(f"{what} is a video UNet; use an SD1.5, SD2.x or SDXL checkpoint")
    if not self_attentions(unet):
        raise TruePoseError(f"{what} has no self-attention to read or to patch; use an SD1.5, SD2.x or SDXL model")
    return unet


def family_of(model: object) -> str:
    """Which models can share sources: "sd15", "sd21", "sdxl", or the configuration's own name."""
    config = model.model.model_config
    widths = {768: "sd15", 1024: "sd21", 2048: "sdxl", 1280: "sdxl-refiner"}
    return widths.get(config.unet_config.get("context_dim"), type(config).__name__.lower())


def cell_size(vae: object) -> int:
    """Pixels along one side of a latent cell of this VAE."""
    return int(vae.spacial_compression_encode())


# ------------------------------------------------------------------------------------------- reading the source


class _ReadOnce(comfy.samplers.Sampler):
    """A sampler of no steps: one pass over the clean latent at sigma 0, which every UNet takes as timestep 0."""

    def sample(
        self,
        model_wrap: object,
        sigmas: Tensor,
        extra_args: dict,
        callback: object,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        sigma = latent_image.new_zeros(latent_image.shape[0])
        positive = model_wrap.conds["positive"]
        options = extra_args["model_options"]
        comfy.samplers.calc_cond_batch(model_wrap.inner_model, [positive], latent_image, sigma, options)
        return latent_image


def _source_conditioning(model: object, latent: Tensor, conditioning: list | None) -> list:
    """The first entry of the conditioning without what places it in a picture; zeros where there is none."""
    config = model.model.model_config.unet_config
    if conditioning:
        tokens, settings = conditioning[0][0], conditioning[0][1]
    else:
        tokens, settings = torch.zeros(1, 77, config.get("context_dim") or 768), {}
    place = ("area", "mask", "set_area_to_bounds", "control", "control_apply_to_uncond", "gligen", "strength")
    schedule = ("start_percent", "end_percent", "timestep_start", "timestep_end", "default")
    settings = {k: v for k, v in settings.items() if k not in place + schedule}
    if settings.get("pooled_output") is None:
        settings["pooled_output"] = torch.zeros(1, 1280)
    if model.model.concat_keys:
        # Inpainting models: nothing is masked, and the picture they are told to keep is the source itself.
        settings["concat_mask"] = latent.new_zeros(1, 1, *latent.shape[2:])
        settings["concat_latent_image"] = latent
    return [[tokens, settings]]


def read_source(
    model: object,
    latent: Tensor,
    parsing: HumanParsing,
    conditioning: list | None = None,
    body: Tensor | None = None,
) -> HostFeatures:
    """Read the source person once: the normed hidden state in front of every self-attention.

    model: a MODEL (LoRA and other patches of it stay in force, HPFA is taken off). latent: [B, C, h, w] as the VAE
    gives it. parsing: of the same pictures. conditioning: CONDITIONING or None for zeros. body: [B, 18, 3].
    """
    unet_of(model, "the model")
    if not bool(latent.isfinite().all()):
        raise TruePoseError(
            "the source's latent holds NaN: the VAE overflowed. Start ComfyUI with --fp32-vae or use another VAE"
        )
    sites: dict[str, Tensor] = {}
    keep_on = comfy.model_management.intermediate_device()

    def record(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        block = (*extra["block"], extra["block_index"])
        sites[site_name(block)] = n.detach().to(keep_on, copy=True)
        return n, context, value

    def wrapper(
        executor: Callable,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        options = dict(transformer_options or {})
        patches = dict(options.get("patches", {}))
        # In front of the others, so that what is stored is what the block was given.
        patches["attn1_patch"] = [record, *patches.get("attn1_patch", [])]
        options["patches"] = patches
        return executor(x, timesteps, context, y, control, options, **kwargs)

    reader = without_hpfa(model)
    reader.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "truepose_source", wrapper)
    guider = comfy.samplers.CFGGuider(reader)
    guider.inner_set_conds({"positive": _source_conditioning(model, latent, conditioning)})
    guider.sample(torch.zeros_like(latent), latent, _ReadOnce(), torch.zeros(1), disable_pbar=True)
    return HostFeatures(family_of(model), sites, (latent.shape[2], latent.shape[3]), parsing, body)


# ------------------------------------------------------------------------------------------------ the patch


@dataclass(frozen=True, eq=False)
class AppliedSource:
    """One Apply HPFA: a source and how it is read. Checked and pruned when made, never changed afterwards.

    omega: weight per region, 7 numbers in [0, 1]. beta, gamma: region match and body match, >= 0. strength: (0, 1].
    sigmas: (highest, lowest) noise at which it works, or None for always. blocks: one of `BLOCKS`.
    keep_unconditional: whether negative rows see the source too. target: P, or None. target_body: [T, 18, 3].
    """

    source: SourceFeatures
    omega: tuple[float, ...]
    beta: float = 0.0
    gamma: float = 0.0
    strength: float = 1.0
    sigmas: tuple[float, float] | None = None
    blocks: str = "all"
    keep_unconditional: bool = False
    target: HumanParsing | None = None
    target_body: Tensor | None = None
    kept: dict[str, tuple[Tensor, Tensor] | None] = field(init=False, repr=False)
    _copies: dict = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        weights = torch.tensor(self.omega)
        kept: dict[str, tuple[Tensor, Tensor] | None] = {}
        by_grid: dict[tuple[int, int], tuple[Tensor, Tensor] | None] = {}
        for site in self.source.sites:
            if site.split(".")[0] not in _PARTS[self.blocks] or self.strength == 0:
                continue
            if bool((weights == 1).all()):
                kept[site] = None
                continue
            grid = self.source.grid(site)
            if grid not in by_grid:
                rows = self.source.regions(site)
                by_grid[grid] = kept_tokens(region_rows_weight(rows, weights))
            if by_grid[grid] is not None:
                kept[site] = by_grid[grid]
        object.__setattr__(self, "kept", kept)

    def __deepcopy__(self, memo: dict) -> AppliedSource:
        # Older hosts copy a model's options deeply at every clone; this object never changes, so it is its own copy.
        return self

    @property
    def has_effect(self) -> bool:
        """False where strength or the region weights leave nothing to read."""
        return bool(self.kept)

    @property
    def matches(self) -> bool:
        """Whether logits depend on the target's position."""
        regions = self.beta > 0 and self.target is not None
        return regions or (self.gamma > 0 and self.target_body is not None and self.source.body is not None)

    def in_window(self, sigma: Tensor | None) -> bool:
        """Whether it works at this noise level. Without a window the sigma is not read: that would wait for the GPU."""
        if self.sigmas is None or sigma is None:
            return True
        return self.sigmas[0] >= float(sigma.flatten()[0]) >= self.sigmas[1]

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run: all kept tokens, and the keys and values of the widest site."""
        total = widest = 0
        for site, kept in self.kept.items():
            tokens = self.source.sites[site]
            count = tokens.shape[0] * (tokens.shape[1] if kept is None else kept[0].shape[1])
            total += count * tokens.shape[2] * itemsize
            widest = max(widest, count * tokens.shape[2] * itemsize)
        return total + 4 * widest

    def on(self, device: torch.device, dtype: torch.dtype, site: str) -> _Kept:
        """The kept tokens of a site on the device, copied at first use and freed by `release`."""
        key = (device, dtype, site)
        with self._lock:
            if key not in self._copies:
                self._copies[key] = self._copy(device, dtype, site)
            return self._copies[key]

    def _copy(self, device: torch.device, dtype: torch.dtype, site: str) -> _Kept:
        tokens, kept = self.source.sites[site], self.kept[site]
        rows = self.source.regions(site) if self.beta > 0 and self.target is not None else None
        body = self.source.coordinates(site) if self.gamma > 0 and self.target_body is not None else None
        log_w = None
        if kept is not None:
            index, log_w = kept
            tokens = gather_tokens(tokens, index)
            rows = None if rows is None else gather_tokens(rows, index)
            body = None if body is None else gather_tokens(body, index)
        if self.strength < 1:
            base = tokens.new_zeros(tokens.shape[:2], dtype=torch.float32) if log_w is None else log_w
            log_w = base + math.log(self.strength)
        if log_w is not None and not bool((log_w != 0).any()):
            log_w = None

        def put(x: Tensor | None, kind: torch.dtype) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=kind)

        # Weights and coordinates stay float32 here: they are rounded once, when they enter the keys.
        return _Kept(put(tokens, dtype), *(put(x, torch.float32) for x in (rows, log_w, body)))

    def release(self) -> None:
        """Free the device copies."""
        with self._lock:
            self._copies.clear()


@dataclass(frozen=True)
class _Kept:
    """What one site reads: tokens [S, K, C], regions [S, K, 7], log_w [S, K], body [S, K, 3] (or None)."""

    tokens: Tensor
    regions: Tensor | None
    log_w: Tensor | None
    body: Tensor | None


class HPFAPatch:
    """The sources of a model, in the order they were applied. Made anew by every Apply, never changed."""

    def __init__(self, applied: tuple[AppliedSource, ...]) -> None:
        self.applied = applied

    def __deepcopy__(self, memo: dict) -> HPFAPatch:
        return self

    def on_model_call(
        self,
        executor: Callable,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The `DIFFUSION_MODEL` wrapper."""
        options = {} if transformer_options is None else transformer_options
        active = [a for a in self.applied if a.in_window(options.get("sigmas"))]
        if active:
            call = _Call(active, x, options)
            options = call.install(executor.class_obj)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def on_cond_batch(
        self, executor: Callable, model: object, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list:
        """The `CALC_COND_BATCH` wrapper: a prompt for an area sees a crop of the latent. Remember which crop."""
        entries = [entry for cond in conds if cond is not None for entry in cond]
        areas = {e["uuid"]: _clip_area(e["area"], x.shape[2:]) for e in entries if e.get("area") is not None}
        if areas and any(a.matches for a in self.applied):
            inner = dict(options.get("transformer_options", {}))
            inner[AREAS] = (tuple(x.shape[2:]), areas)
            options = {**options, "transformer_options": inner}
        return executor(model, conds, x, timestep, options)

    def on_prepare(
        self, executor: Callable, model: object, noise_shape: Sequence[int], *args: object, **kwargs: object
    ) -> object:
        """The `PREPARE_SAMPLING` wrapper: ask for the memory the sources need, as a larger latent would."""
        inference = model.model.manual_cast_dtype or model.model.get_dtype()
        itemsize = comfy.model_management.dtype_size(inference)
        more = sum(a.nbytes(itemsize) for a in self.applied)
        shape = list(noise_shape)
        need = model.model.memory_required([2 * shape[0], *shape[1:]])
        shape[-1] = math.ceil(shape[-1] * (1 + more / max(need, 1)))
        return executor(model, shape, *args, **kwargs)

    def on_cleanup(self, model: object) -> None:
        """The `ON_CLEANUP` callback, at the end of every run, failed ones included."""
        for applied in self.applied:
            applied.release()


def _clip_area(area: Sequence[int], size: Sequence[int]) -> Area:
    height, width, top, left = area
    return min(height, size[0] - top), min(width, size[1] - left), top, left


def applied_sources(model: object) -> tuple[AppliedSource, ...]:
    """The sources that Apply HPFA put on this MODEL."""
    patch = model.attachments.get(KEY)
    return () if patch is None else patch.applied


def with_hpfa(model: object, applied: AppliedSource) -> object:
    """A clone of MODEL that also reads this source. Without effect (strength 0, all weights 0) it is the same model."""
    unet = unet_of(model, "the model")
    _check_fits(model, unet, applied.source)
    if not applied.has_effect:
        return model
    return _patched(model, HPFAPatch((*applied_sources(model), applied)))


def without_hpfa(model: object) -> object:
    """A clone of MODEL that reads no source."""
    return _patched(model, None)


def _patched(model: object, patch: HPFAPatch | None) -> object:
    clone = model.clone()
    wrappers = (
        {}
        if patch is None
        else {
            WrappersMP.DIFFUSION_MODEL: patch.on_model_call,
            WrappersMP.CALC_COND_BATCH: patch.on_cond_batch,
            WrappersMP.PREPARE_SAMPLING: patch.on_prepare,
        }
    )
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.PREPARE_SAMPLING):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, KEY)
    clone.remove_attachments(KEY)
    for kind, wrapper in wrappers.items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    if patch is not None:
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, patch.on_cleanup)
        clone.set_attachments(KEY, patch)
    return clone


def _check_fits(model: object, unet: UNetModel, source: SourceFeatures) -> None:
    family = family_of(model)
    widths = {site: attn.to_k.in_features for site, (_, attn) in self_attentions(unet).items()}
    theirs = {site: tokens.shape[2] for site, tokens in source.sites.items()}
    if family != source.family or widths != theirs:
        raise TruePoseError(
            f"the source was read with a {source.family} model ({len(theirs)} attention sites), and this model is "
            f"{family} ({len(widths)} sites); connect a model of the same family to SourceNet Encode and Apply HPFA"
        )


def sigma_window(model: object, start: float, end: float) -> tuple[float, float] | None:
    """(highest, lowest) sigma of a range of the sampling, given as fractions 0..1; None for all of it."""
    if start <= 0 and end >= 1:
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


# ------------------------------------------------------------------------------------- one call of the UNet


class _Call:
    """What one call of the UNet needs to know: who is in the batch, and which part of the picture they see."""

    def __init__(self, active: list[AppliedSource], x: Tensor, options: dict) -> None:
        self.active, self.options = active, options
        self.batch = x.shape[0]
        self.chunks: list[int] = list(options.get("cond_or_uncond") or [0])
        if self.batch % len(self.chunks):
            self.chunks = [0]
        self.rows = self.batch // len(self.chunks)
        self.size, areas = options.get(AREAS, (tuple(x.shape[2:]), {}))
        uuids = options.get("uuids") or []
        self.areas: list[Area | None] = [
            areas.get(uuids[i]) if i < len(uuids) else None for i in range(len(self.chunks))
        ]
        if tuple(x.shape[2:]) != tuple(self.size) and not any(self.areas):
            self.size = tuple(x.shape[2:])
        self._targets: dict = {}
        for applied in active:
            self._check_batch(applied)

    def _check_batch(self, applied: AppliedSource) -> None:
        counts = {"source images": applied.source.batch}
        if applied.target is not None and applied.beta > 0:
            counts["target parsings"] = applied.target.batch
        if applied.target_body is not None and applied.gamma > 0:
            counts["target poses"] = applied.target_body.shape[0]
        for what, count in counts.items():
            if self.rows % count:
                raise TruePoseError(
                    f"there are {count} {what} and {self.rows} latents in the batch; "
                    f"expected 1 or a number that divides {self.rows}"
                )

    def install(self, unet: UNetModel) -> dict:
        """New transformer options with our replace on every block that a source knows and nobody else owns."""
        options = dict(self.options)
        replaces = dict(options.get("patches_replace", {}))
        attn1 = dict(replaces.get("attn1", {}))
        wanted = {site for applied in self.active for site in applied.kept}
        for site, (block, attn) in self_attentions(unet).items():
            if site not in wanted:
                continue
            if block in attn1 or block[:2] in attn1:
                say_once(f"HPFA leaves block {site} alone: another node replaces its self-attention")
                continue
            attn1[block] = _Replace(self, site, attn)
        replaces["attn1"] = attn1
        options["patches_replace"] = replaces
        return options

    def groups(self) -> Iterator[tuple[list[int], list[AppliedSource]]]:
        """Chunks of the batch that see the same sources: (chunk numbers, sources)."""
        seen: dict[tuple[int, ...], list[int]] = {}
        for number, kind in enumerate(self.chunks):
            visible = tuple(i for i, a in enumerate(self.active) if a.keep_unconditional or kind != UNCONDITIONAL)
            seen.setdefault(visible, []).append(number)
        for visible, numbers in seen.items():
            yield numbers, [self.active[i] for i in visible]

    def target_rows(self, applied: AppliedSource, grid: tuple[int, int], chunks: list[int]) -> Tensor | None:
        """P for these chunks, one after the other: [rows, N, 7], or None."""
        if applied.beta == 0 or applied.target is None:
            return None
        return self._rows_for(applied, "regions", grid, chunks)

    def target_places(self, applied: AppliedSource, grid: tuple[int, int], chunks: list[int]) -> Tensor | None:
        """Body coordinates for these chunks: [rows, N, 3], or None."""
        if applied.gamma == 0 or applied.target_body is None or applied.source.body is None:
            return None
        return self._rows_for(applied, "body", grid, chunks)

    def _rows_for(self, applied: AppliedSource, what: str, grid: tuple[int, int], chunks: list[int]) -> Tensor:
        parts = []
        for chunk in chunks:
            key = (id(applied), what, grid, self.areas[chunk])
            if key not in self._targets:
                self._targets[key] = self._sample(applied, what, grid, self.areas[chunk])
            rows = self._targets[key]
            parts.append(rows.repeat_interleave(self.rows // rows.shape[0], 0))
        return torch.cat(parts)

    def _sample(self, applied: AppliedSource, what: str, grid: tuple[int, int], area: Area | None) -> Tensor:
        aspect = self.size[1] / self.size[0]

        def rows(height: int, width: int) -> Tensor:
            if what == "body":
                return body_coordinates(applied.target_body, height, width, aspect)
            return applied.target.tokens(height, width)

        if area is None:
            return rows(*grid)
        height, width, top, left = area
        whole = rows(*self.size).mT.unflatten(2, tuple(self.size))
        crop = whole[:, :, top : top + height, left : left + width]
        return adaptive_avg_pool2d(crop, grid).flatten(2).mT


class _Replace:
    """The attn1 replace of one block in one call. Takes projected q, k, v [rows, tokens, heads * D]."""

    def __init__(self, call: _Call, site: str, attn: torch.nn.Module) -> None:
        self.call, self.site, self.attn = call, site, attn

    def __deepcopy__(self, memo: dict) -> _Replace:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict, mask: Tensor | None = None) -> Tensor:
        call = self.call
        if k.shape[0] != q.shape[0]:
            # HyperTile folds tiles of the queries into the batch; the host's attention would fold k and v the same way.
            k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
        height, width = extra["activations_shape"][-2:]
        folds, rest = divmod(q.shape[0], call.batch)
        whole = folds >= 1 and rest == 0
        in_place = folds == 1 and rest == 0 and q.shape[1] == height * width
        if not in_place and any(a.matches for a in call.active):
            say_once("region match and body match are off where another node (HyperTile, ToMe) cuts or merges tokens")
        projected: dict[int, tuple[Tensor, Tensor]] = {}
        if not whole:
            # Another node hands over some of the rows and does not say which: all of them read what fits any row.
            sources = [a for a in call.active if a.source.batch == 1]
            return self._attend(q, k, v, extra, sources, None, None, projected)
        groups = list(call.groups())
        grid = (height, width) if in_place else None
        if len(groups) == 1:
            return self._attend(q, k, v, extra, groups[0][1], groups[0][0], grid, projected)
        size = call.rows * folds
        parts: dict[int, Tensor] = {}
        for chunks, sources in groups:
            a, b, c = (torch.cat([x[i * size : (i + 1) * size] for i in chunks]) for x in (q, k, v))
            out = self._attend(a, b, c, extra, sources, chunks, grid, projected)
            parts.update(zip(chunks, out.split(size), strict=True))
        return torch.cat([parts[i] for i in range(len(call.chunks))])

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: dict,
        sources: list[AppliedSource],
        chunks: list[int] | None,
        grid: tuple[int, int] | None,
        projected: dict[int, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Attention of rows that all see `sources`. chunks: which chunks they are, None for unknown rows.
        grid: the token grid, None where tokens are not one per cell."""
        heads = self.attn.heads
        width = q.shape[-1] // heads
        precision = extra.get("attn_precision", self.attn.attn_precision)
        tokens, channels = [], []
        for applied in sources:
            if self.site not in applied.kept:
                continue
            kept = applied.on(q.device, q.dtype, self.site)
            if id(applied) not in projected:
                projected[id(applied)] = (self.attn.to_k(kept.tokens), self.attn.to_v(kept.tokens))
            ks, vs = projected[id(applied)]
            regions = places = None
            if grid is not None and chunks is not None:
                regions = self.call.target_rows(applied, grid, chunks)
                places = self.call.target_places(applied, grid, chunks)
            source = SourceTokens(_heads(ks, heads), _heads(vs, heads), kept.regions, kept.log_w, kept.body)
            source = _spread(source, q.shape[0], chunks)
            channels.append(
                match_channels(
                    source,
                    _heads(q, heads),
                    target_regions=None if regions is None else regions.to(q.device),
                    beta=applied.beta,
                    target_body=None if places is None else places.to(q.device),
                    gamma=applied.gamma,
                )
            )
            tokens.append(source)
        if all(c is None for c in channels):
            for source in tokens:
                k = torch.cat([k, _merge(source.k).expand(k.shape[0], -1, -1)], 1)
                v = torch.cat([v, _merge(source.v).expand(v.shape[0], -1, -1)], 1)
            return host_attention.optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra
            )
        joined = SourceTokens(
            torch.cat([s.k.expand(q.shape[0], -1, -1, -1) for s in tokens], 2),
            torch.cat([s.v.expand(q.shape[0], -1, -1, -1) for s in tokens], 2),
        )
        counts = [s.k.shape[2] for s in tokens]
        q, k, v = augment(*(_heads(x, heads) for x in (q, k, v)), joined, _side_by_side(channels, counts))
        # The host's attention scales by the width it is given; the formula wants that of the unpadded head.
        q = q * (q.shape[-1] / width) ** 0.5
        out = host_attention.optimized_attention(
            q, k, v, heads, attn_precision=precision, skip_reshape=True, transformer_options=extra
        )
        return out.unflatten(-1, (heads, -1))[..., :width].flatten(-2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


def _spread(source: SourceTokens, rows: int, chunks: list[int] | None) -> SourceTokens:
    """A batch of sources repeated to the rows: within every chunk, each source serves the same number of rows."""
    batch = source.k.shape[0]
    if batch == 1:
        return source
    size = rows // len(chunks)
    index = (torch.arange(size, device=source.k.device) * batch // size).repeat(len(chunks))

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index]

    return SourceTokens(*(pick(x) for x in (source.k, source.v, source.regions, source.log_w, source.body)))


def _side_by_side(channels: list[tuple[Tensor, Tensor] | None], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Spare channels of several sources as one pair: each source has channels of its own, zero for the others."""
    present = [c for c in channels if c is not None]
    if len(channels) == 1:
        return present[0]
    query = torch.cat([q for q, _ in present], -1)
    batch = max(k.shape[0] for _, k in present)
    keys, left = [], 0
    for pair, count in zip(channels, counts, strict=True):
        if pair is None:
            keys.append(query.new_zeros((batch, 1, count, query.shape[-1])))
            continue
        width = pair[1].shape[-1]
        key = pair[1].expand(batch, -1, -1, -1)
        keys.append(pad(key, (left, query.shape[-1] - left - width)))
        left += width
    return query, torch.cat(keys, 2)
