"""What a foreign checkpoint becomes: the types that every family of weights speaks, and a name for what none knows.

A family reads names, shapes and types only, never a value and never a file's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from truepose_core.weights.reading import TensorInfo

NOT_STATED = "not stated"
"""The licence of weights whose publisher names none."""
_FOLDER_USE = (
    "as the unet/ of a folder in diffusers format it can carry TruePose without training; alone it has no pose encoder "
    "and no SourceNet of its own"
)
_UNET = "down_blocks.0.resnets.0.time_emb_proj.weight"
_CONTEXT = {768: "SD1.5", 1024: "SD2.1", 2048: "SDXL"}


@dataclass(frozen=True)
class Part:
    """One thing found in one file: which family knows it, what it is there (role), the file's number, and what stands
    before its keys ("" where nothing does)."""

    family: str
    role: str
    file: int
    prefix: str


@dataclass(frozen=True)
class Plan:
    """How files become one of ours.

    config: JSON of the model (`TruePoseConfig`'s fields). tensors: our name -> (file number, original key), in the
    order of the written file. ignored: (file number, original key) -> the reason, in words. Every key of every file is
    in one of the two. metadata: more of the written file's metadata (licence as stated or `NOT_STATED`, title, ...).
    expected: name -> shape of every weight of the model, which the tensors must be exactly; None where `config` is
    `TruePoseConfig`'s, which tells it.
    """

    family: str
    config: dict[str, Any]
    tensors: dict[str, tuple[int, str]]
    ignored: dict[tuple[int, str], str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    expected: Mapping[str, tuple[int, ...]] | None = None


class Family(Protocol):
    """A kind of weights that can be read. name: "animate-anyone"; title: for people."""

    name: str
    title: str

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        """The parts of this family in one file, told from keys and shapes; [] where there are none."""
        ...

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """What the parts become. parts: this family's, of all files. choices: what the user said by name.

        Raises TruePoseError when a file of the set is missing, parts do not belong together, widths are wrong, or a
        choice is needed (the message says which: "add --choose name=value"). A message may say "file 0": whoever shows
        it puts the file's name there.
        """
        ...


# -------------------------------------------------------------------------- files of which a family makes nothing


@dataclass(frozen=True)
class Kind:
    """name: "a plain SD1.5 UNet". use: what it can be used for here."""

    name: str
    use: str


def describe(tensors: Mapping[str, TensorInfo]) -> Kind | None:
    """The kind of a checkpoint by its keys and shapes, whatever stands before its keys; None for an unknown one."""

    def some(*words: str) -> bool:
        return any(word in name for name in tensors for word in words)

    def every(*words: str) -> bool:
        return all(any(word in name for word in words) for name in tensors)

    def ends(*words: str) -> bool:
        return all(any(name.endswith(word) for name in tensors) for word in words)

    if some("to_q_lora", "to_k_lora") and some("image_proj"):
        return Kind("an IP-Adapter FaceID", "nothing here: it reads face recognition vectors, not CLIP's")
    if some("lora_up", "lora_down", "lora_A", "lora_B", "_lora.", ".lora."):
        return Kind("a LoRA", "load it with the host's LoRA loader, on the model that TruePose then patches")
    if every("motion_module", "temporal_transformer"):
        return Kind("a motion module alone", "nothing here: still pictures do not use it")
    if ends("controlnet_cond_embedding.conv_in.weight") or some("input_hint_block.0.weight"):
        return Kind("a ControlNet", "give it to --controlnet as a folder in diffusers format, or to the host's nodes")
    if some("model.diffusion_model.input_blocks.0.0.weight"):
        wide = some("conditioner.embedders.1") or some("model.diffusion_model.label_emb.0.0.weight")
        return Kind(
            f"a whole {'SDXL' if wide else 'Stable Diffusion'} checkpoint",
            "load it with the host's checkpoint loader; TruePose patches it without training",
        )
    unets = [name.removesuffix(_UNET) for name in tensors if name.endswith(_UNET)]
    if len(unets) > 1:
        return Kind(f"{len(unets)} UNets in one file", "convert it, if a system that can be read knows it")
    if unets:
        return _unet({name.removeprefix(unets[0]): info for name, info in tensors.items()})
    if ends("encoder.conv_in.weight", "decoder.conv_in.weight"):
        return Kind("a VAE", "as the vae/ of a folder in diffusers format (--vae), or with the host's VAE loader")
    if some("vision_model.encoder.layers", "visual.transformer.resblocks"):
        return Kind("a CLIP vision tower", "load it with the host's CLIP vision loader")
    if some("text_model.encoder.layers"):
        return Kind("a CLIP text encoder", "load it with the host's CLIP loader")
    if some("double_blocks.", "joint_blocks.", "transformer_blocks.0.attn.to_q"):
        return Kind("a diffusion transformer", "nothing here yet: TruePose works on UNets")
    return None


def _unet(tensors: Mapping[str, TensorInfo]) -> Kind:
    context = next((info.shape[1] for name, info in tensors.items() if name.endswith("attn2.to_k.weight")), 0)
    base = f"{_CONTEXT[context]} UNet" if context in _CONTEXT else "UNet"
    an = "an" if context in _CONTEXT else "a"
    if "conv_out.weight" not in tensors:
        return Kind(f"{an} {base} without its output layer: a reference net", "one file of a set; give them together")
    if any("motion_module" in name for name in tensors):
        return Kind(f"{an} {base} with a motion module", "one file of a set; still pictures use it without the module")
    channels = tensors["conv_in.weight"].shape[1] if "conv_in.weight" in tensors else 4
    if channels != 4:
        return Kind(f"{an} {base} with {channels} input channels", _FOLDER_USE)
    return Kind(f"a plain {base}", _FOLDER_USE)
