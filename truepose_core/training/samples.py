"""Sample sheets: what a model makes of the first people of the test split, while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from truepose_core.models.model import TruePoseModel

TEST_SEED = 0
"""The world seed of the test split. Every table and every sheet shows the same people."""
_GAP = 2


def sample_sheet(model: TruePoseModel, pairs: int, seed: int, steps: int = 8, scale: int = 3) -> Tensor:
    """A sheet with one row per pair: source | skeleton | result | truth.

    pairs: how many rows; they are the first pairs of the test split. seed: of the sampling noise.
    steps: sampling steps. scale: pixels are enlarged by this whole number.
    Returns [1, 3, H, W] float in [0, 1] on the CPU.
    The model samples in evaluation mode and is left in the mode it was in; no global random state is used.
    Raises TruePoseError for fewer than 1 pair or a scale below 1.
    """
    from truepose_core.mannequin import sample_pairs
    from truepose_core.parsing import HumanParsing
    from truepose_core.pipeline import TruePosePipeline
    from truepose_core.skeleton import draw_skeleton

    if pairs < 1 or scale < 1:
        raise TruePoseError(f"a sample sheet of {pairs} pairs at scale {scale}; expected at least 1 of both")
    height, width = model.config.size
    batch = sample_pairs(pairs, "test", seed=TEST_SEED, height=height, width=width)
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        result = pipe(
            batch.source.image,
            batch.target.keypoints,
            HumanParsing(batch.source.parsing),
            batch.source.keypoints,
            num_inference_steps=steps,
            seed=seed,
        ).images
    finally:
        # Frozen parts may have been in evaluation mode on their own.
        for module, training in modes.items():
            module.training = training
    skeleton = draw_skeleton(batch.target.keypoints, height, width)
    columns = (batch.source.image, skeleton, result, batch.target.image)
    return tile([list(row) for row in zip(*columns, strict=True)], scale)


def tile(rows: list[list[Tensor]], scale: int = 1, gap: int = _GAP) -> Tensor:
    """Pictures [3, H, W] of one size, rows of columns, on white with `gap` pixels between -> [1, 3, H', W'].

    scale: every pixel becomes scale x scale; the gap is in pixels of the result.
    """
    grid = torch.stack([torch.stack(row) for row in rows]).float()
    grid = grid.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    grid = torch.nn.functional.pad(grid, (gap, 0, gap, 0), value=1.0)
    sheet = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return torch.nn.functional.pad(sheet, (0, gap, 0, gap), value=1.0)[None].clamp(0, 1)
