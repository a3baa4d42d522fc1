"""The tables that `truepose benchmark` prints, and what their columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DEFINITIONS = """\
* counted: FLOPs (a multiply-add is two) of the matrix products and convolutions of one UNet call for one picture,
  over those of the plain UNet, by torch's FlopCounterMode. K and V of the source are at hand, as in a run: they are
  projected once per source (see K/V). Every row of the batch reads the source; where guidance calls the UNet two or
  three times in a step, one of the calls does, and what is above 1 is divided by the number of calls.
* steps: counted and timed are with kept tokens of weight 1 and beta = 0: no spare channels. Region match (beta > 0, or
  weights between 0 and 1) has 8 spare channels per head; with body match there are 16.
* timed: {timed}
* attention: the largest self-attention, with region match; ratios are channels over masked. The time with a mask
  includes making it; "ratio, mask ready" is against the kernel alone, with a mask that is there. Peak: above the
  inputs, by {memory}. On a CPU both are of some heads, times H / heads.
  Made for the kernel: q', k', v', or k', v' and the [H, N, N + M] mask; and the output.
* K/V: projected is with K and V of the source projected at each step, for one source; ratios are over cached.
* CAA: {caa} region tokens in the decoupled cross-attention of every block; with alignment: also the map of each block
  that region match can read."""

TIMED = {
    "cpu": """CPU time of one thread; medians of interleaved repeats. A step is put together: attention calls at every
  shape of site, on some of the heads, and for the rest one module of each kind and grid, weighted by FLOPs.""",
    "cuda": """CUDA events around calls of the whole UNet; medians of interleaved repeats. K/V and CAA: their own calls,
  added up over the sites.""",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def tables(result: dict[str, Any]) -> str:
    """Markdown of everything in the result of `measure`."""
    from truepose_core.benchmark.shapes import PER_REGION
    from truepose_core.regions import N_REGIONS

    def name(row: dict[str, Any]) -> list[str]:
        cells = [row["model"], row["size"]]
        return [*cells, f"{row['tokens']:.0%}"] if "tokens" in row else cells

    def ratio(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    def size(x: float | None) -> str:
        return "-" if x is None else f"{x:,.0f} MB"

    machine = result["machine"]
    load = "" if machine["load"] is None else f", load {machine['load']:.1f} on {machine['cores']} cores"
    blocks = [
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, {machine['device']}, {machine['dtype']}, "
        f"{machine['clock']}, threads: {machine['threads']}, repeats: {machine['repeats']}{load}",
        "### HPFA step / plain step",
        markdown(
            (
                *("model", "size", "source tokens", "counted", "timed"),
                *("counted, region match", "timed, region match", "counted, body match"),
            ),
            [
                name(r)
                + [
                    ratio(r[k])
                    for k in (
                        *("counted", "timed"),
                        *("counted_region_match", "timed_region_match", "counted_body_match"),
                    )
                ]
                for r in result["steps"]
            ],
        ),
        "### Attention: spare channels against a mask",
        markdown(
            (
                *("model", "size", "source tokens", "N x H x D", "channels", "masked", "ratio", "ratio, mask ready"),
                *("channels, peak", "masked, peak", "ratio, peak", "made for the kernel"),
            ),
            [
                [
                    *name(r),
                    f"{r['target_tokens']} x {r['heads']} x {r['head_width']}",
                    f"{r['augmented_seconds'] * 1e3:,.2f} ms",
                    f"{r['masked_seconds'] * 1e3:,.2f} ms",
                    ratio(r["timed"]),
                    ratio(r["timed_mask_ready"]),
                    size(r["augmented_peak_mb"]),
                    size(r["masked_peak_mb"]),
                    ratio(r["peak"]),
                    f"{size(r['augmented_passed_mb'])} / {size(r['masked_passed_mb'])}",
                ]
                for r in result["attention"]
            ],
        ),
        "### K/V of the source: projected at each step against cached",
        markdown(
            (
                *("model", "size", "source tokens", "cached, counted", "projected, counted"),
                *("ratio, counted", "ratio, timed", "SourceNet at each step, counted"),
            ),
            [
                name(r)
                + [
                    ratio(r[k])
                    for k in (
                        *("counted_cached", "counted_projected", "counted", "timed"),
                        "counted_source_net_every_step",
                    )
                ]
                for r in result["kv"]
            ],
        ),
        "### CAA step / plain step",
        markdown(
            ("model", "size", "counted", "timed", "counted, with alignment", "timed, with alignment"),
            [
                name(r) + [ratio(r[k]) for k in ("counted", "timed", "counted_with_alignment", "timed_with_alignment")]
                for r in result["caa"]
            ],
        ),
        DEFINITIONS.format(timed=TIMED[machine["device_type"]], memory=machine["memory"], caa=N_REGIONS * PER_REGION),
    ]
    return "\n\n".join(blocks)
