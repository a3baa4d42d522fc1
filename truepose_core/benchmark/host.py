"""`truepose benchmark --host` and `--editors`: what HPFA costs inside a real ComfyUI. Finds it, lets its own Python
measure, prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truepose_core.benchmark.report import markdown
from truepose_core.errors import TruePoseError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path("nodes") / "host" / "benchmark" / "run.py"

DEFINITIONS = """\
One guided step: a positive and a negative row, through the host's own guider and attention, on random weights.
* counted: FLOPs of the step over those of the plain step, by torch's FlopCounterMode; timed: the same in {clock}.
* person: only the source tokens of the person, {person:.0%} of them, are read. "negative row without" is Apply HPFA's
  default: the negative prompt's row does not see the source. Region match adds 8 channels per head.
* extra peak: memory held at most in a step above that of the plain step, {dtype}.
  The source's features themselves are {source_mb:,.0f} MB ({source_dtype}), half of that in float16.
* source read at every step: one more pass of the UNet per step, with the source's one row.
* runs: {steps} steps, and {steps} steps for each of {poses} poses of one source, over as many plain steps; reading the
  source is counted in, once for all poses but at every step where it is read there."""


EDITORS = """\
A forward of an editing model with references of {size}, over the same with all tokens of the references, one row.
* kept: only the tokens of the person are read, and the others are dropped. match: region match as well, by 8 channels
  more for each head. Counted FLOPs of the real configurations, by torch's FlopCounterMode.
* cropped: no weights, but the photo cropped to the person's box, of which the person fills {fill:.0%} (the mean over
  the mannequin's ready poses): what a careful user does without this node.
* cache: the host's reference cache over {steps} steps, which reads the references once, at timestep 0; kept as well
  beside. Only for models that are meant for it.
* timed: the same networks with few blocks, in {clock}, beside their own count."""


@dataclass(frozen=True)
class Host:
    """An installed ComfyUI: its folder and the Python that runs it."""

    folder: Path
    python: Path

    @property
    def version(self) -> str:
        """As in comfyui_version.py, e.g. "0.19.3"."""
        scope: dict[str, str] = {}
        exec((self.folder / "comfyui_version.py").read_text(encoding="utf-8"), scope)
        return scope["__version__"]

    def at_least(self, *version: int) -> bool:
        """Whether the host is that version or newer: `host.at_least(0, 19, 3)`."""
        return tuple(int(part) for part in self.version.split(".")[:3]) >= version


def find_host(pack: Path = ROOT) -> Host | None:
    """ComfyUI by $COMFYUI_DIR, else the folder the pack is installed in, else ~/comfy/ComfyUI; None for none.

    Its Python is $COMFYUI_PYTHON, else the host's own .venv, else the Python that runs this.
    """
    folders = []
    if os.environ.get("COMFYUI_DIR"):
        folders.append(Path(os.environ["COMFYUI_DIR"]).expanduser())
    else:
        if pack.parent.name == "custom_nodes":
            folders.append(pack.parent.parent)
        folders.append(Path("~/comfy/ComfyUI").expanduser())
    for folder in folders:
        if is_host(folder):
            return Host(folder.resolve(), _python(folder))
    return None


def is_host(folder: Path) -> bool:
    """Whether a folder looks like ComfyUI."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def _python(folder: Path) -> Path:
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"]).expanduser()
    for name in ("bin/python", "Scripts/python.exe"):
        if (folder / ".venv" / name).exists():
            # Not resolved: the link in the venv is what makes it that venv's Python.
            return folder / ".venv" / name
    return Path(sys.executable)


def choose_host(named: str) -> Host:
    """named: a folder, or "" to look for one. Raises TruePoseError where there is no ComfyUI."""
    if named:
        folder = Path(named).expanduser()
        if not is_host(folder):
            raise TruePoseError(f"{folder} is no ComfyUI (it has no main.py and comfy/); name its folder after --host")
        return Host(folder.resolve(), _python(folder))
    found = find_host()
    if found is None:
        raise TruePoseError(
            "no ComfyUI was found; name its folder: truepose benchmark --host FOLDER, or set COMFYUI_DIR"
        )
    return found


def find_pack(host: Host) -> Path:
    """The pack's folder: this checkout, or the copy in the host's custom_nodes. Raises TruePoseError for none."""
    folders = [ROOT, *sorted((host.folder / "custom_nodes").glob("*"))]
    for folder in folders:
        if (folder / SCRIPT).is_file():
            return folder
    raise TruePoseError(
        f"the node pack is neither here nor in {host.folder / 'custom_nodes'}; install it in ComfyUI first"
    )


def measure_host(host: Host, *, quick: bool, device: str, repeats: int | None, what: str = "steps") -> dict[str, Any]:
    """Run a measurement with the host's Python: "steps" of a UNet, or "editors". Raises TruePoseError with the host's
    last words if it fails."""
    given = {"folder": str(host.folder), "quick": quick, "device": device, "repeats": repeats, "what": what}
    done = subprocess.run(
        [str(host.python), str(find_pack(host) / SCRIPT)],
        input=json.dumps(given),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = "\n".join(lines[-5:])
        raise TruePoseError(f"the measurement in {host.folder} ended with {done.returncode}; see above. {last}")
    return json.loads(lines[-1])


def host_tables(result: dict[str, Any]) -> str:
    """Markdown of a result of `measure_host`."""
    machine = result["machine"]
    head = (
        f"ComfyUI {machine['comfyui']}, torch {machine['torch']}, {machine['device']}, {machine['dtype']}, "
        f"{machine['attention']}, repeats: {machine['repeats']}"
    )

    def size(x: float | None) -> str:
        return "-" if x is None else f"{x:,.0f} MB"

    table = markdown(
        ("step", "counted", "timed", "seconds", "extra peak"),
        [
            [r["what"], f"{r['counted']:.3f}", f"{r['timed']:.3f}", f"{r['seconds']:.3f}", size(r["extra_peak_mb"])]
            for r in result["steps"]
        ],
    )
    steps, poses = result["run_steps"], result["run_poses"]
    columns = [f"{key}_{count}" for count in (1, poses) for key in ("counted", "timed")]
    spread = markdown(
        (
            *("tokens", "source read", f"{steps} steps, counted", "timed"),
            *(f"{steps} steps x {poses} poses, counted", "timed"),
        ),
        [[r["tokens"], r["reading"], *(f"{r[c]:.3f}" for c in columns)] for r in result["runs"]],
    )
    clock = "CUDA events" if machine["device_type"] == "cuda" else "CPU time of one thread"
    notes = DEFINITIONS.format(
        steps=steps,
        poses=poses,
        clock=clock,
        person=result["person"],
        dtype=machine["dtype"],
        source_mb=result["source_mb"],
        source_dtype=result["source_dtype"],
    )
    title = f"### {result['model']} at {result['size']}"
    return "\n\n".join([head, f"{title}: a step over the plain step", table, f"{title}: runs", spread, notes])


def editor_tables(result: dict[str, Any]) -> str:
    """Markdown of a result of `measure_host` with "editors"."""
    machine = result["machine"]
    head = (
        f"ComfyUI {machine['comfyui']}, torch {machine['torch']}, {machine['device']}, {machine['attention']}, "
        f"repeats: {machine['repeats']}"
    )

    def ratio(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    names = ("kept", "match", "cropped", "cache", "cache_kept")
    counted = markdown(
        ("model", "references", "tokens kept", "kept", "kept, match", "cropped", "cache", "cache, kept"),
        [
            [r["model"], str(r["references"]), f"{r['tokens']:.0%}", *(ratio(r[name]) for name in names)]
            for r in result["counted"]
        ],
    )
    timed = markdown(
        ("model", "references", "tokens kept", "", "counted", "timed", "seconds", "peak saved"),
        [
            [
                *(r["model"], str(r["references"]), f"{r['tokens']:.0%}", r["what"]),
                *(ratio(r["counted"]), ratio(r["timed"]), f"{r['seconds']:.3f}"),
                "-" if r["saved_peak_mb"] is None else f"{r['saved_peak_mb']:,.0f} MB",
            ]
            for r in result["timed"]
        ],
    )
    clock = "CUDA events, bfloat16" if machine["device_type"] == "cuda" else "CPU time of one thread, float32"
    notes = EDITORS.format(size=result["size"], fill=result["fill"], steps=result["steps"], clock=clock)
    return "\n\n".join([head, "### Editors: counted", counted, "### Editors: timed", timed, notes])
