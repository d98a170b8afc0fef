"""What goes where: models of many families in every format that fxc exports, loaded by the other tool and compared.

    python -m benchmarks.exports
    python -m benchmarks.exports --sources 'Llama;BERT' --formats onnx

Each cell runs in a process of its own, for `--limit` seconds at most, and is written to benchmarks/results/exports.json when it
is done. What is there is not run again, so that a run that was ended goes on where it was: `--again` runs it all the same,
`--changed` what another version of fxc or of a package gave, which the table marks, or other code of fxc.
The table of all of it is benchmarks/results/exports.md and, with what the formats are, docs/exports.md. llama-cpp-python
runs the GGUF files where it is installed; vLLM is not run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.exports.apart import apart, code, ready
from benchmarks.exports.cells import FORMATS, run
from benchmarks.exports.sources import SOURCES
from benchmarks.exports.text import page, table
from benchmarks.output import RESULTS, note
from fxc.kernel_bench.files import versions, write_texts

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description=__doc__.partition("\n")[0])
    parser.add_argument("--sources", default="", help="rows whose names are or begin so, by semicolons; else all")
    parser.add_argument("--formats", default="", help="columns, likewise")
    parser.add_argument("--again", action="store_true", help="run cells that are there already")
    parser.add_argument("--changed", action="store_true", help="run those that other versions or other code of fxc gave")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a cell may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are, and go to")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where exports.md goes")
    options = parser.parse_args()
    rows = _chosen(parser, SOURCES, options.sources.split(";") if options.sources else [])
    columns = _chosen(parser, FORMATS, options.formats.split(";") if options.formats else [])
    path = options.results / "exports.json"
    report = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    ready("benchmarks.exports.cells", "transformers.generation", "torch.export", "torch.onnx")
    now = code()
    for source in rows:
        for column in columns:
            cells = report["cells"].setdefault(source.name, {})
            made_by = {"versions": versions(column.packages), "code": now}
            known = cells.get(column.name)
            if known and not options.again and not (options.changed and _is_of_others(known, made_by)):
                continue
            note(f"{source.name}, {column.name}")
            cells[column.name] = apart(run, source.name, column.name, limit=options.limit) | made_by
            note(f"  {cells[column.name]}")
            report["versions"] = report.get("versions", {}) | made_by["versions"]
            write_texts(path.parent, {path.name: json.dumps(report, indent=1) + "\n"})
    report = _in_order(report)
    write_texts(path.parent, {path.name: json.dumps(report, indent=1) + "\n", "exports.md": table(report)})
    write_texts(options.docs, {"exports.md": page(report)})


def _is_of_others(cell: dict[str, Any], made_by: dict[str, Any]) -> bool:
    return any(cell.get(name) != value for name, value in made_by.items())


def _chosen(parser: argparse.ArgumentParser, known: tuple[Any, ...], wanted: list[str]) -> list[Any]:
    names = {each.name for each in known}
    found = [
        each for each in known
        if not wanted or any(each.name == name or (name not in names and each.name.startswith(name)) for name in wanted)
    ]  # fmt: skip
    if not found:
        parser.error(f"there is none of {', '.join(wanted)}: {'; '.join(each.name for each in known)}")
    return found


def _in_order(report: dict[str, Any]) -> dict[str, Any]:
    """Rows and columns as they are declared; what is declared no more goes."""
    cells = report["cells"]
    rows = {
        source.name: {column.name: cells[source.name][column.name] for column in FORMATS if column.name in cells[source.name]}
        for source in SOURCES
        if source.name in cells
    }
    return report | {"cells": rows}


if __name__ == "__main__":
    main()
