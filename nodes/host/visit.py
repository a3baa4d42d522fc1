"""Calls of a MODEL's UNet outside of a sampling, with all that the host does around one: loading, casting, patches."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
from torch import Tensor

Call = Callable[[Tensor, Tensor], None]
"""(x [B, C, h, w] as the host hands it to a UNet, sigma [B]): one call on the positive prompt."""


class Visit(comfy.samplers.Sampler):
    """A sampler of no steps: `calls` makes what calls it wants, and the latent comes back as it was."""

    def calls(self, sampling: object, latent: Tensor, noise: Tensor, sigmas: Tensor, call: Call) -> None:
        """sampling: the MODEL's. latent, noise: [B, C, h, w], the latent scaled as the UNet takes it."""
        raise NotImplementedError

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
        """As the host calls it."""
        model, positive, options = model_wrap.inner_model, model_wrap.conds["positive"], extra_args["model_options"]

        def call(x: Tensor, sigma: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            comfy.samplers.calc_cond_batch(model, [positive], x, sigma, options)

        self.calls(model.model_sampling, latent_image, noise, sigmas, call)
        return latent_image
