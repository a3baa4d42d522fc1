"""The laws of Guide References on tiny editors of the host's own classes, through its guider and its sampling."""

from __future__ import annotations

import copy
import gc
from functools import lru_cache
from itertools import pairwise

import comfy.samplers
import pytest
import torch
from bench import close, far
from comfy.patcher_extension import WrappersMP
from fixtures.tiny import EDITORS, TEXT, has_editor, make_editor
from pack.nodes.host import references as host_references
from pack.nodes.host import unet as host_unet
from pack.nodes.host.base import dressed
from pack.nodes.host.references import ReferenceGuide
from pack.nodes.host.references.call import Grid
from pack.nodes.references import GuideReferences
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pose.limbs import body_coordinates
from truepose_core.regions import Region

ALL = (1.0,) * 7
NONE = (0.0,) * 7
FACE = tuple(float(r == Region.FACE) for r in Region)
SOFT = (0.0, 1.0, 0.3, 0.7, 0.0, 1.0, 0.5)
NAMES = [name for name in EDITORS if has_editor(name)]
LAST = [name for name in NAMES if name not in ("omnigen2", "zimage")]
"""Families whose references stand behind the target, at positions of their own."""
DROPS = LAST if "qwen2511" in NAMES else ["kontext"]
"""Families that this version of the host lets tokens be dropped of."""
SIZES = {1: [(12, 8)], 2: [(12, 8), (6, 10)], 3: [(12, 8), (8, 8), (4, 14)]}
TOLERANCE = 1e-5


@lru_cache
def editor(name: str):
    return make_editor(name)


def patch(name: str) -> int:
    return 1 if name in ("flux2", "klein") else 2


def latent(name: str, seed: int, height: int = 10, width: int = 8, batch: int = 1) -> Tensor:
    channels = editor(name).model.latent_format.latent_channels
    shape = (batch, channels, *([1] if name.startswith("qwen") else []), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def references(name: str, count: int = 1, batch: int = 1) -> list[Tensor]:
    return [latent(name, 50 + i, *SIZES[count][i], batch) for i in range(count)]


def text(seed: int, refs: list[Tensor] | None, **more: object) -> list:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn((1, 5, TEXT), generator=generator)
    settings = {"pooled_output": torch.randn((1, 24), generator=generator), **more}
    # OmniGen2 asks how many text tokens there are.
    settings["attention_mask"] = torch.ones(1, 5, dtype=torch.int64)
    if refs is not None:
        settings["reference_latents"] = refs
    return [[tokens, settings]]


def conditioning(name: str, seed: int, refs: list[Tensor] | None, **more: object) -> list:
    found = text(seed, refs, **more)
    if name != "omnigen2":
        del found[0][1]["attention_mask"]
    return found


class Steps(comfy.samplers.Sampler):
    """Plain Euler steps of a flow."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        x = noise * sigmas[0]
        for now, after in pairwise(sigmas):
            denoised = model_wrap(x, now.expand(x.shape[0]), **extra_args)
            x = x + (x - denoised) / now * (after - now)
        return x


def sample(
    who: object,
    name: str,
    refs: list[Tensor] | None,
    *,
    height: int = 10,
    width: int = 8,
    batch: int = 1,
    cfg: float = 3.0,
    sigmas: tuple[float, ...] = (1.0, 0.6, 0.0),
    negative: list[Tensor] | str | None = "same",
    **more: object,
) -> Tensor:
    guider = comfy.samplers.CFGGuider(who)
    negative = refs if isinstance(negative, str) else negative
    guider.set_conds(conditioning(name, 1, refs, **more), conditioning(name, 2, negative, **more))
    guider.set_cfg(cfg)
    noise = latent(name, 9, height, width, batch)
    return guider.sample(noise, torch.zeros_like(noise), Steps(), torch.tensor(sigmas), seed=9, disable_pbar=True)


def parsing(seed: int, height: int, width: int, block: int = 16, batch: int = 1) -> HumanParsing:
    """Hard regions in blocks of pixels, for a latent of height x width cells of 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, -(-height * 8 // block), -(-width * 8 // block))
    labels = torch.randint(0, 7, size, generator=generator).repeat_interleave(block, 1).repeat_interleave(block, 2)
    return HumanParsing.from_labels(labels[:, : height * 8, : width * 8])


def parsings(count: int) -> list[HumanParsing]:
    return [parsing(20 + i, *SIZES[count][i]) for i in range(count)]


def apply(who: object, omegas: list[tuple[float, ...]], masks: list[HumanParsing], **more: object) -> object:
    """One Guide References for each reference."""
    for number, (omega, mask) in enumerate(zip(omegas, masks, strict=True), 1):
        who = host_references.with_guide(who, ReferenceGuide(number, mask, omega, **more))
    return who


def weights(name: str, mask: HumanParsing, omega: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """w(j) the slow way: [B, tokens]; each token belongs to the region that most of its pixels show."""
    p = patch(name)
    rows = -(-size[0] // p), -(-size[1] // p)
    cell = 8 * p
    found = torch.zeros(mask.batch, *rows)
    for b in range(mask.batch):
        for i in range(rows[0]):
            for j in range(rows[1]):
                # A token of an odd latent goes on beyond its edge with what is at the edge.
                ys = torch.arange(i * cell, (i + 1) * cell).clamp(max=size[0] * 8 - 1)
                xs = torch.arange(j * cell, (j + 1) * cell).clamp(max=size[1] * 8 - 1)
                share = mask.masks[b][:, ys][:, :, xs].sum((1, 2))
                found[b, i, j] = omega[int(share.argmax())]
    return found.flatten(1)


def oracle(who: object, name: str, target: int, bias: Tensor, at_target: Tensor | None = None) -> object:
    """A clone whose joint attentions add log w to reference keys [B or 1, R] for every query, and at_target
    [B or 1, target, R] for target queries: an attention mask, nothing else."""
    count = bias.shape[-1]
    clone = who.clone()
    seen: list[int] = []

    def override(func, q, k, v, heads, mask=None, skip_reshape=False, **more):
        assert mask is None
        keys, queries = (x.shape[2 if skip_reshape else 1] for x in (k, q))
        chunks = q.shape[0] // bias.shape[0]
        refined = name == "zimage" and "block_index" not in more["transformer_options"]
        words = 0 if refined else keys - target - count
        if words < 0 or (refined and keys != target + count) or (words == 0 and not refined):
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **more)
        first = name in ("omnigen2", "zimage")
        start = words if first else words + target
        total = torch.zeros(bias.shape[0], queries, keys)
        total[:, :, start : start + count] = bias[:, None]
        if at_target is not None:
            begin = words + count if first else words
            total[:, begin : begin + at_target.shape[1], start : start + count] += at_target
        seen.append(keys)
        total = total.repeat(chunks, 1, 1)[:, None]
        return func(q, k, v, heads, mask=total, skip_reshape=skip_reshape, **more)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    clone.seen = seen
    return clone


def tokens(name: str, height: int, width: int) -> int:
    p = patch(name)
    return -(-height // p) * -(-width // p)


def joined_log(name: str, masks: list[HumanParsing], omegas: list[tuple[float, ...]], count: int) -> Tensor:
    """log w of all references, padding included: [B, R]."""
    parts = []
    for mask, omega, size in zip(masks, omegas, SIZES[count], strict=True):
        one = weights(name, mask, omega, size)
        if name == "zimage":
            one = torch.cat([one, one.amax(1, keepdim=True).expand(-1, -one.shape[1] % 8)], 1)
        parts.append(one)
    return torch.cat(parts, 1).log()


def padded_target(name: str, height: int = 10, width: int = 8) -> int:
    count = tokens(name, height, width)
    return -(-count // 8) * 8 if name == "zimage" else count


@pytest.mark.parametrize("name", NAMES)
def test_all_ones_without_match_is_the_model_bit_for_bit(name: str) -> None:
    plain = sample(editor(name), name, references(name))
    guided = apply(editor(name), [ALL], parsings(1))
    assert torch.equal(plain, sample(guided, name, references(name)))
    # With another guide in force the wrapper runs, and still changes nothing for a whole reference.
    patch = host_references.GuidePatch((ReferenceGuide(1, parsings(1)[0], ALL, keep_positions=True),))
    two = dressed(editor(name), patch)
    assert torch.equal(plain, sample(two, name, references(name)))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_log_weights_of_all_queries(name: str, count: int) -> None:
    refs, masks = references(name, count), parsings(count)
    omegas = [SOFT, FACE, (0.5,) * 7][:count]
    slow = oracle(editor(name), name, padded_target(name), joined_log(name, masks, omegas, count))
    theirs = sample(slow, name, refs)
    assert slow.seen
    for keep in (False, True):
        ours = sample(apply(editor(name), omegas, masks, keep_positions=keep), name, refs)
        assert close(ours, theirs, TOLERANCE)
    assert far(theirs, sample(editor(name), name, refs))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(10, 8), (9, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_match_acts_on_target_queries_only(name: str, height: int, width: int, batch: int) -> None:
    refs, masks, target = references(name, 2), parsings(2), parsing(40, height, width)
    omegas, betas, p = [SOFT, ALL], [1.5, 3.0], patch(name)
    bias = joined_log(name, masks, omegas, 2)
    rows = Grid(height, width, 1, p, 0).regions(target)[0]
    keys = []
    for mask, beta, size in zip(masks, betas, SIZES[2], strict=True):
        own = beta * Grid(*size, 1, p, 0).regions(mask)[0]
        keys.append(torch.cat([own, torch.zeros(-own.shape[0] % 8 if name == "zimage" else 0, 7)]))
    slow = oracle(editor(name), name, padded_target(name, height, width), bias, (rows @ torch.cat(keys).mT)[None])
    theirs = sample(slow, name, refs, height=height, width=width, batch=batch)
    who = editor(name)
    for number in (1, 2):
        guide = ReferenceGuide(
            number, masks[number - 1], omegas[number - 1], betas[number - 1], target=copy.deepcopy(target)
        )
        who = host_references.with_guide(who, guide)
    assert close(sample(who, name, refs, height=height, width=width, batch=batch), theirs, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_body_match_draws_target_queries_to_the_same_place_of_the_body(name: str) -> None:
    refs, mask, p = references(name), parsings(1)[0], patch(name)
    body = torch.rand((2, 18, 3), generator=torch.Generator().manual_seed(4)) * 0.8 + 0.1
    body[..., 2] = 1
    a = body_coordinates(body[1:], 10 // p, 8 // p)[0]
    b = body_coordinates(body[:1], 12 // p, 8 // p)[0]
    far_apart = (a[:, None, :2] - b[None, :, :2]).square().sum(-1)
    both = -3.0 * a[:, None, 2] * b[None, :, 2] * far_apart
    both = torch.nn.functional.pad(both, (0, -both.shape[1] % 8 if name == "zimage" else 0))
    slow = oracle(editor(name), name, padded_target(name), joined_log(name, [mask], [SOFT], 1), both[None])
    guide = ReferenceGuide(1, mask, SOFT, gamma=3.0, body=body[:1], target_body=body[1:])
    who = host_references.with_guide(editor(name), guide)
    assert close(sample(who, name, refs), sample(slow, name, refs), TOLERANCE)


@pytest.mark.parametrize("name", LAST)
def test_odd_references_and_batches_of_parsings(name: str) -> None:
    refs = [latent(name, 60, 9, 7, 2)]
    mask = parsing(30, 9, 7, batch=2)
    bias = weights(name, mask, SOFT, (9, 7)).log()
    slow = oracle(editor(name), name, tokens(name, 11, 5), bias)
    theirs = sample(slow, name, refs, height=11, width=5, batch=4)
    for keep in (False, True):
        who = apply(editor(name), [SOFT], [mask], keep_positions=keep)
        assert close(sample(who, name, refs, height=11, width=5, batch=4), theirs, TOLERANCE)


def test_a_reference_that_keeps_nothing_in_one_picture_of_a_batch() -> None:
    refs = [latent("kontext", 60, 12, 8, 2)]
    labels = torch.zeros(2, 96, 64, dtype=torch.int64)
    labels[1, 16:64] = 1
    who = apply(editor("kontext"), [FACE], [HumanParsing.from_labels(labels)])
    ours = sample(who, "kontext", refs, batch=2)
    none = sample(editor("kontext"), "kontext", None, batch=2)
    assert close(ours[:1], none[:1], TOLERANCE)
    assert far(ours[1:], none[1:])


@pytest.mark.parametrize("method", ["offset", "index"])
@pytest.mark.parametrize("name", LAST)
def test_dropped_equals_shut_equals_a_cropped_latent(name: str, method: str) -> None:
    """The oracle has no hooks: the reference latent itself is cropped, to tokens that keep their positions."""
    p = patch(name)
    first, second = references(name, 2)
    height, width = SIZES[2][1]
    keep = torch.zeros(height, width, dtype=torch.int64)
    if name.startswith("qwen"):  # positions are counted from the middle
        rows, columns = slice(0, height), slice(2, width - 2)
    else:
        rows, columns = slice(0, height - 2), slice(0, width - 2)
    keep[rows, columns] = 1
    mask = HumanParsing.from_labels(keep.repeat_interleave(8, 0).repeat_interleave(8, 1))
    if method == "offset" and name.startswith("qwen"):
        pytest.skip("Qwen's offsets go by the sizes of all references")
    cropped = sample(editor(name), name, [first, second[..., rows, columns]], reference_latents_method=method)
    assert tokens(name, height, width) > int(keep.sum()) // p**2
    for stay in (False, True):
        guide = ReferenceGuide(2, mask, FACE, keep_positions=stay)
        who = host_references.with_guide(editor(name), guide)
        assert close(sample(who, name, [first, second], reference_latents_method=method), cropped, TOLERANCE)


@pytest.mark.parametrize("name", LAST)
def test_all_weights_zero_is_no_reference(name: str) -> None:
    """Not for OmniGen2 and Z-Image: where their target stands depends on the references."""
    none = sample(editor(name), name, None)
    for keep in (False, True):
        who = apply(editor(name), [NONE, NONE], parsings(2), keep_positions=keep)
        assert close(sample(who, name, references(name, 2)), none, TOLERANCE)
    one = apply(editor(name), [ALL, NONE], parsings(2))
    assert close(sample(one, name, references(name, 2)), sample(editor(name), name, references(name, 2)[:1]), TOLERANCE)


def test_weights_go_to_zero_without_a_step() -> None:
    """The nearer to 0, the nearer to deletion."""
    name = "kontext"
    gone = sample(apply(editor(name), [FACE], parsings(1)), name, references(name))
    distance = []
    for small in (1e-1, 1e-2, 1e-3, 1e-4):
        omega = tuple(1.0 if w else small for w in FACE)
        distance.append(
            float((sample(apply(editor(name), [omega], parsings(1)), name, references(name)) - gone).norm())
        )
    assert all(b < 0.2 * a for a, b in pairwise(distance))


def test_hard_weights_run_on_the_hosts_own_kernel_at_its_own_width() -> None:
    for name in LAST:
        for keep in (False, True):
            seen = []
            who = apply(editor(name), [FACE, NONE], parsings(2), keep_positions=keep).clone()

            def watch(func, q, k, v, heads, skip_reshape=False, _seen=seen, **more):
                _seen.append(q.shape[-1] if skip_reshape else q.shape[-1] // heads)
                return func(q, k, v, heads, skip_reshape=skip_reshape, **more)

            who.model_options["transformer_options"]["optimized_attention_override"] = watch
            sample(who, name, references(name, 2))
            assert set(seen) == {32}


def test_dropped_tokens_are_not_computed() -> None:
    for name in LAST:
        kept = int(sum(weights(name, m, FACE, z).sum() for m, z in zip(parsings(2), SIZES[2], strict=True)))
        whole = sum(tokens(name, *size) for size in SIZES[2])
        for keep in (False, True):
            seen = []
            who = apply(editor(name), [FACE, FACE], parsings(2), keep_positions=keep).clone()

            def watch(func, q, k, v, heads, skip_reshape=False, _seen=seen, **more):
                axis = 2 if skip_reshape else 1
                _seen.append((q.shape[axis], k.shape[axis]))
                return func(q, k, v, heads, skip_reshape=skip_reshape, **more)

            who.model_options["transformer_options"]["optimized_attention_override"] = watch
            sample(who, name, references(name, 2))
            ((queries, keys),) = set(seen)
            assert queries - keys == (whole - kept if keep or name not in DROPS else 0)
            assert keys == (512 if name in ("flux2", "klein") else 5) + tokens(name, 10, 8) + kept


def test_positive_and_negative_apart_as_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        target = parsing(40, 10, 8)
        who = apply(editor(name), [SOFT, FACE], parsings(2), beta=2.0, target=target)
        together = sample(who, name, references(name, 2))
        with monkeypatch.context() as patched:
            patched.setattr(comfy.conds.CONDRegular, "can_concat", lambda self, other: False)
            apart = sample(who, name, references(name, 2))
        assert close(together, apart, TOLERANCE)


def test_window_and_blocks() -> None:
    for name in LAST:
        refs, mask = references(name), parsings(1)
        plain = sample(editor(name), name, refs)
        full = sample(apply(editor(name), [SOFT], mask), name, refs)
        never = apply(editor(name), [SOFT], mask, sigmas=(0.2, 0.1))
        assert torch.equal(sample(never, name, refs), plain)
        first = sample(apply(editor(name), [SOFT], mask, sigmas=(1.0, 0.9)), name, refs)
        assert far(first, plain) and far(first, full)
        halves = {b: sample(apply(editor(name), [SOFT], mask, blocks=b), name, refs) for b in host_references.BLOCKS}
        assert torch.equal(halves["all"], full)
        assert far(halves["first half"], halves["second half"]) and far(halves["second half"], plain)
        both = apply(apply(editor(name), [SOFT], mask, blocks="first half"), [SOFT], mask, blocks="second half")
        assert close(sample(both, name, refs), full, TOLERANCE)


def test_weights_of_two_guides_multiply() -> None:
    name = "kontext"
    half = (0.5,) * 7
    twice = apply(apply(editor(name), [half], parsings(1)), [SOFT], parsings(1))
    once = apply(editor(name), [tuple(0.5 * w for w in SOFT)], parsings(1))
    assert close(sample(twice, name, references(name)), sample(once, name, references(name)), TOLERANCE)


def test_references_that_match_one_target_share_their_channels() -> None:
    name, target = "kontext", parsing(40, 10, 8)
    seen = []
    who = apply(editor(name), [SOFT, SOFT, SOFT], parsings(3), beta=2.0, target=target).clone()

    def watch(func, q, k, v, heads, **more):
        seen.append(q.shape[-1])
        return func(q, k, v, heads, **more)

    who.model_options["transformer_options"]["optimized_attention_override"] = watch
    sample(who, name, references(name, 3))
    assert set(seen) == {32 + 8}


def test_a_prompt_for_an_area_sees_its_crop_of_the_target() -> None:
    name = "kontext"
    target = parsing(40, 12, 8)
    crop = HumanParsing(target.masks[:, :, 16:64])
    x = latent(name, 3, 12, 8)
    found = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            part = x[:, :, 2:8] if extra_args.get("crop") else x
            options = extra_args["model_options"]
            found["out"] = comfy.samplers.calc_cond_batch(
                model_wrap.inner_model, [model_wrap.conds["positive"]], part, torch.full((1,), 0.7), options
            )[0]
            return x

    def run(who: object, entry: list, start: Tensor) -> Tensor:
        nonlocal x
        x = start
        guider = comfy.samplers.CFGGuider(who)
        guider.inner_set_conds({"positive": entry})
        guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([0.7, 0.0]), disable_pbar=True)
        return found["out"]

    whole = latent(name, 3, 12, 8)
    placed = conditioning(name, 1, references(name), area=(6, 8, 2, 0), strength=1.0)
    ours = run(apply(editor(name), [SOFT], parsings(1), beta=4.0, target=target), placed, whole)
    alone = apply(editor(name), [SOFT], parsings(1), beta=4.0, target=crop)
    theirs = run(alone, conditioning(name, 1, references(name)), whole[:, :, 2:8])
    assert close(ours[:, :, 2:8], theirs, TOLERANCE)


class TestBesideOthers:
    """Chained with what else people put on these models, in both orders."""

    def test_a_foreign_attention_override(self) -> None:
        for name in NAMES:
            calls = []

            def half(func, q, k, v, heads, _calls=calls, **more):
                _calls.append(q.shape)
                return func(0.5 * q, k, v, heads, **more)

            who = editor(name).clone()
            who.model_options["transformer_options"]["optimized_attention_override"] = half
            ours = sample(apply(who, [FACE, ALL], parsings(2)), name, references(name, 2))
            shut = sample(apply(who, [FACE, ALL], parsings(2), keep_positions=True), name, references(name, 2))
            assert calls
            assert close(ours, shut, TOLERANCE)
            assert far(ours, sample(apply(editor(name), [FACE, ALL], parsings(2)), name, references(name, 2)))

    def test_an_attention_that_refuses_wide_heads_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        name = "kontext"
        host_unet.say_once.cache_clear()

        def narrow(func, q, k, v, heads, **more):
            if q.shape[-1] > 32:
                raise ValueError(f"unsupported head_dim: {q.shape[-1]}")
            return func(q, k, v, heads, **more)

        who = editor(name).clone()
        who.model_options["transformer_options"]["optimized_attention_override"] = narrow
        ours = sample(apply(who, [SOFT], parsings(1)), name, references(name))
        assert close(ours, sample(apply(editor(name), [SOFT], parsings(1)), name, references(name)), TOLERANCE)
        assert caplog.text.count("takes no heads of 40") == 1

    def test_a_foreign_post_input_that_adds_text(self) -> None:
        for name in DROPS:

            def more_text(args: dict) -> dict:
                width = args["txt"].shape[2]
                extra = torch.full((args["txt"].shape[0], 3, width), 0.2)
                ids = torch.zeros(args["txt_ids"].shape[0], 3, args["txt_ids"].shape[2])
                found = {"txt": torch.cat([extra, args["txt"]], 1), "txt_ids": torch.cat([ids, args["txt_ids"]], 1)}
                return {**args, **found}

            before = editor(name).clone()
            before.set_model_post_input_patch(more_text)
            before = apply(before, [SOFT, FACE], parsings(2), beta=2.0, target=parsing(40, 10, 8))
            after = apply(editor(name), [SOFT, FACE], parsings(2), beta=2.0, target=parsing(40, 10, 8)).clone()
            after.set_model_post_input_patch(more_text)
            refs = references(name, 2)
            assert torch.equal(sample(before, name, refs), sample(after, name, refs))
            shut = apply(before, [ALL, ALL], parsings(2), keep_positions=True, beta=1e-9, target=parsing(40, 10, 8))
            assert close(sample(before, name, refs), sample(shut, name, refs), TOLERANCE)
            without = sample(apply(editor(name), [SOFT, FACE], parsings(2)), name, refs)
            assert far(sample(before, name, refs), without)

    def test_a_foreign_post_input_that_changes_the_image_is_said_and_left_alone(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        name = "kontext"
        host_unet.say_once.cache_clear()

        def more_image(args: dict) -> dict:
            found = {key: torch.cat([args[key], args[key][:, -2:]], 1) for key in ("img", "img_ids")}
            return {**args, **found}

        who = editor(name).clone()
        who.set_model_post_input_patch(more_image)
        plain = sample(who, name, references(name))
        guided = sample(apply(who, [SOFT], parsings(1), keep_positions=True), name, references(name))
        assert torch.equal(plain, guided)
        assert caplog.text.count("changed the number of image tokens") == 1

    def test_attn1_patch(self) -> None:
        if "qwen2511" not in NAMES:
            pytest.skip("this host's editors have no attn1_patch")
        for name in LAST:
            shapes = []

            def sharper(q, k, v, pe=None, attn_mask=None, extra_options=None, _shapes=shapes):
                _shapes.append((q.shape[2], k.shape[2]))
                return {"q": 1.2 * q}

            who = apply(editor(name), [SOFT, FACE], parsings(2)).clone()
            who.set_model_attn1_patch(sharper)
            shut = apply(editor(name), [SOFT, FACE], parsings(2), keep_positions=True).clone()
            shut.set_model_attn1_patch(sharper)
            refs = references(name, 2)
            assert close(sample(who, name, refs), sample(shut, name, refs), TOLERANCE)
            assert len(set(shapes)) == 2

    @pytest.mark.parametrize("name", ["klein", "qwen", "qwen2511"])
    def test_the_hosts_reference_cache(self, name: str) -> None:
        nodes_flux = pytest.importorskip("comfy_extras.nodes_flux")
        if name not in NAMES or not hasattr(nodes_flux, "FluxKVCache"):
            pytest.skip("this host has no reference cache")

        def run(omegas: list, keep: bool, ours_first: bool, match: float = 0.0) -> Tensor:
            more = {"beta": match, "target": parsing(40, 10, 8)} if match else {}
            who = editor(name)
            if ours_first:
                who = apply(who, omegas, parsings(2), keep_positions=keep, **more)
            who = nodes_flux.FluxKVCache.execute(who).result[0]
            if not ours_first:
                who = apply(who, omegas, parsings(2), keep_positions=keep, **more)
            # One row: the cache keeps one set of keys for all calls.
            out = sample(who, name, references(name, 2), cfg=1.0, sigmas=(1.0, 0.7, 0.4, 0.0))
            next(p for p in who.model_options["transformer_options"]["patches"]["attn1_patch"]).cleanup()
            return out

        for omegas in ([SOFT, FACE], [FACE, NONE]):
            results = [
                run(omegas, keep, first, match)
                for keep in (False, True)
                for first in (False, True)
                for match in (0.0, 2.0)
            ]
            for match in (0, 1):
                mine = results[match::2]
                assert all(close(x, mine[0], TOLERANCE) for x in mine[1:])
            assert far(results[0], run([ALL, ALL], False, True))
        none = sample(editor(name), name, None, cfg=1.0, sigmas=(1.0, 0.7, 0.4, 0.0))
        assert close(run([NONE, NONE], False, True), none, TOLERANCE)

    def test_the_reference_cache_with_a_window(self) -> None:
        nodes_flux = pytest.importorskip("comfy_extras.nodes_flux")
        if "klein" not in NAMES or not hasattr(nodes_flux, "FluxKVCache"):
            pytest.skip("this host has no reference cache")
        name, refs = "klein", references("klein", 2)
        who = nodes_flux.FluxKVCache.execute(editor(name)).result[0]
        who = apply(who, [FACE, NONE], parsings(2), sigmas=(0.8, 0.5))
        out = sample(who, name, refs, cfg=1.0, sigmas=(1.0, 0.7, 0.4, 0.0))
        assert bool(out.isfinite().all())

    def test_easy_cache(self) -> None:
        cache = pytest.importorskip("comfy_extras.nodes_easycache")
        name = "kontext"

        def cached(who: object) -> object:
            return cache.EasyCacheNode.execute(who, 0.4, 0.1, 0.95, False).result[0]

        steps = tuple(torch.linspace(1, 0, 11).tolist())
        ours = sample(cached(apply(editor(name), [FACE], parsings(1))), name, references(name), sigmas=steps)
        other = sample(apply(cached(editor(name)), [FACE], parsings(1)), name, references(name), sigmas=steps)
        assert torch.equal(ours, other)
        shut = apply(cached(editor(name)), [FACE], parsings(1), keep_positions=True)
        assert close(ours, sample(shut, name, references(name), sigmas=steps), 1e-4)
        plain = sample(apply(editor(name), [FACE], parsings(1)), name, references(name), sigmas=steps)
        assert not torch.equal(ours, plain)

    def test_a_lora(self) -> None:
        for name in NAMES:
            who = editor(name).clone()
            keys = [k for k in who.model_state_dict() if "qkv.weight" in k or "to_k.weight" in k]
            generator = torch.Generator().manual_seed(3)
            patches = {k: (0.05 * torch.randn(who.model_state_dict()[k].shape, generator=generator),) for k in keys}
            assert set(who.add_patches(patches, 1.0)) == set(keys)
            ours = sample(apply(who, [FACE, SOFT], parsings(2)), name, references(name, 2))
            shut = sample(apply(who, [FACE, SOFT], parsings(2), keep_positions=True), name, references(name, 2))
            assert close(ours, shut, TOLERANCE)
            assert far(ours, sample(apply(editor(name), [FACE, SOFT], parsings(2)), name, references(name, 2)))


class TestNode:
    """The node: a schema and a call."""

    def call(self, **more: object) -> tuple:
        given = {"model": editor("kontext"), "parsing": parsings(1)[0], **more}
        return GuideReferences.execute(**given).result

    def test_by_default_the_background_is_left_out(self) -> None:
        patched, _ = self.call()
        (guide,) = host_references.guides_of(patched)
        assert guide.omega == (0.0, *ALL[1:]) and not guide.matches and guide.sigmas is None
        apart = sample(apply(editor("kontext"), [guide.omega], parsings(1)), "kontext", references("kontext"))
        assert torch.equal(sample(patched, "kontext", references("kontext")), apart)
        same, _ = self.call(background=1.0)
        assert same is editor("kontext")

    def test_the_photo_without_what_is_left_out(self) -> None:
        mask = parsings(1)[0]
        photo = torch.rand(1, *mask.size, 3, generator=torch.Generator().manual_seed(2))
        _, shown = self.call(image=photo, upper=0.0, face=0.4)
        hidden = (mask.labels() == Region.UPPER) | (mask.labels() == Region.BACKGROUND)
        assert bool((shown[hidden] == host_references.GREY).all())
        assert torch.equal(shown[~hidden], photo[~hidden])
        _, blocked = self.call()
        assert "image input" in blocked.message
        with pytest.raises(TruePoseError, match="the image 64x64"):
            self.call(image=photo[:, :64])

    def test_a_target_pose_carries_the_parsing_into_its_own_canvas(self) -> None:
        pose = keypoints(64, 96)
        patched, _ = self.call(region_match=2.0, body_match=1.0, pose=pose, target_pose=keypoints(128, 64))
        (guide,) = host_references.guides_of(patched)
        assert not guide.given and guide.target.size == (8, 16)
        assert bool(sample(patched, "kontext", references("kontext"), height=8, width=16).isfinite().all())
        with pytest.raises(TruePoseError, match="connect target_parsing"):
            self.call(region_match=2.0, pose=pose)
        with pytest.raises(TruePoseError, match=r"start_percent 0\.8 is after"):
            self.call(start_percent=0.8, end_percent=0.2)

    def test_a_window_is_told_in_noise(self) -> None:
        patched, _ = self.call(start_percent=0.2, end_percent=0.6)
        (guide,) = host_references.guides_of(patched)
        sampling = patched.get_model_object("model_sampling")
        assert guide.sigmas == (sampling.percent_to_sigma(0.2), sampling.percent_to_sigma(0.6))


def keypoints(width: int, height: int) -> list[dict]:
    """One frame of POSE_KEYPOINT with one person."""
    xy = torch.rand((18, 2), generator=torch.Generator().manual_seed(2)) * torch.tensor([width, height])
    flat = torch.cat([xy, torch.ones(18, 1)], 1).flatten().tolist()
    return [{"canvas_width": width, "canvas_height": height, "people": [{"pose_keypoints_2d": flat}]}]


class TestNothingStays:
    def test_other_clones_and_the_options(self) -> None:
        for name in NAMES:
            before = sample(editor(name), name, references(name))
            options = copy.deepcopy(editor(name).model_options["transformer_options"])
            guided = apply(editor(name), [SOFT], parsings(1))
            assert far(sample(guided, name, references(name)), before)
            assert torch.equal(sample(editor(name), name, references(name)), before)
            assert torch.equal(sample(host_references.without_guides(guided), name, references(name)), before)
            assert editor(name).model_options["transformer_options"] == options
            held = guided.model_options["transformer_options"]
            assert "optimized_attention_override" not in held and "post_input" not in held.get("patches", {})

    def test_what_a_run_learned_is_forgotten_also_when_it_fails(self) -> None:
        guided = apply(editor("kontext"), [SOFT], parsings(1))
        patch_object = guided.attachments[host_references.KEY]
        sample(guided, "kontext", references("kontext"))
        assert len(patch_object.cache) == 0
        broken = guided.clone()

        def fail(args: dict) -> None:
            assert len(patch_object.cache)
            raise RuntimeError("stop")

        broken.set_model_sampler_post_cfg_function(fail)
        with pytest.raises(RuntimeError, match="stop"):
            sample(broken, "kontext", references("kontext"))
        assert len(patch_object.cache) == 0

    def test_clones_share_the_patch_and_nothing_grows(self) -> None:
        who = apply(editor("kontext"), [SOFT, FACE], parsings(2))
        kinds = (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH)
        sizes = []
        for _ in range(3):
            who = who.clone()
            sample(who, "kontext", references("kontext", 2))
            sizes.append([len(who.get_wrappers(kind, host_references.KEY)) for kind in kinds])
        assert sizes == [[1, 1]] * 3
        assert len(host_references.guides_of(who)) == 2
        gc.collect()


class TestBadInput:
    def test_no_reference_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        host_unet.say_once.cache_clear()
        guided = apply(editor("kontext"), [SOFT], parsings(1))
        ours = sample(guided, "kontext", None)
        assert torch.equal(ours, sample(editor("kontext"), "kontext", None))
        assert caplog.text.count("holds no reference latent") == 1

    def test_negative_rows_may_lack_references(self, caplog: pytest.LogCaptureFixture) -> None:
        host_unet.say_once.cache_clear()
        guided = apply(editor("kontext"), [SOFT], parsings(1))
        out = sample(guided, "kontext", references("kontext"), negative=None)
        assert far(out, sample(editor("kontext"), "kontext", references("kontext"), negative=None))
        assert "Guide References" not in caplog.text

    def test_an_index_without_a_reference(self) -> None:
        guided = host_references.with_guide(editor("kontext"), ReferenceGuide(3, parsings(1)[0], SOFT))
        with pytest.raises(TruePoseError, match="for reference 3, and the conditioning holds 2"):
            sample(guided, "kontext", references("kontext", 2))

    def test_a_parsing_of_another_shape(self) -> None:
        guided = apply(editor("kontext"), [SOFT], [parsing(20, 8, 12)])
        with pytest.raises(TruePoseError, match=r"96x64 .* 8x12 cells"):
            sample(guided, "kontext", references("kontext"))

    def test_a_target_parsing_of_another_shape(self) -> None:
        guided = apply(editor("kontext"), [SOFT], parsings(1), beta=1.0, target=parsing(1, 4, 20))
        with pytest.raises(TruePoseError, match="the target parsing is 160x32"):
            sample(guided, "kontext", references("kontext"))

    def test_references_of_another_batch(self) -> None:
        guided = apply(editor("kontext"), [SOFT], [parsing(20, 12, 8, batch=2)])
        with pytest.raises(TruePoseError, match="2 parsings of reference 1 and 3 latents"):
            sample(guided, "kontext", references("kontext"), batch=3)

    def test_a_model_that_is_no_editor(self, caplog: pytest.LogCaptureFixture) -> None:
        from comfy.ldm.wan.model import WanModel
        from fixtures.tiny import make_model

        with pytest.raises(TruePoseError, match="SD15, a UNet"):
            apply(make_model(0), [SOFT], parsings(1))
        host_unet.say_once.cache_clear()
        who = editor("kontext").clone()
        other = copy.copy(who.model)
        other.__dict__["_modules"] = {**who.model._modules, "diffusion_model": WanModel.__new__(WanModel)}
        who.model = other
        assert apply(who, [SOFT], parsings(1)) is who
        assert "Flux holds no references as tokens" in caplog.text

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"omega": (1.5, *ALL[1:])}, "numbers from 0 to 1"),
            ({"reference": 5}, "expected 1 to 4"),
            ({"beta": 1.0}, "connect target_parsing"),
            ({"gamma": 1.0}, "connect pose and target_pose"),
            ({"beta": -1.0}, "expected 0 or more"),
        ],
    )
    def test_numbers(self, more: dict, message: str) -> None:
        with pytest.raises(TruePoseError, match=message):
            ReferenceGuide(**{"reference": 1, "parsing": parsings(1)[0], "omega": ALL, **more})
