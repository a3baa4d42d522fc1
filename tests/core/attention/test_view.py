"""Laws of the attention view: it is the attention, only summed, and what is drawn says it truly."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.attention.hpfa import (
    SourceTokens,
    augment,
    gather_tokens,
    kept_tokens,
    match_channels,
    region_rows_weight,
)
from truepose_core.attention.view import (
    Look,
    SiteLook,
    attention_mass,
    bar_chart,
    combine,
    figure,
    heat_map,
    region_mean,
    spread_kept,
)
from truepose_core.errors import TruePoseError

B, H, N, M, D = 2, 3, 20, 12, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(batch: int, count: int, seed: int) -> torch.Tensor:
    return (3 * draw(batch, count, 7, seed=seed)).softmax(-1)


def everyone(count: int = N) -> torch.Tensor:
    return torch.ones(1, count, 1)


def test_mass_equals_the_whole_attention_map() -> None:
    q, k, groups = draw(B, H, N, D), draw(B, H, N + M, D, seed=1), rows(B, N, 2)
    whole = (q @ k.mT * D**-0.5).softmax(-1).mean(1)
    wanted = torch.stack([(groups[..., g, None] * whole).sum(1) / groups[..., g, None].sum(1) for g in range(7)], 1)
    assert torch.allclose(attention_mass(q, k, groups), wanted, atol=1e-6)


@pytest.mark.parametrize("logits", [1, 100, 1 << 24])
def test_pieces_change_nothing(logits: int) -> None:
    q, k = draw(B, H, N, D), draw(1, H, N + M, D, seed=1)
    whole = attention_mass(q, k, rows(1, N, 2))
    assert torch.allclose(attention_mass(q, k, rows(1, N, 2), logits_at_once=logits), whole, atol=1e-6)
    assert torch.allclose(whole.sum(-1), torch.ones(B, 7), atol=1e-5)


def test_region_sums_equal_attention_with_regions_as_values() -> None:
    q, k, regions = draw(B, H, N, D), draw(B, H, M, D, seed=1), rows(1, M, 3)
    values = regions[:, None].expand(B, H, -1, -1)
    wanted = scaled_dot_product_attention(q, k, values).mean((1, 2))
    assert torch.allclose(attention_mass(q, k, everyone())[:, 0] @ regions[0], wanted, atol=1e-6)


def test_a_group_is_the_mean_of_its_members() -> None:
    q, k = draw(1, H, N, D), draw(1, H, M, D, seed=1)
    single = torch.cat([attention_mass(q[:, :, i : i + 1], k, everyone(1)) for i in range(N)], 1)
    assert torch.allclose(attention_mass(q, k, everyone())[:, 0], single.mean(1), atol=1e-6)
    nobody = torch.zeros(1, N, 1)
    assert torch.equal(attention_mass(q, k, nobody), torch.zeros(1, 1, M))


def test_half_precision_is_summed_in_float32() -> None:
    q, k = draw(1, H, N, D).half(), draw(1, H, M, D, seed=1).half()
    assert torch.allclose(attention_mass(q, k, everyone()), attention_mass(q.float(), k.float(), everyone()), atol=1e-6)


def test_pruned_with_spare_channels_equals_the_formula() -> None:
    """Through the same channels, pruning and copies that a host's kernel is given."""
    q, k, v = draw(B, H, N, D), draw(B, H, N, D, seed=1), draw(B, H, N, D, seed=2)
    ks, vs, regions, target = draw(B, H, M, D, seed=3), draw(B, H, M, D, seed=4), rows(B, M, 5), rows(B, N, 6)
    omega = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 0.2, 1.0])
    # Whole regions, and another number of tokens that weigh something in each batch row.
    regions = torch.nn.functional.one_hot(regions.argmax(-1), 7).float()
    weight, beta = region_rows_weight(regions, omega), 1.7
    index, log_w = kept_tokens(weight)

    def pick(x: torch.Tensor) -> torch.Tensor:
        return torch.gather(x, 2, index[:, None, :, None].expand(-1, H, -1, D))

    source = SourceTokens(pick(ks), pick(vs), gather_tokens(regions, index), log_w)
    channels = match_channels(source, q, target_regions=target, beta=beta)
    qa, ka, _ = augment(q, k, v, source, channels)
    mass = attention_mass(qa, ka, everyone(), scale=D**-0.5)[..., N:]
    logits = torch.cat([q @ k.mT, q @ ks.mT], -1) * D**-0.5
    logits[..., N:] += (weight.log()[:, None] + beta * target @ regions.mT)[:, None]
    wanted = logits.softmax(-1).mean((1, 2))[:, None, N:]
    spread = spread_kept(mass, index, M)
    assert torch.allclose(spread, wanted, atol=1e-6)
    assert torch.equal(spread[:, 0] == 0, weight == 0)


def test_an_even_look_is_one_everywhere() -> None:
    grids = [(4, 3), (2, 2)]
    sites = []
    for seed, (h, w) in enumerate(grids):
        places = 5 + seed
        mass = attention_mass(torch.zeros(1, H, places, D), torch.zeros(1, H, places + h * w, D), everyone(places))
        sites.append(SiteLook(mass[0, :, places:], (h, w), rows(1, h * w, seed)[0], places))
    look = combine(sites)
    assert torch.allclose(look.heat, torch.ones(1, 4, 3), atol=1e-5)
    assert torch.allclose(look.by_region, torch.ones(1, 7), atol=1e-5)
    assert torch.allclose(look.share, torch.tensor([(12 / 17 + 4 / 10) / 2]), atol=1e-6)


def test_an_absent_region_is_zero() -> None:
    regions = torch.zeros(M, 7)
    regions[:, 3] = 1
    mean = region_mean(torch.full((2, M), 0.5), regions)
    assert torch.equal(mean, torch.tensor([[0, 0, 0, 0.5, 0, 0, 0]] * 2))


def test_nothing_seen_is_refused() -> None:
    with pytest.raises(TruePoseError, match="Apply HPFA"):
        combine([])
    with pytest.raises(TruePoseError, match="groups are"):
        attention_mass(draw(1, H, N, D), draw(1, H, M, D), torch.ones(1, M, 1))
    with pytest.raises(TruePoseError, match="keys are"):
        attention_mass(draw(1, H, N, D), draw(1, H, M, D + 1), everyone())


def test_hotter_is_brighter() -> None:
    grey = torch.full((3, 8, 8), 0.5)
    steps = [float(heat_map(grey, torch.full((4, 4), value), 1.0).mean()) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert steps == sorted(steps) and steps[-1] > 0.7
    assert torch.equal(heat_map(grey, torch.full((4, 4), 3.0), 1.0), heat_map(grey, torch.ones(4, 4), 1.0))
    assert torch.equal(heat_map(grey, torch.zeros(4, 4), 0.0), heat_map(grey, torch.zeros(4, 4), 1.0))


def test_bars_are_as_high_as_their_values() -> None:
    def pixels(value: float) -> int:
        chart = bar_chart({"it": torch.tensor([0, 0, 0, value, 0, 0, 4.0])}, "title", 640)
        blue = torch.tensor([0, 114, 178])[:, None, None]
        return int(((chart[0] * 255).round() == blue).all(0).sum())

    assert abs(pixels(2.0) / pixels(1.0) - 2) < 0.05 and abs(pixels(4.0) / pixels(1.0) - 4) < 0.1


@pytest.mark.parametrize("known", [False, True])
def test_figure(known: bool) -> None:
    groups = 8 if known else 1
    looks = {
        name: Look(draw(groups, 8, 6, seed=seed).square(), draw(groups, 7, seed=seed).square(), torch.rand(groups))
        for seed, name in enumerate(("without HPFA", "with HPFA"))
    }
    cover = torch.tensor([0.6, 0.1, 0.0, 0.2, 0.1, 0.0, 0.0]) if known else None
    drawn = figure(torch.rand(3, 64, 48), looks, cover)
    assert drawn.shape[:2] == (1, 3) and drawn.min() >= 0 and drawn.max() <= 1
    # The regions that cover nothing get no column: source, everywhere, face, upper, lower.
    assert drawn.shape[3] == (5 * (48 * 4 + 2) + 2 if known else 560)
    with pytest.raises(TruePoseError, match="groups"):
        figure(torch.rand(3, 64, 48), looks, None if known else torch.ones(7))
