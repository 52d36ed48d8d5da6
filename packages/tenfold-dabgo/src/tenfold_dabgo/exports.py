"""Results as files: JSON Lines, CSV, Parquet, Markdown, and one text's highlights as LaTeX.

Every file says what its numbers mean: a header record with method, unit, sign convention, view
and settings comes first (JSON Lines: the first line; CSV: a first line that begins with `#`;
Parquet: the schema's metadata under `tenfold-dabgo`; Markdown and LaTeX: in the text). Rows are
all scored samples, best first, with the columns

    rank  sample_id  score  signed  direction  loss_asc  loss_desc  [loss_base]  [z]  exact
    metadata  text_preview
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tenfold.capabilities import Tokenizes
from tenfold.errors import ComponentError, ConfigError
from tenfold.files import replacing, write_text

from tenfold_dabgo.describe import number, short_metadata
from tenfold_dabgo.scores import AttributionResult, sign_convention
from tenfold_dabgo.settings import EXPORTS

SCHEMA = "dabgo-ranking/1"
FORMATS = dict(zip(EXPORTS, ("jsonl", "csv", "parquet", "md", "tex"), strict=True))
"""Format → file suffix."""
PREVIEW = 120
BLOCK = 4096
"""Rows in memory at once."""
_LOSSES = {"ascent": "loss_asc", "descent": "loss_desc", "base": "loss_base"}


def header(
    result: AttributionResult, view: str = "signed", settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The record that explains a file's numbers."""
    return {
        "record": "header",
        "schema": SCHEMA,
        "query": result.query_id,
        "method": result.method,
        "view": view,
        "unit": result.unit,
        "sign": sign_convention(result.method, view),
        "samples": len(result.dataset),
        "scored": int(result.scored.sum()),
        "corpus": result.dataset.content_hash(),
        "settings": {} if settings is None else dict(settings),
    }


def ranking_rows(
    result: AttributionResult,
    *,
    view: str = "signed",
    model: Tokenizes | None = None,
    null: np.ndarray | None = None,
    top: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per scored sample, largest score first.

    After a prefilter, exactly scored samples come first, as in `AttributionResult.topk`.

    Args:
        result: scores of one query.
        view: whose scores rank.
        model: decodes text previews; left out without one.
        null: `[M, N]` scores of unrelated queries, for the column `z`.
        top: only the first so many rows.
    """
    scores = result.scores(view)
    known = np.flatnonzero(np.isfinite(scores))
    exact = np.ones(len(scores), dtype=bool) if result.exact is None else result.exact
    order = known[np.lexsort((known, -scores[known], ~exact[known]))]
    z = None if null is None else result.z_scores(null)
    for rank, i in enumerate(order[:top].tolist(), start=1):
        row: dict[str, Any] = {
            "rank": rank,
            "sample_id": result.dataset.sample_ids[i],
            "score": float(scores[i]),
            "signed": float(result.values[i]),
            "direction": "opponent" if result.values[i] < 0 else "proponent",
        }
        for name, column in _LOSSES.items():
            if name in result.losses:
                row[column] = number(result.losses[name][i], 17)
        if z is not None:
            row["z"] = number(z[i], 17)
        row["exact"] = bool(exact[i])
        row["metadata"] = short_metadata(result.dataset.metadata(i))
        if model is not None:
            text = " ".join(model.decode(result.dataset.ids(i).tolist()).split())
            row["text_preview"] = text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…"
        yield row


def write_jsonl(path: Path, head: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> Path:
    """The header as the first line, then one line per row."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(_line(head))
        for row in rows:
            file.write(_line(row))
    return path


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def write_csv(path: Path, head: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> Path:
    """A `#` line with the header record, then a table (readers: `comment="#"`, or skip a line).

    Metadata columns of the first rows stand beside the others as `metadata.<name>`; those that
    only later rows have are in the last column, `metadata`, as JSON.
    """
    first = list(islice(rows, BLOCK))
    own = list(dict.fromkeys(name for row in first for name in row if name != "metadata"))
    columns = list(dict.fromkeys(name for row in first for name in row["metadata"]))
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        file.write("# " + _line(head))
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*own, *(f"metadata.{name}" for name in columns), "metadata"])
        for row in chain(first, rows):
            metadata = dict(row["metadata"])
            cells = [row.get(name) for name in own]
            cells += [metadata.pop(name, None) for name in columns]
            table.writerow([*cells, json.dumps(metadata) if metadata else None])
    return path


def write_parquet(path: Path, head: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> Path:
    """A Parquet table, written in blocks; the header record is JSON in the schema's metadata.

    Raises:
        ComponentError: pyarrow is not installed.
    """
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ComponentError(
            "a Parquet export needs the module 'pyarrow', which is not installed",
            hint='pip install "tenfold[parquet]"',
        ) from error
    blocks = iter(lambda: list(islice(rows, BLOCK)), [])
    first = next(blocks, [])
    kinds = {"rank": arrow.int64(), "exact": arrow.bool_()}
    kinds |= dict.fromkeys(("sample_id", "direction", "metadata", "text_preview"), arrow.string())
    fields = [(name, kinds.get(name, arrow.float64())) for name in (first[0] if first else ())]
    facts = {b"tenfold-dabgo": json.dumps(head, default=str).encode()}
    schema = arrow.schema(fields, metadata=facts)
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as file:
        for block in chain([first], blocks):
            listed = [{**row, "metadata": json.dumps(row["metadata"])} for row in block]
            file.write_table(arrow.Table.from_pylist(listed, schema=schema))
    return path


def write_markdown(
    path: Path, head: Mapping[str, Any], result: AttributionResult, model: Any, top: int
) -> Path:
    """The header as a list, then tables of the `top` proponents and opponents."""
    lines = [f"# Training texts behind {_cell(result.query_id)}", ""]
    lines += [f"- **{key}**: {_cell(head[key])}" for key in ("method", "view", "unit", "sign")]
    lines += [f"- **samples**: {head['scored']} scored of {head['samples']}"]
    lines += [f"- **settings**: {_cell(json.dumps(head['settings'], default=str))}", ""]
    view = head["view"]
    for direction in ("proponents", "opponents"):
        lines += [f"## {direction.capitalize()}", "", "| rank | sample | score | text |"]
        lines += ["| ---: | --- | ---: | --- |"]
        for row in result.topk(top, direction, view):
            text = "" if model is None else model.decode(result.dataset.ids(row.index).tolist())
            cells = (row.rank, row.sample_id, f"{row.score:+.4g}", text[:PREVIEW])
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines.append("")
    write_text(path, "\n".join(lines))
    return path


def _cell(value: Any) -> str:
    """Text that cannot end its table cell or become markup."""
    text = " ".join(str(value).split())
    for special in "\\`*_[]<>|#":
        text = text.replace(special, "\\" + special)
    return text


def export(
    result: AttributionResult,
    form: str,
    path: Path,
    *,
    view: str = "signed",
    model: Any = None,
    settings: Mapping[str, Any] | None = None,
    null: np.ndarray | None = None,
    top: int = 10,
) -> Path:
    """Writes one file of a format; `top` limits what Markdown shows.

    LaTeX shows the best text that has token scores.

    Raises:
        ConfigError: unknown format, or LaTeX without token scores or model.
        ComponentError: Parquet without pyarrow.
    """
    if form not in FORMATS:
        raise ConfigError(f"export is {form!r}; known: {', '.join(FORMATS)}")
    if form == "latex":
        return result.to_latex(path, model=model, view=view, settings=settings)
    head = header(result, view, settings)
    if form == "markdown":
        return write_markdown(path, head, result, model, top)
    write = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[form]
    return write(path, head, ranking_rows(result, view=view, model=model, null=null))
