"""Laws of what stands around the formula: kept tokens, target regions, sources over rows and beside each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from truepose_core.attention.fusion import fuse, keep_tokens, row_index, spread, target_regions
from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.attention.hpfa import SHUT, SourceTokens, hpfa_attention, match_channels

H, D, M, EXACT = 2, 8, 6, 1e-12


def rows(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(sources=1, seed=0, log_w=True):
    shape = (sources, H, M, D)
    return SourceTokens(
        rows(*shape, seed=seed),
        rows(*shape, seed=seed + 1),
        rows(sources, M, 7, seed=seed + 2).softmax(-1),
        rows(sources, M, seed=seed + 3).log() if log_w else None,
        rows(sources, M, 3, seed=seed + 4),
    )


def fused(q, k, v, sources, p, beta=2.0):
    channels = [match_channels(s, q, target_regions=p, beta=beta) for s in sources]
    d = q.shape[-1]
    q, k, v = fuse(q, k, v, sources, channels)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]


@pytest.fixture
def qkv():
    return [rows(4, H, 5, D, seed=seed) for seed in (20, 21, 22)]


@pytest.fixture
def p():
    return rows(4, 5, 7, seed=30).softmax(-1)


def test_full_weight_and_strength_keep_everything_without_a_channel():
    x = rows(1, M, 3)
    for weights in (None, torch.ones(1, M)):
        kept = keep_tokens(x, weights)
        assert kept.log_w is None and torch.equal(kept.of(x), x)
    assert keep_tokens(x, torch.zeros(1, M)) is None


@pytest.mark.parametrize("weights", [None, torch.tensor([[1.0, 0.0, 0.5, 1.0, 0.0, 0.25]], dtype=torch.float64)])
def test_strength_is_a_factor_on_every_weight(weights):
    x = rows(1, M, 3)
    kept = keep_tokens(x, weights, 0.5)
    want = torch.ones(1, M, dtype=torch.float64) if weights is None else weights
    other = keep_tokens(x, 0.5 * want)
    assert torch.equal(kept.of(x), other.of(x))
    assert torch.allclose(kept.log_w, other.log_w, atol=EXACT)


def test_a_source_that_keeps_nothing_stays_shut_whatever_the_strength():
    weights = torch.stack([torch.ones(M), torch.zeros(M)])
    assert bool((keep_tokens(rows(2, M, 3), weights, 0.5).log_w[1] == SHUT).all())


def test_what_the_user_gives_comes_first_then_alignment_then_what_was_carried():
    prior, aligned = rows(1, 5, 7), rows(1, 5, 7, seed=1)
    asked = []

    def align(known):
        asked.append(known)
        return aligned

    assert target_regions(prior, True, align) is prior and not asked
    assert target_regions(prior, False, align) is aligned and asked == [prior]
    assert target_regions(prior, False, None) is prior
    assert target_regions(None, False, None) is None


@pytest.mark.parametrize(("sources", "count", "chunks"), [(1, 6, 2), (2, 8, 1), (2, 8, 2), (3, 6, 2), (4, 4, 1)])
def test_sources_are_repeated_as_the_index_says(sources, count, chunks):
    source = tokens(sources)
    index = row_index(sources, count, chunks)
    assert index.shape == (count,) and bool((index.bincount() == count // sources).all())
    assert torch.equal(index[: count // chunks].sort().values, index[: count // chunks])
    for name, x in vars(spread(source, count, chunks)).items():
        assert torch.equal(x.expand(count, *x.shape[1:]), vars(source)[name][index]), name


def test_a_batch_of_sources_equals_its_items(qkv, p):
    two = tokens(2)
    together = fused(*qkv, [spread(two, 4)], p)
    for row, which in enumerate(row_index(2, 4)):
        one = SourceTokens(*(x[which : which + 1] for x in vars(two).values()))
        alone = fused(*(x[row : row + 1] for x in qkv), [one], p[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, atol=EXACT)


def test_one_source_is_the_formula(qkv, p):
    source = tokens()
    assert torch.equal(fused(*qkv, [source], p), hpfa_attention(*qkv, source, target_regions=p, beta=2.0))


@pytest.mark.parametrize("log_w", [True, False])
def test_sources_beside_each_other_equal_one_longer_source(qkv, p, log_w):
    one, two = tokens(), tokens(seed=10, log_w=log_w)
    both = replace(two, log_w=torch.zeros(1, M, dtype=torch.float64)) if not log_w else two
    names = ("k", "v", "regions", "log_w", "body")
    longer = SourceTokens(*(torch.cat([vars(one)[n], vars(both)[n]], 2 if n in "kv" else 1) for n in names))
    expected = hpfa_attention(*qkv, longer, target_regions=p, beta=2.0)
    assert torch.allclose(fused(*qkv, [one, two], p), expected, atol=EXACT)
    assert torch.allclose(fused(*qkv, [two, one], p), expected, atol=EXACT)


def test_a_source_without_channels_beside_one_with_them(qkv, p):
    plain, weighed = replace(tokens(), regions=None, log_w=None), replace(tokens(seed=10), regions=None)
    zeros = torch.zeros(1, M, dtype=torch.float64)
    names = ("k", "v", "log_w")
    parts = [vars(replace(plain, log_w=zeros)), vars(weighed)]
    longer = SourceTokens(**{n: torch.cat([x[n] for x in parts], 1 if n == "log_w" else 2) for n in names})
    assert torch.allclose(fused(*qkv, [plain, weighed], p), hpfa_attention(*qkv, longer), atol=EXACT)


def test_heads_split_and_merged_are_what_they_were():
    x = rows(2, 5, H * D)
    parts = split_heads(x, H)
    assert parts.shape == (2, H, 5, D) and torch.equal(parts[0, 1, 3], x[0, 3, D:])
    assert torch.equal(merge_heads(parts), x)
