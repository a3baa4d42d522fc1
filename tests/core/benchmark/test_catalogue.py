"""What a catalogue costs: counted from the parts, and told with what is assumed."""

from __future__ import annotations

import pytest

from truepose_core.benchmark import catalogue
from truepose_core.benchmark.catalogue import GPUS, POSES, STEPS, catalogue_tables, count_picture, count_vae
from truepose_core.benchmark.count import added_by_hpfa, added_by_projection, count_step
from truepose_core.benchmark.shapes import Net
from truepose_core.cli import main

NET = Net(
    "tiny",
    "64x128",
    {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
    },
    (16, 8),
)


def test_the_source_is_read_once_for_all_its_poses():
    found, step = count_picture(NET), count_step(NET)
    encode, decode = count_vae(NET)
    reading = (encode + step.flops + added_by_projection(step, 0.4)) / 1e12
    sampling = (STEPS * (2 * step.flops + added_by_hpfa(step, 0.4, 8)) + decode) / 1e12
    assert {poses: found["tflop"][poses] for poses in POSES} == pytest.approx(
        {poses: reading / poses + sampling for poses in POSES}
    )


def test_the_vae_counts_by_its_pixels():
    # Convolutions grow with the pixels, the attention in the middle with their square.
    double = Net("tiny", "128x128", NET.unet, (16, 16))
    for small, large in zip(count_vae(NET), count_vae(double), strict=True):
        assert 2 * small < large < 2.2 * small


def test_tables_say_what_is_assumed(monkeypatch):
    monkeypatch.setattr(catalogue, "NETS", (NET,))
    monkeypatch.setattr(catalogue, "time_poses", lambda _: {poses: {"batch": 0.5, "alone": 1.0} for poses in POSES})
    result = catalogue.measure_catalogue()
    text = catalogue_tables(result)
    assert "at 35% of the maker's dense 16-bit TFLOP/s, which is assumed; no GPU was measured" in text
    assert "| 8 | 0.500 | 1.000 | 50% |" in text
    hours = result["million"]["tiny"][8]
    assert hours["A100"] * GPUS["A100"] == pytest.approx(hours["L4"] * GPUS["L4"])
    assert hours["A100"] == pytest.approx(result["counted"]["tiny"]["tflop"][8] * 1e6 / (312 * 0.35) / 3600)


def test_one_measurement_at_a_time(capsys):
    assert main(["benchmark", "--catalogue", "--body"]) == 2
    assert "--catalogue is a measurement of its own" in capsys.readouterr().err
