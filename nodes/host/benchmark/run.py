"""What HPFA costs inside ComfyUI, measured there: `truepose benchmark --host` and `--editors` run this file with the
host's Python (steps.py and editors.py).

With `--host` each thing is one guided step (a positive and a negative row) of an SD1.5-shaped UNet of random weights,
through the host's own guider, so that batching, casting and attention are the host's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

BOOT = "truepose_benchmark_pack"


def _boot(folder: Path, on_gpu: bool) -> None:
    """Make `import comfy` and this pack work in a fresh Python of the host."""
    # The folder of this file is no place to import from.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != here)]
    sys.argv = ["main.py"]
    import comfy.cli_args

    comfy.cli_args.args.cpu = not on_gpu
    # What the host takes on a GPU; on a CPU it would cut attention into parts by the memory that happens to be free.
    comfy.cli_args.args.use_pytorch_cross_attention = True
    pack = here.parents[2]
    spec = importlib.util.spec_from_file_location(BOOT, pack / "__init__.py", submodule_search_locations=[str(pack)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[BOOT] = module
    spec.loader.exec_module(module)


def main() -> None:
    """Arguments by standard input as JSON; the result, one JSON line, is the last line of standard output."""
    given = json.load(sys.stdin)
    import torch

    if given["device"] == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    _boot(Path(given["folder"]), given["device"] != "cpu")
    measure = importlib.import_module(f"{BOOT}.nodes.host.benchmark.{given['what']}").measure
    with torch.inference_mode():
        result = measure(given["quick"], given["repeats"])
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)
    # The host's threads would keep the process for a while.
    os._exit(0)


if __name__ == "__main__":
    main()
