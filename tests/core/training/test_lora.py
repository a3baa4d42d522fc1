"""LoRA-only training: the nets stay, the updates learn, and the finished file is a usual model."""

from __future__ import annotations

import pytest
import torch
from training.test_train import CONFIG, cpu, trainer  # noqa: F401

from truepose_core.cli import main
from truepose_core.models.store import load_model

pytest.importorskip("peft", reason="peft is not installed")


def test_the_nets_stay_and_their_updates_learn(tmp_path):
    run = trainer(tmp_path, lora=2, steps=2, keep=())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    learns = {name for name, p in run.model.named_parameters() if p.requires_grad}
    in_nets = {name for name in before if name.startswith(("source_net.", "target_net."))}
    assert {name for name in learns & in_nets if "lora_" not in name} == set()
    assert any("lora_" in name for name in learns & in_nets) and learns - in_nets
    run.run()
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= learns
    assert any("lora_B" in name for name in changed)


def test_the_finished_file_is_the_averaged_model(tmp_path):
    run = trainer(tmp_path, lora=2, steps=2)
    plain = trainer(tmp_path / "plain", steps=2).averaged()
    path = run.run()
    averaged = run.averaged()
    assert averaged.state_dict().keys() == plain.state_dict().keys()
    loaded = load_model(path).state_dict()
    for name, value in averaged.state_dict().items():
        assert torch.allclose(value.half().float(), loaded[name].float(), atol=1e-6), name
    # The updates are in the weights: merged, a projection is what base and update make together.
    name = next(n for n, m in run.model.target_net.named_modules() if n.endswith("attn1.to_q"))
    layer = run.model.target_net.get_submodule(name)
    run.ema.copy_to(p for p in run.model.parameters() if p.requires_grad)
    x = torch.randn(3, layer.in_features)
    merged = averaged.target_net.get_submodule(name)
    assert torch.allclose(layer(x), merged(x), atol=1e-5)
    assert not torch.equal(merged.weight, layer.get_base_layer().weight)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "whole", lora=2, steps=4)
    whole.run()
    stopped = trainer(tmp_path / "parts", lora=2, steps=4)
    stopped._optimise()
    stopped._optimise()
    stopped.save()
    again = trainer(tmp_path / "parts", lora=2, steps=4)
    assert again.step == 2
    again.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path, capsys):
    run = trainer(tmp_path, lora=2, steps=1)
    run.run()
    argv = ["train", "--out", str(tmp_path), "--row", "tiny", "--lora", "4", "--steps", "1", "--quiet"]
    for name in ("sources", "targets", "warmup", "people", "poses", "fresh", "sample_every", "save_every"):
        argv += ["--" + name.replace("_", "-"), str(CONFIG[name])]
    assert main(argv) == 2
    assert "lora: 2 then, 4 now" in capsys.readouterr().err
