"""champ (github.com/fudan-generative-vision/champ): AnimateAnyone's two nets and a guidance encoder for each of depth,
normal, semantic map and DWPose skeleton. The encoders' files look alike: which is which, the user says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from truepose_core.errors import TruePoseError
from truepose_core.importing.families.animate_anyone import config_of, plan_nets, recognise_nets, trunk_widths
from truepose_core.importing.plan import Part, Plan
from truepose_core.importing.unet import under
from truepose_core.models.config import SKELETON, Behaviour
from truepose_core.weights.reading import TensorInfo

MAPS = {"depth": "depth", "normal": "normal", "semantic_map": "semantic_map", "dwpose": SKELETON}
"""champ's names -> ours."""
ENCODER = "guidance encoder"
NOT_RUN = "champ never runs it: only the last attention of a guidance encoder is used"
_ATTENTION = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    "transformer_blocks.0.norm1": "norm1",
    "transformer_blocks.0.norm3": "norm3",
    "transformer_blocks.0.attn1.to_q": "to_q",
    "transformer_blocks.0.attn1.to_k": "to_k",
    "transformer_blocks.0.attn1.to_v": "to_v",
    "transformer_blocks.0.attn1.to_out.0": "to_out",
    "transformer_blocks.0.ff.net.0.proj": "ff_in",
    "transformer_blocks.0.ff.net.2": "ff_out",
}


class Champ:
    """champ, for still pictures."""

    name = "champ"
    title = "champ"

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        """See `Family`."""
        parts = list(recognise_nets(self.name, file, tensors))
        for prefix in ("", *(f"guidance_encoder_{name}." for name in MAPS)):
            own = under(prefix, tensors)
            if trunk_widths(own) and "guidance_attention.proj_in.weight" in own:
                parts.append(Part(self.name, ENCODER, file, prefix))
        return parts

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """See `Family`. choices: "maps", the maps of the encoders' files in the order in which they are given."""
        nets = plan_nets(parts, files)
        encoders = [part for part in parts if part.role == ENCODER]
        if not encoders:
            raise TruePoseError("no guidance encoder is given; add the files guidance_encoder_*")
        names = _names(encoders, choices.get("maps"))
        tensors, ignored = dict(nets.tensors), dict(nets.ignored)
        single = list(names) == [SKELETON]
        widths = set()
        for name, part in names.items():
            own = under(part.prefix, files[part.file])
            widths.add(trunk_widths(own))
            last = sum(key.startswith("blocks.") and key.endswith(".weight") for key in own) - 1
            ours = "pose_encoder." if single else f"pose_encoder.{name}."
            for key in own:
                renamed = _renamed(key, f"attentions.{last}.")
                if renamed is None:
                    ignored[part.file, part.prefix + key] = NOT_RUN
                else:
                    tensors[ours + renamed] = (part.file, part.prefix + key)
        if len(widths) > 1:
            raise TruePoseError(f"the guidance encoders have other widths ({widths}); they are not of one model")
        behaviour = Behaviour(
            context="image", source_head=False, guidance=3.5, pose_maps=tuple(names), pose_attention=True
        )
        config = config_of(self.name, nets.unet, widths.pop(), behaviour, (512, 512))
        return Plan(self.name, config, tensors, ignored, {"title": self.title, "code_licence": "MIT"})


def _names(encoders: Sequence[Part], chosen: str | None) -> dict[str, Part]:
    """Our name of each encoder's map, in champ's order. Raises TruePoseError when the user has to say it."""
    told = [part.prefix.removeprefix("guidance_encoder_").rstrip(".") for part in encoders]
    if not all(told):
        told = [] if chosen is None else [name.strip() for name in chosen.split(",")]
    elif chosen is not None:
        raise TruePoseError("the checkpoint names its guidance encoders; leave out the choice maps")
    told = ["dwpose" if name == SKELETON else name for name in told]
    if len(told) != len(encoders) or set(told) - set(MAPS) or len(set(told)) != len(told):
        files = ", ".join(f"file {part.file}" for part in encoders)
        raise TruePoseError(
            f"the guidance encoders {files} look alike; say what each reads, in this order: "
            f"add --choose maps={','.join(list(MAPS)[: len(encoders)])} (of {', '.join(MAPS)})"
        )
    found = dict(zip(told, encoders, strict=True))
    return {ours: found[theirs] for theirs, ours in MAPS.items() if theirs in found}


def _renamed(key: str, attention: str) -> str | None:
    """Our name of an encoder's weight, None for one that champ never runs."""
    if not key.startswith(("attentions.", "guidance_attention.")):
        return key
    stem, _, kind = key.removeprefix(attention).rpartition(".")
    return f"attention.{_ATTENTION[stem]}.{kind}" if key.startswith(attention) and stem in _ATTENTION else None
