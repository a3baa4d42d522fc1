"""ComfyUI nodes, a thin storey above truepose_core: a node is a schema and a call.

Only the folder host/ knows the host's inside.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_CORE = Path(__file__).resolve().parent.parent / "truepose_core"


def _find_core() -> None:
    """Make `import truepose_core` find the copy beside this folder.

    The pack's folder must not go on sys.path: `nodes` there would hide the host's own module of that name.
    """
    if "truepose_core" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "truepose_core", _CORE / "__init__.py", submodule_search_locations=[str(_CORE)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["truepose_core"] = module
    spec.loader.exec_module(module)


_find_core()

from comfy_api.latest import ComfyExtension, io  # noqa: E402

from . import (  # noqa: E402
    align,
    body,
    caa,
    cfld,
    control3d,
    field,
    hpfa,
    human_parsing,
    mannequin,
    model,
    parsing,
    photo,
    pose,
    pose_edit,
    references,
    source,
    view,
)
from .host.files import lay_out_photos  # noqa: E402


class TruePoseExtension(ComfyExtension):
    """Every node of the pack. Hosts before 0.19 call no `on_load`: what is to be done at the start is done here."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        lay_out_photos()
        modules = (
            model,
            source,
            caa,
            cfld,
            hpfa,
            references,
            human_parsing,
            parsing,
            pose,
            pose_edit,
            mannequin,
            body,
            view,
            photo,
            align,
            field,
            control3d,
        )
        nodes = [node for module in modules for node in module.NODES]
        for node in nodes:
            try:
                node.GET_SCHEMA()
            except Exception as error:
                # The host drops every node after an invalid one and does not say which it was.
                raise RuntimeError(f"ComfyUI-TruePose: the schema of {node.__name__} is invalid: {error}") from error
        return nodes
