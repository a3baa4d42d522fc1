"""CAA inside the host's blocks: a second cross-attention beside attn2, to the region tokens of a source person.

`CrossTokens` are the region tokens at one site, `AppliedCAA` one Apply CAA. host.py puts them into a call of the UNet.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from truepose_core.attention.caa import caa_attention
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

SELF_INPUT, CROSS_INPUT = "truepose_self_input", "truepose_cross_input"
"""Where a block's patches leave its attentions' inputs for each other, in the options of that block alone."""


@dataclass(frozen=True, eq=False)
class CrossTokens:
    """CAA's region tokens at one site: k, v [S, H, T, D], regions [T, 7] one-hot, shown [S, T], kappa [H], scale []."""

    k: Tensor
    v: Tensor
    regions: Tensor
    shown: Tensor
    kappa: Tensor
    scale: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> CrossTokens:
        """The same on a device; which tokens are shown stays a mask."""
        k, v, regions, kappa, scale = (
            x.to(device=device, dtype=dtype) for x in (self.k, self.v, self.regions, self.kappa, self.scale)
        )
        return CrossTokens(k, v, regions, self.shown.to(device), kappa, scale)

    def rows(self, index: Tensor) -> CrossTokens:
        """Sources chosen or repeated by index [B]."""
        return CrossTokens(self.k[index], self.v[index], self.regions, self.shown[index], self.kappa, self.scale)

    def weighed(self, omega: Sequence[float], strength: float, kappa: float | None = None) -> CrossTokens:
        """The same tokens, each region's values times its weight (7 numbers), and all of it times strength.

        Only values are weighed: a place that looks at a region of weight 0 gets nothing, and never another region in
        its stead. kappa: region match for every head, or None to leave it.
        """
        weight = self.regions @ self.v.new_tensor(omega)
        match = self.kappa if kappa is None else torch.full_like(self.kappa, kappa)
        return replace(self, v=self.v * weight[:, None], kappa=match, scale=self.scale * strength)

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def numel(self) -> int:
        return self.k.numel() + self.v.numel()


@dataclass(frozen=True, eq=False)
class AppliedCAA:
    """One Apply CAA: region tokens and how they are read. Never changed once made.

    cross: site -> region tokens. empty: site -> the tokens of no picture, for rows that shall not see the source; {} to
    add nothing to them. sigmas: (highest, lowest) noise at which it works, or None for always. keep_unconditional:
    whether negative rows see the source too. target: P, or None for what Apply HPFA knows. background: share, 0 to 1,
    of what is added that places of the target's background get, where the target's regions are known.
    trained: whether the model learned with these tokens; then they take the place of those that Apply HPFA brings, and
    give HPFA its alignment.
    """

    cross: Mapping[str, CrossTokens]
    empty: Mapping[str, CrossTokens] = field(default_factory=dict)
    sigmas: tuple[float, float] | None = None
    keep_unconditional: bool = False
    target: HumanParsing | None = None
    given: bool = False
    background: float = 1.0
    trained: bool = False
    _copies: dict = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __deepcopy__(self, memo: dict) -> AppliedCAA:
        # Older hosts copy a model's options deeply at every clone; this object never changes, so it is its own copy.
        return self

    @property
    def batch(self) -> int:
        """How many sources."""
        return next(iter(self.cross.values())).batch

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run."""
        return itemsize * sum(x.numel for side in (self.cross, self.empty) for x in side.values())

    def on(self, device: torch.device, dtype: torch.dtype, site: str, empty: bool = False) -> CrossTokens:
        """The tokens of a site on the device, copied at first use and freed by `release`."""
        key = (device, dtype, site, empty)
        with self._lock:
            if key not in self._copies:
                self._copies[key] = (self.empty if empty else self.cross)[site].to(device, dtype)
            return self._copies[key]

    def release(self) -> None:
        """Free the device copies."""
        with self._lock:
            self._copies.clear()

    def gate(self, prior: Tensor | None) -> Tensor | None:
        """How much of what is added each place gets: [B, N, 1], or None for all of it. prior: P [B, N, 7] or None."""
        if prior is None or self.background == 1:
            return None
        return 1 - (1 - self.background) * prior[..., Region.BACKGROUND, None]


def keep_self_input(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An attn1 patch: leave the self-attention's input for CAA's alignment, which asks with attn2's queries."""
    extra[SELF_INPUT] = n
    return n, context, value


def keep_cross_input(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An attn2 patch: leave the cross-attention's input for the second cross-attention, beside it."""
    extra[CROSS_INPUT] = n
    return n, context, value


def beside_attention(attn2: torch.nn.Module, x: Tensor, cross: CrossTokens, prior: Tensor | None) -> Tensor:
    """lambda CrossAttn(x, E) as it leaves the block's to_out: the output projection is linear, so what another node
    puts in attn2's place stays and this is added to it. x: [B, N, C]; cross: B rows; prior: [B, N, 7] or None."""
    q = split_heads(attn2.to_q(x), attn2.heads)
    out, _ = caa_attention(q, cross.k, cross.v, cross.regions, cross.shown, prior=prior, kappa=cross.kappa)
    out = cross.scale * merge_heads(out)
    # Without the bias, which the block's own output has already.
    return attn2.to_out(out) - attn2.to_out(torch.zeros_like(out[:1, :1]))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


def row_index(batch: int, rows: int, chunks: int, device: torch.device) -> Tensor:
    """Which of `batch` sources each row reads: within every chunk, each serves the same number of rows."""
    size = rows // chunks
    return (torch.arange(size, device=device) * batch // size).repeat(chunks)
