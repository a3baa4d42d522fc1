"""Advanced-ControlNet's reference (github.com/Kosinkadink/ComfyUI-Advanced-ControlNet) beside this pack: see README.md.

Both run inside ComfyUI, on the same random UNets, through the host's own guider.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSIDE = HERE.parent / "host" / "inside"
KINDS = {"SD1.5": "SD15", "SDXL": "SDXL"}
SIGMAS = (11.0, 4.3, 1.1, 0.0)
SCALE = 4.0
SIZE = (32, 32)
CASES = {
    "attention, style fidelity 1": ("reference_attn", 1.0),
    "attention, style fidelity 0": ("reference_attn", 0.0),
    "AdaIN, style fidelity 1": ("reference_adain", 1.0),
    "AdaIN, style fidelity 0": ("reference_adain", 0.0),
    "attention and AdaIN, style fidelity 1": ("reference_attn+adain", 1.0),
    "attention and AdaIN, style fidelity 0": ("reference_attn+adain", 0.0),
}
"""What it offers. Style fidelity 1: negative rows without the reference; 0: with it."""


def main() -> int:
    """Start the host's Python. Returns the exit code: 1 above a limit."""
    parser = argparse.ArgumentParser(description="Advanced-ControlNet's reference beside this pack, in ComfyUI")
    parser.add_argument("--original", type=Path, required=True, metavar="CLONE", help="a clone of its repository")
    parser.add_argument("--host", default="", metavar="FOLDER", help="ComfyUI; without it, it is looked for")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.original.is_dir():
        parser.error(f"{args.original} is not a folder")
    if args.inside:
        return compare(args.original.resolve())
    sys.path.insert(0, str(HERE.parents[1]))
    from truepose_core.benchmark.host import choose_host

    host = choose_host(args.host)
    command = [str(host.python), "-W", "ignore", __file__, "--inside", "--original", str(args.original.resolve())]
    return subprocess.run(command, env={**os.environ, "COMFYUI_DIR": str(host.folder)}).returncode


def compare(clone: Path) -> int:
    """In the host's Python: run both, print the table."""
    sys.path.insert(0, str(INSIDE))
    import conftest  # loads the host and this pack
    import torch

    sys.path.insert(2, str(HERE))
    from common import commit, print_rows

    conftest.load_package("advanced_controlnet", clone)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    import comfyui_version

    rows = []
    with torch.inference_mode():
        for title, family in KINDS.items():
            rows += family_rows(title, family)
    print(
        f"\n## Advanced-ControlNet\n\nOriginal: commit {commit(clone)}. ComfyUI {comfyui_version.__version__}, ", end=""
    )
    print(f"torch {torch.__version__}.\n")
    good = print_rows(rows)
    print(f"\n{'all within the limits' if good else 'NOT WITHIN THE LIMITS'}")
    return 0 if good else 1


def family_rows(title: str, family: str) -> list:
    """A row for the predictions and one for the latents of each case."""
    from bench import latent, model
    from common import Row
    from fixtures.tiny import make_conditioning

    who, source = model(0, family), latent(70, 1, *SIZE)
    prompts = make_conditioning(1), make_conditioning(2)
    rows = []
    for case, (kind, fidelity) in CASES.items():
        theirs = run(who, *originally(source, prompts, kind, fidelity))
        ours = run(patched(who, source, prompts, kind, fidelity), *prompts)
        rows.append(Row(f"{title}: {case}: guided prediction at each step", ours, theirs))
    # The bank of the negative rows is then the source as the positive prompt reads it, which is what `keep` shows them.
    one = prompts[0], prompts[0]
    for kind, what in (("reference_attn", "attention"), ("reference_attn+adain", "attention and AdaIN")):
        theirs = run(who, *originally(source, one, kind, 0.0))
        ours = run(kept(who, source, one[0], kind), *one)
        rows.append(Row(f"{title}: {what}, style fidelity 0, one prompt for both, `keep`", ours, theirs))
    return rows


def run(who: object, positive: list, negative: list) -> list:
    """The predictions of guided Euler steps through the host's guider, each from its own side's latent."""
    import comfy.samplers
    import torch
    from bench import latent

    predictions = []

    class Steps(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            x = noise * sigmas[0]
            for now, after in pairwise(sigmas):
                denoised = model_wrap(x, now.expand(x.shape[0]), **extra_args)
                # As the UNet says it: the noise, which is of the size of 1 at every level.
                noise = (x - denoised) / now
                x = x + noise * (after - now)
                predictions.append(noise.clone())
            return x

    guider = comfy.samplers.CFGGuider(who)
    guider.set_conds(positive, negative)
    guider.set_cfg(SCALE)
    noise = latent(9, 1, *SIZE)
    guider.sample(noise, torch.zeros_like(noise), Steps(), torch.tensor(SIGMAS), disable_pbar=True)
    return predictions


def originally(source: object, prompts: tuple, kind: str, fidelity: float) -> tuple[list, list]:
    """The prompts with its Reference ControlNet, and this pack's noise in the place of its own, which is drawn anew at
    every step."""
    import torch
    from advanced_controlnet.adv_control import control_reference
    from advanced_controlnet.adv_control.nodes_main import AdvancedControlNetApply

    from truepose_core.source.features import NOISE_SEED

    fixed = torch.randn(source.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    as_published = control_reference.ref_noise_latents

    def noised(latents: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return as_published(latents, sigma, fixed.to(latents).expand_as(latents))

    if as_published.__name__ == "ref_noise_latents":
        control_reference.ref_noise_latents = noised
    options = control_reference.ReferenceOptions.create_combo(kind, fidelity, 1.0)
    net = control_reference.ReferenceAdvanced(ref_opts=options, timestep_keyframes=None)
    picture = control_reference.ReferencePreprocWrapper(condhint=source)
    more = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    given = AdvancedControlNetApply.execute(*prompts, net, picture, **more).args
    return given[0], given[1]


def patched(who: object, source: object, prompts: tuple, kind: str, fidelity: float) -> object:
    """The MODEL with Apply HPFA, read at every step. Its bank is read with each row's own prompt: for negative rows
    that is a source of its own here."""
    for number, prompt in enumerate(prompts if fidelity == 0 else prompts[:1]):
        who = applied(who, source, prompt, kind, only_unconditional=number == 1)
    return who


def kept(who: object, source: object, prompt: list, kind: str) -> object:
    """The MODEL with Apply HPFA, *unconditional* `keep`."""
    return applied(who, source, prompt, kind, keep_unconditional=True)


def applied(who: object, source: object, prompt: list, kind: str, **seen: bool) -> object:
    """The MODEL with one source, read with this prompt at every step."""
    from bench import parsing
    from pack.nodes.host import applied as host_applied
    from pack.nodes.host import patch as host_patch
    from pack.nodes.host import source as host_source

    mask = parsing(0, 1, SIZE[0] * 8, SIZE[1] * 8)
    omega = (1.0 if "attn" in kind else 0.0,) * 7
    read = host_source.read_source(who, source, mask, prompt, levels=1, anew=True)
    style = 1.0 if "adain" in kind else 0.0
    return host_patch.with_hpfa(who, host_applied.AppliedSource(read, omega, style=style, **seen))


if __name__ == "__main__":
    sys.exit(main())
