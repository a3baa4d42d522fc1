"""Guidance by the pose field: the step is a gradient, limited, and free where it is off."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from small import people, small_model, source_of
from torch import nn

from truepose_core.alignment.field import PoseField
from truepose_core.body.lift import LiftNet
from truepose_core.cli import main
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.guidance import EASY, EXTREME, choose_pairs, measure_keypoints, summary
from truepose_core.guidance import field as guidance
from truepose_core.guidance.field import (
    LIMIT,
    FieldGuidance,
    PoseEnergy,
    clean_estimate,
    field_step,
    load_energy,
    moved_prediction,
    signal_share,
)
from truepose_core.guidance.keypoints import KeypointPredictor, load_predictor, nearer_sides, picture_of, place_of
from truepose_core.mannequin.split import split_pairs
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import SD_SCHEDULE
from truepose_core.pipeline import TruePosePipeline
from truepose_core.pipeline import truepose as pipeline
from truepose_core.pose.edit import BODY_MIRROR
from truepose_core.training.keypoints import KeypointConfig, KeypointTrainer, blur, degrade, place, spots
from truepose_core.weights.small import save_small
from truepose_core.weights.strict import bundled_path

ASPECT, PATCH = 0.75, 4
SMALL = (8, 8, 8)


def small_energy(seed: int = 0, **predictor) -> PoseEnergy:
    """Random small networks; the heat maps are peaked enough that every part of the energy matters."""
    torch.manual_seed(seed)
    reader = KeypointPredictor(widths=SMALL, **predictor)
    with torch.no_grad():
        reader.heat.weight.mul_(8)
        reader.seen.bias.fill_(2)
    return PoseEnergy(PoseField(16, 1), reader, LiftNet(16, 1))


def latents(count: int = 2, seed: int = 0) -> torch.Tensor:
    return 0.5 * torch.randn((count, 48, 16, 12), generator=torch.Generator().manual_seed(seed))


def step(energy, x0, options, target=None):
    return field_step(energy, x0, options, aspect=ASPECT, patch=PATCH, target=target)


def targets(count: int = 2) -> torch.Tensor:
    return people().target.keypoints[:count]


# ---------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("mu", [0.0, 3.0])
def test_the_step_is_the_gradient_of_the_energy(mu):
    energy, x0, target = small_energy(), latents(1), targets(1)
    taken = step(energy, x0, FieldGuidance(scale=1e-3, mu=mu), target) / 1e-3
    # Central differences along some directions, in double precision.
    double = small_energy().double()
    for seed in range(3):
        way = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).double()
        high, low = (double(x0.double() + s * way, ASPECT, PATCH, target.double(), mu).sum() for s in (1e-4, -1e-4))
        slope = ((high - low) / 2e-4).item()
        assert (taken.double() * way).sum().item() == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_the_energy_falls_along_the_step():
    energy, x0, target = small_energy(), latents(), targets()
    options = FieldGuidance(scale=0.1, mu=5.0)
    moved = x0 - step(energy, x0, options, target)
    before, after = (energy(x, ASPECT, PATCH, target, options.mu) for x in (x0, moved))
    assert (after < before).all()


def test_the_step_is_limited_and_it_is_said_once(caplog):
    energy, x0 = small_energy(), latents()
    guidance._say_limited.cache_clear()
    with caplog.at_level(logging.WARNING, "truepose_core"):
        long = step(energy, x0, FieldGuidance(scale=1e6), targets())
        step(energy, x0, FieldGuidance(scale=1e6), targets())
    assert len([r for r in caplog.records if "was shortened" in r.message]) == 1
    torch.testing.assert_close(long.square().mean((1, 2, 3)).sqrt(), torch.full((2,), LIMIT))
    short = step(energy, x0, FieldGuidance(scale=1e-4), targets())
    assert short.square().mean((1, 2, 3)).sqrt().max() < LIMIT
    torch.testing.assert_close(nn.functional.normalize(long.flatten(1)), nn.functional.normalize(short.flatten(1)))


def test_a_batch_is_its_items_one_by_one():
    energy, x0, target = small_energy(), latents(4), targets(2)
    options = FieldGuidance(scale=0.1, mu=5.0)
    whole = step(energy, x0, options, target)
    for i in range(4):
        torch.testing.assert_close(whole[i : i + 1], step(energy, x0[i : i + 1], options, target[i // 2][None]))


def test_it_works_in_inference_mode():
    energy, target = small_energy(), targets()
    expected = step(energy, latents(), FieldGuidance(scale=0.1), target)
    with torch.inference_mode():
        x0 = latents() + 0
        assert x0.is_inference()
        found = step(energy, x0, FieldGuidance(scale=0.1), target + 0)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


def test_joints_that_the_target_lacks_do_not_pull():
    energy, x0, target = small_energy(), latents(1), targets(1)
    nobody = torch.zeros_like(target)
    alone = step(energy, x0, FieldGuidance(scale=0.01, mu=0.0))
    torch.testing.assert_close(step(energy, x0, FieldGuidance(scale=0.01, mu=50.0), nobody), alone)
    torch.testing.assert_close(step(energy, x0, FieldGuidance(scale=0.01, mu=50.0)), alone)
    assert not torch.allclose(step(energy, x0, FieldGuidance(scale=0.01, mu=50.0), target), alone)


def test_too_few_joints_say_nothing_of_a_body():
    energy = small_energy()
    places = torch.rand((2, 18, 2), generator=torch.Generator().manual_seed(0))
    seen = torch.full((2, 18), -1.0)
    seen[0, :4] = 1
    seen[1, :5] = 1
    distance = energy.distance(places, seen, ASPECT)
    assert distance[0] == 0 and distance[1] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": -1.0}, "the field's scale is -1.0"),
        ({"mu": float("nan")}, "the field's mu is nan"),
        ({"start": 0.6, "end": 0.4}, "works from 0.6 to 0.4"),
        ({"end": 1.5}, "expected 0 <= start <= end <= 1"),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(TruePoseError, match=message):
        FieldGuidance(**wrong)


# --------------------------------------------------------------------------------------------- estimates and schedules


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_a_moved_prediction_says_the_moved_estimate(kind):
    generator = torch.Generator().manual_seed(0)
    clean, noise, move = (torch.randn((2, 4, 8, 6), generator=generator, dtype=torch.float64) for _ in range(3))
    alpha = 0.3
    x = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    prediction = {
        "sample": clean,
        "epsilon": noise,
        "v_prediction": alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean,
    }[kind]
    torch.testing.assert_close(clean_estimate(prediction, x, alpha, kind), clean)
    moved = moved_prediction(prediction, move, alpha, kind)
    torch.testing.assert_close(clean_estimate(moved, x, alpha, kind), clean - move)


def test_the_share_of_signal_is_the_schedules():
    scheduler = DDIMScheduler(**SD_SCHEDULE)
    alphas = scheduler.alphas_cumprod
    for t in (0, 1, 500, 999):
        assert signal_share(alphas, t).item() == pytest.approx(alphas[t].item(), rel=1e-6)
    between = signal_share(alphas, 500.5).item()
    assert alphas[501].item() < between < alphas[500].item()
    euler = EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="linspace")
    euler.set_timesteps(7)
    for t, sigma in zip(euler.timesteps, euler.sigmas, strict=False):
        share = signal_share(euler.alphas_cumprod, t).item()
        assert (1 / share - 1) ** 0.5 == pytest.approx(sigma.item(), rel=1e-3)


# -------------------------------------------------------------------------------------------------------- the pipeline


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(pipeline, "load_energy", lambda predictor, pixels: small_energy())
    made = TruePosePipeline.from_model(small_model())
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, options, rows: slice = slice(None), **more):
    pairs = people()
    image, parsing, body = source_of(pairs, rows)
    keypoints = pairs.target.keypoints[rows]
    seeds = list(range(len(pairs)))[rows]
    given = {"num_inference_steps": 3, "seed": seeds, "field_guidance": options, **more}
    return pipe(image, keypoints, parsing, body, **given).images


def test_scale_zero_is_bit_for_bit_nothing_and_loads_nothing(pipe):
    plain = draw(pipe, None)
    assert torch.equal(draw(pipe, FieldGuidance(scale=0.0, mu=1e6)), plain)
    assert pipe._energy is None
    assert not torch.equal(draw(pipe, FieldGuidance()), plain)


def test_outside_of_its_part_of_the_sampling_it_does_nothing(pipe):
    # Three trailing steps lie at 0, 1/3 and 2/3 of the sampling.
    plain, every = draw(pipe, None), draw(pipe, FieldGuidance())
    assert torch.equal(draw(pipe, FieldGuidance(start=0.1, end=0.3)), plain)
    middle = draw(pipe, FieldGuidance(start=0.3, end=0.5))
    assert not torch.equal(middle, plain) and not torch.equal(middle, every)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda c: DDIMScheduler(**c),
        lambda c: EulerDiscreteScheduler(**c, timestep_spacing="linspace"),
        lambda c: DPMSolverMultistepScheduler(**c, use_karras_sigmas=True),
    ],
)
@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_any_sampler_takes_it(monkeypatch, scheduler, kind):
    monkeypatch.setattr(pipeline, "load_energy", lambda predictor, pixels: small_energy())
    made = TruePosePipeline.from_model(
        small_model(prediction_type=kind), scheduler({**SD_SCHEDULE, "prediction_type": kind})
    )
    made.set_progress_bar_config(disable=True)
    rows = slice(0, 1)
    plain, guided = (draw(made, options, rows) for options in (None, FieldGuidance(mu=400)))
    assert guided.isfinite().all() and not torch.equal(plain, guided)


def test_guided_pictures_do_not_depend_on_their_batch(pipe):
    options = FieldGuidance(mu=100.0)
    whole = draw(pipe, options)
    for i in range(len(whole)):
        torch.testing.assert_close(whole[i : i + 1], draw(pipe, options, slice(i, i + 1)), atol=2e-5, rtol=0)


def test_with_guidance_scales_too(pipe):
    both = {"guidance_pose": 2.0, "guidance_source": 2.0}
    assert not torch.equal(draw(pipe, FieldGuidance(), **both), draw(pipe, None, **both))


def test_another_predictor_is_loaded_anew(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "load_energy", lambda path, pixels: asked.append((path, pixels)) or small_energy())
    made = TruePosePipeline.from_model(small_model())
    made.set_progress_bar_config(disable=True)
    for predictor in (None, None, "a"):
        draw(made, FieldGuidance(predictor=predictor), slice(0, 1))
    assert asked == [(None, True), ("a", True)]


def test_a_predictor_must_read_what_the_model_works_on(tmp_path):
    reader = KeypointPredictor("vae", 4, widths=SMALL)
    path = save_small(reader.state_dict(), tmp_path / "reader.safetensors", "keypoints", reader.sizes, {})
    with pytest.raises(TruePoseError, match="reads vae and this model works on pixel patches"):
        load_energy(path, pixels=True)
    with pytest.raises(TruePoseError, match="truepose train --row keypoints --vae FOLDER"):
        load_energy(None, pixels=False)
    with pytest.raises(TruePoseError, match="expected the weights of truepose train --row keypoints"):
        load_predictor(bundled_path())
    with pytest.raises(TruePoseError, match="no model file at"):
        load_predictor(tmp_path / "gone.safetensors")


# ------------------------------------------------------------------------------------------------------- the predictor


def test_the_place_of_a_spot_is_where_it_is():
    body = torch.tensor([[[0.2, 0.7, 1.0]] * 18])
    torch.testing.assert_close(place_of(spots(body, (32, 24))), body[..., :2], atol=1e-3, rtol=0)
    assert spots(body, (32, 24)).sum((2, 3)).allclose(torch.ones(1, 18))


def test_sides_are_taken_as_they_lie_nearer():
    body = targets(2)
    exchanged = body[:, list(BODY_MIRROR)]
    assert torch.equal(nearer_sides(body[..., :2], body, ASPECT), body)
    assert torch.equal(nearer_sides(exchanged[..., :2], body, ASPECT), exchanged)
    assert torch.equal(exchanged[:, list(BODY_MIRROR)], body)


def test_pixel_patches_become_the_codecs_picture():
    image = people().target.image
    latent = PixelCodec(PATCH).encode(image)
    torch.testing.assert_close((picture_of(latent, PATCH) + 1) / 2, image)


def test_sizes_are_brought_to_one():
    torch.manual_seed(0)
    reader = KeypointPredictor(widths=SMALL).eval()
    small = people().target.image * 2 - 1
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    (a, _b), (c, _d) = reader(small), reader(large)
    torch.testing.assert_close(a, c, atol=0.02, rtol=0)
    assert reader.body(small).shape == (3, 18, 3)
    with pytest.raises(TruePoseError, match=r"expected \[B, 3, H, W\]"):
        reader(torch.zeros(1, 48, 16, 12))


def test_blur_keeps_flat_pictures_and_the_mean():
    flat = torch.full((2, 3, 32, 24), 0.3)
    torch.testing.assert_close(blur(flat, torch.tensor([0.0, 3.0])), flat)
    spot = torch.zeros(1, 3, 33, 25)
    spot[:, :, 16, 12] = 1
    soft = blur(spot, torch.tensor([1.5]))
    torch.testing.assert_close(soft.sum((2, 3)), torch.ones(1, 3))
    xs = torch.arange(25) - 12
    assert (soft.sum(2) * xs.square()).sum(-1).mean().item() == pytest.approx(1.5**2, rel=0.05)
    assert torch.equal(blur(spot, torch.zeros(1)), spot)


def test_keypoints_move_with_the_picture():
    picture, body = torch.zeros(8, 3, 64, 48), torch.zeros(8, 18, 3)
    picture[:, :, 20:24, 12:16] = 1
    body[:, 0] = torch.tensor([14 / 48, 22 / 64, 1.0])
    moved, there = place(picture, body, torch.Generator().manual_seed(1))
    weight = moved[:, 0]
    centre = torch.stack(
        [
            (weight * (torch.arange(48) + 0.5)).sum((1, 2)) / 48,
            (weight * (torch.arange(64)[:, None] + 0.5)).sum((1, 2)) / 64,
        ],
        -1,
    )
    centre = centre / weight.sum((1, 2))[:, None]
    torch.testing.assert_close(there[:, 0, :2], centre, atol=0.012, rtol=0)
    assert not torch.allclose(there[:, 0], body[:, 0]) and (there[:, 1:] == 0).all()


def test_worse_pictures_depend_on_the_seed_alone():
    image = people().target.image
    a, b = (degrade(image, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and not torch.allclose(a, image)


def test_training_on_a_vaes_latents(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    vae.save_pretrained(tmp_path / "sd" / "vae")
    config = KeypointConfig(steps=1, batch=2, people=1, poses=2, fresh=0, vae=str(tmp_path / "sd"), widths=SMALL)
    weights = KeypointTrainer(config, tmp_path / "run", quiet=True).run()
    reader = load_predictor(weights)
    assert (reader.space, reader.channels) == ("vae", 4)
    energy = PoseEnergy(PoseField(16, 1), reader, LiftNet(16, 1))
    moved = field_step(energy, torch.randn(1, 4, 24, 16), FieldGuidance(), aspect=2 / 3, target=targets(1))
    assert moved.shape == (1, 4, 24, 16) and moved.abs().max() > 0


def test_a_predictors_run_that_was_stopped_ends_in_the_same_weights(tmp_path):
    config = KeypointConfig(steps=4, batch=2, people=3, poses=2, fresh=1, widths=SMALL)
    whole = KeypointTrainer(config, tmp_path / "whole", quiet=True)
    whole.run()
    first = KeypointTrainer(config, tmp_path / "broken", quiet=True)
    for _ in range(2):
        first._optimise()
    first.save()
    second = KeypointTrainer(config, tmp_path / "broken", quiet=True)
    second.run()
    for a, b in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["keypoints", "keypoints-judge"])
def test_the_shipped_predictors_find_joints(name):
    assert bundled_path(name).stat().st_size < 2e6
    reader = load_predictor(bundled_path(name))
    for size in ((64, 48), (128, 96)):
        pairs = split_pairs(48, size)
        with torch.no_grad():
            places, seen = reader(pairs.target.image * 2 - 1)
        found = measure_keypoints(places, pairs.target.keypoints, ASPECT)
        assert found["pck@0.2"].mean() > 0.8
        assert ((seen > 0) == (pairs.target.keypoints[..., 2] > 0)).float().mean() > 0.9


# ------------------------------------------------------------------------------------------------------ measured, told


def test_pck_counts_joints_that_lie_near_enough():
    truth = targets(1)
    shown = truth[..., 2] > 0
    exact = measure_keypoints(truth[..., :2], truth, ASPECT)
    assert exact["pck@0.1"].item() == 1 and exact["error"].item() == pytest.approx(0, abs=1e-7)
    off = truth[..., :2].clone()
    off[0, 2, 1] += 0.5
    found = measure_keypoints(off, truth, ASPECT)
    assert found["pck@0.2"].item() == pytest.approx(1 - 1 / shown.sum().item())
    assert found["error"].item() == pytest.approx(0.5 / shown.sum().item(), rel=1e-4)
    assert measure_keypoints(off, torch.zeros_like(truth), ASPECT)["pck@0.1"].isnan().all()


def test_extreme_poses_are_farther_from_standing_than_easy_ones():
    chosen = choose_pairs(8)
    assert len(chosen[EASY]) == len(chosen[EXTREME]) == 8
    assert not set(chosen[EASY].tolist()) & set(chosen[EXTREME].tolist())
    knees = [
        split_pairs(chosen[kind], (16, 12)).target.theta[:, (4, 5)].norm(dim=-1).mean() for kind in (EASY, EXTREME)
    ]
    assert knees[1] > knees[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--field-mu", "3"), "need --field-scale above 0"),
        (("--field-scale", "1", "--field-window", "0.8", "0.2"), "works from 0.8 to 0.2"),
        (("--field-scale", "1", "--field-predictor", "gone.safetensors"), "no model file at gone.safetensors"),
    ],
)
def test_wrong_options_of_transfer(tmp_path, capsys, options, message):
    from truepose_core.cli.demo import render_inputs
    from truepose_core.pictures.files import save_image

    for name, content in render_inputs().items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        else:
            save_image(content, tmp_path / name)
    words = ["transfer", str(tmp_path / "person.png"), "--parsing", str(tmp_path / "person-parsing.png")]
    words += ["--pose", str(tmp_path / "wave.json"), "--out", str(tmp_path / "out.png"), "--steps", "1", *options]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_the_command_measures_guidance(capsys, tmp_path):
    out = tmp_path / "guidance.json"
    words = ["eval", "--data", "mannequin", "--field-guidance", "--pairs", "2", "--steps", "1", "--field-scale", "20"]
    assert main([*words, "--report", str(out)]) == 0
    told = capsys.readouterr().out
    assert "Guidance of one picture takes" in told and "| scale 20, field alone |" in told
    report = json.loads(out.read_text())
    assert set(report["rows"]) == {"truth", "without", "scale 20", "scale 20, field alone"}
    assert report["step"]["seconds"] > 0 and report["step"]["kept_mib"] > 0
    assert report["options"]["scale 20"]["mu"] == FieldGuidance.mu
    for wrong, message in (
        (["--field-guidance", "--pairs", "1"], "expected at least 2 of each kind"),
        (["--field-guidance", "--model", "mine=x"], "unknown row 'mine' for --field-guidance"),
        (["--field-scale", "1"], "belong to --field-guidance"),
    ):
        assert main(["eval", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_standard_errors_are_those_of_the_pairs():
    base = {"x": torch.tensor([1.0, 2.0, 3.0, torch.nan])}
    found = summary({"x": base["x"] + torch.tensor([0.5, 0.5, 0.5, 0.0])}, base)
    assert found["x"] == pytest.approx(2.5) and found["x se"] == pytest.approx(0)
    assert summary(base, None)["x se"] == pytest.approx(1 / 3**0.5)
