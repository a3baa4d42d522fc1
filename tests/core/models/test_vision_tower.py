"""CLIP towers from files: what open_clip computes, and the right architecture or a clear question."""

from __future__ import annotations

import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.models import vision_tower
from truepose_core.models.vision_tower import CLIP_MEAN, architectures, load_tower, recognise_tower, vision_tensors

VISION = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "head_width": 12}
PLAIN = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": {}}
KNOWN = {
    "tiny": PLAIN,
    "tiny-wide": {**PLAIN, "vision_cfg": {**VISION, "width": 48}},
    "tiny-deep": {**PLAIN, "vision_cfg": {**VISION, "layers": 4}},
    "tiny-fine": {**PLAIN, "vision_cfg": {**VISION, "patch_size": 4}},
    "tiny-again": {**PLAIN, "text_cfg": {"width": 9}},
    "xlm-tiny": {**PLAIN, "quick_gelu": True, "text_cfg": {"hf_model_name": "somebody/some-text-model"}},
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """open_clip knows small architectures only; a random tower of the first."""
    monkeypatch.setattr(vision_tower, "architectures", lambda: KNOWN)
    vision_tower._normalisation.cache_clear()
    torch.manual_seed(0)
    return vision_tower._build("tiny").state_dict()


def test_it_computes_what_open_clip_does(tiny) -> None:
    tower = load_tower({f"visual.{name}": x for name, x in tiny.items()}, "file", "tiny")
    pixels = torch.randn(2, 3, 32, 32)
    seen = tower(pixels)
    assert torch.equal(seen.embedding, tower.visual(pixels))
    x = tower.visual._embeds(pixels)
    states = []
    for block in tower.visual.transformer.resblocks:
        x = block(x)
        states.append(x)
    assert seen.before.shape == (2, 17, 24)
    assert torch.allclose(seen.before, states[1], atol=1e-6)
    assert torch.allclose(seen.last, states[2], atol=1e-6)
    assert tower.mean == CLIP_MEAN and tower.image_size == (32, 32)


def test_a_whole_model_and_the_tower_alone_are_the_same(tiny) -> None:
    model = {f"visual.{name}": x for name, x in tiny.items()} | {"logit_scale": torch.zeros(())}
    for tensors in (model, {f"module.{name}": x for name, x in model.items()}, tiny):
        assert vision_tensors(tensors, "file").keys() == tiny.keys()
        found = load_tower(tensors, "file").visual.state_dict()
        assert all(torch.equal(found[name], x) for name, x in tiny.items())


@pytest.mark.parametrize("name", ["tiny", "tiny-wide", "tiny-deep", "tiny-fine"])
def test_the_architecture_is_told_by_shapes(tiny, name: str) -> None:
    shapes = {key: x.shape for key, x in vision_tower._build(name).state_dict().items()}
    assert recognise_tower(shapes) == [name]


def test_where_two_compute_differently_the_user_is_asked(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"tiny-quick": {**PLAIN, "quick_gelu": True}}
    monkeypatch.setattr(vision_tower, "architectures", lambda: KNOWN | quick)
    with pytest.raises(TruePoseError, match="tiny, tiny-quick all have such weights; choose the architecture"):
        load_tower(tiny, "file")
    pixels = torch.randn(1, 3, 32, 32)
    plain, other = (load_tower(tiny, "file", name)(pixels).embedding for name in ("tiny", "tiny-quick"))
    assert (plain - other).abs().max() > 1e-4


def test_bad_files_are_named(tiny) -> None:
    with pytest.raises(TruePoseError, match="no architecture of open_clip has such weights"):
        load_tower({name: x for name, x in tiny.items() if name != "proj"}, "file")
    with pytest.raises(TruePoseError, match=r"file as tiny: .*1 missing: proj"):
        load_tower({name: x for name, x in tiny.items() if name != "proj"}, "file", "tiny")
    with pytest.raises(TruePoseError, match="no architecture 'RN50'"):
        load_tower(tiny, "file", "RN50")
    with pytest.raises(TruePoseError, match=r"transformers layout.*Load CLIP Vision"):
        load_tower({"vision_model.embeddings.class_embedding": torch.zeros(3)}, "file")
    with pytest.raises(TruePoseError, match="holds no vision tower"):
        load_tower({"conv_in.weight": torch.zeros(3)}, "file")


def test_without_open_clip_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_tower, "architectures", dict)
    with pytest.raises(TruePoseError, match="pip install open_clip_torch"):
        load_tower({}, "file")


def test_open_clips_own_architectures() -> None:
    """Names and normalisation of the towers people use; all without a download."""
    names = architectures()
    assert {"ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14", "ViT-B-16-SigLIP"} <= names.keys()
    assert not any(name.startswith(("RN", "convnext")) for name in names)
    assert vision_tower._normalisation("ViT-B-16-SigLIP") == ((0.5,) * 3, (0.5,) * 3)
    assert vision_tower._normalisation("ViT-H-14")[0] == CLIP_MEAN
    for name in ("ViT-H-14", "ViT-B-16-SigLIP"):
        with torch.device("meta"):
            shapes = {key: x.shape for key, x in vision_tower._build(name).state_dict().items()}
        assert name in recognise_tower(shapes)
