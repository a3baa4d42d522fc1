"""API-format prompts for the fixture models, as small graphs."""

from __future__ import annotations

from typing import Any


def transfer(seed: int = 1, hpfa: bool = True, **apply: Any) -> dict[str, dict]:
    """A figure in two colours is read, and a picture is sampled that looks at it. Saved by node "save"."""
    prompt = {
        "model": {"class_type": "TestModel", "inputs": {"seed": 0, "family": "SD15"}},
        "yes": {"class_type": "TestConditioning", "inputs": {"seed": 1}},
        "no": {"class_type": "TestConditioning", "inputs": {"seed": 2}},
        "image": {"class_type": "TestImage", "inputs": {"width": 64, "height": 96, "seed": 3}},
        "parsing": {
            "class_type": "TruePoseParsingFromMasks",
            "inputs": {"upper": ["image", 1], "lower": ["image", 2]},
        },
        "source": {
            "class_type": "TruePoseSourceNetEncode",
            "inputs": {
                "model": ["model", 0],
                "vae": ["model", 1],
                "image": ["image", 0],
                "parsing": ["parsing", 0],
                "conditioning": ["yes", 0],
            },
        },
        "hpfa": {
            "class_type": "TruePoseApplyHPFA",
            "inputs": {"model": ["model", 0], "source": ["source", 0], **DEFAULTS, **apply},
        },
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 96, "batch_size": 1}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["hpfa" if hpfa else "model", 0],
                "positive": ["yes", 0],
                "negative": ["no", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": 2,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["model", 1]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decoded", 0], "filename_prefix": "test"}},
    }
    if not hpfa:
        for node in ("hpfa", "source", "parsing", "image"):
            del prompt[node]
    return prompt


DEFAULTS = {
    "strength": 1.0,
    "background": 0.0,
    "face": 1.0,
    "hair": 1.0,
    "upper": 1.0,
    "lower": 1.0,
    "skin": 1.0,
    "accessory": 1.0,
    "region_match": 2.0,
    "body_match": 0.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "blocks": "all",
    "unconditional": "drop",
}
