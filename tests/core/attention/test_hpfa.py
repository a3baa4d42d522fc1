"""The laws of HPFA (design section 3), each against an independent reading of the formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.attention.hpfa import (
    SHUT,
    SourceTokens,
    hpfa_attention,
    hpfa_attention_masked,
    kept_tokens,
    match_channels,
    prune,
    region_rows_weight,
)
from truepose_core.errors import TruePoseError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(seed, dtype=torch.float64, batch=2, source_batch=None, heads=3, n=10, m=12, d=16, places=2):
    """places: 2 numbers of a place on the skeleton, 3 on the surface."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    sb = batch if source_batch is None else source_batch
    q, k, v = (rand(batch, heads, n, d) for _ in range(3))
    source = SourceTokens(
        rand(sb, heads, m, d),
        rand(sb, heads, m, d),
        regions=rand(sb, m, 7).softmax(-1),
        log_w=torch.rand(sb, m, generator=g, dtype=torch.float64).clamp(min=0.01).log().to(dtype),
        body=torch.cat([rand(sb, m, places) / 2, torch.rand(sb, m, 1, generator=g, dtype=torch.float64).to(dtype)], -1),
    )
    terms = dict(
        target_regions=rand(batch, n, 7).softmax(-1),
        beta=rand(heads).abs() * 2,
        region_log_weight=rand(heads, 7),
        target_body=torch.cat(
            [rand(batch, n, places) / 2, torch.rand(batch, n, 1, generator=g, dtype=torch.float64).to(dtype)], -1
        ),
        gamma=rand(heads).abs(),
    )
    return q, k, v, source, terms


def by_hand(q, k, v, source, terms):
    """The formula, one logit at a time, in plain loops."""
    batch, heads, n, d = q.shape
    m = source.k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        sb = b if source.k.shape[0] > 1 else 0
        for h in range(heads):
            for i in range(n):
                logits = [float(q[b, h, i] @ k[b, h, j]) / math.sqrt(d) for j in range(n)]
                for j in range(m):
                    x = float(q[b, h, i] @ source.k[sb, h, j]) / math.sqrt(d) + float(source.log_w[sb, j])
                    row = terms["beta"][h] * terms["target_regions"][b, i] + terms["region_log_weight"][h]
                    x += float(row @ source.regions[sb, j])
                    ci, cj = terms["target_body"][b, i], source.body[sb, j]
                    x -= float(terms["gamma"][h] * ci[-1] * cj[-1] * (ci[:-1] - cj[:-1]).square().sum())
                    logits.append(x)
                p = torch.tensor(logits, dtype=torch.float64).softmax(0).to(q)
                out[b, h, i] = p @ torch.cat([v[b, h], source.v[sb, h]])
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("source_batch", [1, 2])
@pytest.mark.parametrize("places", [2, 3], ids=["skeleton", "surface"])
def test_the_augmented_form_is_the_formula(dtype, source_batch, places):
    q, k, v, source, terms = make(0, dtype, source_batch=source_batch, n=5, m=6, places=places)
    expected = by_hand(q.double(), k.double(), v.double(), source_to(source, torch.float64), to64(terms))
    assert (hpfa_attention(q, k, v, source, **terms).double() - expected).abs().max() < TOLERANCE[dtype]


def source_to(source, dtype):
    return SourceTokens(*(x.to(dtype) for x in vars(source).values()))


def to64(terms):
    return {name: x.double() for name, x in terms.items()}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    heads=st.integers(1, 4),
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    d=st.sampled_from([8, 24, 40, 64]),
    places=st.sampled_from([2, 3]),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_augmented_form_is_the_masked_form(dtype, seed, heads, n, m, d, places):
    q, k, v, source, terms = make(seed, dtype, heads=heads, n=n, m=m, d=d, places=places)
    one = hpfa_attention(q, k, v, source, **terms)
    two = hpfa_attention_masked(q, k, v, source, **terms)
    assert (one - two).abs().max() < TOLERANCE[dtype]


def test_no_source_is_the_plain_call_bit_for_bit():
    q, k, v, _, _ = make(1, torch.float32)
    assert torch.equal(hpfa_attention(q, k, v, None), scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_weight_without_match_is_concatenation(dtype):
    q, k, v, source, _ = make(2, dtype)
    source = replace(source, log_w=None)
    expected = scaled_dot_product_attention(q, torch.cat([k, source.k], 2), torch.cat([v, source.v], 2))
    assert torch.equal(hpfa_attention(q, k, v, source), expected), "no channel may be appended"
    zero = dict(target_regions=torch.ones(2, 10, 7, dtype=dtype), beta=0.0)
    assert (hpfa_attention(q, k, v, source, **zero) - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropping_equals_masking(dtype):
    q, k, v, source, terms = make(3, dtype)
    omega = torch.tensor([0.0, 1, 0.5, 1, 0, 0, 1], dtype=dtype)
    hard = torch.nn.functional.one_hot(torch.arange(12).expand(2, -1) % 7, 7).to(dtype)
    source = replace(source, regions=hard, log_w=None)
    weight = region_rows_weight(hard, omega)
    index, log_w = kept_tokens(weight)
    assert index.shape[1] < 12, "tokens of weight 0 are dropped"
    dropped = hpfa_attention(q, k, v, prune(source, index, log_w), **terms)
    shut = replace(source, log_w=torch.where(weight > 0, weight.clamp(min=1e-9).log(), -torch.inf))
    assert (dropped - hpfa_attention_masked(q, k, v, shut, **terms)).abs().max() < TOLERANCE[dtype]


def test_rows_that_keep_different_numbers_of_tokens_lose_and_gain_nothing():
    q, k, v, source, terms = make(4)
    weight = torch.rand(2, 12, dtype=torch.float64).clamp(min=0.1)
    weight[0, 2:] = 0
    weight[1, ::3] = 0
    index, log_w = kept_tokens(weight)
    assert index.shape == (2, 8)
    together = hpfa_attention(q, k, v, prune(replace(source, log_w=None), index, log_w), **terms)
    for b in range(2):
        one = SourceTokens(*(x[b : b + 1] for x in vars(source).values()))
        i, w = kept_tokens(weight[b : b + 1])
        own = {x: y[b : b + 1] if x.startswith("target") else y for x, y in terms.items()}
        alone = hpfa_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], prune(one, i, w), **own)
        assert (together[b : b + 1] - alone).abs().max() < 1e-12


def test_a_row_without_tokens_is_plain_attention():
    q, k, v, source, _ = make(5)
    weight = torch.zeros(2, 12, dtype=torch.float64)
    weight[1, 3] = 1
    index, log_w = kept_tokens(weight)
    out = hpfa_attention(q, k, v, prune(source, index, log_w))
    assert (out[0] - scaled_dot_product_attention(q, k, v)[0]).abs().max() < 1e-12
    assert not torch.allclose(out[1], scaled_dot_product_attention(q, k, v)[1])
    assert kept_tokens(torch.zeros(2, 12)) is None


def test_the_order_of_source_tokens_does_not_matter():
    q, k, v, source, terms = make(6)
    order = torch.randperm(12)
    moved = SourceTokens(
        source.k[:, :, order],
        source.v[:, :, order],
        source.regions[:, order],
        source.log_w[:, order],
        source.body[:, order],
    )
    one, two = hpfa_attention(q, k, v, source, **terms), hpfa_attention(q, k, v, moved, **terms)
    assert (one - two).abs().max() < 1e-12


def test_a_batch_equals_its_items():
    q, k, v, source, terms = make(7, batch=3)
    whole = hpfa_attention(q, k, v, source, **terms)
    for b in range(3):
        one = SourceTokens(*(x[b : b + 1] for x in vars(source).values()))
        own = {x: y[b : b + 1] if x.startswith("target") else y for x, y in terms.items()}
        alone = hpfa_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], one, **own)
        assert (whole[b : b + 1] - alone).abs().max() < 1e-12


def test_a_closed_token_weighs_exactly_nothing():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.tensor(SHUT, dtype=dtype).exp() == 0
        assert torch.isfinite(torch.tensor(SHUT, dtype=dtype))


def test_body_match_is_zero_off_the_body_and_falls_with_distance():
    q, _, _, source, _ = make(8, heads=1, n=1, m=3)
    q = torch.zeros_like(q)
    body = torch.tensor([[[0.0, 0, 1], [1.0, 0, 1], [5.0, 0, 0]]], dtype=torch.float64).expand(2, -1, -1)
    source = SourceTokens(torch.zeros_like(source.k), source.v, body=body)
    here = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64).expand(2, -1, -1)
    query, key = match_channels(source, q, target_body=here, gamma=3.0)
    logits = (query @ key.mT)[0, 0, 0] / 4  # the kernel's own factor, 1/sqrt(16)
    assert torch.allclose(logits, torch.tensor([0.0, -3.0, 0.0], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("places", [2, 3], ids=["skeleton", "surface"])
def test_channels_keep_the_width_a_multiple_of_eight(places):
    q, _, _, source, terms = make(9, places=places)
    plain = match_channels(source, q, target_regions=terms["target_regions"], beta=1.0)
    assert plain[0].shape[-1] == plain[1].shape[-1] == 8
    assert match_channels(source, q, **terms)[0].shape[-1] == 16


def test_a_place_on_the_surface_without_depth_is_one_on_the_skeleton():
    q, k, v, source, terms = make(10)

    def flat(body):
        return torch.cat([body[..., :2], torch.zeros_like(body[..., :1]), body[..., 2:]], -1)

    deep = replace(source, body=flat(source.body))
    expected = hpfa_attention(q, k, v, source, **terms)
    made = hpfa_attention(q, k, v, deep, **{**terms, "target_body": flat(terms["target_body"])})
    assert (made - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("of_source", "of_target"), [(2, 3), (3, 2)])
def test_places_on_skeleton_and_surface_are_not_mixed(of_source, of_target):
    q, k, v, source, terms = make(11, places=of_source)
    terms["target_body"] = make(11, places=of_target)[4]["target_body"]
    message = f"target's body have {of_target + 1} numbers and the source's {of_source + 1}"
    with pytest.raises(TruePoseError, match=message):
        hpfa_attention(q, k, v, source, **terms)


def test_region_weights_of_the_wrong_length_are_named():
    with pytest.raises(TruePoseError, match=r"\(3,\).*7 regions"):
        region_rows_weight(torch.rand(2, 4, 7), torch.ones(3))
