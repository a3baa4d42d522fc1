"""Laws of the joint attention of editors, against the formula with an explicit bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.attention.references import (
    Layout,
    Match,
    Reference,
    Target,
    drop_tokens,
    guide,
    guided,
    guided_mask,
    patch_rows,
    strongest,
)
from truepose_core.errors import TruePoseError

TEXT, TARGET, COUNTS, HEADS, WIDTH = 5, 12, (8, 6), 2, 16
TOTAL = TEXT + TARGET + sum(COUNTS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count: int, seed: int, batch: int = 1) -> Tensor:
    return random(batch, count, 7, seed=seed).softmax(-1)


def places(count: int, seed: int, batch: int = 1) -> Tensor:
    found = random(batch, count, 3, seed=seed)
    return torch.cat([found[..., :2], (found[..., 2:] > 0).to(found)], -1)


def layout(first: bool) -> Layout:
    refs = sum(COUNTS)
    if first:
        return Layout((TEXT + refs, TOTAL), (TEXT, TEXT + refs))
    return Layout((TEXT, TEXT + TARGET), (TEXT + TARGET, TOTAL))


def qkv(batch: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(random(batch, HEADS, TOTAL, WIDTH, seed=seed + i) for i in range(3))


def slow(q: Tensor, k: Tensor, v: Tensor, where: Layout, references: list[Reference]) -> Tensor:
    """The formula as it stands in the docstring, with the whole bias in memory."""
    bias = q.new_zeros(q.shape[0], 1, q.shape[2], k.shape[2])
    begin, end = where.target
    start = where.references[0]
    for reference in references:
        stop = start + reference.count
        if reference.weight is not None:
            bias[..., start:stop] += reference.weight.log()[:, None, None]
        for m in reference.matches:
            if m.regions is not None:
                bias[:, 0, begin:end, start:stop] += m.beta * (m.target.regions @ m.regions.mT)
            if m.body is not None:
                distance = (m.target.body[:, :, None, :2] - m.body[:, None, :, :2]).square().sum(-1)
                on_body = m.target.body[:, :, None, 2] * m.body[:, None, :, 2]
                bias[:, 0, begin:end, start:stop] -= m.gamma * on_body * distance
        start = stop
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


def fast(q: Tensor, k: Tensor, v: Tensor, where: Layout, references: list[Reference]) -> Tensor:
    q, k, v = guided(q, k, v, where, guide(references))
    return scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5)[..., :WIDTH]


def make(batch: int, shared: bool) -> list[Reference]:
    """A reference with fractional weights, zeros among them, and one whole, both matching."""
    target = Target(rows(TARGET, 10, batch), places(TARGET, 11, batch))
    other = target if shared else Target(rows(TARGET, 12, batch))
    weight = random(batch, COUNTS[0], seed=13).sigmoid() * (random(batch, COUNTS[0], seed=14) > -0.3)
    first = Match(target, rows(COUNTS[0], 15), places(COUNTS[0], 16), 2.0, 0.7)
    second = Match(other, rows(COUNTS[1], 17, batch), None, 0.5)
    return [Reference(COUNTS[0], weight, (first,)), Reference(COUNTS[1], None, (second,))]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_spare_channels_are_the_formula(batch: int, shared: bool, first: bool) -> None:
    references, where, inputs = make(batch, shared), layout(first), qkv(batch)
    assert (fast(*inputs, where, references) - slow(*inputs, where, references)).abs().max() < 1e-12


def test_references_of_one_target_share_its_channels() -> None:
    widths = {}
    for shared in (False, True):
        q, k, v = guided(*qkv(1), layout(False), guide(make(1, shared)))
        widths[shared] = q.shape[-1] - WIDTH
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert widths == {True: 16, False: 24}


def test_nothing_asked_is_no_guidance() -> None:
    ones = torch.ones(1, COUNTS[0])
    assert guide([Reference(COUNTS[0], ones), Reference(COUNTS[1])]) is None


def test_weights_of_zero_and_one_take_keys_out_and_widen_nothing() -> None:
    weight = (torch.arange(COUNTS[0]) % 3 > 0).double()[None]
    guidance = guide([Reference(COUNTS[0], weight), Reference(COUNTS[1], torch.zeros(1, COUNTS[1]))])
    assert not guidance.widens
    assert guidance.counts == (int(weight.sum()), 0)
    q, k, v = qkv(1)
    new_q, new_k, _ = guided(q, k, v, layout(False), guidance)
    assert new_q is q
    assert new_k.shape == (1, HEADS, TEXT + TARGET + int(weight.sum()), WIDTH)
    references = [Reference(COUNTS[0], weight), Reference(COUNTS[1], torch.zeros(1, COUNTS[1]))]
    out = fast(q, k, v, layout(False), references)
    assert (out - slow(q, k, v, layout(False), references)).abs().max() < 1e-12


def test_everything_of_weight_zero_leaves_text_and_target() -> None:
    references = [Reference(n, torch.zeros(1, n)) for n in COUNTS]
    q, k, v = qkv(1)
    rest = TEXT + TARGET
    out = fast(q, k, v, layout(False), references)
    assert torch.allclose(out, scaled_dot_product_attention(q, k[:, :, :rest], v[:, :, :rest]), atol=1e-12)


def test_tokens_dropped_before_are_keys_taken_out() -> None:
    references, where, inputs = make(2, True), layout(False), qkv(2)
    guidance = guide(references)
    start, stop = where.references
    dropped = [
        drop_tokens(x.transpose(1, 2).flatten(2), guidance, where.references).unflatten(2, (HEADS, -1)).transpose(1, 2)
        for x in inputs
    ]
    length = dropped[0].shape[2]
    assert length == TEXT + TARGET + sum(guidance.counts) < TOTAL
    late = Layout(where.target, (start, length))
    q, k, v = guided(*dropped, late, guidance.dropped())
    out = scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5)[..., :WIDTH]
    whole = fast(*inputs, where, references)
    assert (out[:, :, :start] - whole[:, :, :start]).abs().max() < 1e-12
    assert stop == TOTAL


def test_queries_without_the_references_as_with_a_reference_cache() -> None:
    references, where, (q, k, v) = make(1, True), layout(False), qkv(1)
    short = q[:, :, : TEXT + TARGET]
    out = fast(short, k, v, where, references)
    assert (out - slow(q, k, v, where, references)[:, :, : TEXT + TARGET]).abs().max() < 1e-12


@pytest.mark.parametrize("first", [False, True])
def test_a_mask_follows_the_keys(first: bool) -> None:
    batch, where = 2, layout(first)
    references, (q, k, v) = make(batch, True), qkv(2)
    allowed = random(batch, 1, TOTAL, TOTAL, seed=30) > -0.5
    allowed[..., :TEXT] = True
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, float("-inf"))
    guidance = guide(references)
    for mask in (bias, bias[0, 0], bias[:, 0], bias[:, 0, :1]):
        new_q, new_k, new_v = guided(q, k, v, where, guidance)
        new_mask = guided_mask(mask, where, guidance)
        out = scaled_dot_product_attention(new_q, new_k, new_v, attn_mask=new_mask, scale=WIDTH**-0.5)[..., :WIDTH]
        whole = mask if mask.dim() == 4 else mask.reshape(-1, 1, *mask.shape[-2:])
        theirs = slow_with(q, k, v, where, references, whole)
        assert (out - theirs).abs().max() < 1e-12


def slow_with(q: Tensor, k: Tensor, v: Tensor, where: Layout, references: list[Reference], mask: Tensor) -> Tensor:
    """As `slow`, with a mask on top: the bias is read off `slow` by giving it one-hot values."""
    eye = torch.eye(TOTAL, dtype=q.dtype).expand(q.shape[0], HEADS, -1, -1)
    probability = slow(q, k, eye, where, references) * mask.exp()
    return probability / probability.sum(-1, keepdim=True) @ v


def test_a_batch_is_its_items_one_by_one() -> None:
    references, inputs = make(2, False), qkv(2)
    both = fast(*inputs, layout(False), references)
    for i in range(2):
        row = slice(i, i + 1)

        def pick(x: Tensor | None, row: slice = row) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[row]

        targets: dict[int, Target] = {}
        alone = []
        for reference in references:
            matches = []
            for m in reference.matches:
                target = targets.setdefault(id(m.target), Target(pick(m.target.regions), pick(m.target.body)))
                matches.append(Match(target, pick(m.regions), pick(m.body), m.beta, m.gamma))
            alone.append(Reference(reference.count, pick(reference.weight), tuple(matches)))
        one = fast(*(x[row] for x in inputs), layout(False), alone)
        assert (one - both[row]).abs().max() < 1e-12


def test_wider_body_coordinates_pass_as_they_are() -> None:
    """Only the last column, "on the body", is touched by gamma."""
    target = Target(None, places(TARGET, 1))
    body = places(COUNTS[0], 2)
    guidance = guide([Reference(COUNTS[0], None, (Match(target, None, body, gamma=3.0),)), Reference(COUNTS[1])])
    (joined,) = guidance.matches
    assert torch.equal(joined.body[:, : COUNTS[0], :-1], body[..., :-1])
    assert torch.equal(joined.body[:, : COUNTS[0], -1], 3 * body[..., -1])
    assert not joined.body[:, COUNTS[0] :].any()
    wide = torch.cat([body[..., :2], body], -1)
    five = guide([Reference(COUNTS[0], None, (Match(Target(None, torch.zeros(1, TARGET, 5)), None, wide, gamma=2.0),))])
    assert five.matches[0].body.shape == (1, COUNTS[0], 5)


@pytest.mark.parametrize(("height", "width", "patch"), [(6, 8, 2), (5, 7, 2), (4, 4, 1)])
def test_patch_rows_are_means_of_their_cells(height: int, width: int, patch: int) -> None:
    cells = rows(height * width, 3)
    got = patch_rows(cells, height, width, patch)
    square = cells.unflatten(1, (height, width))
    tall, wide = -(-height // patch), -(-width // patch)
    assert got.shape == (1, tall * wide, 7)
    for i in range(tall):
        for j in range(wide):
            ys = torch.arange(i * patch, (i + 1) * patch).clamp(max=height - 1)
            xs = torch.arange(j * patch, (j + 1) * patch).clamp(max=width - 1)
            mean = square[0][ys][:, xs].mean((0, 1))
            assert torch.allclose(got[0, i * wide + j], mean)
    assert torch.allclose(got.sum(-1), torch.ones(1, tall * wide, dtype=got.dtype))


def test_strongest_is_one_region() -> None:
    found = strongest(rows(20, 4))
    assert torch.equal(found.sum(-1), torch.ones(1, 20, dtype=found.dtype))
    assert torch.equal(found.argmax(-1), rows(20, 4).argmax(-1))


def test_weights_of_another_number_of_tokens() -> None:
    with pytest.raises(TruePoseError, match="6 tokens has 5 weights"):
        guide([Reference(6, torch.ones(1, 5))])


def test_two_places_on_one_target() -> None:
    target = Target(None, places(TARGET, 1))
    match = Match(target, None, places(6, 2), gamma=1.0)
    with pytest.raises(TruePoseError, match="twice"):
        guide([Reference(6, None, (match, match))])
