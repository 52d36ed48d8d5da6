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

    Metadata columns stand beside the others as `metadata.<name>`.
    """
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        file.write("# " + _line(head))
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(flat)
    return path


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {f"metadata.{key}": value for key, value in row["metadata"].items()}
    return {key: value for key, value in row.items() if key != "metadata"} | metadata


def write_parquet(path: Path, head: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> Path:
    """A Parquet table; the header record is JSON in the schema's metadata.

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
    listed = [{**row, "metadata": json.dumps(row["metadata"])} for row in rows]
    table = arrow.Table.from_pylist(listed)
    metadata = {b"tenfold-dabgo": json.dumps(head, default=str).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)
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
