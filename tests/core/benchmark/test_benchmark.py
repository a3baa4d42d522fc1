"""What `truepose benchmark` counts is checked against hand counts; what it times, for form and never for speed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from truepose_core.benchmark import add_arguments, run
from truepose_core.benchmark.calls import attention_work, compared_work, rest_seconds, rest_work, some_heads, whole_work
from truepose_core.benchmark.count import (
    added_by_caa,
    added_by_hpfa,
    added_by_projection,
    count_attention,
    count_step,
    counted,
)
from truepose_core.benchmark.measure import measure
from truepose_core.benchmark.memory import cpu_peaks, high_water, passed_bytes
from truepose_core.benchmark.report import tables
from truepose_core.benchmark.shapes import CHANNELS, NETS, SHARES, Net, Site, build, step_inputs
from truepose_core.benchmark.timing import LONG, interleaved
from truepose_core.errors import TruePoseError

META, CPU, FLOAT = torch.device("meta"), torch.device("cpu"), torch.float32

TINY = Net(
    "tiny",
    "64x96",
    {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
    },
    (12, 8),
    context=5,
)


@pytest.fixture(scope="module")
def tiny():
    return count_step(TINY)


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_a_plain_step_is_the_sum_of_its_layers(tiny):
    """Convolutions, linear layers and attention by their textbook counts, from a run on real tensors."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    unet = UNet2DConditionModel(**TINY.unet).eval()
    total = 0

    def layer(module, args, output):
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    def attention(module, args, kwargs, output):
        nonlocal total
        x = args[0]
        context = kwargs.get("encoder_hidden_states")
        keys = x.shape[1] if context is None else context.shape[1]
        total += 4 * x.shape[1] * keys * module.inner_dim

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(layer)
        if isinstance(module, Attention):
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        unet(**step_inputs(TINY, unet, CPU, FLOAT))
    assert tiny.flops == total


def test_sites_are_those_of_the_net(tiny):
    # One block on the way down, two on the way up, one in the middle.
    assert tiny.sites == (Site(96, 4, 8, 3), Site(24, 4, 16, 1))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_hpfa_adds_what_the_formula_says(tiny, share, channels):
    def longer(s):
        n, m = s.tokens, round(share * s.tokens)
        return s.count * s.heads * 4 * n * ((n + m) * (s.width + channels) - n * s.width)

    assert added_by_hpfa(tiny, share, channels) == sum(map(longer, tiny.sites))


def test_a_whole_step_with_our_processors_counts_the_same(tiny):
    work = whole_work(TINY, SHARES, CHANNELS, META, FLOAT)
    assert counted(work["step",]) == tiny.flops
    for share, c in zip(SHARES, CHANNELS, strict=True):
        assert counted(work["step", share, c]) == tiny.flops + added_by_hpfa(tiny, share, c), (share, c)


def test_projection_is_two_products_per_site(tiny):
    for share in SHARES:
        by_hand = sum(s.count * 2 * 2 * round(share * s.tokens) * (s.heads * s.width) ** 2 for s in tiny.sites)
        assert added_by_projection(tiny, share) == by_hand


def test_caa_is_a_cross_attention_to_28_tokens(tiny):
    cross = aligned = 0
    for s in tiny.sites:
        once = 2 * 2 * 28 * 24 * s.inner + 4 * s.heads * s.tokens * 28 * (s.width + 8)
        cross += s.count * once
        aligned += s.count * (once + 2 * s.tokens * s.inner**2)
    assert added_by_caa(tiny, 24) == (cross, aligned)


def test_parts_and_kernels_are_the_step(tiny):
    kernels = sum(s.count * count_attention(s) for s in tiny.sites)
    unet = build(TINY)
    t = torch.empty(1, 32, device=META)
    embedding = counted(lambda: unet.time_embedding(t))
    assert sum(p.flops for p in tiny.parts) + kernels + embedding == tiny.flops
    assert {(p.kind, p.tokens) for p in tiny.parts} == {
        (k, n) for k in ("convolution", "transformer") for n in (96, 24)
    }


def test_the_module_of_a_part_has_the_flops_it_says(tiny):
    work = rest_work(tiny.parts, META, FLOAT)
    for p in tiny.parts:
        assert counted(work["rest", p.kind, p.tokens]) == p.module_flops


def test_rest_is_proportional_to_flops_at_one_speed(tiny):
    seconds = {("rest", p.kind, p.tokens): p.module_flops / 1e9 for p in tiny.parts}
    kernels = sum(s.count * count_attention(s) for s in tiny.sites)
    assert rest_seconds(tiny, seconds) == pytest.approx((tiny.flops - kernels) / 1e9, rel=1e-12)


GOALS = [(NETS[0], (1.21, 1.085, 1.053)), (NETS[1], (1.086, 1.034, 1.021))]


@pytest.mark.parametrize(("net", "goals"), GOALS, ids=["sd15", "sdxl"])
def test_counted_ratios_meet_the_design(net, goals):
    step = count_step(net)
    ratios = [1 + added_by_hpfa(step, share, 0) / step.flops for share in SHARES]
    assert ratios == pytest.approx(goals, abs=3e-3)
    for c in CHANNELS:
        costs = [added_by_hpfa(step, share, c) for share in SHARES]
        assert all(a > b > 0 for a, b in pairwise(costs))


def test_nets_are_the_published_ones():
    parameters = [sum(p.numel() for p in build(net).parameters()) for net in NETS]
    assert parameters == [859_520_964, 2_567_463_684]


def test_some_heads_stay_within_the_budget():
    site = Site(96, 4, 8, 3)
    head = 4 * 96 * 96 * 8
    assert some_heads(site, None) == site
    assert [some_heads(site, b * head).heads for b in (0.1, 1, 2.5, 99)] == [1, 1, 2, 4]


def test_the_three_ways_of_attention_agree():
    """Augmented and masked are one formula; with a mask of zeros the kernel alone reads the same tokens."""
    site = Site(24, 2, 8, 1)
    work = compared_work(site, (0.5,), CPU, FLOAT)
    a, m, ready = (work[how, site, 0.5]() for how in ("augmented", "masked", "mask ready"))
    assert torch.allclose(a, m, atol=1e-5)
    assert ready.shape == a.shape == (1, 2, 24, 8)


def test_all_work_runs_on_real_tensors(tiny):
    work = rest_work(tiny.parts, CPU, FLOAT) | attention_work(tiny.sites, (0.4,), (0, 8), CPU, FLOAT)
    work |= whole_work(TINY, (0.4,), CHANNELS, CPU, FLOAT)
    with torch.no_grad():
        for key, call in work.items():
            out = call()
            out = out.sample if hasattr(out, "sample") else out
            assert torch.isfinite(out).all(), key


class FakeClock:
    """Tells prepared readings and remembers the order of calls."""

    def __init__(self, readings, first_counts=True):
        self.readings, self.order, self.first_counts = readings, [], first_counts

    def seconds(self, work, times):
        name = work()
        self.order.append(name)
        return self.readings[name].pop(0)


def test_repeats_are_interleaved_and_the_median_is_taken():
    clock = FakeClock({"a": [0.1, 3.0, 1.0, 2.0], "b": [0.1, 5.0, 7.0, 6.0]})
    ticks = []
    work = {"a": lambda: "a", "b": lambda: "b"}
    assert interleaved(work, 3, clock, lambda: ticks.append(1)) == {"a": 2.0, "b": 6.0}
    assert clock.order == ["a", "b"] * 4
    assert len(ticks) == 6


def test_a_long_first_reading_counts():
    clock = FakeClock({"long": [LONG], "short": [LONG / 2, 1.0]})
    assert interleaved({"long": lambda: "long", "short": lambda: "short"}, 1, clock) == {"long": LONG, "short": 1.0}


def test_a_cold_start_never_counts():
    clock = FakeClock({"a": [99.0, LONG, 2.0]}, first_counts=False)
    assert interleaved({"a": lambda: "a"}, 2, clock) == {"a": (LONG + 2.0) / 2}


def test_bytes_made_for_the_kernel():
    site, kept = Site(10, 3, 8, 1), 4
    q, kv, out, bias = 10 * 16, 2 * 14 * 16, 10 * 16, 10 * 14
    assert passed_bytes(site, kept, "augmented", 2) == 3 * 2 * (q + kv + out)
    assert passed_bytes(site, kept, "masked", 2) == 3 * 2 * (2 * 14 * 8 + 10 * 8 + bias)


@pytest.mark.skipif(high_water() is None, reason="this system tells no high-water mark")
def test_peak_memory_of_a_child():
    """The mask alone is 32 MiB here; the augmented tensors are under one."""
    site = Site(2048, 1, 8, 1)
    augmented, masked = cpu_peaks([(site, 2048, "augmented"), (site, 2048, "masked")])
    assert masked >= 2048 * 4096 * 4
    assert augmented < masked / 2


def test_a_child_that_dies_leaves_no_number(monkeypatch, capsys):
    died = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: died)
    assert cpu_peaks([(Site(4, 1, 8, 1), 4, "masked")] * 2) == [None, None]
    assert "ended with -9" in capsys.readouterr().err


STEP_KEYS = {"model", "size", "tokens", "counted", "timed", "counted_region_match", "timed_region_match"}


@pytest.mark.parametrize("words", [("--quick",), ("--repeats", "2")])
def test_the_command_writes_what_it_prints(words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("truepose_core.benchmark.shapes.NETS", (TINY,))
    monkeypatch.setattr("truepose_core.benchmark.timing.SHORT", 0.0)
    path = tmp_path / "b.json"
    threads = torch.get_num_threads()
    if "--quick" not in words:  # as on a system that tells no high-water mark
        monkeypatch.setattr("truepose_core.benchmark.measure.cpu_peaks", lambda cases: [None] * len(list(cases)))
    result = run(options("--report", str(path), "--device", "cpu", *words))
    assert torch.get_num_threads() == threads
    assert json.loads(path.read_text()) == result
    assert capsys.readouterr().out.strip() == tables(result).strip()

    assert [(r["model"], r["size"], r["tokens"]) for r in result["steps"]] == [("tiny", "64x96", s) for s in SHARES]
    assert set(result["steps"][0]) >= STEP_KEYS
    for rows in (result["steps"], result["kv"], result["caa"]):
        assert all(x >= 1 for r in rows for k, x in r.items() if k.startswith("counted"))
    assert all(a["counted"] > b["counted"] for a, b in pairwise(result["steps"]))
    assert all(r["timed"] > 0 for key in ("steps", "attention", "kv", "caa") for r in result[key])
    assert [r["tokens"] for r in result["attention"]] == ([0.4] if "--quick" in words else list(SHARES))
    assert {"torch", "device", "threads", "dtype", "repeats"} <= set(result["machine"])
    with pytest.raises(TruePoseError, match="exists"):
        run(options("--report", str(path)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--repeats", "0"), "--repeats is 0; expected at least 1"),
        (("--device", "tpu9"), "expected auto, cpu, cuda"),
        (("--device", "meta"), "expected auto, cpu, cuda"),
        (("--device", "cuda:99"), "torch sees"),
        (("--report", "/nowhere/b.json"), "does not exist"),
        (("--report", "b.txt"), ".json"),
    ],
)
def test_bad_options_are_refused_before_any_work(words, message, monkeypatch):
    monkeypatch.setattr("truepose_core.benchmark.measure.count_step", None)
    with pytest.raises(TruePoseError, match=message.replace(".", r"\.")):
        run(options(*words))


def test_importing_the_command_is_light():
    code = (
        "import sys, argparse; from truepose_core.benchmark import add_arguments;"
        "add_arguments(argparse.ArgumentParser()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_measure_wants_a_repeat():
    with pytest.raises(TruePoseError, match="at least 1"):
        measure((TINY,), repeats=-1, device="cpu")
