"""How to run a compilation again: a command line and a recipe file, from what its report says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxc.page import told


@dataclass(frozen=True)
class Again:
    """recipe: a TOML file; command: of a shell; missing: what the report does not know, in words."""

    command: str
    recipe: str
    missing: list[str]


def again(report: Mapping[str, Any]) -> Again | None:
    """None where the report does not say which passes there were."""
    steps = [step for step in told.mappings(report.get("passes")) if isinstance(step.get("name"), str)]
    if not steps:
        return None
    passes, missing = [], []
    for step in steps:
        # What a pass chose by itself is in plan.json.
        passes.append("prune" if step.get("repeat") else told.text(step["name"], 4000))
    source = told.mapping(report.get("source"))
    where = told.text(source.get("id") or source.get("path"), 1000)
    if not where:
        missing.append(f"the model was given as {told.text(source.get('kind')) or 'something that the report does not name'}: "
                       "put its name in the place of MODEL")  # fmt: skip
    parts = ["fxc", "compile", where or "MODEL", "--recipe", "recipe.toml"]
    if revision := told.text(source.get("revision")):
        parts += ["--revision", revision]
    if part := told.text(source.get("part")):
        parts += ["--part", part]
    lines = [f"passes = [{', '.join(map(_quoted, passes))}]"]
    if skip := told.texts(report.get("skip")):
        lines.append(f"skip = [{', '.join(_quoted(each) for each in skip)}]")
    dtype = told.text(report.get("dtype"))
    if dtype and dtype != "auto":
        lines.append(f"dtype = {_quoted(dtype)}")
    for key, option in (("calibration", "calib"), ("training", "train")):
        if data := told.mapping(report.get(key)):
            parts += [f"--{option}", "DATA"]
            lines += [f"{option}_{name} = {amount}" for name, field in (("samples", "most"), ("length", "length"))
                      if (amount := told.whole(data.get(field))) is not None]  # fmt: skip
            digest = told.text(data.get("sha256"))
            missing.append(f"which data --{option} was is not recorded, but for its hash: sha256 {digest}")
    if (limit := told.whole(report.get("limit"))) is not None:
        parts += ["--limit", str(limit)]
        missing.append("which passes would have come after the limit")
    for module in dict.fromkeys(told.text(told.mapping(step.get("plugin")).get("module")) for step in steps):
        parts += ["--plugin", module] if module else []
    if any(step.get("repeat") for step in steps):
        parts += ["--plan", "plan.json"]
        missing.append("plan.json lies beside this page in the artifact")
    if told.mapping(report.get("teacher")):
        parts += ["--teacher", told.text(told.mapping(report["teacher"]).get("id"), 1000) or "TEACHER"]
    return Again(shlex.join([*parts, "-o", "OTHER"]), "\n".join(lines), missing)


def _quoted(value: str) -> str:
    """As TOML writes it: of what JSON escapes, no text that is printable has more than quotes and backslashes."""
    return json.dumps(told.text(value, 4000), ensure_ascii=False)
