"""The laws of CAA (design section 4), each against an independent reading of the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from truepose_core.attention.caa import CAASite, RegionResampler, RegionTokens, caa_attention
from truepose_core.regions import Region

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
FACE, HAIR, UPPER = int(Region.FACE), int(Region.HAIR), int(Region.UPPER)


def hot(per_region, dtype=torch.float64):
    return one_hot(torch.arange(7).repeat_interleave(per_region), 7).to(dtype)


def make(seed, dtype=torch.float64, batch=2, heads=3, n=9, per_region=2, d=8, hidden=(FACE,)):
    """Random queries, tokens, a prior and kappa; the regions in `hidden` are not shown by item 0."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q = rand(batch, heads, n, d)
    k, v = rand(batch, heads, 7 * per_region, d), rand(batch, heads, 7 * per_region, d)
    shown = torch.ones(batch, 7, dtype=torch.bool)
    shown[0, list(hidden)] = False
    terms = dict(prior=rand(batch, n, 7).softmax(-1), kappa=rand(heads).abs() * 3)
    return q, k, v, hot(per_region, dtype), shown.repeat_interleave(per_region, 1), terms


def by_hand(q, k, v, regions, shown, prior, kappa):
    """The formula, one logit at a time, in plain loops."""
    batch, heads, n, d = q.shape
    out, alignment = torch.zeros_like(q), q.new_zeros(batch, n, 7)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                logits = []
                for j in range(k.shape[2]):
                    region = int(regions[j].argmax())
                    x = float(q[b, h, i] @ k[b, h, j]) / math.sqrt(d) + float(kappa[h] * prior[b, i, region])
                    logits.append(x if shown[b, j] else -math.inf)
                p = torch.tensor(logits, dtype=torch.float64).softmax(0).to(q)
                out[b, h, i] = p @ v[b, h]
                alignment[b, i] += (p @ regions) / heads
    return out, alignment


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_fused_call_is_the_formula(dtype):
    q, k, v, regions, shown, terms = make(0, dtype, n=5)
    out, alignment = caa_attention(q, k, v, regions, shown, **terms)
    exact = [x.double() if x.is_floating_point() else x for x in (q, k, v, regions, shown)]
    expected = by_hand(*exact, terms["prior"].double(), terms["kappa"].double())
    assert (out.double() - expected[0]).abs().max() < TOLERANCE[dtype]
    assert (alignment.double() - expected[1]).abs().max() < TOLERANCE[dtype]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    heads=st.integers(1, 4),
    n=st.integers(1, 12),
    per_region=st.integers(1, 4),
    d=st.sampled_from([1, 8, 20, 64]),
    hidden=st.sets(st.integers(1, 6)),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_alignment_is_a_distribution_over_the_regions_shown(dtype, seed, heads, n, per_region, d, hidden):
    q, k, v, regions, shown, terms = make(seed, dtype, heads=heads, n=n, per_region=per_region, d=d, hidden=hidden)
    _, alignment = caa_attention(q, k, v, regions, shown, **terms)
    assert (alignment.sum(-1) - 1).abs().max() < TOLERANCE[dtype]
    assert alignment.min() >= 0
    assert (alignment[0][:, list(hidden)] == 0).all(), "exactly 0, not nearly"


def test_a_hidden_region_contributes_nothing():
    q, k, v, regions, shown, terms = make(1)
    before = caa_attention(q, k, v, regions, shown, **terms)
    rows = regions[:, FACE].bool()
    k[:, :, rows], v[:, :, rows] = k[:, :, rows] + 1, -1e3
    after = caa_attention(q, k, v, regions, shown, **terms)
    assert torch.equal(before[0][0], after[0][0])
    assert torch.equal(before[1][0], after[1][0])
    assert not torch.allclose(before[0][1], after[0][1]), "item 1 shows its face"


def test_no_prior_is_a_prior_that_does_not_count():
    q, k, v, regions, shown, terms = make(2)
    plain = caa_attention(q, k, v, regions, shown)
    for without in ({**terms, "kappa": 0.0}, {"prior": torch.zeros_like(terms["prior"]), "kappa": 5.0}):
        out, alignment = caa_attention(q, k, v, regions, shown, **without)
        assert (out - plain[0]).abs().max() < 1e-12
        assert (alignment - plain[1]).abs().max() < 1e-12


def test_a_prior_that_is_the_same_for_all_regions_changes_nothing():
    q, k, v, regions, shown, _ = make(3)
    plain = caa_attention(q, k, v, regions, shown)
    out, alignment = caa_attention(q, k, v, regions, shown, prior=torch.full((2, 9, 7), 1 / 7).double(), kappa=9.0)
    assert (out - plain[0]).abs().max() < 1e-12
    assert (alignment - plain[1]).abs().max() < 1e-12


def test_a_certain_prior_with_large_kappa_is_the_alignment():
    q, k, v, regions, shown, _ = make(4, hidden=())
    prior = one_hot(torch.arange(9) % 7, 7).double().expand(2, -1, -1)
    distance = [
        float((caa_attention(q, k, v, regions, shown, prior=prior, kappa=kappa)[1] - prior).abs().max())
        for kappa in (0.0, 4.0, 16.0, 64.0)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-12


def test_kappa_may_differ_between_heads():
    q, k, v, regions, shown, terms = make(5, hidden=())
    together = caa_attention(q, k, v, regions, shown, **terms)
    alone = [
        caa_attention(
            q[:, [h]], k[:, [h]], v[:, [h]], regions, shown, prior=terms["prior"], kappa=float(terms["kappa"][h])
        )
        for h in range(3)
    ]
    assert (together[0] - torch.cat([out for out, _ in alone], 1)).abs().max() < 1e-12
    assert (together[1] - sum(p for _, p in alone) / 3).abs().max() < 1e-12, "P is the mean over heads"


def test_a_batch_equals_its_items():
    q, k, v, regions, shown, terms = make(6, batch=3)
    out, alignment = caa_attention(q, k, v, regions, shown, **terms)
    for b in range(3):
        one = slice(b, b + 1)
        alone = caa_attention(
            q[one], k[one], v[one], regions, shown[one], prior=terms["prior"][one], kappa=terms["kappa"]
        )
        assert (out[one] - alone[0]).abs().max() < 1e-12
        assert (alignment[one] - alone[1]).abs().max() < 1e-12


def test_the_order_of_tokens_within_a_region_does_not_matter():
    q, k, v, regions, shown, terms = make(7, per_region=3)
    order = torch.cat([3 * r + torch.randperm(3, generator=torch.Generator().manual_seed(r)) for r in range(7)])
    one = caa_attention(q, k, v, regions, shown, **terms)
    two = caa_attention(q, k[:, :, order], v[:, :, order], regions, shown[:, order], **terms)
    assert (one[0] - two[0]).abs().max() < 1e-12
    assert (one[1] - two[1]).abs().max() < 1e-12


def test_region_tokens_say_which_region_they_are():
    tokens = RegionTokens(torch.randn(2, 21, 4), torch.ones(2, 21, dtype=torch.bool))
    assert torch.equal(tokens.regions, hot(3, torch.float32))
    twice = tokens.repeat(2)
    assert torch.equal(twice.tokens, tokens.tokens[[0, 0, 1, 1]])
    assert torch.equal(twice.shown, tokens.shown[[0, 0, 1, 1]])


def test_a_dropped_row_is_background_and_adds_nothing():
    torch.manual_seed(0)
    site = CAASite(context=5, inner=12, heads=3, scale=1.0)
    tokens = RegionTokens(torch.randn(2, 14, 5), torch.ones(2, 14, dtype=torch.bool))
    dropped = tokens.rows(torch.tensor([True, False]))
    assert torch.equal(dropped.tokens[0], tokens.tokens[0])
    out, alignment = site(torch.randn(2, 3, 6, 4), dropped, torch.rand(2, 6, 7))
    assert (out[1] == 0).all()
    assert torch.equal(alignment[1], one_hot(torch.zeros(6, dtype=torch.long), 7).float())
    assert (out[0] != 0).all()


def resample(seed=0, leak=None, count=20, shown=range(7), **sizes):
    """A resampler, random patches and rows that each belong to one of the regions in `shown`."""
    torch.manual_seed(seed)
    resampler = RegionResampler(**dict(dim_in=6, dim_out=10, dim=16, per_region=3, heads=2) | sizes).double()
    if leak is not None:
        resampler.leak = leak
    shown = list(shown)
    index = torch.tensor([shown[i % len(shown)] for i in range(count)])
    return resampler, torch.randn(2, count, 6).double(), one_hot(index, 7).double().expand(2, -1, -1), index


def test_regions_that_the_source_hides_have_no_tokens():
    resampler, patches, rows, _ = resample(shown=(int(Region.BACKGROUND), UPPER))
    tokens = resampler(patches, rows)
    assert tokens.tokens.shape == (2, 21, 10)
    seen = tokens.shown.unflatten(1, (7, 3))
    assert seen[:, [int(Region.BACKGROUND), UPPER]].all()
    assert not seen[:, [r for r in range(7) if r not in (int(Region.BACKGROUND), UPPER)]].any()
    assert (tokens.tokens[~tokens.shown] == 0).all()
    assert (tokens.tokens[tokens.shown] != 0).any()


def test_the_background_is_shown_even_by_a_picture_without_any():
    resampler, patches, rows, _ = resample(shown=(FACE, UPPER))
    assert resampler(patches, rows).shown.unflatten(1, (7, 3))[:, int(Region.BACKGROUND)].all()


def changed_by_hair(leak, depth=1):
    """How far every region's tokens move when the hair's patches change: [7]."""
    resampler, patches, rows, index = resample(leak=leak, depth=depth)
    other = patches.clone()
    other[:, index == HAIR] += torch.randn(2, int((index == HAIR).sum()), 6).double()
    with torch.no_grad():
        moved = resampler(other, rows).tokens - resampler(patches, rows).tokens
    return moved.unflatten(1, (7, 3)).abs().amax((0, 2, 3))


@pytest.mark.parametrize("depth", [1, 2])
def test_without_leak_a_region_reads_its_own_patches_alone(depth):
    moved = changed_by_hair(0.0, depth)
    own = torch.tensor([r in (HAIR, int(Region.BACKGROUND)) for r in range(7)])
    assert (moved[own] > 1e-3).all(), "the background's queries read the whole picture"
    assert (moved[~own] == 0).all()


def test_what_other_regions_see_is_bounded_by_the_leak():
    """A foreign patch's weight has the factor leak, so the change is at most in proportion to it."""
    others = [r for r in range(7) if r not in (HAIR, int(Region.BACKGROUND))]
    small, default = changed_by_hair(1e-4)[others], changed_by_hair(None)[others]
    assert (default < 2e-2).all()
    assert ((default / small - 10).abs() < 0.5).all()


def test_the_resampler_treats_items_one_by_one_and_patches_as_a_set():
    resampler, patches, rows, _ = resample()
    whole = resampler(patches, rows).tokens
    assert (resampler(patches[1:], rows[1:]).tokens - whole[1:]).abs().max() < 1e-12
    order = torch.randperm(20)
    assert (resampler(patches[:, order], rows[:, order]).tokens - whole).abs().max() < 1e-12
