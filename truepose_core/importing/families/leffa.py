"""Leffa (github.com/franciszzj/Leffa, arXiv 2412.08486): pose transfer on SDXL, virtual try-on on SD1.5. One file has
the VAE and both nets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from truepose_core.errors import TruePoseError
from truepose_core.importing.plan import Part, Plan
from truepose_core.importing.unet import GROUPS, SDXL_HEAD_WIDTH, is_unet, under, unet_config
from truepose_core.models.config import SD_SCHEDULE, Behaviour, TruePoseConfig
from truepose_core.weights.reading import TensorInfo

GENERATIVE, REFERENCE, VAE = "unet.", "unet_encoder.", "vae."
ROLES = {GENERATIVE: "generative net", REFERENCE: "reference net", VAE: "VAE"}
OURS = {GENERATIVE: "target_net.", REFERENCE: "source_net.", VAE: "codec.vae."}
NO_CROSS = "Leffa has no cross-attention: its blocks add norm2(h) in its place"
NO_EMBEDDING = "Leffa switches SDXL's text and size embedding off"
NO_OUTPUT = "the reference net's output is never read"
CHANNELS = ("mask", "masked latent", "densepose")
SCALINGS = ("127.5", "24")


class Leffa:
    """Leffa. Its pose is a DensePose picture in the input channels of the target net."""

    name = "leffa"
    title = "Leffa"

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        """See `Family`."""
        nets = [prefix for prefix in (GENERATIVE, REFERENCE) if is_unet(under(prefix, tensors))]
        if REFERENCE in nets and under(VAE, tensors):
            nets.append(VAE)
        if REFERENCE not in nets and tensors.get(f"{GENERATIVE}conv_in.weight", _NONE).shape[1:2] != (12,):
            return []
        return [Part(self.name, ROLES[prefix], file, prefix) for prefix in nets]

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """See `Family`. choices: "densepose", "127.5" (every channel, as its demo does) or "24" (the third channel by
        the number of parts, as its transform for pose transfer is written)."""
        scaling = choices.get("densepose", SCALINGS[0])
        if scaling not in SCALINGS:
            raise TruePoseError(f"the choice densepose is {scaling!r}; expected {' or '.join(SCALINGS)}")
        found = {part.prefix: part for part in parts}
        missing = [ROLES[prefix] for prefix in ROLES if prefix not in found]
        if missing or len(parts) != len(ROLES):
            wrong = f"the {' and the '.join(missing)} missing" if missing else "more than one set of nets"
            raise TruePoseError(f"{wrong}; Leffa's weights are one file with keys under vae., unet. and unet_encoder.")
        own = {prefix: under(prefix, files[part.file]) for prefix, part in found.items()}
        wide = "add_embedding.linear_1.weight" in own[GENERATIVE]
        nets = {
            prefix: unet_config(own[prefix], f"the {ROLES[prefix]}", head_width=SDXL_HEAD_WIDTH if wide else None)
            for prefix in (GENERATIVE, REFERENCE)
        }
        _check(nets)
        vae = _vae_config(own[VAE], 0.13025 if wide else 0.18215)
        tensors: dict[str, tuple[int, str]] = {}
        ignored: dict[tuple[int, str], str] = {}
        for prefix, names in own.items():
            for name in names:
                at = (found[prefix].file, prefix + name)
                reason = _reason(prefix, name)
                if reason is None:
                    tensors[OURS[prefix] + name] = at
                else:
                    ignored[at] = reason
        title = f"{self.title} pose transfer (SDXL)" if wide else f"{self.title} virtual try-on (SD1.5)"
        config = TruePoseConfig(
            family="leffa-sdxl" if wide else "leffa-sd15",
            unet=nets[GENERATIVE],
            fusion="concat",
            match="surface",
            prediction_type="epsilon",
            scheduler={
                **SD_SCHEDULE,
                "steps_offset": 1,
                "timestep_spacing": "leading",
                "rescale_betas_zero_snr": wide,
            },
            size=(1024, 768),
            vae=vae,
            behaviour=Behaviour(
                source_timestep="step",
                unconditional="zero latent",
                cross_attention="pass",
                channels=CHANNELS,
                densepose=scaling,
                pose_maps=(),
                source_head=False,
                sampler="ddpm",
                guidance=2.5,
                guidance_rescale=1.0,
            ),
        )
        metadata = {"title": title, "code_licence": "MIT"}
        return Plan(self.name, json.loads(config.to_json()), tensors, ignored, metadata)


_NONE = TensorInfo((), "F32")


def _check(nets: Mapping[str, dict[str, Any]]) -> None:
    """Raises TruePoseError when the nets do not belong together or have other inputs."""
    target, source = nets[GENERATIVE], nets[REFERENCE]
    inputs = (target["in_channels"], source["in_channels"])
    if inputs != (12, 4):
        raise TruePoseError(f"the nets read {inputs[0]} and {inputs[1]} channels; expected 12 and 4 (the reference)")
    for name, value in target.items():
        if name != "in_channels" and source[name] != value:
            raise TruePoseError(f"the nets do not belong together: {name} is {value} and {source[name]}")


def _reason(prefix: str, name: str) -> str | None:
    """Why a weight is left out, None for one that is not."""
    if prefix == VAE:
        return None
    if ".attn2." in name:
        return NO_CROSS
    if name.startswith("add_embedding."):
        return NO_EMBEDDING
    if prefix == REFERENCE and name.startswith(("conv_norm_out.", "conv_out.")):
        return NO_OUTPUT
    return None


def _vae_config(tensors: Mapping[str, TensorInfo], scaling: float) -> dict[str, Any]:
    """Keyword arguments of diffusers' AutoencoderKL. Raises TruePoseError for one that lacks a level."""
    stem = "encoder.down_blocks."
    levels = len({name.removeprefix(stem).split(".")[0] for name in tensors if name.startswith(stem)})
    try:
        widths = [tensors[f"{stem}{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
        latent = tensors["decoder.conv_in.weight"].shape[1]
        layers = len({n.split(".")[4] for n in tensors if n.startswith(f"{stem}0.resnets.")})
    except KeyError as error:
        raise TruePoseError(f"the VAE lacks {error}; the file is incomplete") from error
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": latent,
        "norm_num_groups": GROUPS,
        "scaling_factor": scaling,
    }
