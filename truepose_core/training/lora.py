"""LoRA-only training: both nets stay as they are, and low-rank updates of their attentions learn (peft's).

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. HPFA's scales, CAA and the pose encoder, which no
checkpoint has, learn as usual. A finished model holds the updates in its weights, so it is used like any other.
"""

from __future__ import annotations

from torch import nn

from truepose_core.errors import TruePoseError
from truepose_core.models.model import TruePoseModel

PROJECTIONS = r".*\.(to_q|to_k|to_v|to_out\.0)"
"""The layers that get an update: the projections of every attention."""


def add_lora(model: TruePoseModel, rank: int) -> None:
    """Freeze SourceNet and TargetNet and give their attentions updates of this rank, which begin at zero.

    Raises TruePoseError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TruePoseError('--lora needs peft; install it with: pip install "comfyui-truepose[train]"') from error
    for net in _nets(model):
        # An alpha of the rank: the update is added as it is.
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS), net)


def merge_lora(model: TruePoseModel) -> None:
    """Add the updates to the weights and take them out, in place: the model has its usual names again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for net in _nets(model):
        layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, BaseTunerLayer)]
        for name, layer in layers:
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, layer.get_base_layer())


def _nets(model: TruePoseModel) -> list[nn.Module]:
    return [net for net in (model.source_net, model.target_net) if net is not None]
