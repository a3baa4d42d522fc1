"""One call of the UNet: what each row of its batch reads of the sources, at each block.

For the time of one call an attn1 `replace` stands on each block the source knows. It projects the source's tokens with
the block's own to_k and to_v and hands longer keys and values to the host's attention. What a call needs lives in the
call, so several threads may run at once.
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
from torch.nn.functional import adaptive_avg_pool2d

from truepose_core.attention.caa import caa_attention
from truepose_core.attention.fusion import fuse, is_off, row_index, spread, target_regions
from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.attention.hpfa import SourceTokens, gather_tokens, match_channels
from truepose_core.attention.style import restyled
from truepose_core.errors import TruePoseError
from truepose_core.source.features import Level, SourceFeatures, Style, nearest_level

from .applied import AppliedCAA, AppliedSource, _Kept
from .caa import (
    CROSS_INPUT,
    SELF_INPUT,
    CrossTokens,
    beside_attention,
    keep_cross_input,
    keep_self_input,
)
from .features import SourceReader
from .unet import (
    AREAS,
    NEGATIVE_ROWS,
    UNCONDITIONAL,
    Area,
    place_name,
    same_shape,
    say_once,
    site_name,
    transformer_blocks,
    with_patches,
)

# ------------------------------------------------------------------------------------- one call of the UNet


class _Call:
    """What one call of the UNet needs to know: who is in the batch, and which part of the picture they see."""

    def __init__(
        self,
        active: list[AppliedSource],
        x: Tensor,
        options: dict,
        caas: Sequence[AppliedCAA] = (),
        trained: AppliedCAA | None = None,
        hidden: bool = False,
    ) -> None:
        """active, caas: what works at this noise level. trained: the Apply CAA in place of what the sources bring.
        hidden: whether no row may see the source."""
        self.active, self.options = active, options
        self.caas, self.trained, self.hidden = caas, trained, hidden
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
        self.visible = [a for a in active if any(a.seen_by(kind) for kind in self.chunks)]
        """The sources that any row sees."""
        self._fresh: dict[SourceReader, Level] = {}
        self.levels = {id(a): self._level(a.source) for a in self.visible}
        """Which level of a source this call reads."""
        self._targets: dict = {}
        for applied in active:
            self._check_batch(applied)
            if applied.matches:
                self._check_target(applied)
        for caa in (*caas, *([] if trained is None else [trained])):
            counts = {"CAA source images": caa.batch}
            if caa.target is not None:
                counts["target parsings"] = caa.target.batch
            self._check_counts(counts)
            self._check_target(caa)

    def _check_batch(self, applied: AppliedSource) -> None:
        counts = {"source images": applied.source.batch}
        if applied.aligned is not None:
            counts["carried sources"] = applied.aligned[0].shape[0]
        if applied.target is not None and (applied.has_beta or applied.cross or self.caas):
            counts["target parsings"] = applied.target.batch
        if applied.target_body is not None and applied.has_gamma:
            counts["target poses"] = applied.target_body.shape[0]
        self._check_counts(counts)

    def _check_counts(self, counts: Mapping[str, int]) -> None:
        for what, count in counts.items():
            if self.rows % count:
                raise TruePoseError(
                    f"there are {count} {what} and {self.rows} latents in the batch; "
                    f"expected 1 or a number that divides {self.rows}"
                )

    def _check_target(self, applied: AppliedSource | AppliedCAA) -> None:
        """A target parsing that the user gave must have the picture's shape, but for rounding to whole cells."""
        if not applied.given or applied.target is None or same_shape(applied.target.size, tuple(self.size)):
            return
        (height, width), (rows, columns) = applied.target.size, self.size
        raise TruePoseError(
            f"the target parsing is {width}x{height} (width x height) and the latent {columns}x{rows} cells, another "
            "shape; make the parsing from a picture of the shape that is sampled, or crop it to that"
        )

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
        return levels[self.levels[id(applied)]].style if levels else applied.source.style

    def _style_input(self, h: Tensor, options: dict) -> Tensor:
        """An input block patch: the sources' moments in place of the picture's own, for the rows that see them."""
        place, parts = place_name(options["block"]), list(h.split(self.rows))
        for number, kind in enumerate(self.chunks):
            styles = [(a, self.style_of(a)) for a in self.visible if a.styles and a.seen_by(kind)]
            styles = [(a, style[place]) for a, style in styles if place in style]
            own = parts[number]
            for applied, found in styles:
                mean, deviation = (x.to(own).repeat_interleave(self.rows // x.shape[0], 0) for x in found)
                share = applied.style / len(styles)
                parts[number] = parts[number] + share * (restyled(own, mean, deviation) - own)
        return torch.cat(parts)

    def _style_output(self, h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        return self._style_input(h, options), skip

    def tokens(self, applied: AppliedSource, kept: _Kept, site: str, like: Tensor) -> Tensor:
        """The tokens of a source that one site reads in this call: [S, K, C]."""
        if applied.reader is None:
            return kept.tokens
        tokens = self._fresh[applied.reader].sites[site].to(like)
        return tokens if kept.index is None else gather_tokens(tokens, kept.index)

    def _after_first(self, h: Tensor, options: dict) -> Tensor:
        """An input block patch: what the carried source adds after conv_in."""
        return self.carried(h, 0) if options["block"] == ("input", 0) else h

    def carried(self, x: Tensor, part: int) -> Tensor:
        """x [rows, C, h, w] plus what carried sources add there, for the rows that see them. part: 0 after conv_in,
        1 to the prediction."""
        for applied in self.active:
            if applied.aligned is None:
                continue
            added = applied.aligned_on(x.device, x.dtype)[part]
            if tuple(added.shape[2:]) != tuple(self.size):
                raise TruePoseError(
                    f"the latent is {self.size[1]}x{self.size[0]} cells and this TruePose model makes pictures of "
                    f"{added.shape[3]}x{added.shape[2]} cells; connect Empty TruePose Latent"
                )
            parts = list(x.split(self.rows))
            for number, kind in enumerate(self.chunks):
                if not applied.seen_by(kind):
                    continue
                crop = added
                if self.areas[number] is not None:
                    height, width, top, left = self.areas[number]
                    crop = added[:, :, top : top + height, left : left + width]
                parts[number] = parts[number] + crop.repeat_interleave(self.rows // crop.shape[0], 0)
            x = torch.cat(parts)
        return x

    def groups(self) -> Iterator[tuple[list[int], list[AppliedSource]]]:
        """Chunks of the batch that see the same sources: (chunk numbers, sources)."""
        seen: dict[tuple[int, ...], list[int]] = {}
        for number, kind in enumerate(self.chunks):
            visible = tuple(i for i, a in enumerate(self.active) if a.seen_by(kind))
            seen.setdefault(visible, []).append(number)
        for visible, numbers in seen.items():
            yield numbers, [self.active[i] for i in visible]

    def readers(self, site: str, device: torch.device, dtype: torch.dtype) -> Iterator[_Reader]:
        """Which chunks read which region tokens at a site."""
        if self.trained is None:
            for chunks, sources in self.groups():
                for applied in sources:
                    if site in applied.kept and site in applied.cross:
                        kept = applied.on(device, dtype, site, self.levels[id(applied)])
                        yield _Reader(chunks, kept.cross, applied, None)
        for caa in self.caas:
            sees = [not self.hidden and (caa.keep_unconditional or kind != UNCONDITIONAL) for kind in self.chunks]
            for empty in (False, True):
                chunks = [number for number, sees_it in enumerate(sees) if sees_it != empty]
                if chunks and site in (caa.empty if empty else caa.cross):
                    yield _Reader(chunks, caa.on(device, dtype, site, empty), self._knows_target(caa), caa)

    def _knows_target(self, caa: AppliedCAA) -> AppliedSource | AppliedCAA:
        """Whose target parsing a CAA goes by: its own, else that of a source."""
        return next((a for a in (caa, *self.active) if a.target is not None), caa)

    def chunks_of(self, count: int, extra: Mapping) -> list[int] | None:
        """Which chunks of the batch `count` rows of an attention are: all of them, or those that the caller says;
        None where it does not."""
        if count % self.batch == 0:
            return list(range(len(self.chunks)))
        named = list(extra.get(NEGATIVE_ROWS) or [])
        chunks = sorted({row // self.rows for row in named})
        whole = [row for chunk in chunks for row in range(chunk * self.rows, (chunk + 1) * self.rows)]
        return chunks if named and named == whole and count % len(named) == 0 else None

    def target_rows(
        self, applied: AppliedSource | AppliedCAA, grid: tuple[int, int], chunks: list[int]
    ) -> Tensor | None:
        """The target's regions for these chunks, one after the other: [rows, N, 7], or None."""
        if applied.target is None:
            return None
        return self._rows_for(applied, "regions", grid, chunks)

    def target_places(self, applied: AppliedSource, grid: tuple[int, int], chunks: list[int]) -> Tensor | None:
        """Places on the body for these chunks: [rows, N, 3 or 4], or None."""
        if not applied.has_gamma or applied.target_body is None or applied.source.body is None:
            return None
        if applied.source.target_coordinates(applied.target_body, 1, 1, self.size[1] / self.size[0]) is None:
            return None
        return self._rows_for(applied, "body", grid, chunks)

    def _rows_for(
        self, applied: AppliedSource | AppliedCAA, what: str, grid: tuple[int, int], chunks: list[int]
    ) -> Tensor:
        parts = []
        for chunk in chunks:
            key = (id(applied), what, grid, self.areas[chunk])
            if key not in self._targets:
                self._targets[key] = self._sample(applied, what, grid, self.areas[chunk])
            rows = self._targets[key]
            parts.append(rows.repeat_interleave(self.rows // rows.shape[0], 0))
        return torch.cat(parts)

    def _sample(
        self, applied: AppliedSource | AppliedCAA, what: str, grid: tuple[int, int], area: Area | None
    ) -> Tensor:
        aspect = self.size[1] / self.size[0]

        def rows(height: int, width: int) -> Tensor:
            if what == "body":
                return applied.source.target_coordinates(applied.target_body, height, width, aspect)
            return applied.target.tokens(height, width)

        if area is None:
            return rows(*grid)
        height, width, top, left = area
        whole = rows(*self.size).mT.unflatten(2, tuple(self.size))
        crop = whole[:, :, top : top + height, left : left + width]
        return adaptive_avg_pool2d(crop, grid).flatten(2).mT


@dataclass(frozen=True)
class _Reader:
    """Chunks that read region tokens. target: whose target parsing they go by. caa: the Apply CAA, None for what a
    source brings."""

    chunks: list[int]
    cross: CrossTokens
    target: AppliedSource | AppliedCAA
    caa: AppliedCAA | None


class _Replace:
    """The attn1 replace of one block in one call. Takes projected q, k, v [rows, tokens, heads * D]."""

    def __init__(self, call: _Call, site: str, block: torch.nn.Module) -> None:
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
        projected: dict[int, tuple[Tensor, Tensor]] = {}
        present = call.chunks_of(q.shape[0], extra)
        if present is None:
            # All of them read what fits any row.
            say_once(
                f"{_caller(2)} hands over {q.shape[0]} of {call.batch} rows to Apply HPFA and does not say which: "
                "there negative rows see what positive ones do, batches of sources are not read, and region match and "
                "body match are off"
            )
            sources = [a for a in call.visible if a.source.batch == 1]
            return self._attend(q, k, v, extra, sources, None, None, None, projected)
        size = q.shape[0] // len(present)
        in_place = size == call.rows and q.shape[1] == height * width
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
        projected: dict[int, tuple[Tensor, Tensor]],
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
            kept = applied.on(q.device, q.dtype, self.site, self.call.levels[id(applied)])
            if id(applied) not in projected:
                read = self.call.tokens(applied, kept, self.site, q)
                projected[id(applied)] = (self.attn.to_k(read), self.attn.to_v(read))
            ks, vs = projected[id(applied)]
            regions = places = None
            if grid is not None and chunks is not None:
                regions = self._target_regions(applied, kept, grid, chunks, n)
                places = self.call.target_places(applied, grid, chunks)
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
        self, applied: AppliedSource, kept: _Kept, grid: tuple[int, int], chunks: list[int], n: Tensor | None
    ) -> Tensor | None:
        """P: [rows, N, 7] or None."""
        if is_off(kept.how.beta):
            return None

        def align(prior: Tensor | None) -> Tensor:
            trained = self.call.trained
            cross = kept.cross if trained is None else trained.on(n.device, n.dtype, self.site)
            cross = cross.rows(row_index(cross.batch, n.shape[0], len(chunks), n.device))
            prior = None if prior is None else prior.to(n.device)
            q = split_heads(self.attn2.to_q(n), self.attn2.heads)
            return caa_attention(q, cross.k, cross.v, cross.regions, cross.shown, prior=prior, kappa=cross.kappa)[1]

        with_caa = kept.cross is not None and n is not None
        prior = self.call.target_rows(applied, grid, chunks)
        return target_regions(prior, applied.given, align if with_caa else None)


def _caller(depth: int) -> str:
    """Who called the function `depth` calls up from here: a custom node pack by its folder, else a file."""
    path = Path(sys._getframe(depth).f_code.co_filename)
    parts = path.parts
    return parts[parts.index("custom_nodes") + 1] if "custom_nodes" in parts else path.name


class _TargetCross:
    """The attn2 output patch of one call: rows that see a source also read its region tokens."""

    def __init__(self, call: _Call, blocks: Mapping[str, torch.nn.Module]) -> None:
        self.call, self.blocks = call, blocks

    def __deepcopy__(self, memo: dict) -> _TargetCross:
        return self

    def __call__(self, n: Tensor, extra: dict) -> Tensor:
        call, x = self.call, extra.pop(CROSS_INPUT)
        site = site_name((*extra["block"], extra["block_index"]))
        if site not in self.blocks:
            return n
        if n.shape[0] != call.batch:
            say_once("CAA's cross-attention is off where another node hands over some of the rows")
            return n
        height, width = extra["activations_shape"][-2:]
        grid = (height, width) if n.shape[1] == height * width else None
        parts = list(n.split(call.rows))
        for reader in call.readers(site, n.device, n.dtype):
            chunks = reader.chunks
            rows = torch.cat([x[i * call.rows : (i + 1) * call.rows] for i in chunks])
            cross = reader.cross.rows(row_index(reader.cross.batch, rows.shape[0], len(chunks), n.device))
            prior = None if grid is None else call.target_rows(reader.target, grid, chunks)
            prior = None if prior is None else prior.to(n)
            added = beside_attention(self.blocks[site].attn2, rows, cross, prior)
            gate = None if reader.caa is None else reader.caa.gate(prior)
            added = added if gate is None else gate * added
            for chunk, more in zip(chunks, added.split(call.rows), strict=True):
                parts[chunk] = parts[chunk] + more
        return torch.cat(parts)
