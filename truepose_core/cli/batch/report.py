"""What a batch leaves for people and for tables: report.html and report.parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from truepose_core.cli.batch.spec import Row, arrow
from truepose_core.cli.batch.store import Store

PARQUET, PAGE = "report.parquet", "report.html"
_FIELDS = ("id", "status", "source", "pose", "options", "picture", "sha256", "seconds", "error", "notes")


def collect(rows: Sequence[Row], records: Mapping[str, dict[str, Any]], base: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per row of the table, in its order: its record, or "missing" where nothing was done yet."""
    entries = []
    for row in rows:
        record = records.get(row.id)
        if record is None or record.get("hash") != row.hash(base):
            record = {"status": "missing", "source": row.source, "pose": row.pose, "options": dict(row.options)}
        entries.append({name: record.get(name) for name in _FIELDS} | {"id": row.id})
    return entries


def parquet_bytes(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """The entries as a table; options as JSON text."""
    pa = arrow()
    kinds = {"seconds": pa.float64()}
    columns = {name: [entry[name] for entry in entries] for name in _FIELDS}
    columns["options"] = [json.dumps(value or {}, sort_keys=True) for value in columns["options"]]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _FIELDS])
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table(columns, schema=schema), buffer)
    return buffer.getvalue()


def page(entries: Sequence[Mapping[str, Any]]) -> str:
    """One page with thumbnails, a search and a filter; pictures are loaded from beside it as they are seen."""
    shown = ("id", "status", "source", "pose", "picture", "seconds", "error", "notes")
    data = json.dumps([[entry[name] for name in shown] for entry in entries]).replace("</", "<\\/")
    template = (files("truepose_core") / "cli" / "batch" / "report.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", data)


def write_report(store: Store, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write both files. Returns their names."""
    store.write(PARQUET, parquet_bytes(entries))
    store.write(PAGE, page(entries).encode())
    return [PARQUET, PAGE]
