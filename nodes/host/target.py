"""What is known of the picture that is made, as the rows of one call see it: regions and places on the body."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .applied import AppliedCAA, AppliedSource
from .batch import Area, Batch

Grid = tuple[int, int]
"""(rows, columns) of a block's tokens."""


class Targets:
    """The targets of one call's sources, sampled once for each grid and area."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._known: dict[tuple, Tensor] = {}

    def regions(self, applied: AppliedSource | AppliedCAA, grid: Grid, chunks: list[int]) -> Tensor | None:
        """The target's regions for these chunks, one after the other: [rows, N, 7], or None."""
        if applied.target is None:
            return None
        return self._rows(("regions", applied), applied.target.tokens, grid, chunks)

    def places(self, applied: AppliedSource, grid: Grid, chunks: list[int]) -> Tensor | None:
        """Places on the body for these chunks: [rows, N, 3 or 4], or None."""
        source, body, aspect = applied.source, applied.target_body, self.batch.size[1] / self.batch.size[0]
        if not applied.has_gamma or body is None or source.body is None:
            return None
        if source.target_coordinates(body, 1, 1, aspect) is None:
            return None

        def tokens(height: int, width: int) -> Tensor:
            return source.target_coordinates(body, height, width, aspect)

        return self._rows(("body", applied), tokens, grid, chunks)

    def _rows(
        self, what: tuple[str, object], tokens: Callable[[int, int], Tensor], grid: Grid, chunks: list[int]
    ) -> Tensor:
        parts = []
        for chunk in chunks:
            area = self.batch.areas[chunk]
            key = (what, grid, area)
            if key not in self._known:
                self._known[key] = _sample(tokens, grid, area, self.batch.size)
            rows = self._known[key]
            parts.append(rows.repeat_interleave(self.batch.rows // rows.shape[0], 0))
        return torch.cat(parts)


def _sample(tokens: Callable[[int, int], Tensor], grid: Grid, area: Area | None, size: tuple[int, int]) -> Tensor:
    """Rows [T, N, C] of a grid that lies on an area of the latent, None for all of it. tokens: (height, width) -> rows
    of the whole at that size."""
    if area is None:
        return tokens(*grid)
    height, width, top, left = area
    whole = tokens(*size).mT.unflatten(2, size)
    return adaptive_avg_pool2d(whole[:, :, top : top + height, left : left + width], grid).flatten(2).mT
