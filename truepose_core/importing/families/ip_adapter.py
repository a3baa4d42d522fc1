"""IP-Adapter and IP-Adapter Plus (arXiv 2308.06721): tokens from CLIP's image features, and K, V per cross-attention.

The file keeps the original names, `image_proj.*` and `ip_adapter.<n>.to_{k,v}_ip.weight`, where n = 1, 3, 5, ... counts
the attentions of the UNet as diffusers lists them (down, up, middle); even numbers are self-attentions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from truepose_core.errors import TruePoseError
from truepose_core.importing.plan import Part, Plan
from truepose_core.models.ip_adapter import ARCHITECTURE, SITES, IPAdapterConfig, RegionAdapter, recognise
from truepose_core.weights.reading import TensorInfo

NAME = "ip-adapter"
HALVES = {"image_proj.": "image projection", "ip_adapter.": "cross-attention"}
"""Prefix -> role."""


class IPAdapter:
    """The two halves in one file, as published, or in two."""

    name = NAME
    title = "IP-Adapter"

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        """Halves are known by their prefix; FaceID and other relatives too, which `plan` then refuses by name."""
        return [
            Part(NAME, role, file, prefix)
            for prefix, role in HALVES.items()
            if any(name.startswith(prefix) for name in tensors)
        ]

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """No choices. Raises TruePoseError for half an IP-Adapter or several, a relative, or wrong widths."""
        for prefix, role in HALVES.items():
            owners = [f"file {part.file}" for part in parts if part.prefix == prefix]
            if len(owners) > 1:
                raise TruePoseError(f"{' and '.join(owners)} each have an IP-Adapter's {role}; convert one at a time")
        sources = {key: (part.file, key) for part in parts for key in files[part.file] if key.startswith(part.prefix)}
        config = recognise({key: files[file][key].shape for key, (file, _) in sources.items()})
        expected = shapes_of(config)
        # What the network has not is left for the caller to name.
        return Plan(
            family=NAME,
            config=asdict(config),
            tensors={name: sources.get(name, (parts[0].file, name)) for name in expected},
            metadata={"architecture": ARCHITECTURE, "title": title_of(config)},
            expected=expected,
        )


def title_of(config: IPAdapterConfig) -> str:
    """For people: the kind, and the models it was made for."""
    kind = "IP-Adapter Plus" if config.reads_patches else "IP-Adapter"
    return f"{kind} for {SITES.get(len(config.widths), f'{len(config.widths)} cross-attentions')}"


def shapes_of(config: IPAdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in the network's order."""
    with torch.device("meta"):
        adapter = RegionAdapter(config)
    return {name: tuple(x.shape) for name, x in adapter.state_dict().items()}
