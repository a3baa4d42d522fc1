"""Patching a MODEL with HPFA and CAA (`with_hpfa`, `with_caa`), a pose (`with_pose`), or channels beside its latent.

A patch is a `DIFFUSION_MODEL` wrapper. Nothing stays in the options between calls, and patch objects never change once
made; what one call needs is in call.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from truepose_core.attention.fusion import row_index
from truepose_core.errors import TruePoseError
from truepose_core.source.features import SourceFeatures

from .applied import AppliedCAA, AppliedSource
from .call import _Call
from .unet import GUIDANCE, NOTHING, POSE_ONLY, family_of, in_window, self_attentions, unet_of, with_areas, with_patches

KEY = "truepose_hpfa"
POSE_KEY = "truepose_pose"


class HPFAPatch:
    """The sources of a model and its CAAs, in the order they were applied. Made anew by every Apply, never changed."""

    def __init__(self, applied: tuple[AppliedSource, ...], caas: tuple[AppliedCAA, ...] = ()) -> None:
        self.applied, self.caas = applied, caas

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
        hidden = options.get(GUIDANCE) in (NOTHING, POSE_ONLY)
        sigma = options.get("sigmas")
        active = [] if hidden else [a for a in self.applied if a.in_window(sigma)]
        caas = [c for c in self.caas if (c.empty or not hidden) and in_window(c.sigmas, sigma)]
        if not active and not caas:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        trained = next((c for c in self.caas if c.trained), None)
        call = _Call(active, x, options, caas, trained, hidden)
        call.read_sources(timesteps)
        options = call.install(executor.class_obj)
        return call.carried(executor(x, timesteps, context, y, control, options, **kwargs), 1)

    def on_cond_batch(
        self, executor: Callable, model: object, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list:
        """The `CALC_COND_BATCH` wrapper: a prompt for an area sees a crop of the latent. Remember which crop."""
        if self.caas or any(a.matches for a in self.applied):
            options = with_areas(conds, x, options)
        return executor(model, conds, x, timestep, options)

    def on_prepare(
        self, executor: Callable, model: object, noise_shape: Sequence[int], *args: object, **kwargs: object
    ) -> object:
        """The `PREPARE_SAMPLING` wrapper: ask for the memory the sources need, as a larger latent would."""
        inference = model.model.manual_cast_dtype or model.model.get_dtype()
        itemsize = comfy.model_management.dtype_size(inference)
        more = sum(a.nbytes(itemsize) for a in (*self.applied, *self.caas))
        shape = list(noise_shape)
        need = model.model.memory_required([2 * shape[0], *shape[1:]])
        shape[-1] = math.ceil(shape[-1] * (1 + more / max(need, 1)))
        return executor(model, shape, *args, **kwargs)

    def on_cleanup(self, model: object) -> None:
        """The `ON_CLEANUP` callback, at the end of every run, failed ones included."""
        for applied in (*self.applied, *self.caas):
            applied.release()


def applied_sources(model: object) -> tuple[AppliedSource, ...]:
    """The sources that Apply HPFA put on this MODEL."""
    patch = model.attachments.get(KEY)
    return () if patch is None else patch.applied


def applied_caas(model: object) -> tuple[AppliedCAA, ...]:
    """What Apply CAA put on this MODEL."""
    patch = model.attachments.get(KEY)
    return () if patch is None else patch.caas


def with_hpfa(model: object, applied: AppliedSource) -> object:
    """A clone of MODEL that also reads this source. Without effect (strength 0, all weights 0) it is the same model."""
    unet = unet_of(model, "the model")
    _check_fits(model, unet, applied.source)
    reader = applied.reader
    if reader is not None and reader.noise is None and reader.model.model is model.model:
        raise TruePoseError(
            "this is the SourceNet that reads the source; connect the model output of Load TruePose Model"
        )
    if not applied.has_effect:
        return model
    added = [applied]
    nothing = getattr(applied.source, "nothing", None)
    if nothing is not None:
        added = [
            replace(applied, keep_unconditional=False),
            replace(applied, source=nothing, keep_unconditional=False, only_unconditional=True),
        ]
    return _patched(model, (*applied_sources(model), *added), applied_caas(model))


def without_hpfa(model: object) -> object:
    """A clone of MODEL that reads no source. What Apply CAA put on it stays."""
    return _patched(model, (), applied_caas(model))


def with_caa(model: object, applied: AppliedCAA) -> object:
    """A clone of MODEL that also reads these region tokens. Tokens that the model learned with take the place of those
    of another Apply CAA; others add up."""
    others = [c for c in applied_caas(model) if not (c.trained and applied.trained)]
    return _patched(model, applied_sources(model), (*others, applied))


def without_caa(model: object) -> object:
    """A clone of MODEL without Apply CAA."""
    return _patched(model, applied_sources(model), ())


def _source_nets(model: object, sources: Sequence[AppliedSource]) -> list:
    """The MODELs beside this one that read these sources anew at every step, each net once. Raises TruePoseError where
    a net would have to be patched in two ways."""
    found: dict[int, object] = {}
    for applied in sources:
        # A checkpoint that reads for itself is loaded already, and reads with the weights that it samples with.
        if applied.reader is None or applied.reader.model.model is model.model:
            continue
        net = applied.reader.model
        if found.setdefault(id(net.model), net).patches_uuid != net.patches_uuid:
            raise TruePoseError(
                "two sources are read at every step by one SourceNet with different LoRA or other patches; read both "
                "with the same, or set source_reading to once"
            )
    return list(found.values())


def _patched(model: object, sources: tuple[AppliedSource, ...], caas: tuple[AppliedCAA, ...]) -> object:
    patch = HPFAPatch(sources, caas) if sources or caas else None
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
    clone.remove_additional_models(KEY)
    nets = _source_nets(model, sources)
    if nets:
        clone.set_additional_models(KEY, nets)
    for kind, wrapper in wrappers.items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    if patch is not None:
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, patch.on_cleanup)
        clone.set_attachments(KEY, patch)
    return clone


class PosePatch:
    """The pose of a model: what is added after conv_in, [T, C0, h, w]. Never changed once made."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def __deepcopy__(self, memo: dict) -> PosePatch:
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
        if options.get(GUIDANCE) != NOTHING:
            options = {**options, "patches": with_patches(options, {"input_block_patch": [self._add]})}
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _add(self, h: Tensor, options: dict) -> Tensor:
        if options["block"] != ("input", 0):
            return h
        chunks = len(options.get("cond_or_uncond") or [0])
        count, size = self.embedding.shape[0], tuple(self.embedding.shape[2:])
        if tuple(h.shape[2:]) != size:
            raise TruePoseError(
                f"the latent is {h.shape[3]}x{h.shape[2]} cells and this TruePose model makes pictures of "
                f"{size[1]}x{size[0]} cells; connect Empty TruePose Latent"
            )
        rows, rest = divmod(h.shape[0], chunks)
        if rest or rows % count:
            raise TruePoseError(
                f"there are {count} target poses and {h.shape[0] // chunks} latents in the batch; "
                "expected 1 pose or a number that divides the latents"
            )
        index = row_index(count, h.shape[0], chunks, self.embedding.device)
        return h + self.embedding[index].to(h)


def with_pose(model: object, embedding: Tensor) -> object:
    """A clone of MODEL that makes its pictures in this pose; another pose on it is replaced."""
    patch = PosePatch(embedding)
    clone = without_pose(model)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, POSE_KEY, patch.on_model_call)
    clone.set_attachments(POSE_KEY, patch)
    return clone


def without_pose(model: object) -> object:
    """A clone of MODEL without Apply Pose Encoder."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, POSE_KEY)
    clone.remove_attachments(POSE_KEY)
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


# ------------------------------------------------------------------------------------- channels beside the latent

CHANNELS_KEY = "truepose_channels"


class ChannelsPatch:
    """What TargetNet's conv_in reads beside the noisy latent, [T, C, h, w]. Never changed once made."""

    def __init__(self, channels: Tensor, without_pose: Tensor) -> None:
        self.channels, self.without_pose = channels, without_pose

    def __deepcopy__(self, memo: dict) -> ChannelsPatch:
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
        added = self.without_pose if options.get(GUIDANCE) == NOTHING else self.channels
        chunks, count = len(options.get("cond_or_uncond") or [0]), added.shape[0]
        if tuple(x.shape[2:]) != tuple(added.shape[2:]):
            raise TruePoseError(
                f"the latent is {x.shape[3]}x{x.shape[2]} cells and this model was given a pose of "
                f"{added.shape[3]}x{added.shape[2]} cells; connect Empty TruePose Latent"
            )
        rows, rest = divmod(x.shape[0], chunks)
        if rest or rows % count:
            raise TruePoseError(
                f"there are {count} target poses and {x.shape[0] // chunks} latents in the batch; "
                "expected 1 pose or a number that divides the latents"
            )
        index = row_index(count, x.shape[0], chunks, added.device)
        return executor(torch.cat([x, added[index].to(x)], 1), timesteps, context, y, control, options, **kwargs)


def with_channels(model: object, channels: tuple[Tensor, Tensor]) -> object:
    """A clone of MODEL whose conv_in also reads these (see `Adapter.channels`); others on it are replaced."""
    patch = ChannelsPatch(*channels)
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, CHANNELS_KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, CHANNELS_KEY, patch.on_model_call)
    return clone
