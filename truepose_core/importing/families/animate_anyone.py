"""AnimateAnyone as Moore Threads trained it (github.com/MooreThreads/Moore-AnimateAnyone): reference net, denoising net
and pose guider, in three files or one training checkpoint. What its two UNets share with champ is here too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truepose_core.errors import TruePoseError
from truepose_core.importing.plan import Part, Plan
from truepose_core.importing.unet import is_unet, under, unet_config
from truepose_core.models.config import Behaviour, TruePoseConfig
from truepose_core.weights.reading import TensorInfo

REFERENCE, DENOISING, GUIDER, MOTION = "reference net", "denoising net", "pose guider", "motion module"
SOURCE, TARGET = "source_net.", "target_net."
NO_MOTION = "the motion module: still pictures do not use it"
UNET_PREFIXES = ("", "reference_unet.", "denoising_unet.")
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "steps_offset": 1,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""As both systems sample. (They were trained with scaled_linear.)"""


def is_motion(name: str) -> bool:
    return "motion_module" in name or "temporal_transformer" in name


def recognise_nets(family: str, file: int, tensors: Mapping[str, TensorInfo]) -> Iterator[Part]:
    """The UNets of one file, and a motion module alone. A reference net is a UNet without its output layer."""
    for prefix in UNET_PREFIXES:
        own = under(prefix, tensors)
        if not is_unet(own) or own["conv_in.weight"].shape[1:2] != (4,):
            continue
        yield Part(family, DENOISING if "conv_out.weight" in own else REFERENCE, file, prefix)
    if tensors and all(map(is_motion, tensors)):
        yield Part(family, MOTION, file, "")


def trunk_widths(tensors: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    """Widths of a pose encoder's layers, such as (16, 32, 96, 256); None for anything else."""
    count = sum(name.startswith("blocks.") and name.endswith(".weight") for name in tensors)
    shapes = [tensors[f"blocks.{i}.weight"].shape for i in range(count) if f"blocks.{i}.weight" in tensors]
    if "conv_in.weight" not in tensors or not shapes or len(shapes) != count or count % 2:
        return None
    return (tensors["conv_in.weight"].shape[0], *(shape[0] for shape in shapes[1::2]))


def one_of(parts: Sequence[Part], role: str, hint: str) -> Part:
    """The only part with this role. Raises TruePoseError when there is none or more than one."""
    found = [part for part in parts if part.role == role]
    if len(found) == 1:
        return found[0]
    if not found:
        there = ", ".join(f"file {part.file} is the {part.role}" for part in parts)
        raise TruePoseError(f"the {role} is missing ({there}); {hint}")
    files = " and ".join(f"file {part.file}" for part in found)
    raise TruePoseError(f"{files} are both a {role}; expected one. {hint}")


@dataclass(frozen=True)
class Nets:
    """The two UNets' configuration, and the mapping so far."""

    unet: dict[str, Any]
    tensors: dict[str, tuple[int, str]]
    ignored: dict[tuple[int, str], str]


def plan_nets(parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]]) -> Nets:
    """Reference and denoising net as SourceNet and TargetNet. Raises TruePoseError if one is missing or they differ."""
    if all(part.role == MOTION for part in parts):
        raise TruePoseError("file 0 is a motion module alone; give the reference net, the denoising net and the rest")
    hint = "a reference net is a UNet without conv_out, as the system's own trainer writes it"
    reference, denoising = one_of(parts, REFERENCE, hint), one_of(parts, DENOISING, hint)
    tensors: dict[str, tuple[int, str]] = {}
    ignored = {(p.file, key): NO_MOTION for p in parts if p.role == MOTION for key in files[p.file]}
    configs = []
    for part, ours in ((denoising, TARGET), (reference, SOURCE)):
        own = under(part.prefix, files[part.file])
        configs.append(unet_config(own, f"the {part.role} in file {part.file}"))
        for name in own:
            if is_motion(name):
                ignored[part.file, part.prefix + name] = NO_MOTION
            else:
                tensors[ours + name] = (part.file, part.prefix + name)
    for name, value in configs[0].items():
        if configs[1][name] != value:
            raise TruePoseError(
                f"the nets do not belong together: {name} is {value} in file {denoising.file} and "
                f"{configs[1][name]} in file {reference.file}"
            )
    return Nets(configs[0], tensors, ignored)


def config_of(
    family: str, unet: dict[str, Any], widths: tuple[int, ...], behaviour: Behaviour, size: tuple[int, int]
) -> dict[str, Any]:
    """The configuration that both systems share, as JSON values."""
    config = TruePoseConfig(
        family=family,
        unet=unet,
        fusion="concat",
        match="surface",
        pose_widths=widths,
        prediction_type="v_prediction",
        scheduler=dict(SCHEDULER),
        size=size,
        behaviour=behaviour,
    )
    return json.loads(config.to_json())


class AnimateAnyone:
    """Moore's AnimateAnyone. Its pose is a drawn skeleton; the source is also read as one CLIP embedding."""

    name = "animate-anyone"
    title = "AnimateAnyone (Moore)"

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        """See `Family`."""
        parts = list(recognise_nets(self.name, file, tensors))
        for prefix in ("", "pose_guider."):
            own = under(prefix, tensors)
            if trunk_widths(own) and not any("attention" in name for name in own) and not is_unet(own):
                parts.append(Part(self.name, GUIDER, file, prefix))
        return parts

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """See `Family`."""
        nets = plan_nets(parts, files)
        guider = one_of(parts, GUIDER, "it is a file of its own (pose_guider) with 16 tensors")
        own = under(guider.prefix, files[guider.file])
        pose = {f"pose_encoder.{name}": (guider.file, guider.prefix + name) for name in own}
        behaviour = Behaviour(context="image", source_head=False, guidance=3.5)
        config = config_of(self.name, nets.unet, trunk_widths(own), behaviour, (768, 512))
        metadata = {"title": self.title, "code_licence": "Apache-2.0"}
        return Plan(self.name, config, nets.tensors | pose, nets.ignored, metadata)
