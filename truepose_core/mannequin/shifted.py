"""Another world: people whose garments, proportions and light are outside of what any training here has drawn (ours).

Everything else (poses, views, framing, which pattern who wears) is the usual world's, so that a pair of this world is
the pair of the same number in the other one, shifted.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .identity import Identities

LIGHT = (0.6, 0.1, 0.79)
"""Where the light comes from: low from the other side."""
_PERIOD = 1.8
_LOGO = 1.5
_BEYOND = 1.2


def shift_people(people: Identities) -> Identities:
    """The same people in other clothes and of another build.

    Colours of clothes are inverted (which keeps their contrast and leaves the palettes). Stripes and checks are 1.8
    times as wide, logos 1.5 times as large, stripes around the chest fewer: all outside of their ranges. Sleeves and
    trousers end a little below where short ones do. Each shape number moves 1.2 away from zero, up to 3.2 where
    training ends at 2. Backgrounds are darker than any.
    """
    half = torch.full_like(people.sleeve_long, 0.5, dtype=people.beta.dtype)
    return replace(
        people,
        shoe=1 - people.shoe,
        top_a=1 - people.top_a,
        top_b=1 - people.top_b,
        top_accent=1 - people.top_accent,
        top_period=_PERIOD * people.top_period,
        # Checks need an even number of cells to close around the chest.
        top_count=torch.where(people.top_pattern == 3, 6, 3),
        logo_size=_LOGO * people.logo_size,
        sleeve_long=half,
        bottom_long=half,
        bottom_a=1 - people.bottom_a,
        bottom_b=1 - people.bottom_b,
        bottom_period=_PERIOD * people.bottom_period,
        background=0.4 * people.background,
        beta=people.beta + _BEYOND * torch.where(people.beta < 0, -1.0, 1.0),
    )
