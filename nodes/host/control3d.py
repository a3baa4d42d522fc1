"""3D guidance inside the host's blocks: a second cross-attention beside attn2, to tokens of the target's body.

`SiteTokens` are the tokens at one site, `Control3DPatch` one Apply 3D Guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from truepose_core.alignment.control3d import ControlTokens, cells, control_attention, place_bias
from truepose_core.attention.fusion import row_index
from truepose_core.attention.heads import merge_heads, split_heads

from .base import UNetCall, UNetPatch, dressed
from .batch import UNCONDITIONAL, Area, Batch
from .unet import GUIDANCE, NOTHING, POSE_ONLY, in_window, say_once, site_name, transformer_blocks, with_patches

CONTROL_KEY = "truepose_control3d"
CONTROL_INPUT = "truepose_control3d_input"
"""Where a block's patches leave its cross-attention's input, in the options of that block alone."""


@dataclass(frozen=True, eq=False)
class SiteTokens:
    """The guidance's tokens at one site: k, v [T, H, K, D]; factor [T], lambda and which rows are shown; gamma [H];
    log_w [T, K] and places [T, K, 3] (see `ControlTokens`), or None."""

    k: Tensor
    v: Tensor
    factor: Tensor
    gamma: Tensor
    log_w: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> SiteTokens:
        """The same on a device; distances stay float32 until they are logits."""
        kinds = dict.fromkeys(("gamma", "places"), torch.float32)
        moved = {
            name: None if x is None else x.to(device=device, dtype=kinds.get(name, dtype))
            for name, x in vars(self).items()
        }
        return SiteTokens(**moved)

    def rows(self, index: Tensor) -> SiteTokens:
        """Targets chosen or repeated by index [B]."""
        return SiteTokens(**{name: x if x is None or name == "gamma" else x[index] for name, x in vars(self).items()})

    def bias(self, at: Tensor | None) -> Tensor | None:
        """What is added to the logits at places [N, 2], or where they are not known: [T, H or 1, N or 1, K] or None."""
        if self.places is None or at is None:
            return None if self.log_w is None else self.log_w[:, None, None]
        return place_bias(at, self.places, self.gamma).to(self.k.dtype)


def site_tokens(sites: Mapping[str, torch.nn.Module], tokens: ControlTokens | None) -> dict[str, SiteTokens]:
    """Site -> keys and values on the CPU. sites: site -> its `Control3DSite`; {} for no tokens."""
    if tokens is None:
        return {}
    found = {}
    for site, module in sites.items():
        k, v = module.keys(tokens.tokens)
        made = (k, v, module.scale * tokens.shown, module.log_gamma.exp(), tokens.log_w, tokens.places)
        found[site] = SiteTokens(*(None if x is None else x.cpu() for x in made))
    return found


class Control3DPatch(UNetPatch):
    """One Apply 3D Guidance.

    full: site -> tokens for rows that see the source; posed: for those that see the pose alone, {} where they read
    nothing. sigmas: (highest, lowest) noise at which it works, or None for always. keep_unconditional: whether negative
    rows see the source too.
    """

    key = CONTROL_KEY
    matches = True

    def __init__(
        self,
        full: Mapping[str, SiteTokens],
        posed: Mapping[str, SiteTokens],
        sigmas: tuple[float, float] | None,
        keep_unconditional: bool,
    ) -> None:
        super().__init__()
        self.full, self.posed = full, posed
        self.sigmas, self.keep_unconditional = sigmas, keep_unconditional

    @property
    def wrappers(self) -> Mapping[str, Callable]:
        return {**super().wrappers, WrappersMP.CALC_COND_BATCH: self.on_cond_batch}

    @property
    def targets(self) -> int:
        """How many target bodies: T."""
        return len(next(iter((self.full or self.posed).values())).k)

    def on(self, site: str, seen: bool, like: Tensor) -> SiteTokens:
        """The tokens of a site on the device and in the type of `like`."""
        tokens = (self.full if seen else self.posed)[site]
        return self.cache.of((site, seen, like.device, like.dtype), lambda: tokens.to(like.device, like.dtype))

    def around(self, call: UNetCall) -> Tensor:
        sees = call.options.get(GUIDANCE)
        if sees == NOTHING or not in_window(self.sigmas, call.options.get("sigmas")):
            return call.run()
        reads = _Reads(self, Batch.of(call.x, call.options), call.unet, hidden=sees == POSE_ONLY)
        more = {"attn2_patch": [keep_control_input], "attn2_output_patch": [reads]}
        return call.run(options={**call.options, "patches": with_patches(call.options, more)})


def keep_control_input(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An attn2 patch: leave the cross-attention's input for the guidance's own, beside it."""
    extra[CONTROL_INPUT] = n
    return n, context, value


class _Reads:
    """The attn2 output patch of one call: adds what each chunk of the batch reads of the tokens."""

    def __init__(self, patch: Control3DPatch, batch: Batch, unet: torch.nn.Module, hidden: bool) -> None:
        """hidden: whether no row may see the source."""
        self.patch, self.batch, self.hidden = patch, batch, hidden
        self.blocks = {site: block for site, (_, block) in transformer_blocks(unet).items()}
        batch.check({"target bodies": patch.targets})

    def __deepcopy__(self, memo: dict) -> _Reads:
        return self

    def __call__(self, n: Tensor, extra: dict) -> Tensor:
        x = extra.pop(CONTROL_INPUT)
        site = site_name((*extra["block"], extra["block_index"]))
        batch = self.batch
        if n.shape[0] != batch.count:
            say_once("3D guidance is off where another node hands over some of the rows")
            return n
        height, width = extra["activations_shape"][-2:]
        grid = (height, width) if n.shape[1] == height * width else None
        if grid is None:
            say_once("3D guidance goes without places where another node (HyperTile, ToMe) cuts or merges tokens")
        parts = []
        chunks = zip(batch.kinds, batch.areas, n.split(batch.rows), x.split(batch.rows), strict=True)
        for kind, area, out, rows in chunks:
            seen = not self.hidden and (self.patch.keep_unconditional or kind != UNCONDITIONAL)
            if site in (self.patch.full if seen else self.patch.posed):
                tokens = self.patch.on(site, seen, n)
                at = None if grid is None else self._at(grid, area, n)
                out = out + beside_attention(self.blocks[site].attn2, rows, tokens, at)
            parts.append(out)
        return torch.cat(parts)

    def _at(self, grid: tuple[int, int], area: Area | None, like: Tensor) -> Tensor:
        """Where a grid's cells are in the whole picture, [N, 2] in its heights."""
        at = cells(*grid, like.float())
        if area is None:
            return at
        (tall, wide), (height, width, top, left) = self.batch.size, area
        middle = at.new_tensor([left + width / 2 - wide / 2, top + height / 2 - tall / 2])
        return (at * height + middle) / tall


def beside_attention(attn2: torch.nn.Module, x: Tensor, tokens: SiteTokens, at: Tensor | None) -> Tensor:
    """lambda CrossAttn(x, tokens) as it leaves the block's to_out. x: [B, N, C], B a multiple of the targets. at: where
    the tokens of x are, [N, 2], or None."""
    tokens = tokens.rows(row_index(len(tokens.k), x.shape[0], 1, x.device))
    q = split_heads(attn2.to_q(x), attn2.heads)
    out = merge_heads(control_attention(q, tokens.k, tokens.v, tokens.factor, tokens.bias(at)))
    # Without the bias, which the block's own output has already.
    return attn2.to_out(out) - attn2.to_out(torch.zeros_like(out[:1, :1]))


def with_control3d(model: object, patch: Control3DPatch) -> object:
    """A clone of MODEL with this 3D guidance; another on it is replaced."""
    return dressed(model, patch)
