"""Laws of training: what a run sees is fixed by its configuration, and stopping it in the middle changes nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from cli.test_folder import make_folder
from safetensors.torch import load_file, save_file
from torch.nn.functional import one_hot

from truepose_core.errors import TruePoseError
from truepose_core.models.config import large_config, mannequin_config
from truepose_core.models.processors import attention_sites
from truepose_core.models.store import load_model
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region
from truepose_core.training import train
from truepose_core.training.data import MannequinPool
from truepose_core.training.train import (
    REGION_LOSS,
    Trainer,
    TrainingConfig,
    alignment_loss,
    draw_dropout,
    draw_timesteps,
    region_loss_weight,
    uninterrupted,
)
from truepose_core.weights.strict import read_metadata

TINY = replace(mannequin_config("hpfa", caa=True, widths=(32, 32), aligned=True), size=(32, 24))
CONFIG = dict(
    row="tiny", steps=6, sources=2, targets=1, warmup=2, people=4, poses=2, fresh=1, sample_every=1000, save_every=1000
)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """accelerate on the CPU, whatever the machine has, and a row that trains in moments."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(train.ROWS, "tiny", lambda: TINY)
    for kind in ("epsilon", "v_prediction"):
        monkeypatch.setitem(
            train.ROWS, kind, lambda kind=kind: replace(TINY, prediction_type=kind, caa=None, aligned=False)
        )
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(out, **changes):
    return Trainer(TrainingConfig(**CONFIG | changes), out, quiet=True)


def checkpoint(run):
    return load_file(run.out / "checkpoint" / "state.safetensors")


def assert_same(one, two):
    assert set(one) == set(two)
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different, different[:5]


def pool(step=0, **other):
    return MannequinPool(**dict(people=4, poses=3, size=(16, 12), seed=3, fresh=1, step=step) | other)


@pytest.mark.parametrize("fresh", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_pool_made_at_a_step_is_one_that_went_there(fresh, steps):
    walked, made = pool(fresh=fresh), pool(fresh=fresh, step=steps)
    for _ in range(steps):
        walked.advance()
    assert torch.equal(walked.person, made.person) and walked.step == made.step
    assert_same(vars_of(walked.batch(2, 2)), vars_of(made.batch(2, 2)))
    for name in ("image", "parsing", "body"):
        assert torch.equal(getattr(walked, name), getattr(made, name)), name


def vars_of(batch):
    found = {k: v.masks if isinstance(v, HumanParsing) else v for k, v in vars(batch).items() if v is not None}
    for name in ("source_pose", "target_pose"):
        found |= {f"{name}.{k}": v for k, v in vars(found.pop(name)).items()}
    return found


def test_the_oldest_people_are_replaced_and_nobody_comes_twice():
    walked = pool(fresh=3)
    seen = set(walked.person.tolist())
    for _ in range(5):
        before = walked.person.clone()
        walked.advance()
        gone = before[before != walked.person]
        assert sorted(gone.tolist()) == sorted(before.tolist())[:3]
        new = set(walked.person.tolist()) - set(before.tolist())
        assert len(new) == 3 and not new & seen
        seen |= new


def test_a_batch_shows_each_source_in_other_poses():
    p = pool()
    batch = p.batch(5, 2)
    flat = p.image.flatten(0, 1).float() / 255

    def where(images):
        """(person, pose) of each picture."""
        index = (flat[None] - images[:, None]).abs().flatten(2).amax(-1).argmin(1)
        return index // p.poses, index % p.poses

    person, pose = where(batch.source_image)
    target_person, target_pose = where(batch.target_image)
    assert torch.equal(target_person, person.repeat_interleave(2))
    poses = torch.cat([pose[:, None], target_pose.unflatten(0, (5, 2))], 1)
    assert all(len(set(row)) == 3 for row in poses.tolist()), "one source and two other poses"
    assert torch.equal(batch.target_body, p.body[target_person, target_pose])
    assert (batch.target_parsing.masks - p.parsing[target_person, target_pose].float() / 255).abs().max() < 2e-2


def test_processes_see_different_batches_of_one_pool():
    one, two = (pool().batch(4, 1, rank) for rank in (0, 1))
    assert not torch.equal(one.source_image, two.source_image)


def test_too_few_poses_are_refused():
    with pytest.raises(TruePoseError, match=r"2 poses.*got 1"):
        pool(poses=1)
    with pytest.raises(TruePoseError, match=r"3 targets from 3 poses.*1 to 2"):
        pool(poses=3).batch(2, 3)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_timesteps_are_in_range_with_density_by_power(power):
    steps = draw_timesteps(20_000, 1000, power, torch.Generator().manual_seed(0))
    assert steps.dtype == torch.int64 and steps.min() >= 0 and steps.max() <= 999
    for share in (0.1, 0.5, 0.9):
        # P(t < share T) = share^(1 / power)
        assert float((steps < share * 1000).float().mean()) == pytest.approx(share ** (1 / power), abs=0.015)


def test_the_pose_is_dropped_with_the_source_only():
    keep_source, keep_pose = draw_dropout(20_000, 0.1, 0.05, torch.Generator().manual_seed(0))
    assert not (keep_source & ~keep_pose).any()
    assert float((~keep_source).float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((~keep_pose).float().mean()) == pytest.approx(0.05, abs=0.01)
    always = draw_dropout(100, 0.0, 0.0, torch.Generator())
    assert always[0].all() and always[1].all()


def test_region_weights_of_the_loss_have_mean_1_and_keep_their_ratios():
    weight = region_loss_weight(torch.rand(3, 7, 8, 6).softmax(1))
    assert weight.shape == (3, 1, 8, 6)
    assert (weight.mean((1, 2, 3)) - 1).abs().max() < 1e-6
    labels = torch.arange(7).repeat(1, 4, 1)
    flat = region_loss_weight(one_hot(labels, 7).permute(0, 3, 1, 2).float())[0, 0, 0]
    for region in Region:
        assert float(flat[region] / flat[0]) == pytest.approx(REGION_LOSS[region] / REGION_LOSS[Region.BACKGROUND])


def test_alignment_loss_is_a_cross_entropy_over_rows_that_see_the_source():
    labels = torch.randint(0, 7, (2, 8, 6), generator=torch.Generator().manual_seed(0))
    target = HumanParsing.from_labels(labels)
    perfect = {"fine": target.tokens(8, 6)}
    keep = torch.tensor([True, True])
    assert alignment_loss(perfect, target, (8, 6), keep) == 0
    uniform = {"fine": torch.full((2, 48, 7), 1 / 7), "coarse": torch.full((2, 12, 7), 1 / 7)}
    assert float(alignment_loss(uniform, target, (8, 6), keep)) == pytest.approx(math.log(7), abs=1e-5)
    half = {"fine": torch.stack([perfect["fine"][0], uniform["fine"][1]])}
    assert alignment_loss(half, target, (8, 6), torch.tensor([True, False])) == 0
    assert float(alignment_loss(half, target, (8, 6), keep)) == pytest.approx(math.log(7) / 2, abs=1e-5)
    wrong = {"fine": target.tokens(8, 6).roll(1, -1)}
    assert alignment_loss(wrong, target, (8, 6), keep).isfinite()
    assert alignment_loss(half, target, (8, 6), ~keep) == 0
    assert alignment_loss({}, target, (8, 6), keep) == 0


def test_the_same_configuration_gives_the_same_loss(tmp_path):
    one, two = trainer(tmp_path / "one"), trainer(tmp_path / "two")
    for step in range(2):
        a, b = (t.loss(t.pool.batch(2, 1), step) for t in (one, two))
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
        one.pool.advance(), two.pool.advance()
    other = trainer(tmp_path / "three", seed=1)
    assert other.loss(other.pool.batch(2, 1), 0)[1] != one.loss(one.pool.batch(2, 1), 0)[1]


def perfect_but_for(run, delta):
    """Replace the net by one whose x0 is the truth plus delta, said in the run's own prediction type."""
    batch = run.pool.batch(2, 1)
    seen = {}

    def net(*args):
        noisy, steps = args[3], args[4]
        alpha = run.scheduler.alphas_cumprod[steps][:, None, None, None]
        clean = run.model.codec.encode(batch.target_image)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        x0 = clean + delta
        eps = (noisy - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
        seen.update(snr=alpha.flatten() / (1 - alpha.flatten()), noise=noise)
        return {"sample": x0, "epsilon": eps, "v_prediction": v}[run.model.config.prediction_type], {}, None

    run.net = net
    return run.loss(batch, 0)[0].double(), seen["snr"].double()


@pytest.mark.parametrize("row", ["tiny", "epsilon", "v_prediction"])
def test_all_predictions_are_judged_by_their_x0(tmp_path, row):
    """min-SNR-5: for the same error of x0 the epsilon and the v loss are both min(snr, 5) times the plain one."""
    run = trainer(tmp_path, row=row)
    assert perfect_but_for(run, 0.0)[0] < 1e-6
    loss, snr = perfect_but_for(run, 0.1)
    factor = 1.0 if row == "tiny" else float(snr.clamp(max=5).mean())
    assert float(loss) == pytest.approx(0.01 * factor, rel=1e-3), "region weights have mean 1"


def test_the_learning_rate_rises_stays_and_falls_to_zero(tmp_path):
    run = trainer(tmp_path, steps=100, warmup=10, decay=0.2, learning_rate=1.0)
    rates = [run.learning_rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(21)])
    assert run.learning_rate(0) > 0
    run.config = replace(run.config, warmup=0, decay=0.0)
    assert [run.learning_rate(step) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


def test_a_run_that_is_stopped_and_resumed_ends_as_an_unbroken_one(tmp_path):
    """The stop is a real Ctrl-C in the middle of an update: weights, averages and count still belong together."""
    straight = trainer(tmp_path / "straight")
    weights = straight.run()
    broken = trainer(tmp_path / "broken")
    step = broken.ema.step

    def interrupted(parameters):
        if broken.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        step(parameters)

    broken.ema.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert broken.step == 3
    assert not (tmp_path / "broken" / "weights.safetensors").exists()
    resumed = trainer(tmp_path / "broken")
    assert resumed.step == resumed.pool.step == 3
    resumed.run()
    assert_same(checkpoint(straight), checkpoint(resumed))
    assert_same(load_file(weights), load_file(tmp_path / "broken" / "weights.safetensors"))
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in checkpoint(straight))


def test_ctrl_c_during_the_loss_leaves_the_step_before(tmp_path):
    run = trainer(tmp_path)
    loss = run.loss

    def interrupted(batch, step):
        if step == 2:
            raise KeyboardInterrupt
        return loss(batch, step)

    run.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.run()
    resumed = trainer(tmp_path)
    assert resumed.step == 2
    assert_same(dict(resumed.model.state_dict()), dict(run.model.state_dict()))
    for one, two in zip(resumed.ema.shadow_params, run.ema.shadow_params, strict=True):
        assert torch.equal(one, two)


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("all of it")
    assert done
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_cannot_shield_themselves_and_need_not():
    done = []

    def work():
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    run = trainer(tmp_path)
    run.save()
    with pytest.raises(TruePoseError, match=r"seed: 0 then, 1 now.*--out") as error:
        trainer(tmp_path, seed=1, learning_rate=0.5)
    assert "learning_rate: 0.001 then, 0.5 now" in str(error.value) and "people" not in str(error.value)
    more = trainer(tmp_path, steps=60, keep=(3,), sample_every=7, save_every=9)
    assert more.step == 0


def test_a_checkpoint_from_before_a_setting_existed_goes_on(tmp_path):
    run = trainer(tmp_path)
    run.save()
    path = tmp_path / "checkpoint" / "state.safetensors"
    story = json.loads(read_metadata(path)["story"])
    del story["config"]["gradient_checkpointing"], story["config"]["clip"]
    save_file(load_file(path), path, {"story": json.dumps(story)})
    assert trainer(tmp_path).step == 0
    with pytest.raises(TruePoseError, match=r"clip: 1.0 then, 2.0 now"):
        trainer(tmp_path, clip=2.0)


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(TruePoseError, match=r"'tony'.*HPFA\+CAA"):
        TrainingConfig(row="tony")
    with pytest.raises(TruePoseError, match=r"height is 512 and width 0"):
        TrainingConfig(height=512)


def test_aligned_tokens_are_a_setting_of_any_row_that_reads_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(train.ROWS, "reader", lambda: large_config("concat", False, (16, 32)))
    path = trainer(tmp_path / "run", row="reader", steps=1, aligned_tokens=True).run()
    assert load_model(path).config.aligned_tokens
    with pytest.raises(TruePoseError, match="aligned tokens stand beside"):
        TrainingConfig(row="tiny", aligned_tokens=True).build()
    folder = make_folder(tmp_path / "base", "sd15")
    base = TrainingConfig(row="reader", base=str(folder), height=64, width=48, aligned_tokens=True).build()
    assert base.config.aligned_tokens and base.config.family == "sd15"


def test_a_run_goes_on_from_the_weights_of_another(tmp_path):
    first = trainer(tmp_path / "one", steps=1).run()
    more = trainer(tmp_path / "two", start=str(first), seed=5, height=64, width=48)
    assert more.step == 0 and more.model.config.size == (64, 48) and more.model.training
    for name, weight in load_model(first).state_dict().items():
        assert torch.equal(more.model.state_dict()[name], weight), name
    told = json.loads(read_metadata(more.export(tmp_path / "made.safetensors"))["training"])
    assert told["start"] == "weights.safetensors", "no file says where its maker's folders are"
    with pytest.raises(TruePoseError, match="is no model of row epsilon"):
        TrainingConfig(row="epsilon", start=str(first)).build()
    with pytest.raises(TruePoseError, match="both say where the weights come from"):
        TrainingConfig(row="tiny", start=str(first), base="folder").build()


def test_exported_weights_are_the_averaged_ones_and_load(tmp_path):
    run = trainer(tmp_path, steps=2, keep=(1,))
    path = run.run()
    model = load_model(path, verify=True)
    assert not model.training and model.config.size == TINY.size
    averaged = dict(zip([n for n, _ in run.model.named_parameters()], run.ema.shadow_params, strict=True))
    for name, p in model.named_parameters():
        assert torch.equal(p, averaged[name].half().float()), name
    assert any(not torch.equal(p, averaged[n]) for n, p in run.model.named_parameters()), "not the last ones"
    assert '"steps_done": 2' in read_metadata(path)["training"]
    assert load_model(tmp_path / "weights-1.safetensors") is not None
    assert run.model.training, "training goes on with a model in training mode"


def gradients(run, accumulate=1):
    """Gradients of the mean loss of the next batches, computed without accelerate: {name: tensor or None}."""
    run.model.zero_grad()
    for i in range(accumulate):
        run.loss(run.pool.batch(2, 1), i)[0].div(accumulate).backward()
        run.pool.advance()
    found = {n: None if p.grad is None else p.grad.clone() for n, p in run.model.named_parameters()}
    run.model.zero_grad()
    return found


def test_every_weight_that_can_matter_has_a_gradient(tmp_path):
    """SourceNet is read at its self-attentions: what it computes behind the last one has none, nor has CLIP's pooled
    projection, nor kappa where no prior is known. Everything else must."""
    run = trainer(tmp_path)
    without = [name for name, gradient in gradients(run).items() if gradient is None]
    last = list(attention_sites(run.model.source_net))[-1]
    order = [f"source_net.{name}" for name, _ in run.model.source_net.named_parameters()]
    behind = {"source_net.conv_out.", "source_net.conv_norm_out.", f"source_net.{last}."}
    parent = last.split(".transformer_blocks")[0]
    behind |= {f"source_net.{parent}.proj_out.", f"caa.source_sites.{last.replace('.', '_')}."}
    behind |= {"caa.vision.proj"}
    kappa = {f"caa.source_sites.{key}.kappa" for key in run.model.caa.source_sites}
    unexplained = [name for name in without if not name.startswith(tuple(behind)) and name not in kappa]
    assert not unexplained
    assert 0 < len([name for name in without if name in order]) < 0.2 * len(order)
    assert f"source_net.{last}.norm1.weight" not in without, "the site's own input is read"


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """SourceNet's sites and CAA's alignments are read from inside the blocks that are computed twice."""
    plain, thrifty = (
        gradients(trainer(tmp_path / str(on), gradient_checkpointing=on, alignment=1.0)) for on in (False, True)
    )
    for name, gradient in plain.items():
        assert (gradient is None) == (thrifty[name] is None), name
        if gradient is not None:
            assert (gradient - thrifty[name]).abs().max() <= 1e-6 * max(1.0, gradient.abs().max().item()), name


def test_accumulated_batches_are_one_step_on_their_mean(tmp_path):
    reference = gradients(trainer(tmp_path / "reference"), accumulate=2)
    run = trainer(tmp_path / "run", accumulate=2, clip=1e9)
    seen, step = {}, run.optimizer.step

    def look(*args, **kwargs):
        seen.update({n: None if p.grad is None else p.grad.clone() for n, p in run.model.named_parameters()})
        return step(*args, **kwargs)

    run.optimizer.step = look
    run._optimise()
    assert run.step == 1 and run.pool.step == 2
    for name, gradient in reference.items():
        assert (gradient is None) == (seen[name] is None), name
        if gradient is not None:
            assert (gradient - seen[name]).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name


def test_bfloat16_runs_and_keeps_float32_weights(tmp_path):
    exact = trainer(tmp_path / "exact")
    expected, _ = exact.loss(exact.pool.batch(2, 1), 0)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    run = trainer(tmp_path / "half", precision="bf16")
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    loss, _ = run.loss(run.pool.batch(2, 1), 0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05) and loss.item() != expected.item()
    figures = run._optimise()
    assert all(math.isfinite(x) for x in figures.values())
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert any(not torch.equal(p, before[n]) for n, p in run.model.named_parameters())


@pytest.mark.parametrize("bad", [0, 1])
def test_a_loss_that_is_not_a_number_stops_before_the_weights_change(tmp_path, bad):
    run = trainer(tmp_path, accumulate=2)
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    loss = run.loss

    def broken(batch, step):
        value, figures = loss(batch, step)
        return (value * math.nan if step == bad else value), figures

    run.loss = broken
    with pytest.raises(TruePoseError, match="the loss became nan at step 0; lower the learning rate"):
        run._optimise()
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    assert run.step == 0


def test_rendering_the_people_shows_a_bar(capsys):
    MannequinPool(2, 2, (16, 16), quiet=False)
    assert "rendering people" in capsys.readouterr().err
    MannequinPool(2, 2, (16, 16))
    assert capsys.readouterr().err == ""
