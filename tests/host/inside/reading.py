"""SourceNet's one pass equals a direct forward pass over the clean latent."""

from __future__ import annotations

import pytest
import torch
from bench import latent, model, parsing, sample, source
from fixtures.tiny import make_conditioning, make_model
from pack.nodes.host import applied as host_applied
from pack.nodes.host import patch as host_patch
from pack.nodes.host import source as host_source
from pack.nodes.host import unet as host_unet

from truepose_core.errors import TruePoseError


def direct(who: object, x: torch.Tensor, tokens: torch.Tensor, **more: object) -> dict[str, torch.Tensor]:
    """norm1's outputs in a plain call of the UNet at timestep 0."""
    unet, out, hooks = who.model.diffusion_model, {}, []
    for site, _ in host_unet.self_attentions(unet).items():
        part, number, index = site.split(".")
        layers = {"input": unet.input_blocks, "output": unet.output_blocks}
        layer = unet.middle_block if part == "middle" else layers[part][int(number)]
        spatial = next(m for m in layer if hasattr(m, "transformer_blocks"))
        norm = spatial.transformer_blocks[int(index)].norm1
        hooks.append(norm.register_forward_hook(lambda m, i, o, site=site: out.__setitem__(site, o.clone())))
    try:
        unet(x, torch.zeros(x.shape[0]), context=tokens, transformer_options={}, **more)
    finally:
        for hook in hooks:
            hook.remove()
    return out


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 12, 8), (2, 13, 7), (1, 9, 17)])
def test_one_pass_is_the_clean_forward_pass(batch: int, height: int, width: int) -> None:
    who, x = model(), latent(3, batch, height, width)
    cond = make_conditioning(5)
    image = parsing(0, batch, height * 8 // 16 * 16, width * 8 // 16 * 16)
    features = host_source.read_source(who, x, image, cond)
    scaled = who.model.process_latent_in(x)
    expected = direct(who, scaled, cond[0][0].expand(batch, -1, -1))
    assert list(features.sites) == list(expected) == list(host_unet.self_attentions(who.model.diffusion_model))
    for site, tokens in expected.items():
        assert torch.equal(features.sites[site], tokens), site
    assert features.sites["input.1.0"].device.type == "cpu"
    assert features.latent_size == (height, width)
    assert features.get_ram_usage() >= features.nbytes > 0


def test_sdxl_shape_has_all_sites() -> None:
    who = make_model(0, "SDXL")
    features = source(1, who=who)
    assert len(features.sites) == len(host_unet.self_attentions(who.model.diffusion_model)) == 2 + 2 + 3 + 3 + 3 + 15
    assert features.family == "sdxl" or features.family.startswith("sdxl")


def test_inpainting_model_is_told_nothing_is_masked() -> None:
    who, x = model(0, channels=9), latent(3)
    features = host_source.read_source(who, x, parsing(), make_conditioning(5))
    scaled = who.model.process_latent_in(x)
    given = torch.cat([scaled, torch.zeros_like(x[:, :1]), scaled], 1)
    expected = direct(who, given, make_conditioning(5)[0][0])
    assert all(torch.equal(features.sites[s], t) for s, t in expected.items())


def test_areas_masks_and_schedules_of_the_prompt_do_not_count() -> None:
    plain = make_conditioning(5)
    placed = [
        [
            plain[0][0],
            {
                **plain[0][1],
                "area": (4, 4, 2, 2),
                "strength": 0.3,
                "start_percent": 0.5,
                "mask": torch.zeros(1, 12, 8),
            },
        ]
    ]
    a = host_source.read_source(model(), latent(3), parsing(), plain)
    b = host_source.read_source(model(), latent(3), parsing(), placed)
    assert all(torch.equal(a.sites[s], b.sites[s]) for s in a.sites)


def test_reading_with_a_patched_model_reads_without_the_patch() -> None:
    plain = source(2)
    patched = host_patch.with_hpfa(model(), host_applied.AppliedSource(source(1), (1.0,) * 7))
    again = source(2, who=patched)
    assert all(torch.equal(plain.sites[s], again.sites[s]) for s in plain.sites)
    assert len(host_patch.applied_sources(patched)) == 1


def test_reading_leaves_the_model_as_it_was() -> None:
    before = sample(model())
    source(4)
    assert torch.equal(before, sample(model()))


def test_nan_latent_is_refused() -> None:
    x = latent(3)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(TruePoseError, match="fp32-vae"):
        host_source.read_source(model(), x, parsing())
