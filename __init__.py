"""ComfyUI-TruePose: a person shown again in another pose, as native ComfyUI nodes."""

import logging
import re
import sys
from pathlib import Path

WEB_DIRECTORY = "./web"


def too_old() -> str | None:
    """What to tell users of a ComfyUI older than pyproject's `requires-comfyui`; None where it is new enough."""
    text = (Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r'^requires-comfyui = ">=(.+)"$', text, re.MULTILINE)[1]
    found = getattr(sys.modules.get("comfyui_version"), "__version__", needed)
    if [int(n) for n in re.findall(r"\d+", found)[:3]] >= [int(n) for n in needed.split(".")]:
        return None
    return f"ComfyUI-TruePose needs ComfyUI {needed} or newer, and this is {found}. Update ComfyUI; no node was loaded"


# Hosts that do not know comfy_entrypoint say nothing of use.
if (message := too_old()) is not None:
    logging.getLogger("truepose").error(message)


async def comfy_entrypoint():  # noqa: ANN201 - the host's type is unknown outside the host
    """What ComfyUI calls to get the nodes. The import waits until then, so tests can collect this folder."""
    if (message := too_old()) is not None:
        raise RuntimeError(message)
    from .nodes import TruePoseExtension

    return TruePoseExtension()
