"""What a model of Load TruePose Model needs is known from its adapter: said before anything is sampled, not seen in a
wrong picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from truepose_core.errors import TruePoseError

from .control3d import CONTROL_KEY
from .features import SOURCE_KEY
from .patch import CHANNELS_KEY, POSE_KEY, applied_sources
from .unet import log

if TYPE_CHECKING:
    from .model import Adapter

KEY = "truepose_checks"
TARGET_NET, SOURCE_NET = "target_net", "source_net"


def check_when_used(model: object, part: str, adapter: Adapter) -> None:
    """Have a net of a TruePose model checked in front of every sampling and reading. part: TARGET_NET or SOURCE_NET."""
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, partial(_on_prepare, part, adapter))


def _on_prepare(
    part: str,
    adapter: Adapter,
    executor: Callable,
    model: object,
    noise_shape: Sequence[int],
    conds: Mapping,
    *args: object,
    **kwargs: object,
) -> object:
    """The `PREPARE_SAMPLING` wrapper."""
    reads = bool(model.get_wrappers(WrappersMP.DIFFUSION_MODEL, SOURCE_KEY))
    if part == TARGET_NET and reads:
        raise TruePoseError(
            "this is the target_net of Load TruePose Model, which makes pictures; connect its source_net to SourceNet "
            "Encode"
        )
    if part == SOURCE_NET and not reads:
        raise TruePoseError(
            "this is the source_net of Load TruePose Model, which only reads the source; sample with its target_net"
        )
    _check_context(adapter, conds)
    if part == TARGET_NET:
        _check_pose(adapter, model)
    return executor(model, noise_shape, conds, *args, **kwargs)


def _check_context(adapter: Adapter, conds: Mapping) -> None:
    """Raise TruePoseError for a prompt where the model reads none, or reads a picture's embedding."""
    if adapter.config.behaviour.cross_attention == "pass":
        return
    width = adapter.config.unet["cross_attention_dim"]
    pictured = adapter.config.behaviour.context == "image"
    for name, entries in conds.items():
        for entry in entries or ():
            tokens = entry.get("cross_attn")
            if tokens is None or (tokens.shape[-1] == width and (tokens.shape[1] == 1 or not pictured)):
                continue
            given = f"{name} holds {tokens.shape[1]} tokens of width {tokens.shape[-1]}"
            if pictured:
                raise TruePoseError(
                    f"{given}, and a {adapter.config.family} model reads one CLIP embedding of the source picture, "
                    f"of width {width}, and no prompt: connect Picture Context to positive and negative"
                )
            raise TruePoseError(
                f"{given}, and this {adapter.config.family} model reads no text: connect the conditioning output of "
                "Load TruePose Model to positive and negative"
            )


def _check_pose(adapter: Adapter, model: object) -> None:
    """Raise TruePoseError where nobody said which pose to make. A source carried to it, or 3D guidance, says something:
    then it is a warning."""
    channels = bool(adapter.config.behaviour.channels)
    if model.get_wrappers(WrappersMP.DIFFUSION_MODEL, CHANNELS_KEY if channels else POSE_KEY):
        return
    if not channels and not adapter.has_pose_encoder:
        return
    what = "DensePose picture" if channels else "pose"
    message = (
        f"nobody told this {adapter.config.family} model which pose to make: put Apply Pose Encoder, with the {what}, "
        "between Load TruePose Model and the sampler"
    )
    carried = any(applied.aligned is not None for applied in applied_sources(model))
    if not carried and not model.get_wrappers(WrappersMP.DIFFUSION_MODEL, CONTROL_KEY):
        raise TruePoseError(message)
    warn_on_node(f"{message}. It only knows the pose by the source or the 3D guidance, and the picture will be poor")


def warn_on_node(message: str) -> None:
    """A warning in the log, and on the node that is running."""
    log.warning(message)
    context = get_executing_context()
    if context is None:
        return
    from server import PromptServer

    PromptServer.instance.send_progress_text(message, context.node_id)
