"""The fixed test split of the mannequin world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from truepose_core.mannequin import PairBatch

TEST_SEED = 0
"""The world seed of the test split: every table and every sheet shows the same people. Training never draws them."""


def split_pairs(indices: Tensor | int, size: tuple[int, int], world: str = "usual") -> PairBatch:
    """Pairs of the test split (an int n means the first n), as pictures of (height, width), on the CPU. world: one of
    `world.WORLDS`."""
    from truepose_core.mannequin import sample_pairs

    return sample_pairs(indices, "test", seed=TEST_SEED, height=size[0], width=size[1], kind=world)
