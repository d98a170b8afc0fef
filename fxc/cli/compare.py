"""fxc compare."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fxc.comparison import table
from fxc.comparison.compare import compare
from fxc.comparison.folder import STATE
from fxc.report.console import Output
from fxc.source.load import kind_of


def compare_strategies(output: Output, model: str, strategies: list[str], out: Path | None, options: dict[str, Any]) -> None:
    out = out or default_out(model)
    try:
        found = compare(model, strategies=strategies, out=out, track=output.track, say=output.note, **options)
    except BaseException:
        if (out / STATE).is_dir():
            output.note("what is done is kept: the same command goes on from there")
        raise
    output.table(table.title(found), table.heads(found), table.body(found))
    for line in table.lines(found):
        output.line(line)
    output.line(f"written to {out}: compare.md, compare.json, and an artifact for each strategy")
    output.json(found.as_json() | {"out": str(out)})


def default_out(model: str) -> Path:
    """The folder to write when none was given, in the current one: pylm-compare."""
    local = kind_of(model) in ("folder", "artifact")
    name = Path(model).expanduser().resolve().name if local else re.split(r"[/:]", model)[-1]
    plain = re.sub(r"[^\w.]+", "-", name).strip("-.")[:100]
    return Path(f"{plain or 'model'}-compare")
