"""What `truepose benchmark --editors` counts and times, on networks of a few blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from pack.nodes.host.benchmark import editors as host_editors
from pack.nodes.host.benchmark.editors import SMALL, Counter, Forward, count, counted, known_to_host, make_model

EDITORS = [replace(editor, side=16) for editor in SMALL if known_to_host(editor)]


@pytest.fixture(params=EDITORS, ids=lambda editor: editor.kind)
def editor(request: pytest.FixtureRequest) -> host_editors.Editor:
    return request.param


def test_one_and_two_blocks_say_what_a_deep_network_costs(editor: host_editors.Editor) -> None:
    meta = torch.device("meta")
    whole = Forward(editor, make_model(editor, meta, torch.float32), meta, torch.float32)
    sides = [(16, 16), (8, 16)]
    assert Counter.of(editor).flops(lambda forward: forward.run(sides)) == counted(partial(whole.run, sides))


def test_what_is_counted_keeps_its_order(editor: host_editors.Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_editors, "COUNTS", (1, 2))
    monkeypatch.setattr(host_editors, "SHARES", (1.0, 0.4, 0.25))
    rows = count(editor, lambda: None)
    drops = editor.kind == "Flux" or hasattr(host_editors.nodes_flux, "FluxKVCache")
    for references in (1, 2):
        mine = [row for row in rows if row["references"] == references]
        kept = [row["kept"] for row in mine]
        # What the parsing's tokens cost, once in a run, is counted too.
        assert kept[0] == pytest.approx(1, abs=1e-4)
        assert all(a > b for a, b in pairwise(kept))
        assert all(row["match"] > row["kept"] for row in mine)
        if drops:
            assert all(row["kept"] < row["cropped"] for row in mine[1:])
    if drops:
        by = {(row["references"], row["tokens"]): row["kept"] for row in rows}
        assert by[2, 0.4] < by[1, 0.4]


def test_dropping_costs_what_a_smaller_reference_costs(editor: host_editors.Editor) -> None:
    if editor.kind != "Flux":
        pytest.skip("the rows of this network are counted above")
    counter = Counter.of(editor)
    half = counter.flops(lambda forward: forward.run([(8, 16)]))
    kept = counter.flops(lambda forward: forward.run([(16, 16)], forward.guides(1, 0.5, False)))
    plain = counter.flops(lambda forward: forward.run([(16, 16)]))
    # Only the first projection of the patches still sees all of them.
    assert half < kept < half + 0.005 * plain


def test_the_reference_cache_saves_over_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(host_editors.nodes_flux, "FluxKVCache"):
        pytest.skip("this host has no reference cache")
    klein = next(e for e in host_editors.EDITORS if e.cached)
    small = {"hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "context_in_dim": 64}
    monkeypatch.setattr(host_editors, "COUNTS", (1,))
    monkeypatch.setattr(host_editors, "SHARES", (1.0, 0.4))
    rows = count(replace(klein, network={**klein.network, **small}, text=16, width=64, side=16), lambda: None)
    whole, *_, least = rows
    assert whole["cache"] == pytest.approx(whole["cache_kept"], rel=0.01)
    assert least["cache_kept"] < least["cache"] < least["kept"]


def test_times_beside_counts(editor: host_editors.Editor) -> None:
    rows = host_editors.time(replace(editor, side=16), torch.device("cpu"), 1, lambda: None)
    assert [(r["references"], r["what"]) for r in rows] == [(1, "kept"), (1, "match"), (2, "kept"), (2, "match")]
    assert all(r["seconds"] > 0 and r["counted"] < 1.05 for r in rows)


def test_a_person_fills_a_part_of_the_box() -> None:
    assert 0.2 < host_editors.filled() < 0.8
