"""The loop of the small networks: exact resume, strict files, and what the lifting and alignment trainers draw."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from truepose_core.alignment.recurrent import Aligned
from truepose_core.body.lift import LiftNet, lift_net
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import sample_identities, sample_poses
from truepose_core.mannequin.body import axis_angle_to_matrix
from truepose_core.mannequin.shifted import LIGHT as SHIFTED_LIGHT
from truepose_core.training import lift as lift_training
from truepose_core.training.alignment import (
    AlignBatch,
    AlignPool,
    AlignTrainer,
    AlignTrainingConfig,
    alignment_losses,
    endpoint_error,
    light_from_above,
    recolor,
)
from truepose_core.training.lift import LiftConfig, LiftTrainer, angles, draw_bodies, world_rotations
from truepose_core.weights.small import load_small, save_small
from truepose_core.weights.strict import read_metadata

TINY = LiftConfig(steps=6, batch=8, warmup=2, save_every=2, width=8, depth=1, hypotheses=2)


@pytest.fixture(autouse=True)
def _few_people(monkeypatch):
    calibrate = lift_training.calibrate
    monkeypatch.setattr(lift_training, "calibrate", lambda net, seed: calibrate(net, 16, seed))


def trained(folder, config=TINY):
    trainer = LiftTrainer(config, folder, quiet=True)
    return trainer, trainer.run()


class Stopped(LiftTrainer):
    """A run that is interrupted while it works out the loss of its fourth step."""

    def loss(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return super().loss(step)


# The loop


def test_a_run_that_was_stopped_ends_in_the_same_state_bit_for_bit(tmp_path):
    whole, weights = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Stopped(TINY, tmp_path / "broken", quiet=True).run()
    assert not (tmp_path / "broken" / "weights.safetensors").exists()
    resumed = LiftTrainer(TINY, tmp_path / "broken", quiet=True)
    assert resumed.step == 3
    again = resumed.run()
    moments = whole.optimizer.state_dict()["state"]
    assert moments.keys() == resumed.optimizer.state_dict()["state"].keys()
    for one, other in (
        (whole.net.state_dict(), resumed.net.state_dict()),
        (whole.average.state_dict(), resumed.average.state_dict()),
        (load_file(weights), load_file(again)),
        *((state, resumed.optimizer.state_dict()["state"][i]) for i, state in moments.items()),
    ):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def test_a_finished_run_is_not_trained_on(tmp_path):
    trainer, weights = trained(tmp_path)
    before = weights.read_bytes()
    again = LiftTrainer(TINY, tmp_path, quiet=True)
    assert again.step == TINY.steps
    assert load_file(again.run()).keys() == load_file(weights).keys()
    for name, value in trainer.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value)
    assert len(before) == weights.stat().st_size


def test_other_seeds_are_other_weights(tmp_path):
    one, other = trained(tmp_path / "a")[0], trained(tmp_path / "b", replace(TINY, seed=1))[0]
    assert not torch.equal(one.net.head.weight, other.net.head.weight)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 9}, "seed: 0 then, 9 now"),
        ({"learning_rate": 1e-4}, "learning_rate: 0.002 then, 0.0001 now"),
        ({"width": 16}, "width: 8 then, 16 now"),
        ({"steps": 7, "batch": 4}, "steps: 6 then, 7 now; batch: 8 then, 4 now"),
    ],
)
def test_other_settings_than_the_checkpoints_are_refused_by_name(tmp_path, changes, told):
    trained(tmp_path)
    with pytest.raises(TruePoseError, match=f"made with other settings .*{told}.*another --out"):
        LiftTrainer(replace(TINY, **changes), tmp_path, quiet=True)
    # How often it is saved makes no difference to the result.
    assert LiftTrainer(replace(TINY, save_every=1), tmp_path, quiet=True).step == 6


def test_a_checkpoint_that_is_none_or_is_cut_short_is_refused(tmp_path):
    trained(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TruePoseError, match="truncated"):
        LiftTrainer(TINY, tmp_path, quiet=True)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(TruePoseError, match=r"is no checkpoint of truepose train; delete that file.*use another --out"):
        LiftTrainer(TINY, tmp_path, quiet=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    trainer = LiftTrainer(TINY, tmp_path, quiet=True)
    monkeypatch.setattr(trainer, "loss", lambda step: (trainer.net.head.weight.sum() * torch.nan, {}))
    with pytest.raises(TruePoseError, match=r"the loss became nan at step 0; lower the learning rate \(now 0.002\)"):
        trainer.run()


def test_the_learning_rate_rises_and_falls_to_nothing(tmp_path):
    trainer = LiftTrainer(replace(TINY, steps=1000, warmup=100), tmp_path, quiet=True)
    rates = [trainer.learning_rate(step) for step in range(1000)]
    top = max(range(1000), key=rates.__getitem__)
    assert 90 <= top <= 100 and rates[top] <= TINY.learning_rate
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] < 0.02 * TINY.learning_rate and rates[-1] < 1e-4 * TINY.learning_rate


def test_the_log_tells_of_every_part_of_the_run(tmp_path):
    trained(tmp_path, replace(TINY, save_every=5))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"seconds", "loss", "first", "best", "angle"} <= line.keys() for line in lines)


# The file


def test_the_exported_file_loads_strictly_and_tells_its_story(tmp_path):
    trainer, weights = trained(tmp_path)
    net = lift_net(str(weights))
    assert net.sizes == {"width": 8, "depth": 1, "hypotheses": 2}
    for name, value in trainer.average.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name], value, atol=2e-3, rtol=2e-3)
    metadata = read_metadata(weights)
    story = json.loads(metadata["training"])
    assert (story["steps_done"], story["seed"], story["batch"]) == (6, 0, 8)
    assert metadata["architecture"] == "truepose-lift"
    assert all(x.dtype == torch.float16 for x in load_file(weights).values())


def test_loading_draws_no_random_numbers(tmp_path):
    net = LiftNet(8, 1, 1)
    path = save_small(net.state_dict(), tmp_path / "x.safetensors", "lift", net.sizes, {})
    state = torch.get_rng_state()
    load_small(path, "lift", LiftNet)
    assert torch.equal(torch.get_rng_state(), state)


def test_files_of_another_kind_are_refused(tmp_path):
    net = LiftNet(8, 1, 1)
    path = save_small(net.state_dict(), tmp_path / "x.safetensors", "lift", net.sizes, {})
    with pytest.raises(TruePoseError, match="truepose-lift; expected the weights of truepose train --row field"):
        load_small(path, "field", LiftNet)
    foreign = tmp_path / "y.safetensors"
    save_file(net.state_dict(), foreign)
    with pytest.raises(TruePoseError, match=r"holds another architecture; expected .* --row lift"):
        load_small(foreign, "lift", LiftNet)
    odd = save_small(net.state_dict(), tmp_path / "z.safetensors", "lift", {"breadth": 3}, {})
    with pytest.raises(TruePoseError, match=r"describes a network that cannot be built .*breadth"):
        load_small(odd, "lift", LiftNet)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:200])
    with pytest.raises(TruePoseError, match="truncated"):
        load_small(tmp_path / "cut.safetensors", "lift", LiftNet)


# What lifting is trained on


def test_without_a_generator_people_are_the_worlds_own():
    index = torch.arange(5)
    batch = draw_bodies(index, 3, None)
    assert torch.equal(batch.beta, sample_identities(index, 3).beta)
    local = axis_angle_to_matrix(sample_poses(index, 3).theta)
    assert torch.equal(batch.local, local)
    torch.testing.assert_close(world_rotations(local), batch.world)
    assert batch.points.shape == (5, 18, 3) and (batch.points[:, 1:14, 2] == 1).all()


def test_harder_people_keep_enough_keypoints_and_depend_on_the_generator_alone():
    index = torch.arange(400)

    def drawn(seed):
        return draw_bodies(index, 0, torch.Generator().manual_seed(seed))

    batch = drawn(0)
    assert torch.equal(batch.points, drawn(0).points) and not torch.equal(batch.points, drawn(1).points)
    plain = draw_bodies(index, 0, None)
    seen, all_ = batch.points[..., 2].sum(1), plain.points[..., 2].sum(1)
    assert seen.min() >= 6 and (seen < all_).float().mean() > 0.2
    assert not batch.points[batch.points[..., 2] == 0].any()
    assert not torch.equal(batch.beta, plain.beta)


def test_angles_between_rotations_are_in_radians():
    turn = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 3.0, 0]])
    torch.testing.assert_close(
        angles(torch.eye(3).expand(3, 3, 3), axis_angle_to_matrix(turn)),
        torch.tensor([0.0, 0.5, 3.0]),
        atol=1e-3,
        rtol=0,
    )


# What alignment is trained on

POOL = AlignTrainingConfig(height=32, width=24, people=4, poses=2, refill=2, batch=3)


def test_the_pool_of_a_step_depends_on_the_step_alone():
    """A pool that went on for three refills holds what one made at that step holds."""
    going = AlignPool(POOL, lift_net())
    first = going.tensors["image"].clone()
    for _ in range(6):
        going.advance()
    fresh = AlignPool(POOL, lift_net(), step=6)
    for name, value in fresh.tensors.items():
        assert torch.equal(going.tensors[name], value), name
    assert not torch.equal(first, fresh.tensors["image"])
    one, other = (pool.batch(torch.Generator().manual_seed(2)) for pool in (going, fresh))
    assert torch.equal(one.image, other.image) and torch.equal(one.true_grid, other.true_grid)


def test_a_batch_of_the_pool_is_pairs_of_one_person_each():
    batch = AlignPool(POOL, lift_net()).batch(torch.Generator().manual_seed(0))
    assert batch.image.shape == batch.truth.shape == (3, 3, 32, 24)
    assert torch.equal(batch.source.beta, batch.target.beta)
    assert (batch.source.theta - batch.target.theta).abs().amax((1, 2)).min() > 0.05
    assert (batch.true_seen <= batch.true_mask).all()
    torch.testing.assert_close(batch.truth_parsing.sum(1), torch.ones(3, 32, 24))
    person = batch.truth_parsing[:, 0] < 0.5
    assert ((batch.true_mask[:, 0] > 0) == person).float().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"poses": 1}, "needs 2 poses"), ({"people": 5}, "5 people cannot be replaced 2 at a time")],
)
def test_pools_that_make_no_pairs_are_refused(changes, message):
    with pytest.raises(TruePoseError, match=message):
        AlignPool(replace(POOL, **changes), lift_net())


def test_the_endpoint_error_is_in_pixels_and_flow_makes_up_for_it():
    true = torch.rand(2, 40, 30, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    off = true.clone()
    off[..., 0] += 2 * 3 / 30
    off[..., 1] -= 2 * 4 / 40
    flow = torch.zeros(2, 2, 40, 30)
    torch.testing.assert_close(endpoint_error(off, flow, true), torch.full((2, 1, 40, 30), 5.0))
    flow[:, 0], flow[:, 1] = -3 / 40, 4 / 40
    assert endpoint_error(off, flow, true).max() < 1e-3


def test_the_loss_of_the_truth_is_the_smallest():
    pool = AlignPool(POOL, lift_net())
    batch: AlignBatch = pool.batch(torch.Generator().manual_seed(0))
    sure = torch.zeros(3, 5, 32, 24)
    sure[:, 0], sure[:, -1] = batch.true_seen[:, 0], 1 - batch.true_seen[:, 0]
    logits = batch.truth_parsing.clamp(min=1e-4).log()
    flow = torch.zeros(3, 2, 32, 24)
    right = Aligned(
        picture=batch.truth,
        weights=sure,
        gain=torch.ones_like(sure),
        residual=torch.zeros_like(batch.truth),
        parsing=batch.parsing,
        grid=batch.true_grid,
        flow=flow,
        looked_up=batch.true_grid,
        state=flow,
        log_parsing=logits,
    )
    best, parts = alignment_losses(right, batch)
    assert parts["picture"] == 0 and parts["pixels"] < 1e-3 and parts["seen"] < 1e-3
    for wrong in (
        replace(right, picture=batch.image),
        replace(right, log_parsing=-logits),
        replace(right, flow=flow + 0.03),
        replace(right, weights=sure.flip(1)),
    ):
        assert alignment_losses(wrong, batch)[0] > best + 0.01


def test_lights_of_people_come_from_above_as_no_shifted_one_does():
    generator = torch.Generator().manual_seed(0)
    lights = torch.tensor([light_from_above(generator) for _ in range(500)])
    heights = lights[:, 1] / lights.norm(dim=1)
    shifted = torch.tensor(SHIFTED_LIGHT)
    assert heights.min() > shifted[1] / shifted.norm() + 0.05 and (lights[:, 2] > 0).all()
    assert lights[:, 0].min() < -0.7 and lights[:, 0].max() > 0.7


def test_new_colours_are_the_same_on_both_sides_of_a_pair():
    images = torch.rand((8, 1, 3, 6, 4)).expand(-1, 2, -1, -1, -1)
    none, some, every = (recolor(images, share, torch.Generator().manual_seed(3)) for share in (0.0, 0.5, 1.0))
    assert torch.equal(none, images)
    assert torch.allclose(every[:, 0], every[:, 1], atol=1e-6) and every.min() >= 0 and every.max() <= 1
    changed = (some != images).flatten(1).any(1)
    assert 0 < changed.sum() < 8 and torch.equal(some[changed], every[changed]), "the share changes no draw"


def test_mixed_precision_is_near_to_single_on_one_step_and_on_two(tmp_path):
    config = AlignTrainingConfig(height=32, width=24, people=4, poses=2, refill=2, batch=4, channels=16, steps=2)
    for longer in (0.0, 1.0):
        losses = []
        for precision in ("no", "bf16"):
            run = AlignTrainer(
                replace(config, longer=longer, precision=precision), tmp_path / f"{precision}{longer}", quiet=True
            )
            loss, _ = run.loss(0)
            loss.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in run.net.parameters())
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
