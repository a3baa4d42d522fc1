"""What the pipelines have in common: where they are, what they refuse, and the way from noise to pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.pipeline.sampling import denoise, step_callback

Self = TypeVar("Self", bound="TransferPipeline")


class TransferPipeline(DiffusionPipeline):
    """A diffusers pipeline around `model`, whose `target_net` makes the pictures and whose `codec` decodes them."""

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    model: Any = None

    @property
    def device(self) -> torch.device:
        """Where TargetNet's weights are. (Not every component is a diffusers model that could be asked.)"""
        return self.target_net.device

    @property
    def dtype(self) -> torch.dtype:
        """TargetNet's type."""
        return self.target_net.dtype

    def to(self: Self, *args: Any, silence_dtype_warnings: bool = False, **kwargs: Any) -> Self:
        """Move every network to a device or type, as `torch.nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        generators: Sequence[torch.Generator],
        callback: Callable[[Any, int, int, dict], dict] | None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] on the CPU, from noise [B, C, h, w]; for `predict` see `denoise`. The
        scheduler has its timesteps. Raises TruePoseError for NaN."""
        latents = denoise(
            predict,
            self.scheduler,
            noise.to(self._execution_device),
            generators,
            on_step=step_callback(self, callback),
            progress=self.progress_bar,
        )
        images = self.model.codec.decode(latents.to(self.model.dtype)).float().cpu()
        self.maybe_free_model_hooks()
        if not torch.isfinite(images).all():
            raise TruePoseError(
                f"the model produced NaN in {self.model.dtype}; try float32 or bfloat16, or check the weights"
            )
        return images


def check_call(
    target_body: Tensor, sources: int, steps: int, strength: float, numbers: Mapping[str, float], hint: str = ""
) -> None:
    """Raise TruePoseError unless keypoints [B, 18, 3] show somebody in each of the B poses, which so many sources can
    share, and the numbers are at least 0, the strength at most 1. hint: said behind a number that is none."""
    if target_body.ndim != 3 or target_body.shape[1:] != (18, 3):
        raise TruePoseError(f"target keypoints are {tuple(target_body.shape)}; expected [B, 18, 3]")
    if not bool((target_body[..., 2] > 0).any(1).all()):
        raise TruePoseError("a target pose has no keypoint at all; expected at least one person per pose")
    if target_body.shape[0] % sources:
        raise TruePoseError(
            f"{target_body.shape[0]} target poses cannot be shared among {sources} sources; "
            "expected the same number for each"
        )
    if steps < 1:
        raise TruePoseError(f"{steps} sampling steps; expected at least 1")
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise TruePoseError(f"{name} is {value}; expected a number of at least 0{hint}")
    if not 0 <= strength <= 1:
        raise TruePoseError(f"strength is {strength}; expected 0 to 1")
