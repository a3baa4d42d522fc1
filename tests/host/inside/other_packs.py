"""HPFA beside other packs, which are not part of this one: clones in the folder that $TRUEPOSE_OTHER_PACKS names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from bench import GREY, apply, close, far, latent, model, parsing, reference, sample, source, split
from conftest import load_package
from fixtures.tiny import CONTEXT, make_conditioning
from pack.nodes.host import unet as host_unet
from patching import log_weight, unet

FOLDER = os.environ.get("TRUEPOSE_OTHER_PACKS", "")
SIZE = {"height": 16, "width": 16}


def load(name: str) -> object:
    """A pack by the name of its repository; the tests that want it are skipped where it is not there."""
    folder = Path(FOLDER, name)
    if not FOLDER or not folder.is_dir():
        pytest.skip(f"{name} is not in the folder that TRUEPOSE_OTHER_PACKS names ({FOLDER or 'it names none'})")
    return load_package(name.lower().replace("-", "_"), folder)


class TestAdvancedControlNet:
    """Its reference calls a block's attention twice: for all rows, and for the negative ones alone."""

    @pytest.fixture(autouse=True, scope="class")
    def pack(self) -> None:
        load("ComfyUI-Advanced-ControlNet")

    def prompts(self, fidelity: float) -> tuple[list, list]:
        from comfyui_advanced_controlnet.adv_control import control_reference
        from comfyui_advanced_controlnet.adv_control.nodes_main import AdvancedControlNetApply

        options = control_reference.ReferenceOptions.create_combo("reference_attn", fidelity, 1.0)
        net = control_reference.ReferenceAdvanced(ref_opts=options, timestep_keyframes=None)
        picture = control_reference.ReferencePreprocWrapper(condhint=latent(77, **SIZE))
        more = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        prompts = make_conditioning(1), make_conditioning(2)
        return AdvancedControlNetApply.execute(*prompts, net, picture, **more).args[:2]

    def split(self, who: object, fidelity: float | None, batch: int = 1, **more: object) -> tuple:
        """(positive, negative) of one call beside its reference, or without it."""
        torch.manual_seed(0)  # it draws the reference's noise from the global generator
        conds = None if fidelity is None else self.prompts(fidelity)
        return split(who, latent(9, batch, **SIZE), conds=conds, **more)

    @pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("apart", [False, True])
    def test_dropped_negative_rows_are_those_of_its_node_alone(self, fidelity: float, apart: bool) -> None:
        alone = self.split(model(), fidelity, apart=apart)
        ours = self.split(apply(model(), source(**SIZE), GREY, keep_unconditional=False), fidelity, apart=apart)
        assert close(ours[1], alone[1])
        assert far(ours[0], alone[0])

    @pytest.mark.parametrize("sources", [1, 2])
    def test_kept_negative_rows_see_their_own_source(self, sources: int) -> None:
        """At style fidelity 1 its negative rows are those without it."""
        more = {"beta": 2.0, "target": parsing(7, sources, 128, 128)}
        patched = apply(model(), source(1, sources, **SIZE), GREY, **more)
        alone = self.split(patched, None, batch=2)
        both = self.split(patched, 1.0, batch=2)
        assert far(alone[1], self.split(model(), None, batch=2)[1])
        assert close(both[1], alone[1])
        assert far(both[0], alone[0])

    @pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0])
    def test_the_reference_of_the_tests_under_it(self, fidelity: float) -> None:
        ours = self.split(apply(model(), source(**SIZE), GREY), fidelity)
        with reference(unet(), [source(**SIZE)], log_weight(GREY)):
            theirs = self.split(model(), fidelity)
        assert all(close(a, b, 1e-4) for a, b in zip(ours, theirs, strict=True))

    def test_nobody_is_blamed(self, caplog: pytest.LogCaptureFixture) -> None:
        host_unet.say_once.cache_clear()
        target = parsing(7, 1, 128, 128)
        self.split(apply(model(), source(**SIZE), GREY, beta=2.0, target=target), 1.0)
        assert "truepose" not in {record.name for record in caplog.records}

    def test_five_runs_are_one_and_nothing_stays(self) -> None:
        patched = apply(model(), source(**SIZE), GREY, keep_unconditional=False)
        before = self.split(model(), None)
        runs = [self.split(patched, 0.5) for _ in range(5)]
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(self.split(model(), None), before, strict=True))


class TestIPAdapterPlus:
    """It replaces the cross-attentions of a clone; HPFA is in the self-attentions."""

    WIDTHS = (32, 32, 64, 64, 128, 128, *(128,) * 3, *(64,) * 3, *(32,) * 3, 128)
    """Of the tiny model's cross-attentions: input, output and middle blocks, as its files number them."""
    EMBEDDING = 40

    @pytest.fixture(autouse=True, scope="class")
    def pack(self) -> None:
        load("ComfyUI_IPAdapter_plus")

    def adapter(self) -> dict[str, dict]:
        """A plain IP-Adapter with random weights, as its loader gives it."""
        random = torch.Generator().manual_seed(3)
        image = {
            "proj.weight": torch.randn((4 * CONTEXT, self.EMBEDDING), generator=random) / self.EMBEDDING**0.5,
            "proj.bias": torch.zeros(4 * CONTEXT),
            "norm.weight": torch.ones(CONTEXT),
            "norm.bias": torch.zeros(CONTEXT),
        }
        layers = {
            f"{2 * number + 1}.to_{part}_ip.weight": torch.randn((width, CONTEXT), generator=random) / CONTEXT**0.5
            for number, width in enumerate(self.WIDTHS)
            for part in "kv"
        }
        return {"image_proj": image, "ip_adapter": layers}

    def after(self, who: object, weight: float = 1.0) -> object:
        """Its node after a model."""
        from comfyui_ipadapter_plus.IPAdapterPlus import IPAdapterEmbeds

        seen = torch.randn((1, self.EMBEDDING), generator=torch.Generator().manual_seed(4))
        nothing = torch.zeros_like(seen)
        return IPAdapterEmbeds().apply_ipadapter(who, self.adapter(), seen, weight, "linear", 0.0, 1.0, nothing)[0]

    @pytest.mark.parametrize("more", [{}, {"keep_unconditional": False}, {"beta": 2.0}], ids=["keep", "drop", "match"])
    def test_both_orders_are_bit_equal(self, more: dict) -> None:
        if "beta" in more:
            more = more | {"target": parsing(7)}
        first = sample(self.after(apply(model(), source(), GREY, **more)))
        second = sample(apply(self.after(model()), source(), GREY, **more))
        assert torch.equal(first, second)
        assert far(first, sample(self.after(model()))) and far(first, sample(apply(model(), source(), GREY, **more)))

    def test_dropped_negative_rows_are_those_of_its_node_alone(self) -> None:
        alone = split(self.after(model()), latent(9))
        both = split(apply(self.after(model()), source(), GREY, keep_unconditional=False), latent(9))
        assert close(both[1], alone[1]) and far(both[0], alone[0])

    def test_two_of_its_nodes_around_ours(self) -> None:
        """The second adds itself to the first's replacement."""
        around = sample(self.after(apply(self.after(model()), source(), GREY), 0.5))
        behind = sample(self.after(self.after(apply(model(), source(), GREY)), 0.5))
        assert torch.equal(around, behind)

    def test_a_source_read_through_it_is_read_with_it(self) -> None:
        plain, read = source(), source(who=self.after(model()))
        assert any(far(read.sites[site], plain.sites[site]) for site in plain.sites)

    def test_five_runs_are_one_and_nothing_stays(self) -> None:
        before = sample(model())
        runs = [sample(self.after(apply(model(), source(), GREY))) for _ in range(5)]
        assert all(torch.equal(run, runs[0]) for run in runs)
        queued = apply(self.after(model()), source(), GREY)
        assert all(torch.equal(sample(queued), runs[0]) for _ in range(5))
        assert torch.equal(sample(model()), before)
