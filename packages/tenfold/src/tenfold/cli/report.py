"""`tenfold report`: the report of a run, or a table that compares several."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a run's report, or compare several runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tenfold report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, ids or names")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="out.html, out.md or out.csv"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the report in the form that the file's ending names."""
    import json

    from tenfold.compare import comparison_blocks, write_blocks
    from tenfold.errors import ConfigError
    from tenfold.host import Host
    from tenfold.rescore import rescore
    from tenfold.store import find_run

    host = Host()
    stores = [find_run(host.runs, name) for name in args.runs]
    if len(stores) == 1:
        rescore(host, stores[0])
        written = stores[0].path / "report.html"
        if args.output is not None:
            if args.output.suffix not in (".html", ".md"):
                raise ConfigError(
                    f"{args.output}: the report of one run ends in .html or .md",
                    hint="`tenfold runs export` writes items as CSV",
                )
            source = stores[0].path / f"report{args.output.suffix}"
            args.output.write_bytes(source.read_bytes())
            written = args.output
    else:
        written = args.output or Path("comparison.html")
        write_blocks(written, "Comparison", comparison_blocks(stores))
    print(json.dumps({"report": str(written)}) if args.json else str(written))
    return 0
