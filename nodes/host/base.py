"""What the patches of a MODEL have in common: how they are put on and taken off, one shape for a call of the UNet, and
what is kept for the time of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from .batch import with_areas

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

T = TypeVar("T")
KINDS = (
    WrappersMP.DIFFUSION_MODEL,
    WrappersMP.APPLY_MODEL,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.PREPARE_SAMPLING,
)


class RunCache:
    """What is made at first use and kept until `clear`, such as copies on the devices in use. Threads may share it."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Hashable, object]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> RunCache:
        return self

    def __len__(self) -> int:
        return len(self._made)

    def versions(self) -> set:
        """The versions of all that it holds."""
        return {version for version, _ in self._made.values()}

    def of(self, key: Hashable, make: Callable[[], T], version: Hashable = None) -> T:
        """What is kept under a key, made where it is not there. One of another version is freed first."""
        with self._lock:
            if key not in self._made or self._made[key][0] != version:
                self._made.pop(key, None)
                self._made[key] = (version, make())
            return self._made[key][1]

    def clear(self) -> None:
        """Free everything."""
        with self._lock:
            self._made.clear()


class Patch:
    """What one of our nodes put on a MODEL, and its wrappers, under a key of its own. Never changed once made; `cache`
    is what a run keeps."""

    key: ClassVar[str]

    def __init__(self) -> None:
        self.cache = RunCache()

    def __deepcopy__(self, memo: dict) -> Patch:
        # Older hosts copy a model's options deeply at every clone; a patch never changes, so it is its own copy.
        return self

    @property
    def wrappers(self) -> Mapping[str, Callable]:
        """The host's kind of wrapper -> ours."""
        raise NotImplementedError

    @property
    def matches(self) -> bool:
        """Whether it has to know which part of the picture a prompt for an area sees."""
        return False

    def on_cond_batch(
        self, executor: Callable, model: object, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list:
        """The `CALC_COND_BATCH` wrapper: a prompt for an area sees a crop of the latent. Remember which crop."""
        if self.matches and x.dim() == 4:
            options = with_areas(conds, x, options)
        return executor(model, conds, x, timestep, options)

    def on_cleanup(self, model: object) -> None:
        """The `ON_CLEANUP` callback, at the end of every run, failed ones included."""
        self.cache.clear()


@dataclass(frozen=True, eq=False)
class UNetCall:
    """One call of the UNet, as a `DIFFUSION_MODEL` wrapper gets it."""

    executor: Callable
    x: Tensor
    timesteps: Tensor | None
    context: Tensor | None
    y: Tensor | None
    control: object
    options: dict
    more: dict

    @property
    def unet(self) -> UNetModel:
        """The network that is called."""
        return self.executor.class_obj

    def run(self, **changes: object) -> Tensor:
        """The prediction, with x, context or options changed."""
        now = replace(self, **changes)
        return self.executor(now.x, now.timesteps, now.context, now.y, now.control, now.options, **now.more)


class UNetPatch(Patch):
    """A patch that stands around every call of the UNet."""

    @property
    def wrappers(self) -> Mapping[str, Callable]:
        return {WrappersMP.DIFFUSION_MODEL: self.on_model_call}

    def on_model_call(
        self,
        executor: Callable,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        transformer_options: dict | None = None,
        **more: object,
    ) -> Tensor:
        """The `DIFFUSION_MODEL` wrapper."""
        options = {} if transformer_options is None else transformer_options
        return self.around(UNetCall(executor, x, timesteps, context, y, control, options, more))

    def around(self, call: UNetCall) -> Tensor:
        """What the call gives with this patch."""
        raise NotImplementedError


def undressed(model: ModelPatcher, *keys: str) -> ModelPatcher:
    """A clone of MODEL without what our nodes put on it under these keys."""
    clone = model.clone()
    for key in keys:
        for kind in KINDS:
            clone.remove_wrappers_with_key(kind, key)
        clone.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)
        clone.remove_attachments(key)
        clone.remove_additional_models(key)
    return clone


def dressed(model: ModelPatcher, patch: Patch, nets: Sequence[ModelPatcher] = ()) -> ModelPatcher:
    """A clone of MODEL with this patch, in the place of one of its kind. nets: MODELs that the host loads beside it."""
    clone = undressed(model, patch.key)
    for kind, wrapper in patch.wrappers.items():
        clone.add_wrapper_with_key(kind, patch.key, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, patch.key, patch.on_cleanup)
    clone.set_attachments(patch.key, patch)
    if nets:
        clone.set_additional_models(patch.key, list(nets))
    return clone
