"""Patching a MODEL with HPFA and CAA (`with_hpfa`, `with_caa`), a pose (`with_pose`), or channels beside its latent.

Nothing stays in the options between calls; what one call needs is in call.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.source.features import SourceFeatures

from .applied import AppliedCAA, AppliedSource
from .base import UNetCall, UNetPatch, dressed, undressed
from .batch import Batch, check_cells, with_option
from .call import WEIGHTS, SourceCall
from .unet import GUIDANCE, NOTHING, POSE_ONLY, family_of, in_window, self_attentions, unet_of, with_patches

KEY = "truepose_hpfa"
POSE_KEY = "truepose_pose"


class HPFAPatch(UNetPatch):
    """The sources of a model and its CAAs, in the order they were applied. Made anew by every Apply, never changed."""

    key = KEY

    def __init__(self, applied: tuple[AppliedSource, ...], caas: tuple[AppliedCAA, ...] = ()) -> None:
        super().__init__()
        self.applied, self.caas = applied, caas

    @property
    def wrappers(self) -> Mapping[str, Callable]:
        return {
            **super().wrappers,
            WrappersMP.CALC_COND_BATCH: self.on_cond_batch,
            WrappersMP.PREPARE_SAMPLING: self.on_prepare,
        }

    @property
    def matches(self) -> bool:
        return bool(self.caas) or any(a.matches for a in self.applied)

    def around(self, call: UNetCall) -> Tensor:
        hidden = call.options.get(GUIDANCE) in (NOTHING, POSE_ONLY)
        sigma = call.options.get("sigmas")
        active = [] if hidden else [a for a in self.applied if a.in_window(sigma)]
        caas = [c for c in self.caas if (c.empty or not hidden) and in_window(c.sigmas, sigma)]
        if not active and not caas:
            return call.run()
        trained = next((c for c in self.caas if c.trained), None)
        reads = SourceCall(self.cache, active, call.x, call.options, caas, trained, hidden)
        reads.read_sources(call.timesteps)
        return reads.carried(call.run(options=reads.install(call.unet)), 1)

    def on_cond_batch(
        self, executor: Callable, model: object, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list:
        """The `CALC_COND_BATCH` wrapper. Besides areas: whether K and V may be kept."""
        patcher = model.current_patcher
        if patcher is not None and not patcher.hook_patches:
            options = with_option(options, WEIGHTS, patcher.patches_uuid)
        return super().on_cond_batch(executor, model, conds, x, timestep, options)

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
    if not sources and not caas:
        return undressed(model, KEY)
    return dressed(model, HPFAPatch(sources, caas), _source_nets(model, sources))


class PosePatch(UNetPatch):
    """The pose of a model: what is added after conv_in, [T, C0, h, w]."""

    key = POSE_KEY

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def around(self, call: UNetCall) -> Tensor:
        if call.options.get(GUIDANCE) == NOTHING:
            return call.run()
        patches = with_patches(call.options, {"input_block_patch": [self._add]})
        return call.run(options={**call.options, "patches": patches})

    def _add(self, h: Tensor, options: dict) -> Tensor:
        return h + _shared(self.embedding, h, options) if options["block"] == ("input", 0) else h


def _shared(made: Tensor, x: Tensor, options: Mapping) -> Tensor:
    """What was made of T target poses, [T, C, h, w], for each row of x [rows, _, h, w]."""
    check_cells(x.shape[2:], made.shape[2:])
    batch = Batch.of(x, options)
    batch.check({"target poses": len(made)})
    return made[batch.index(len(made), made.device)].to(x)


def with_pose(model: object, embedding: Tensor) -> object:
    """A clone of MODEL that makes its pictures in this pose; another pose on it is replaced."""
    return dressed(model, PosePatch(embedding))


def without_pose(model: object) -> object:
    """A clone of MODEL without Apply Pose Encoder."""
    return undressed(model, POSE_KEY)


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


class ChannelsPatch(UNetPatch):
    """What TargetNet's conv_in reads beside the noisy latent, [T, C, h, w]: with the pose, and without it."""

    key = CHANNELS_KEY

    def __init__(self, channels: Tensor, without_pose: Tensor) -> None:
        super().__init__()
        self.channels, self.without_pose = channels, without_pose

    def around(self, call: UNetCall) -> Tensor:
        added = self.without_pose if call.options.get(GUIDANCE) == NOTHING else self.channels
        return call.run(x=torch.cat([call.x, _shared(added, call.x, call.options)], 1))


def with_channels(model: object, channels: tuple[Tensor, Tensor]) -> object:
    """A clone of MODEL whose conv_in also reads these (see `Adapter.channels`); others on it are replaced."""
    return dressed(model, ChannelsPatch(*channels))
