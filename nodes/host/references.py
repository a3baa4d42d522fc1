"""ComfyUI's inside, reference tokens: guiding editors that hold their references as tokens (Flux, Qwen-Image-Edit).

An `APPLY_MODEL` wrapper (one signature for all families and versions) reads `ref_latents`, and for the time of that
call puts two things into the transformer options:
* `post_input` patches, first and last in the list: tokens of weight 0 leave the sequence before the first block, and
  the number of text tokens that the others leave is noted;
* an attention override, chained with one that is there: longer heads where anything is weighed or matched, and
  without the shut keys where tokens stay in the sequence.
Nothing stays in the options between calls; patch objects never change once made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker
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
from truepose_core.parsing import HumanParsing
from truepose_core.pose.limbs import body_coordinates

from .unet import AREAS, UNCONDITIONAL, in_window, same_shape, say_once, with_areas

KEY = "truepose_references"
BLOCKS = ("all", "first half", "second half")
MOST = 4
"""References that can be chosen."""
GREY = 0.5
WIDEST = 128
"""The widest head of kernels that refuse the spare channels."""
NARROW_KERNELS = ("attention_sage", "attention3_sage")
REFUSALS = (ValueError, AssertionError, NotImplementedError)
"""What kernels raise for a width of heads that they do not know."""


@dataclass(frozen=True)
class Family:
    """Where a kind of network holds its references. blocks: names of its lists of joint blocks, in order. first: the
    references stand in front of the target, not behind it. refined: image tokens attend to each other, and are padded
    to a multiple, before the text joins them."""

    blocks: tuple[str, ...]
    first: bool = False
    refined: bool = False

    def depth(self, unet: torch.nn.Module) -> int:
        """How many joint blocks the network has."""
        return sum(len(getattr(unet, name)) for name in self.blocks)


FAMILIES: dict[type, Family] = {
    Flux: Family(("double_blocks", "single_blocks")),
    QwenImageTransformer2DModel: Family(("transformer_blocks",)),
    OmniGen2Transformer2DModel: Family(("layers",), first=True),
    NextDiT: Family(("layers",), first=True, refined=True),
}
"""Flux: FLUX.1 Kontext, FLUX.2 dev and klein, LongCat-Image-Edit. Qwen: Qwen-Image-Edit, 2509, 2511. NextDiT: Z-Image
Omni; other networks of that class get no references from the host."""


def family_of(model: object) -> Family | None:
    """How a MODEL holds references as tokens; None where it holds none. Raises TruePoseError for a UNet."""
    unet = model.model.diffusion_model
    if isinstance(unet, UNetModel):
        raise TruePoseError(
            f"the model is a {type(model.model.model_config).__name__}, a UNet without reference tokens; use SourceNet "
            "Encode and Apply HPFA with it"
        )
    return next((family for kind, family in FAMILIES.items() if isinstance(unet, kind)), None)


@dataclass(frozen=True, eq=False)
class ReferenceGuide:
    """One Guide References: which reference, and how it is read. Checked when made, never changed afterwards.

    reference: 1 for the first. parsing: of its picture. omega: weight per region, 7 numbers in [0, 1]. beta, gamma:
    region match and body match, >= 0. target: P, and given: whether it is the user's own. body, target_body:
    [B, 18, 3]. sigmas: (highest, lowest) noise at which it works, or None for always. blocks: one of `BLOCKS`.
    keep_positions: tokens of weight 0 stay in the sequence, where nobody reads them.
    """

    reference: int
    parsing: HumanParsing
    omega: tuple[float, ...]
    beta: float = 0.0
    gamma: float = 0.0
    target: HumanParsing | None = None
    given: bool = True
    body: Tensor | None = None
    target_body: Tensor | None = None
    sigmas: tuple[float, float] | None = None
    blocks: str = "all"
    keep_positions: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.reference <= MOST:
            raise TruePoseError(
                f"reference is {self.reference}; expected 1 to {MOST}, in the order of the conditioning"
            )
        if not all(0 <= w <= 1 for w in self.omega):
            raise TruePoseError(f"region weights are {self.omega}; expected numbers from 0 to 1")
        if self.beta < 0 or self.gamma < 0:
            raise TruePoseError(f"region match is {self.beta:g} and body match {self.gamma:g}; expected 0 or more")
        if self.beta > 0 and self.target is None:
            raise TruePoseError(
                f"region_match is {self.beta:g}, but where the regions shall be is not known; connect target_parsing, "
                "or pose and target_pose, or set it to 0"
            )
        if self.gamma > 0 and (self.body is None or self.target_body is None):
            raise TruePoseError(f"body_match is {self.gamma:g}; connect pose and target_pose, or set it to 0")

    def __deepcopy__(self, memo: dict) -> ReferenceGuide:
        return self

    @property
    def matches(self) -> bool:
        """Whether anything depends on the target's position."""
        return self.beta > 0 or self.gamma > 0

    @property
    def has_effect(self) -> bool:
        """False where all weights are 1 and nothing matches."""
        return self.matches or any(w != 1 for w in self.omega)


class GuidePatch:
    """The guides of a model, in the order they were applied. Made anew by every Guide References; what it learns of a
    run's sizes is forgotten at the end of the run."""

    def __init__(self, guides: tuple[ReferenceGuide, ...]) -> None:
        self.guides = guides
        self._known: dict[tuple, Guidance | None] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> GuidePatch:
        return self

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
            call = _Call(self, active, unet, x, references, c_crossattn, options, kwargs)
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

    def on_cond_batch(
        self, executor: Callable, model: object, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list:
        """The `CALC_COND_BATCH` wrapper: a prompt for an area sees a crop of the latent. Remember which crop."""
        if x.dim() == 4 and any(g.matches for g in self.guides):
            options = with_areas(conds, x, options)
        return executor(model, conds, x, timestep, options)

    def on_cleanup(self, model: object) -> None:
        """The `ON_CLEANUP` callback, at the end of every run, failed ones included."""
        with self._lock:
            self._known.clear()

    def known(self, key: tuple, make: Callable[[], Guidance | None]) -> Guidance | None:
        """What was made for a key in this run."""
        with self._lock:
            if key not in self._known:
                self._known[key] = make()
            return self._known[key]


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
    clone = model.clone()
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, KEY)
    clone.remove_attachments(KEY)
    if guides:
        patch = GuidePatch(guides)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, patch.on_model_call)
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, patch.on_cond_batch)
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, patch.on_cleanup)
        clone.set_attachments(KEY, patch)
    return clone


def hide_regions(image: Tensor, parsing: HumanParsing, omega: Sequence[float]) -> Tensor:
    """The picture with regions of weight 0 painted grey: image [B, 3, H, W], parsing of the same size or batch 1."""
    hidden = torch.tensor([float(w == 0) for w in omega])
    share = torch.einsum("brhw,r->bhw", parsing.masks, hidden.to(parsing.masks))[:, None].to(image)
    return image * (1 - share) + GREY * share


def nothing_to_show(why: str) -> ExecutionBlocker:
    """An output that stops what is connected to it, with a reason."""
    return ExecutionBlocker(why)


# ------------------------------------------------------------------------------------- one call of the network


@dataclass(frozen=True)
class _Grid:
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


def _grid(latent: Tensor, patch: int, multiple: int) -> _Grid:
    height, width = latent.shape[-2:]
    frames = latent.shape[2] if latent.dim() == 5 else 1
    tokens = -(-height // patch) * -(-width // patch) * frames
    return _Grid(height, width, frames, patch, -(-tokens // multiple) * multiple)


class _Call:
    """What one call of the network needs to know: where its tokens are, and how each reference is read."""

    def __init__(
        self,
        patch: GuidePatch,
        active: list[ReferenceGuide],
        unet: torch.nn.Module,
        x: Tensor,
        references: Sequence[Tensor],
        context: Tensor | None,
        options: dict,
        conditions: dict,
    ) -> None:
        """active: the guides that work at this noise level. context: text tokens [rows, T, C]. conditions: what else
        the network is given."""
        self.active, self.unet, self.options, self.conditions = active, unet, options, conditions
        self.family = next(family for kind, family in FAMILIES.items() if isinstance(unet, kind))
        multiple = (getattr(unet, "pad_tokens_multiple", None) or 1) if self.family.refined else 1
        self.target = _grid(x, unet.patch_size, multiple)
        self.references = [_grid(latent, unet.patch_size, multiple) for latent in references]
        self.text = 0 if context is None else context.shape[1]
        self.batch = x.shape[0]
        self.chunks = len(options.get("cond_or_uncond") or [0])
        self.chunks = 1 if self.batch % self.chunks else self.chunks
        self.rows = self.batch // self.chunks
        self.size, areas = options.get(AREAS, (tuple(x.shape[-2:]), {}))
        uuids = options.get("uuids") or []
        self.areas = tuple(areas.get(uuids[i]) if i < len(uuids) else None for i in range(self.chunks))
        if not any(self.areas):
            self.size = tuple(x.shape[-2:])
        for one in active:
            self._check(one)
        self.guidance = [self._known(patch, half, x.device) for half in BLOCKS[1:]]
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
        for what, count in counts.items():
            if self.rows % count:
                raise TruePoseError(
                    f"there are {count} {what} and {self.rows} latents in the batch; expected 1 or a number that "
                    f"divides {self.rows}"
                )
        latent = self.references[one.reference - 1]
        pictures = [(f"parsing of reference {one.reference}", one.parsing, "reference", (latent.height, latent.width))]
        if one.beta > 0 and one.given:
            pictures.append(("target parsing", one.target, "latent", tuple(self.size)))
        for what, parsing, which, cells in pictures:
            if not same_shape(parsing.size, cells):
                raise TruePoseError(
                    f"the {what} is {parsing.size[1]}x{parsing.size[0]} (width x height) and the {which} "
                    f"{cells[1]}x{cells[0]} cells, another shape; make the parsing from the picture that was encoded, "
                    "after any cropping"
                )

    # -------------------------------------------------------------------------------------- what is asked

    def _known(self, patch: GuidePatch, half: str, device: torch.device) -> Guidance | None:
        guides = [g for g in self.active if g.blocks in ("all", half)]
        sizes = (self.target, *self.references, self.batch, self.chunks, self.areas, tuple(self.size))
        key = (tuple(map(id, guides)), sizes, device)

        def make() -> Guidance | None:
            found = guide(self._references(guides))
            return None if found is None else found.to(device)

        return patch.known(key, make)

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
        return rows.repeat(self.batch // rows.shape[0], *[1] * (rows.dim() - 1))

    def _target(self, one: ReferenceGuide, known: list[tuple[ReferenceGuide, Target]]) -> Target:
        """The target that a guide matches; guides that match the same one share it, and its channels."""
        for other, target in known:
            if _same_target(one, other):
                return target
        regions = self._rows(lambda grid: grid.regions(one.target.to("cpu", torch.float32))) if one.beta > 0 else None
        body = self._rows(lambda grid: grid.places(one.target_body)) if one.gamma > 0 else None
        known.append((one, Target(regions, body)))
        return known[-1][1]

    def _rows(self, rows_on: Callable[[_Grid], Tensor]) -> Tensor:
        """Rows of the target tokens, those of its crop for a prompt for an area: [1 or batch, N, C]."""
        if not any(self.areas):
            return self._spread(self.target.padded(rows_on(self.target)))
        whole = _Grid(*self.size, 1, 1, self.size[0] * self.size[1])
        cells = rows_on(whole).mT.unflatten(2, tuple(self.size))
        parts = []
        for area in self.areas:
            height, width, top, left = area or (*self.size, 0, 0)
            crop = cells[:, :, top : top + height, left : left + width]
            rows = adaptive_avg_pool2d(crop, (self.target.rows, self.target.columns)).flatten(2).mT
            parts.append(self.target.padded(rows).repeat(self.rows // rows.shape[0], 1, 1))
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
        args["img_ids"] = drop_tokens(args["img_ids"].expand(self.batch, -1, -1), guidance, where)
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

    def __init__(self, call: _Call, previous: Callable | None) -> None:
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
