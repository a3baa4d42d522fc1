"""CAA in a running ComfyUI: files are found, every link is accepted, and a picture comes out."""

from __future__ import annotations

import numpy
import pytest
import torch
from prompts import transfer
from safetensors.torch import save_file
from server import PromptFailed, Server

WIDTHS = (32, 32, 64, 64, 128, 128, *(128,) * 3, *(64,) * 3, *(32,) * 3, 128)
CONTEXT, EMBED = 48, 256
"""Of the fixture model, and of the smallest tower of open_clip."""
TOWER = "ViT-S-32-alt"


def picture(comfy: Server, prompt: dict) -> numpy.ndarray:
    return comfy.images(comfy.run(prompt), "save")[0]


@pytest.fixture(scope="module")
def files(comfy: Server) -> None:
    """A random IP-Adapter and a random tower among the server's models."""
    vision_tower = pytest.importorskip("truepose_core.models.vision_tower")
    if not vision_tower.architectures():
        pytest.skip("open_clip is not installed")
    torch.manual_seed(0)
    weights = {
        "image_proj.proj.weight": torch.randn(4 * CONTEXT, EMBED) / EMBED**0.5,
        "image_proj.proj.bias": torch.randn(4 * CONTEXT),
        "image_proj.norm.weight": torch.ones(CONTEXT),
        "image_proj.norm.bias": torch.zeros(CONTEXT),
    }
    for number, width in enumerate(WIDTHS):
        for part in "kv":
            weights[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(width, CONTEXT) / CONTEXT**0.5
    tower = {f"visual.{name}": x.half() for name, x in vision_tower._build(TOWER).state_dict().items()}
    models = comfy.folder / "models"
    for folder, tensors in (("ipadapter", weights), ("clip_vision", tower)):
        (models / folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, models / folder / "random.safetensors")


def with_ip_adapter(**apply: object) -> dict:
    prompt = transfer()
    more = {
        "vision": ("LoadOpenCLIPVision", {"file": "random.safetensors", "architecture": "from the file"}),
        "adapter": ("LoadCAAAdapter", {"file": "random.safetensors"}),
        "caa": (
            "CAAEncode",
            {"adapter": ["adapter", 0], "image": ["image", 0], "parsing": ["parsing", 0], "clip_vision": ["vision", 0]},
        ),
        "apply": ("ApplyCAA", {"model": ["hpfa", 0], "caa": ["caa", 0], **apply}),
    }
    for name, (kind, inputs) in more.items():
        prompt[name] = {"class_type": f"TruePose{kind}", "inputs": inputs}
    prompt["sampler"]["inputs"]["model"] = ["apply", 0]
    return prompt


WEIGHTS = dict.fromkeys(("face", "hair", "upper", "lower", "skin", "accessory"), 1.0)
WEIGHTS |= {"background": 0.0, "region_match": 4.0, "start_percent": 0.0, "end_percent": 1.0, "unconditional": "drop"}


def test_ip_adapter_files_work_through_the_server(comfy: Server, files: None) -> None:
    plain = picture(comfy, transfer())
    ours = picture(comfy, with_ip_adapter(strength=1.0, **WEIGHTS))
    assert (ours != plain).any()
    numpy.testing.assert_array_equal(plain, picture(comfy, with_ip_adapter(strength=0.0, **WEIGHTS)))
    numpy.testing.assert_array_equal(ours, picture(comfy, with_ip_adapter(strength=1.0, **WEIGHTS)))
    numpy.testing.assert_array_equal(plain, picture(comfy, transfer()))
    wrong = with_ip_adapter(strength=1.0, **WEIGHTS)
    wrong["model"]["inputs"]["family"] = "SDXL"
    with pytest.raises(PromptFailed, match="choose an IP-Adapter for this model") as failed:
        comfy.run(wrong)
    assert failed.value.node == "apply"


def test_a_truepose_models_adapter_is_accepted_too(comfy: Server) -> None:
    prompt = {
        "loaded": ("LoadModel", {"file": "bundled demo"}),
        "person": ("Mannequin", {"width": 48, "height": 64}),
        "caa": (
            "CAAEncode",
            {"adapter": ["loaded", 3], "image": ["person", 0], "parsing": ["person", 1]},
        ),
        "posed": ("ApplyPoseEncoder", {"model": ["loaded", 0], "pose": ["person", 2]}),
        "apply": ("ApplyCAA", {"model": ["posed", 0], "caa": ["caa", 0], "strength": 1.0, **WEIGHTS}),
    }
    graph = {name: {"class_type": f"TruePose{kind}", "inputs": inputs} for name, (kind, inputs) in prompt.items()}
    info = comfy.object_info()
    for node in graph.values():
        for key, (_, settings) in info[node["class_type"]]["input"].get("required", {}).items():
            if "default" in settings:
                node["inputs"].setdefault(key, settings["default"])
    graph["latent"] = {"class_type": "TruePoseEmptyLatent", "inputs": {"adapter": ["loaded", 3], "batch_size": 1}}
    sampling = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "ddim", "scheduler": "ddim_uniform", "denoise": 1.0}
    links = {"model": ["apply", 0], "positive": ["loaded", 4], "negative": ["loaded", 4], "latent_image": ["latent", 0]}
    graph["sampler"] = {"class_type": "KSampler", "inputs": {**sampling, **links}}
    graph["decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["loaded", 2]}}
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["decoded", 0], "filename_prefix": "caa"}}
    assert picture(comfy, graph).shape == (128, 96, 3)
