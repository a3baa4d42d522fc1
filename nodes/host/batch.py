"""Who is in the batch of one call of a network, and which part of the picture each of them sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truepose_core.attention.fusion import row_index
from truepose_core.errors import TruePoseError

AREAS = "truepose_areas"
UNCONDITIONAL = 1
"""The host's number for negative rows in `cond_or_uncond`."""
NEGATIVE_ROWS = "ref_uncond_idxs"
"""Where Advanced-ControlNet's reference says which rows are negative. It calls a replace for all rows, and then again
for these alone, which the host never does."""

Area = tuple[int, int, int, int]
"""(height, width, top, left) in latent cells."""


@dataclass(frozen=True)
class Batch:
    """The rows of one call: chunks of equal size, one for each prompt.

    count: rows. kinds: of each chunk, as in `cond_or_uncond`. size: (height, width) of the whole latent in cells.
    areas: what each chunk sees of it, None for all.
    """

    count: int
    kinds: tuple[int, ...]
    size: tuple[int, int]
    areas: tuple[Area | None, ...]

    @classmethod
    def of(cls, x: Tensor, options: Mapping) -> Batch:
        """x: the latents of the call, [rows, ..., h, w]. options: its transformer options."""
        kinds = tuple(options.get("cond_or_uncond") or [0])
        kinds = (0,) if x.shape[0] % len(kinds) else kinds
        cells = tuple(x.shape[-2:])
        size, known = options.get(AREAS, (cells, {}))
        uuids = options.get("uuids") or []
        areas = tuple(known.get(uuids[i]) if i < len(uuids) else None for i in range(len(kinds)))
        return cls(x.shape[0], kinds, tuple(size) if any(areas) else cells, areas)

    @property
    def rows(self) -> int:
        """Rows of one chunk: the latents of the batch."""
        return self.count // len(self.kinds)

    def check(self, counts: Mapping[str, int]) -> None:
        """Raise TruePoseError for something (its name -> how many) that cannot be shared among the latents."""
        for what, count in counts.items():
            if self.rows % count:
                raise TruePoseError(
                    f"there are {count} {what} and {self.rows} latents in the batch; "
                    f"expected 1 or a number that divides {self.rows}"
                )

    def index(self, count: int, device: torch.device) -> Tensor:
        """Which of `count` sources or targets each row reads: [rows of all chunks]."""
        return row_index(count, self.count, len(self.kinds), device)

    def chunks_of(self, count: int, extra: Mapping) -> list[int] | None:
        """Which chunks `count` rows of an attention are: all of them, or those that the caller says; None where it does
        not."""
        if count % self.count == 0:
            return list(range(len(self.kinds)))
        named = list(extra.get(NEGATIVE_ROWS) or [])
        chunks = sorted({row // self.rows for row in named})
        whole = [row for chunk in chunks for row in range(chunk * self.rows, (chunk + 1) * self.rows)]
        return chunks if named and named == whole and count % len(named) == 0 else None


def check_cells(latent: Sequence[int], made: Sequence[int]) -> None:
    """Raise TruePoseError for a latent of (height, width) cells where a TruePose model makes others."""
    if tuple(latent) != tuple(made):
        raise TruePoseError(
            f"the latent is {latent[1]}x{latent[0]} cells and this TruePose model makes pictures of "
            f"{made[1]}x{made[0]} cells; connect Empty TruePose Latent"
        )


def with_areas(conds: list, x: Tensor, options: dict) -> dict:
    """Model options that remember which crop of the latents x each prompt for an area sees; as they are without any."""
    entries = [entry for cond in conds if cond is not None for entry in cond]
    areas = {e["uuid"]: _clip_area(e["area"], x.shape[2:]) for e in entries if e.get("area") is not None}
    if not areas:
        return options
    return with_option(options, AREAS, (tuple(x.shape[2:]), areas))


def with_option(options: dict, name: str, value: object) -> dict:
    """Model options with one more entry in their transformer options."""
    return {**options, "transformer_options": {**options.get("transformer_options", {}), name: value}}


def _clip_area(area: Sequence[int], size: Sequence[int]) -> Area:
    height, width, top, left = area
    return min(height, size[0] - top), min(width, size[1] - left), top, left
