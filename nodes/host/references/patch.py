"""Guiding editors that hold their references as tokens (`with_guide`): the patch, and what stands beside it.

An `APPLY_MODEL` wrapper (one signature for all families and versions) reads `ref_latents`; what one call needs is in
call.py. Nothing stays in the options between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing

from ..base import Patch, dressed, undressed
from ..batch import UNCONDITIONAL
from ..unet import in_window, say_once
from .call import ReferenceCall
from .guide import ReferenceGuide, family_of

KEY = "truepose_references"
GREY = 0.5


class GuidePatch(Patch):
    """The guides of a model, in the order they were applied. Made anew by every Guide References."""

    key = KEY

    def __init__(self, guides: tuple[ReferenceGuide, ...]) -> None:
        super().__init__()
        self.guides = guides

    @property
    def wrappers(self) -> Mapping[str, Callable]:
        return {WrappersMP.APPLY_MODEL: self.on_model_call, WrappersMP.CALC_COND_BATCH: self.on_cond_batch}

    @property
    def matches(self) -> bool:
        return any(g.matches for g in self.guides)

    def on_model_call(
        self,
        executor: Callable,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: object = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The `APPLY_MODEL` wrapper."""
        options = {} if transformer_options is None else transformer_options
        active = [g for g in self.guides if in_window(g.sigmas, options.get("sigmas"))]
        references = kwargs.get("ref_latents") or []
        kinds = set(options.get("cond_or_uncond") or [0])
        if kinds != {UNCONDITIONAL}:
            self._check(references)
        active = [g for g in active if g.reference <= len(references)]
        if active:
            unet = executor.class_obj.diffusion_model
            call = ReferenceCall(self.cache, active, unet, x, references, c_crossattn, options, kwargs)
            options = call.install()
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _check(self, references: Sequence[Tensor]) -> None:
        if not references:
            say_once(
                "Guide References does nothing: the conditioning holds no reference latent. Connect ReferenceLatent or "
                "the model's own image edit encoder with a VAE"
            )
            return
        for guide_ in self.guides:
            if guide_.reference > len(references):
                raise TruePoseError(
                    f"Guide References is for reference {guide_.reference}, and the conditioning holds "
                    f"{len(references)}"
                )


def guides_of(model: object) -> tuple[ReferenceGuide, ...]:
    """What Guide References put on this MODEL."""
    patch = model.attachments.get(KEY)
    return () if patch is None else patch.guides


def with_guide(model: object, added: ReferenceGuide) -> object:
    """A clone of MODEL that reads this reference so. Weights of several guides for one reference multiply. Without
    effect, and where the family holds no reference tokens (said once), it is the same model."""
    if family_of(model) is None:
        say_once(
            f"Guide References does nothing: {type(model.model).__name__} holds no references as tokens. Use FLUX.1 "
            "Kontext, FLUX.2, LongCat-Image-Edit, Qwen-Image-Edit, OmniGen2 or Z-Image Omni"
        )
        return model
    if not added.has_effect:
        return model
    return _patched(model, (*guides_of(model), added))


def without_guides(model: object) -> object:
    """A clone of MODEL without Guide References."""
    return _patched(model, ())


def _patched(model: object, guides: tuple[ReferenceGuide, ...]) -> object:
    return dressed(model, GuidePatch(guides)) if guides else undressed(model, KEY)


def hide_regions(image: Tensor, parsing: HumanParsing, omega: Sequence[float]) -> Tensor:
    """The picture with regions of weight 0 painted grey: image [B, 3, H, W], parsing of the same size or batch 1."""
    hidden = torch.tensor([float(w == 0) for w in omega])
    share = torch.einsum("brhw,r->bhw", parsing.masks, hidden.to(parsing.masks))[:, None].to(image)
    return image * (1 - share) + GREY * share


def nothing_to_show(why: str) -> ExecutionBlocker:
    """An output that stops what is connected to it, with a reason."""
    return ExecutionBlocker(why)
