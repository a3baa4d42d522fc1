"""Where the target looked: attention of regions to source tokens, as heat maps over the source and as bars.

With a(i, j) the softmax of one head's logits over all N + M keys, and groups of target places with weights g(i) >= 0,

    mass(g, j) = mean over heads of  sum_i g(i) a(i, j) / sum_i g(i)

is how much of its attention the average place of a group gives to token j. Queries are taken in pieces, so no N x
(N + M) map of a site is ever held whole. Everything shown is in units of an even look, 1 / (N + M): 1 means that a
token gets what it would get if every token were looked at alike. The measure and the drawing are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.pictures.sheet import labelled_sheet
from truepose_core.regions import REGION_COLORS, REGION_NAMES

WHOLE = "everywhere"
"""The group of all places of the picture."""
_BUDGET = 1 << 24
"""Logits held at once: 64 MB in float32."""
_SEEN = 0.002
"""Groups that cover less of the picture than this are not drawn."""
# Black, violet, red, orange, pale yellow: lighter is more, also in a grey print.
_RAMP = ((0, 0, 0), (72, 16, 110), (180, 44, 90), (248, 130, 40), (252, 250, 180))


def attention_mass(
    q: Tensor, k: Tensor, groups: Tensor, scale: float | None = None, logits_at_once: int = _BUDGET
) -> Tensor:
    """Mean attention of groups of queries to every key: [B, G, L], each row of a group that is there sums to 1.

    q: [B, H, N, D]. k: [B or 1, H, L, D]. groups: weights [B or 1, N, G], >= 0; a group without weight gets zeros.
    scale: of the logits, by default 1/sqrt(D). Computed in float32, `logits_at_once` logits at a time.
    """
    batch, heads, count, width = q.shape
    if k.shape[1] != heads or k.shape[-1] != width or k.shape[0] not in (1, batch):
        raise TruePoseError(f"keys are {tuple(k.shape)}; expected [{batch} or 1, {heads}, L, {width}] as the queries")
    if groups.dim() != 3 or groups.shape[0] not in (1, batch) or groups.shape[1] != count:
        raise TruePoseError(f"groups are {tuple(groups.shape)}; expected [{batch} or 1, {count}, G]")
    scale = width**-0.5 if scale is None else scale
    groups = groups.to(device=q.device, dtype=torch.float32).expand(batch, -1, -1)
    groups = groups / groups.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    total = q.new_zeros((batch, groups.shape[2], k.shape[2]), dtype=torch.float32)
    piece = max(1, logits_at_once // (batch * heads * k.shape[2]))
    keys = k.float().mT
    for first in range(0, count, piece):
        last = min(first + piece, count)
        seen = (q[:, :, first:last].float() * scale @ keys).softmax(-1).mean(1)
        total += groups[:, first:last].mT @ seen
    return total


def spread_kept(mass: Tensor, index: Tensor, count: int) -> Tensor:
    """Mass of kept tokens back on all source tokens: [B, G, K], index [B, K] (see `kept_tokens`) -> [B, G, count].

    Copies of a token add up; tokens that were dropped get zero.
    """
    index = index.to(mass.device).expand(mass.shape[0], -1)[:, None].expand(-1, mass.shape[1], -1)
    return mass.new_zeros((*mass.shape[:2], count)).scatter_add(2, index, mass)


def region_mean(mass: Tensor, regions: Tensor) -> Tensor:
    """Mean mass per token of each region: mass [..., M], region rows R [M, 7] -> [..., 7]; 0 for an absent region."""
    size = regions.sum(0)
    mean = mass @ regions.to(mass) / size.to(mass).clamp(min=1e-6)
    return torch.where(size.to(mass.device) > 1e-6, mean, torch.zeros_like(mean))


@dataclass(frozen=True)
class SiteLook:
    """What one attention site says of one picture.

    mass: [G, M] over all source tokens. grid: their (rows, columns). regions: R [M, 7]. places: N of the picture.
    """

    mass: Tensor
    grid: tuple[int, int]
    regions: Tensor
    places: int


@dataclass(frozen=True)
class Look:
    """Where one picture looked, over all sites, for G groups of its places.

    heat: [G, h, w], attention to each place of the source in units of an even look. by_region: [G, 7], its mean over
    each region of the source. share: [G] in 0..1, how much of all attention went to the source.
    """

    heat: Tensor
    by_region: Tensor
    share: Tensor


def combine(sites: Sequence[SiteLook]) -> Look:
    """The mean over sites, each site counting the same. Coarse sites are enlarged to the finest grid.

    Raises `TruePoseError` when there is no site.
    """
    if not sites:
        raise TruePoseError("no attention to the source was seen; connect a model that comes from Apply HPFA")
    finest = max((site.grid for site in sites), key=lambda grid: grid[0] * grid[1])
    heat, by_region, share = [], [], []
    for site in sites:
        even = site.places + site.mass.shape[-1]
        picture = (site.mass * even).unflatten(-1, site.grid)[None].float()
        heat.append(F.interpolate(picture, finest, mode="bilinear")[0])
        by_region.append(region_mean(site.mass * even, site.regions))
        share.append(site.mass.sum(-1))
    return Look(*(torch.stack(parts).mean(0).cpu() for parts in (heat, by_region, share)))


def heat_map(image: Tensor, heat: Tensor, top: float) -> Tensor:
    """Heat [h, w] (0 .. top) over a grey copy of the image [3, H, W] -> [3, H, W] in [0, 1]."""
    size = image.shape[1:]
    heat = F.interpolate(heat[None, None].float(), size, mode="bilinear")[0, 0] / max(top, 1e-12)
    place = heat.clamp(0, 1) * (len(_RAMP) - 1)
    low = place.long().clamp(max=len(_RAMP) - 2)
    ramp = heat.new_tensor(_RAMP) / 255
    part = (place - low)[..., None]
    colour = (ramp[low] * (1 - part) + ramp[low + 1] * part).movedim(-1, 0)
    grey = (image * image.new_tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(0)
    # The grey picture shows through everywhere, and most where nothing is looked at.
    return (0.45 * grey * (1 - heat.clamp(0, 1)) + colour).clamp(0, 1)


def bar_chart(series: Mapping[str, Tensor], title: str, width: int, height: int = 280) -> Tensor:
    """Bars of every series side by side for each region: values [7] >= 0 by name -> [1, 3, height, width] in [0, 1].

    The last series is drawn in full colour, earlier ones pale. A dashed line marks 1, an even look.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    text, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    left, right, top, bottom = 40, width - 12, 58, height - 28
    most = max(1.0, *(float(values.max()) for values in series.values())) * 1.1

    def level(value: float) -> float:
        return bottom - (bottom - top) * value / most

    draw.text((left, 8), title, fill="black", font=text)
    across = float(left)
    for number, name in enumerate(series):
        shade = _shade((60, 60, 60), number, len(series))
        draw.rectangle((across, 34, across + 12, 46), fill=shade)
        draw.text((across + 17, 40), name, fill="black", font=small, anchor="lm")
        across += 17 + draw.textlength(name, font=small) + 20
    slot = (right - left) / len(REGION_NAMES)
    bar = slot * 0.72 / len(series)
    for region, name in enumerate(REGION_NAMES):
        start = left + slot * region + slot * 0.14
        draw.text((start + slot * 0.36, bottom + 6), name, fill="black", font=small, anchor="ma")
        for number, values in enumerate(series.values()):
            value = float(values[region])
            x = start + bar * number
            colour = _shade(REGION_COLORS[region], number, len(series))
            draw.rectangle((x, level(value), x + bar - 2, bottom), fill=colour)
            draw.text((x + bar / 2, level(value) - 2), f"{value:.2g}", fill="black", font=small, anchor="mb")
    for x in range(left, right, 8):
        draw.line((x, level(1.0), x + 4, level(1.0)), fill=(120, 120, 120))
    draw.text((left - 6, level(1.0)), "1", fill="black", font=small, anchor="rm")
    draw.line((left, bottom, right, bottom), fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _shade(colour: tuple[int, int, int], number: int, count: int) -> tuple[int, int, int]:
    """The colour, paler for earlier series."""
    strength = 1.0 if number == count - 1 else 0.35
    return tuple(round(255 - (255 - part) * strength) for part in colour)


def figure(image: Tensor, looks: Mapping[str, Look], target_regions: Tensor | None = None) -> Tensor:
    """Heat maps over the source, a row for each look, and bars of the mean attention per region: [1, 3, H, W].

    image: the source [3, H, W] in [0, 1]. looks: by name, all of the same groups: first all places, then, where
    target_regions is given, the places of each region. target_regions: [7], how much of the picture each region
    covers (0..1); regions that are hardly there get no column.
    """
    first = next(iter(looks.values()))
    columns = {WHOLE: 0}
    if target_regions is not None:
        shown = [r for r in range(1, len(REGION_NAMES)) if float(target_regions[r]) > _SEEN]
        columns |= {f"from {REGION_NAMES[r]}": 1 + r for r in shown}
    if first.heat.shape[0] != (1 if target_regions is None else 1 + len(REGION_NAMES)):
        raise TruePoseError(f"a look holds {first.heat.shape[0]} groups; expected all places, and one for each region")
    # Small pictures (the bundled model's are 96 x 128) get room for their labels.
    grow = max(1, -(-224 // image.shape[1]), -(-120 // image.shape[2]))
    image = image.repeat_interleave(grow, 1).repeat_interleave(grow, 2)
    pictures = {"source": torch.stack([image] * len(looks))}
    for name, group in columns.items():
        # One scale for all rows of a column, so that they can be compared.
        top = max(float(look.heat[group].max()) for look in looks.values())
        pictures[name] = torch.stack([heat_map(image, look.heat[group], top) for look in looks.values()])
    captions = [f"{name}: {100 * float(look.share[0]):.0f} % to the source" for name, look in looks.items()]
    sheet = labelled_sheet(pictures, captions, least_height=1)
    width = max(sheet.shape[-1], 560)
    charts = [
        bar_chart(
            {name: look.by_region[0] for name, look in looks.items()},
            "Mean attention to the tokens of each region of the source (1 = an even look)",
            width,
        )
    ]
    if target_regions is not None:
        charts.append(
            bar_chart(
                {name: look.by_region[1:].diagonal() for name, look in looks.items()},
                "The same from places of that region alone: does a face look at the face?",
                width,
            )
        )
    sheet = F.pad(sheet, (0, width - sheet.shape[-1], 0, 0), value=1.0)
    return torch.cat([sheet, *charts], 2)
