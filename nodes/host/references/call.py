"""One call of a network with reference tokens: where its tokens are, and how each reference is read.

For the time of the call two things stand in the transformer options:
* `post_input` patches, first and last in the list: tokens of weight 0 leave the sequence before the first block, and
  the number of text tokens that the others leave is noted;
* an attention override, chained with one that is there: longer heads where anything is weighed or matched, and
  without the shut keys where tokens stay in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.ldm.flux.model import Flux
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.attention.hpfa import region_rows_weight
from truepose_core.attention.references import (
    Guidance,
    Layout,
    Match,
    Reference,
    Target,
    drop_tokens,
    guide,
    guided,
    guided_mask,
    patch_rows,
    strongest,
)
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fits_cells
from truepose_core.parsing import HumanParsing
from truepose_core.pose.limbs import body_coordinates

from ..base import RunCache
from ..batch import Batch
from ..unet import say_once
from .guide import BLOCKS, FAMILIES, ReferenceGuide

WIDEST = 128
"""The widest head of kernels that refuse the spare channels."""
NARROW_KERNELS = ("attention_sage", "attention3_sage")
REFUSALS = (ValueError, AssertionError, NotImplementedError)
"""What kernels raise for a width of heads that they do not know."""


@dataclass(frozen=True)
class Grid:
    """Tokens of one latent: its cells and frames, its tokens, and how many there are with padding."""

    height: int
    width: int
    frames: int
    patch: int
    count: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.patch)

    @property
    def columns(self) -> int:
        return -(-self.width // self.patch)

    def regions(self, parsing: HumanParsing) -> Tensor:
        """[B, tokens of all frames, 7], without padding."""
        rows = patch_rows(parsing.tokens(self.height, self.width), self.height, self.width, self.patch)
        return rows.repeat(1, self.frames, 1)

    def places(self, body: Tensor) -> Tensor:
        """Body coordinates [B, tokens of all frames, 3], without padding."""
        # Tokens of an odd latent cover a little more than the picture that the keypoints are normalised to.
        cover = body.new_tensor([self.width / (self.columns * self.patch), self.height / (self.rows * self.patch), 1.0])
        rows = body_coordinates(body * cover, self.rows, self.columns, self.columns / self.rows)
        return rows.repeat(1, self.frames, 1)

    def padded(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """Rows [B, tokens, C] with those of padding tokens behind them."""
        return pad(rows, (0, 0, 0, self.count - rows.shape[1]), value=value)


def _grid(latent: Tensor, patch: int, multiple: int) -> Grid:
    height, width = latent.shape[-2:]
    frames = latent.shape[2] if latent.dim() == 5 else 1
    tokens = -(-height // patch) * -(-width // patch) * frames
    return Grid(height, width, frames, patch, -(-tokens // multiple) * multiple)


class ReferenceCall:
    """What one call of the network needs to know: where its tokens are, and how each reference is read."""

    def __init__(
        self,
        cache: RunCache,
        active: list[ReferenceGuide],
        unet: torch.nn.Module,
        x: Tensor,
        references: Sequence[Tensor],
        context: Tensor | None,
        options: dict,
        conditions: dict,
    ) -> None:
        """cache: of the run. active: the guides that work at this noise level. context: text tokens [rows, T, C].
        conditions: what else the network is given."""
        self.active, self.unet, self.options, self.conditions = active, unet, options, conditions
        self.family = next(family for kind, family in FAMILIES.items() if isinstance(unet, kind))
        multiple = (getattr(unet, "pad_tokens_multiple", None) or 1) if self.family.refined else 1
        self.target = _grid(x, unet.patch_size, multiple)
        self.references = [_grid(latent, unet.patch_size, multiple) for latent in references]
        self.text = 0 if context is None else context.shape[1]
        self.batch = Batch.of(x, options)
        for one in active:
            self._check(one)
        self.guidance = [self._known(cache, half, x.device) for half in BLOCKS[1:]]
        """For the first and for the second half of the blocks."""
        self.dropped = self._may_drop = False
        self.readable = True
        """False where another node left a number of image tokens that says nothing of whose they are."""
        self._calls = self._joint = 0

    def _check(self, one: ReferenceGuide) -> None:
        counts = {f"parsings of reference {one.reference}": one.parsing.batch}
        if one.beta > 0:
            counts["target parsings"] = one.target.batch
        if one.gamma > 0:
            counts["poses of the reference"] = one.body.shape[0]
            counts["target poses"] = one.target_body.shape[0]
        self.batch.check(counts)
        latent = self.references[one.reference - 1]
        pictures = [(f"parsing of reference {one.reference}", one.parsing, "reference", (latent.height, latent.width))]
        if one.beta > 0 and one.given:
            pictures.append(("target parsing", one.target, "latent", self.batch.size))
        for what, parsing, which, cells in pictures:
            if not fits_cells(parsing.size, cells):
                raise TruePoseError(
                    f"the {what} is {parsing.size[1]}x{parsing.size[0]} (width x height) and the {which} "
                    f"{cells[1]}x{cells[0]} cells, another shape; make the parsing from the picture that was encoded, "
                    "after any cropping"
                )

    # -------------------------------------------------------------------------------------- what is asked

    def _known(self, cache: RunCache, half: str, device: torch.device) -> Guidance | None:
        guides = [g for g in self.active if g.blocks in ("all", half)]
        sizes = (self.target, *self.references, self.batch)
        key = (tuple(map(id, guides)), sizes, device)

        def make() -> Guidance | None:
            found = guide(self._references(guides))
            return None if found is None else found.to(device)

        return cache.of(key, make)

    def _references(self, guides: list[ReferenceGuide]) -> list[Reference]:
        targets: list[tuple[ReferenceGuide, Target]] = []
        found = []
        for number, grid in enumerate(self.references, 1):
            weight, matches = None, []
            for one in (g for g in guides if g.reference == number):
                regions = grid.regions(one.parsing.to("cpu", torch.float32))
                own = region_rows_weight(strongest(regions), torch.tensor(one.omega))
                # Padding belongs to the reference as a whole: it goes when all of it goes.
                own = torch.cat([own, own.amax(1, keepdim=True).expand(-1, grid.count - own.shape[1])], 1)
                own = self._spread(own)
                weight = own if weight is None else weight * own
                if one.matches:
                    body = grid.padded(grid.places(one.body)) if one.gamma > 0 else None
                    matches.append(
                        Match(
                            self._target(one, targets),
                            self._spread(grid.padded(regions)) if one.beta > 0 else None,
                            None if body is None else self._spread(body),
                            one.beta,
                            one.gamma,
                        )
                    )
            found.append(Reference(grid.count, weight, tuple(matches)))
        return found

    def _spread(self, rows: Tensor) -> Tensor:
        """[B, ...] of a batch of pictures repeated to the rows of the call, as the host repeats references."""
        if rows.shape[0] == 1:
            return rows
        return rows.repeat(self.batch.count // rows.shape[0], *[1] * (rows.dim() - 1))

    def _target(self, one: ReferenceGuide, known: list[tuple[ReferenceGuide, Target]]) -> Target:
        """The target that a guide matches; guides that match the same one share it, and its channels."""
        for other, target in known:
            if _same_target(one, other):
                return target
        regions = self._rows(lambda grid: grid.regions(one.target.to("cpu", torch.float32))) if one.beta > 0 else None
        body = self._rows(lambda grid: grid.places(one.target_body)) if one.gamma > 0 else None
        known.append((one, Target(regions, body)))
        return known[-1][1]

    def _rows(self, rows_on: Callable[[Grid], Tensor]) -> Tensor:
        """Rows of the target tokens, those of its crop for a prompt for an area: [1 or batch, N, C]."""
        if not any(self.batch.areas):
            return self._spread(self.target.padded(rows_on(self.target)))
        whole = Grid(*self.batch.size, 1, 1, self.batch.size[0] * self.batch.size[1])
        cells = rows_on(whole).mT.unflatten(2, self.batch.size)
        parts = []
        for area in self.batch.areas:
            height, width, top, left = area or (*self.batch.size, 0, 0)
            crop = cells[:, :, top : top + height, left : left + width]
            rows = adaptive_avg_pool2d(crop, (self.target.rows, self.target.columns)).flatten(2).mT
            parts.append(self.target.padded(rows).repeat(self.batch.rows // rows.shape[0], 1, 1))
        return torch.cat(parts)

    # ------------------------------------------------------------------------------------- how it is done

    def install(self) -> dict:
        """New transformer options for this call."""
        if all(g is None for g in self.guidance):
            return self.options
        options = dict(self.options)
        patches = dict(options.get("patches", {}))
        others = patches.get("post_input", [])
        # In front of the others, so that what they read (the host's reference cache does) is true already.
        patches["post_input"] = [self._drop, *others, self._look]
        options["patches"] = patches
        options["optimized_attention_override"] = _Attend(self, options.get("optimized_attention_override"))
        self._may_drop = self._droppable(bool(others))
        return options

    def _droppable(self, others: bool) -> bool:
        """Whether tokens may leave the sequence, rather than stay where nobody reads them."""
        if any(g.keep_positions or g.blocks != "all" for g in self.active):
            return False
        if isinstance(self.unet, Flux) and self.conditions.get("attention_mask") is not None:
            return False  # its size is that of the whole sequence
        # Other nodes there may keep tokens from one step to the next, and a window changes how many there are.
        return not (others and any(g.sigmas is not None for g in self.active))

    def _drop(self, args: dict) -> dict:
        """The first `post_input` patch."""
        guidance = self.guidance[0]
        if not self._may_drop or guidance.index is None:
            return args
        where = (self.target.count, self.target.count + sum(r.count for r in self.references))
        if args["img"].shape[1] != where[1]:
            return args  # said in `_look`
        args = {**args, "img": drop_tokens(args["img"], guidance, where)}
        args["img_ids"] = drop_tokens(args["img_ids"].expand(self.batch.count, -1, -1), guidance, where)
        if "reference_image_num_tokens" in args.get("transformer_options", {}):
            # These options are the host's own copy for this call.
            counts = list(guidance.counts) if sum(guidance.counts) else []
            args["transformer_options"]["reference_image_num_tokens"] = counts
        self.dropped = True
        return args

    def _look(self, args: dict) -> dict:
        """The last `post_input` patch: what the blocks will be given."""
        self.text = args["txt"].shape[1]
        target, references = self.target.count, self._left()
        # The host's reference cache takes the references out of the queries and leaves them among the keys.
        if args["img"].shape[1] not in (target, target + references):
            self.readable = False
            say_once("Guide References does nothing: another node changed the number of image tokens")
        return args

    def _left(self) -> int:
        """Reference tokens among the keys."""
        return sum(self.guidance[0].counts) if self.dropped else sum(r.count for r in self.references)

    def layout(self, keys: int, options: dict) -> Layout | None:
        """Where things are among that many keys, or None for an attention of something else."""
        self._calls += 1
        target, references = self.target.count, self._left()
        text = self.text
        if self.family.refined:
            text = keys - target - references if "block_index" in options else 0
            refiners = [self.unet.context_refiner, self.unet.siglip_refiner or []]
            if "block_index" not in options and self._calls <= sum(map(len, refiners)):
                return None
        if not self.readable or text < 0 or keys != text + target + references:
            return None
        if self.family.first:
            return Layout((text + references, keys), (text, text + references))
        return Layout((text, text + target), (text + target, keys))

    def guidance_at(self, options: dict) -> Guidance | None:
        """How the block reads that attends now, which is the next joint one unless the host says its number."""
        number = self._joint
        self._joint += 1
        if "block_index" in options:
            number = options["block_index"]
            if options.get("block_type") == "single":
                number += len(self.unet.double_blocks)
        found = self.guidance[int(2 * number >= self.family.depth(self.unet))]
        return found.dropped() if self.dropped and found is not None else found


def _same_target(one: ReferenceGuide, other: ReferenceGuide) -> bool:
    same = [(one.beta > 0) == (other.beta > 0), (one.gamma > 0) == (other.gamma > 0)]
    if one.beta > 0 and all(same):
        same.append(one.target is other.target or _equal(one.target.masks, other.target.masks))
    if one.gamma > 0 and all(same):
        same.append(_equal(one.target_body, other.target_body))
    return all(same)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


class _Attend:
    """The attention override of one call, in front of one that was there."""

    def __init__(self, call: ReferenceCall, previous: Callable | None) -> None:
        self.call, self.previous = call, previous

    def __deepcopy__(self, memo: dict) -> _Attend:
        return self

    def __call__(
        self,
        func: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: object,
    ) -> Tensor:
        options = more.get("transformer_options") or {}
        layout = self.call.layout(k.shape[2 if skip_reshape else 1], options)
        guidance = None if layout is None else self.call.guidance_at(options)
        more = {"attn_precision": attn_precision, **more}
        if guidance is None or (guidance.index is None and not guidance.widens):
            more |= {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            return self._run(func, q, k, v, heads, mask=mask, **more)
        if not skip_reshape:
            q, k, v = (split_heads(x, heads) for x in (q, k, v))
        width = q.shape[-1]
        q, k, v = guided(q, k, v, layout, guidance)
        if mask is not None and mask.shape[-1] > 1:
            mask = guided_mask(mask, layout, guidance)
        # The kernel scales by the width it is given; the formula wants that of the unpadded head.
        q = q * (q.shape[-1] / width) ** 0.5 if guidance.widens else q
        run = self._run_wide if guidance.widens else self._run
        out = run(func, q, k, v, heads, mask=mask, skip_reshape=True, **more)
        out = split_heads(out, heads)[..., :width]
        return out if skip_output_reshape else merge_heads(out)

    def _run(self, func: Callable, *args: object, **more: object) -> Tensor:
        return func(*args, **more) if self.previous is None else self.previous(func, *args, **more)

    def _run_wide(self, func: Callable, q: Tensor, *args: object, **more: object) -> Tensor:
        """Attention of longer heads, by another kernel where the one in force does not take them."""
        if self.previous is not None:
            try:
                return self.previous(func, q, *args, **more)
            except REFUSALS as refusal:
                say_once(f"another node's attention takes no heads of {q.shape[-1]} ({refusal}): PyTorch's is used")
                return host_attention.attention_pytorch(q, *args, **more)
        if q.shape[-1] > WIDEST and getattr(func, "__name__", "") in NARROW_KERNELS:
            say_once(
                f"Sage attention takes no heads of {q.shape[-1]}: weights between 0 and 1 and matches use PyTorch's"
            )
            func = host_attention.attention_pytorch
        return func(q, *args, **more)
