"""Guidance with a scale of its own for the pose and for the source, and what region weights do to CAA's tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from truepose_core.attention.caa import RegionTokens
from truepose_core.regions import Region
from truepose_core.source.features import SourceFeatures


def combine_guidance(
    nothing: Tensor | None, pose: Tensor | None, full: Tensor | None, w_pose: float, w_source: float
) -> Tensor:
    """e = e0 + w_pose (e_pose - e0) + w_source (e_full - e_pose) (design, Guidance; ours, after the two-scale guidance
    of CFLD). A term whose factor is 0 may be None."""
    terms = zip(guidance_factors(w_pose, w_source), (nothing, pose, full), strict=True)
    parts = [factor * value for factor, value in terms if factor != 0]
    return sum(parts[1:], parts[0])


def guidance_factors(w_pose: float, w_source: float) -> tuple[float, float, float]:
    """Factors of (e0, e_pose, e_full): only predictions with a factor other than 0 need computing."""
    return 1 - w_pose, w_pose - w_source, w_source


def rescale_guidance(guided: Tensor, full: Tensor, phi: float) -> Tensor:
    """Guidance rescaling (arXiv 2305.08891, section 3.4): phi of the way towards the spread of the prediction that sees
    all. guided, full: [B, C, h, w]; phi >= 0 (Leffa goes beyond 1)."""
    spread, wanted = (x.flatten(1).std(1)[:, None, None, None] for x in (guided, full))
    return guided * (phi * wanted / spread + 1 - phi)


def weigh_region_tokens(features: SourceFeatures, omega: Tensor | None, strength: float) -> SourceFeatures:
    """The source with CAA's region tokens scaled by the region weights omega [7] and by strength, both in [0, 1].

    The background's queries read the whole person, so their tokens weigh what the least of the person's regions does.
    """
    if features.caa is None or (omega is None and strength == 1):
        return features
    caa = features.caa
    weight = torch.ones(len(Region)) if omega is None else omega.detach().cpu().float().clone()
    weight[Region.BACKGROUND] = weight[Region.BACKGROUND + 1 :].min()
    per_token = caa.regions @ (strength * weight).to(caa.tokens)
    return replace(features, caa=RegionTokens(caa.tokens * per_token[:, None], caa.shown))
