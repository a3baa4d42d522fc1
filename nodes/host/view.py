"""Watching a MODEL's attention to its sources: one call of the UNet, with an eye on the host's attention function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from truepose_core.attention.heads import split_heads
from truepose_core.attention.view import Look, SiteLook, attention_mass, combine, spread_kept
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing

from . import applied as host_applied
from . import patch as host_patch
from . import unet as host_unet
from .visit import Call, Visit

OVERRIDE = "optimized_attention_override"


class _LookOnce(Visit):
    """One call at the first noise level."""

    def calls(self, sampling: object, latent: Tensor, noise: Tensor, sigmas: Tensor, call: Call) -> None:
        call(sampling.noise_scaling(sigmas[0], noise, latent, False), sigmas[0].expand(len(latent)))


@dataclass
class _Eye:
    """Stands in front of the host's attention and sums what goes to one source.

    active: the sources of this call, in order. chosen: which of them is watched. target: regions of the picture, for
    groups. then: another override that was there before, or None. sites: per picture, what was seen.
    """

    active: list[host_applied.AppliedSource]
    chosen: host_applied.AppliedSource
    target: HumanParsing | None
    rows: int
    then: Callable | None
    sites: list[list[SiteLook]]

    def __deepcopy__(self, memo: dict) -> _Eye:
        # Older hosts copy a model's options deeply; what is seen must arrive here.
        return self

    def __call__(self, attention: Callable, *args: object, **kwargs: object) -> Tensor:
        self._watch(*args, **kwargs)
        return attention(*args, **kwargs) if self.then is None else self.then(attention, *args, **kwargs)

    def _watch(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: object, skip_reshape: bool = False, **kwargs: object
    ) -> None:
        options = kwargs.get("transformer_options") or {}
        if "block" not in options or "n_heads" not in options:
            return  # not called by a block's patch, so not the self-attention that HPFA lengthened
        site = host_unet.site_name((*options["block"], options["block_index"]))
        counts = [(a, self._count(a, site)) for a in self.active if site in a.kept]
        if not any(a is self.chosen for a, _ in counts):
            return
        if not skip_reshape:
            q, k = (split_heads(x, heads) for x in (q, k))
        height, width = options["activations_shape"][-2:]
        places = height * width
        # HyperTile, ToMe and others cut or merge tokens: what is left cannot be laid on the picture.
        if q.shape[0] != self.rows or q.shape[2] != places or k.shape[2] != places + sum(c for _, c in counts):
            return
        mass = attention_mass(q, k, self._groups(height, width))
        first = places
        for applied, count in counts:
            if applied is self.chosen:
                break
            first += count
        self._store(site, mass[..., first : first + count], places)

    @staticmethod
    def _count(applied: host_applied.AppliedSource, site: str) -> int:
        index = applied.kept[site].index
        return applied.source.sites[site].shape[1] if index is None else index.shape[1]

    def _groups(self, height: int, width: int) -> Tensor:
        everyone = torch.ones(1, height * width, 1)
        if self.target is None:
            return everyone
        rows = self.target.tokens(height, width).float()
        rows = rows.repeat_interleave(self.rows // rows.shape[0], 0)
        return torch.cat([everyone.expand(rows.shape[0], -1, -1), rows], -1)

    def _store(self, site: str, mass: Tensor, places: int) -> None:
        source, index = self.chosen.source, self.chosen.kept[site].index
        tokens = source.sites[site].shape[1]
        regions, grid = source.regions(site), source.grid(site)
        for row in range(self.rows):
            which = row * source.batch // self.rows
            one = mass[row : row + 1]
            if index is not None:
                one = spread_kept(one, index[which : which + 1], tokens)
            self.sites[row].append(SiteLook(one[0].cpu(), grid, regions[which].cpu(), places))


def sources_of(model: object) -> tuple[host_applied.AppliedSource, ...]:
    """The sources of a MODEL. Raises where there is none to look at."""
    found = host_patch.applied_sources(model)
    if not found:
        raise TruePoseError("the model reads no source; connect the model that comes from Apply HPFA")
    return found


def without_guidance(model: object) -> object:
    """The MODEL with the same sources, read as plain extra tokens: no region weights, no match, full strength."""
    plain = host_patch.without_hpfa(model)
    for applied in sources_of(model):
        plain = host_patch.with_hpfa(plain, unguided(applied))
    return plain


def unguided(applied: host_applied.AppliedSource) -> host_applied.AppliedSource:
    """The same source with nothing that guides the look at it. CAA and the carried source stay: they are no part of
    the self-attention that is compared."""
    ones = (1.0,) * len(applied.omega)
    return replace(applied, omega=ones, beta=0.0, gamma=0.0, strength=1.0, target=None, target_body=None, weights=None)


def look(
    model: object,
    positive: list,
    latent: dict,
    number: int,
    percent: float,
    seed: int,
    target: HumanParsing | None,
) -> list[Look]:
    """Where each picture of the latent looks in source `number` of the MODEL, at `percent` (0..1) of the sampling.

    One call of the UNet on the latent with that much noise. target: regions of the picture, for groups of places.
    """
    applied = sources_of(model)
    sampling = model.get_model_object("model_sampling")
    # At 0 the host answers with a number above every noise level.
    sigma = torch.tensor([min(float(sampling.percent_to_sigma(percent)), float(sampling.sigma_max))])
    active = [a for a in applied if a.in_window(sigma) and a.seen_by(0)]
    chosen = applied[number]
    if not any(a is chosen for a in active):
        raise TruePoseError(
            f"the source is not read at {percent:g} of the sampling; choose a percent between Apply HPFA's "
            "start_percent and end_percent"
        )
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    rows = samples.shape[0]
    if target is not None and rows % target.batch:
        raise TruePoseError(f"there are {target.batch} target parsings and {rows} latents; expected 1 or a divisor")
    watched = model.clone()
    options = dict(watched.model_options.get("transformer_options", {}))
    eye = _Eye(active, chosen, target, rows, options.get(OVERRIDE), [[] for _ in range(rows)])
    options[OVERRIDE] = eye
    watched.model_options["transformer_options"] = options
    guider = comfy.samplers.CFGGuider(watched)
    guider.inner_set_conds({"positive": positive[:1]})
    noise = comfy.sample.prepare_noise(samples, seed)
    guider.sample(noise, samples, _LookOnce(), sigma, disable_pbar=True, seed=seed)
    return [combine(sites) for sites in eye.sites]
