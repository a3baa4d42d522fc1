"""One call of the UNet: what each row of its batch reads of the sources, at each block.

For the time of one call an attn1 `replace` stands on each block the source knows. It hands longer keys and values to
the host's attention: the source's tokens through the block's own to_k and to_v. What a call needs lives in the call,
so several threads may run at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from truepose_core.attention.caa import caa_attention
from truepose_core.attention.fusion import fuse, is_off, row_index, spread, target_regions
from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.attention.hpfa import SourceTokens, gather_tokens, match_channels
from truepose_core.attention.style import restyled
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fits_cells
from truepose_core.source.features import Level, SourceFeatures, Style, nearest_level

from .applied import AppliedCAA, AppliedSource, SiteReading
from .base import RunCache
from .batch import UNCONDITIONAL, Batch, check_cells
from .caa import (
    CROSS_INPUT,
    SELF_INPUT,
    CrossTokens,
    beside_attention,
    keep_cross_input,
    keep_self_input,
)
from .features import SourceReader
from .target import Targets
from .unet import place_name, say_once, site_name, transformer_blocks, with_patches

WEIGHTS = "truepose_weights"
"""Which weights are in force for the whole run, in the options of a call; without a word they may change in it (the
host's LoRA hooks do that)."""


class SourceCall:
    """One call of the UNet: which sources and region tokens its rows read, at which level, and of what target."""

    def __init__(
        self,
        cache: RunCache,
        active: list[AppliedSource],
        x: Tensor,
        options: dict,
        caas: Sequence[AppliedCAA] = (),
        trained: AppliedCAA | None = None,
        hidden: bool = False,
    ) -> None:
        """cache: of the run. active, caas: what works at this noise level. trained: the Apply CAA in place of what the
        sources bring. hidden: whether no row may see the source."""
        self.cache, self.active, self.options = cache, active, options
        self.caas, self.trained, self.hidden = caas, trained, hidden
        self.batch = Batch.of(x, options)
        self.visible = [a for a in active if any(a.seen_by(kind) for kind in self.batch.kinds)]
        """The sources that any row sees."""
        self.levels = {a: self._level(a.source) for a in self.visible}
        """Which level of a source this call reads."""
        self._fresh: dict[SourceReader, Level] = {}
        self.targets = Targets(self.batch)
        for applied in active:
            self.batch.check(applied.counts(bool(caas)))
        for applied in (*(a for a in active if a.matches), *caas, *([] if trained is None else [trained])):
            _check_target(applied, self.batch.size)
        for caa in (*caas, *([] if trained is None else [trained])):
            self.batch.check(caa.counts)

    def install(self, unet: UNetModel) -> dict:
        """New transformer options with our replace on every block that a source knows and nobody else owns."""
        options = dict(self.options)
        replaces = dict(options.get("patches_replace", {}))
        attn1 = dict(replaces.get("attn1", {}))
        wanted = {site for applied in self.active for site in applied.kept}
        blocks = transformer_blocks(unet)
        for site, (block, module) in blocks.items():
            if site not in wanted:
                continue
            if block in attn1 or block[:2] in attn1:
                say_once(f"HPFA leaves block {site} alone: another node replaces its self-attention")
                continue
            attn1[block] = _Replace(self, site, module)
        replaces["attn1"] = attn1
        options["patches_replace"] = replaces
        more: dict[str, list] = {}
        if any(a.aligns for a in self.active):
            more["attn1_patch"] = [keep_self_input]
        if self.caas or (self.trained is None and any(a.cross for a in self.active)):
            more["attn2_patch"] = [keep_cross_input]
            more["attn2_output_patch"] = [_TargetCross(self, {s: module for s, (_, module) in blocks.items()})]
        if any(a.aligned is not None for a in self.active):
            more["input_block_patch"] = [self._after_first]
        if any(a.styles for a in self.visible):
            more["input_block_patch"] = [*more.get("input_block_patch", []), self._style_input]
            more["output_block_patch"] = [self._style_output]
        options["patches"] = with_patches(options, more)
        return options

    def _level(self, source: SourceFeatures) -> int:
        if len(source.levels) < 2:
            return 0
        sigmas = self.options.get("sigmas")
        return len(source.levels) // 2 if sigmas is None else nearest_level(source.levels, float(sigmas.flatten()[0]))

    def read_sources(self, timesteps: Tensor | None) -> None:
        """Read what is read anew at every step, for this call's timesteps [rows]."""
        for reader in dict.fromkeys(a.reader for a in self.visible if a.reader is not None):
            self._fresh[reader] = reader.read(timesteps, self.options.get("sigmas"))

    def style_of(self, applied: AppliedSource) -> Style:
        """The moments of a source that this call goes by."""
        if applied.reader is not None:
            return self._fresh[applied.reader].style
        levels = applied.source.levels
        return levels[self.levels[applied]].style if levels else applied.source.style

    def _style_input(self, h: Tensor, options: dict) -> Tensor:
        """An input block patch: the sources' moments in place of the picture's own, for the rows that see them."""
        place, parts = place_name(options["block"]), list(h.split(self.batch.rows))
        for number, kind in enumerate(self.batch.kinds):
            styles = [(a, self.style_of(a)) for a in self.visible if a.styles and a.seen_by(kind)]
            styles = [(a, style[place]) for a, style in styles if place in style]
            own = parts[number]
            for applied, found in styles:
                mean, deviation = (x.to(own).repeat_interleave(self.batch.rows // x.shape[0], 0) for x in found)
                share = applied.style / len(styles)
                parts[number] = parts[number] + share * (restyled(own, mean, deviation) - own)
        return torch.cat(parts)

    def _style_output(self, h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        return self._style_input(h, options), skip

    def keys_values(
        self, applied: AppliedSource, site: str, attn: torch.nn.Module, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K and V of a source at a site, [S, K, H * D] each, on the device and in the type of `like`. Projected once
        per run where the block's weights stay and the source is not read anew, else here."""

        def project(tokens: Tensor) -> tuple[Tensor, Tensor]:
            return attn.to_k(tokens), attn.to_v(tokens)

        if applied.reader is not None:
            fresh, index = self._fresh[applied.reader].sites[site].to(like), applied.on(self.cache, site, like).index
            return project(fresh if index is None else gather_tokens(fresh, index))

        def tokens() -> Tensor:
            return applied.tokens(site, self.levels[applied]).to(like)

        weights, key = self.options.get(WEIGHTS), (applied, "tokens", site, like.device, like.dtype)
        # A sampler does not come back to a level, so only one is kept.
        version = (self.levels[applied], weights)
        if weights is None:
            return project(self.cache.of(key, tokens, version))
        return self.cache.of(key, lambda: project(tokens()), version)

    def _after_first(self, h: Tensor, options: dict) -> Tensor:
        """An input block patch: what the carried source adds after conv_in."""
        return self.carried(h, 0) if options["block"] == ("input", 0) else h

    def carried(self, x: Tensor, part: int) -> Tensor:
        """x [rows, C, h, w] plus what carried sources add there, for the rows that see them. part: 0 after conv_in,
        1 to the prediction."""
        for applied in self.active:
            if applied.aligned is None:
                continue
            added = applied.aligned_on(self.cache, x)[part]
            check_cells(self.batch.size, added.shape[2:])
            parts = list(x.split(self.batch.rows))
            for number, kind in enumerate(self.batch.kinds):
                if not applied.seen_by(kind):
                    continue
                crop = added
                if self.batch.areas[number] is not None:
                    height, width, top, left = self.batch.areas[number]
                    crop = added[:, :, top : top + height, left : left + width]
                parts[number] = parts[number] + crop.repeat_interleave(self.batch.rows // crop.shape[0], 0)
            x = torch.cat(parts)
        return x

    def groups(self) -> Iterator[tuple[list[int], list[AppliedSource]]]:
        """Chunks of the batch that see the same sources: (chunk numbers, sources)."""
        seen: dict[tuple[int, ...], list[int]] = {}
        for number, kind in enumerate(self.batch.kinds):
            visible = tuple(i for i, a in enumerate(self.active) if a.seen_by(kind))
            seen.setdefault(visible, []).append(number)
        for visible, numbers in seen.items():
            yield numbers, [self.active[i] for i in visible]

    def readers(self, site: str, like: Tensor) -> Iterator[_Reader]:
        """Which chunks read which region tokens at a site."""
        if self.trained is None:
            for chunks, sources in self.groups():
                for applied in sources:
                    if site in applied.kept and site in applied.cross:
                        yield _Reader(chunks, applied.on(self.cache, site, like).cross, applied, None)
        for caa in self.caas:
            sees = [not self.hidden and (caa.keep_unconditional or kind != UNCONDITIONAL) for kind in self.batch.kinds]
            for empty in (False, True):
                chunks = [number for number, sees_it in enumerate(sees) if sees_it != empty]
                if chunks and site in (caa.empty if empty else caa.cross):
                    yield _Reader(chunks, caa.on(self.cache, site, like, empty), self._knows_target(caa), caa)

    def _knows_target(self, caa: AppliedCAA) -> AppliedSource | AppliedCAA:
        """Whose target parsing a CAA goes by: its own, else that of a source."""
        return next((a for a in (caa, *self.active) if a.target is not None), caa)


@dataclass(frozen=True)
class _Reader:
    """Chunks that read region tokens. target: whose target parsing they go by. caa: the Apply CAA, None for what a
    source brings."""

    chunks: list[int]
    cross: CrossTokens
    target: AppliedSource | AppliedCAA
    caa: AppliedCAA | None


def _check_target(applied: AppliedSource | AppliedCAA, cells: tuple[int, int]) -> None:
    """A target parsing that the user gave must have the picture's shape, but for rounding to whole cells."""
    if not applied.given or applied.target is None or fits_cells(applied.target.size, cells):
        return
    (height, width), (rows, columns) = applied.target.size, cells
    raise TruePoseError(
        f"the target parsing is {width}x{height} (width x height) and the latent {columns}x{rows} cells, another "
        "shape; make the parsing from a picture of the shape that is sampled, or crop it to that"
    )


class _Replace:
    """The attn1 replace of one block in one call. Takes projected q, k, v [rows, tokens, heads * D]."""

    def __init__(self, call: SourceCall, site: str, block: torch.nn.Module) -> None:
        self.call, self.site, self.attn, self.attn2 = call, site, block.attn1, block.attn2

    def __deepcopy__(self, memo: dict) -> _Replace:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict, mask: Tensor | None = None) -> Tensor:
        call = self.call
        # Left where it is: another node may call twice with the same options.
        n = extra.get(SELF_INPUT)
        if k.shape[0] != q.shape[0]:
            # HyperTile folds tiles of the queries into the batch; the host's attention would fold k and v the same way.
            k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
        height, width = extra["activations_shape"][-2:]
        projected: dict[AppliedSource, tuple[Tensor, Tensor]] = {}
        present = call.batch.chunks_of(q.shape[0], extra)
        if present is None:
            # All of them read what fits any row.
            say_once(
                f"{_caller(2)} hands over {q.shape[0]} of {call.batch.count} rows to Apply HPFA and does not say "
                "which: there negative rows see what positive ones do, batches of sources are not read, and region "
                "match and body match are off"
            )
            sources = [a for a in call.visible if a.source.batch == 1]
            return self._attend(q, k, v, extra, sources, None, None, None, projected)
        size = q.shape[0] // len(present)
        in_place = size == call.batch.rows and q.shape[1] == height * width
        if not in_place and any(a.matches for a in call.active):
            say_once("region match and body match are off where another node (HyperTile, ToMe) cuts or merges tokens")
        grid = (height, width) if in_place else None
        groups = [([i for i in chunks if i in present], sources) for chunks, sources in call.groups()]
        groups = [group for group in groups if group[0]]
        parts: dict[int, Tensor] = {}
        for chunks, sources in groups:
            d = None if n is None or grid is None else torch.cat([n[i * size : (i + 1) * size] for i in chunks])
            if len(groups) == 1:
                return self._attend(q, k, v, extra, sources, chunks, grid, d, projected)
            places = [present.index(i) for i in chunks]
            a, b, c = (torch.cat([x[i * size : (i + 1) * size] for i in places]) for x in (q, k, v))
            out = self._attend(a, b, c, extra, sources, chunks, grid, d, projected)
            parts.update(zip(chunks, out.split(size), strict=True))
        return torch.cat([parts[i] for i in present])

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: dict,
        sources: list[AppliedSource],
        chunks: list[int] | None,
        grid: tuple[int, int] | None,
        n: Tensor | None,
        projected: dict[AppliedSource, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Attention of rows that all see `sources`. chunks: which chunks they are, None for unknown rows.
        grid: the token grid, None where tokens are not one per cell. n: the block's input, if CAA wants it."""
        heads = self.attn.heads
        width = q.shape[-1] // heads
        precision = extra.get("attn_precision", self.attn.attn_precision)
        tokens, channels = [], []
        for applied in sources:
            if self.site not in applied.kept:
                continue
            kept = applied.on(self.call.cache, self.site, q)
            if applied not in projected:
                projected[applied] = self.call.keys_values(applied, self.site, self.attn, q)
            ks, vs = projected[applied]
            regions = places = None
            if grid is not None and chunks is not None:
                regions = self._target_regions(applied, kept, grid, chunks, n)
                places = self.call.targets.places(applied, grid, chunks)
            source = SourceTokens(split_heads(ks, heads), split_heads(vs, heads), kept.regions, kept.log_w, kept.body)
            # Unknown rows read single sources only.
            source = spread(source, q.shape[0], 1 if chunks is None else len(chunks))
            channels.append(
                match_channels(
                    source,
                    split_heads(q, heads),
                    target_regions=None if regions is None else regions.to(q.device),
                    beta=kept.how.beta,
                    region_log_weight=kept.how.region_log_weight,
                    target_body=None if places is None else places.to(q.device),
                    gamma=kept.how.gamma,
                )
            )
            tokens.append(source)
        if all(c is None for c in channels):
            for source in tokens:
                k = torch.cat([k, merge_heads(source.k).expand(k.shape[0], -1, -1)], 1)
                v = torch.cat([v, merge_heads(source.v).expand(v.shape[0], -1, -1)], 1)
            return host_attention.optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra
            )
        q, k, v = fuse(*(split_heads(x, heads) for x in (q, k, v)), tokens, channels)
        # The host's attention scales by the width it is given; the formula wants that of the unpadded head.
        q = q * (q.shape[-1] / width) ** 0.5
        out = host_attention.optimized_attention(
            q, k, v, heads, attn_precision=precision, skip_reshape=True, transformer_options=extra
        )
        return out.unflatten(-1, (heads, -1))[..., :width].flatten(-2)

    def _target_regions(
        self, applied: AppliedSource, kept: SiteReading, grid: tuple[int, int], chunks: list[int], n: Tensor | None
    ) -> Tensor | None:
        """P: [rows, N, 7] or None."""
        if is_off(kept.how.beta):
            return None

        def align(prior: Tensor | None) -> Tensor:
            trained = self.call.trained
            cross = kept.cross if trained is None else trained.on(self.call.cache, self.site, n)
            cross = cross.rows(row_index(cross.batch, n.shape[0], len(chunks), n.device))
            prior = None if prior is None else prior.to(n.device)
            q = split_heads(self.attn2.to_q(n), self.attn2.heads)
            return caa_attention(q, cross.k, cross.v, cross.regions, cross.shown, prior=prior, kappa=cross.kappa)[1]

        with_caa = kept.cross is not None and n is not None
        prior = self.call.targets.regions(applied, grid, chunks)
        return target_regions(prior, applied.given, align if with_caa else None)


def _caller(depth: int) -> str:
    """Who called the function `depth` calls up from here: a custom node pack by its folder, else a file."""
    path = Path(sys._getframe(depth).f_code.co_filename)
    parts = path.parts
    return parts[parts.index("custom_nodes") + 1] if "custom_nodes" in parts else path.name


class _TargetCross:
    """The attn2 output patch of one call: rows that see a source also read its region tokens."""

    def __init__(self, call: SourceCall, blocks: Mapping[str, torch.nn.Module]) -> None:
        self.call, self.blocks = call, blocks

    def __deepcopy__(self, memo: dict) -> _TargetCross:
        return self

    def __call__(self, n: Tensor, extra: dict) -> Tensor:
        call, x = self.call, extra.pop(CROSS_INPUT)
        site = site_name((*extra["block"], extra["block_index"]))
        if site not in self.blocks:
            return n
        if n.shape[0] != call.batch.count:
            say_once("CAA's cross-attention is off where another node hands over some of the rows")
            return n
        height, width = extra["activations_shape"][-2:]
        grid = (height, width) if n.shape[1] == height * width else None
        parts = list(n.split(call.batch.rows))
        for reader in call.readers(site, n):
            chunks = reader.chunks
            rows = torch.cat([x[i * call.batch.rows : (i + 1) * call.batch.rows] for i in chunks])
            cross = reader.cross.rows(row_index(reader.cross.batch, rows.shape[0], len(chunks), n.device))
            prior = None if grid is None else call.targets.regions(reader.target, grid, chunks)
            prior = None if prior is None else prior.to(n)
            added = beside_attention(self.blocks[site].attn2, rows, cross, prior)
            gate = None if reader.caa is None else reader.caa.gate(prior)
            added = added if gate is None else gate * added
            for chunk, more in zip(chunks, added.split(call.batch.rows), strict=True):
                parts[chunk] = parts[chunk] + more
        return torch.cat(parts)
