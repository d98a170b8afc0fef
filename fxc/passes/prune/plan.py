"""Decisions from outside: which heads, channels and layers to drop, in words or as JSON.

"model.layers.3.self_attn:heads=0,5", "model.layers.3.mlp:ffn=7", "model.layers.4"
{"drop": ["model.layers.4", {"module": "model.layers.3.self_attn", "heads": [0, 5]}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxc.errors import UsageError

KINDS = {"heads": "head", "kv_heads": "kv_head", "ffn": "ffn", "channels": "channel"}
_HINT = "write it as MODULE:heads=0,5, with heads, kv_heads, ffn or channels, or as MODULE alone"


@dataclass(frozen=True)
class Drop:
    """The units of one kind to drop in `module`, or where `kind` is "" the module itself."""

    module: str
    kind: str = ""
    units: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}/{self.kind}/{'+'.join(map(str, self.units))}" if self.kind else self.module


def parse_drops(text: str) -> tuple[Drop, ...]:
    """Several drops joined by ";". Within the options of a pass, where ":" and "," have a meaning, "/" and "+" stand for them:
    "model.layers.3.self_attn/heads/0+5"."""
    return tuple(_parse_drop(each.strip()) for each in text.split(";") if each.strip())


def _parse_drop(text: str) -> Drop:
    match = re.fullmatch(r"([\w.\-]+)(?:[:/](\w+)[=/]([\d,+\s]+))?", text)
    if match is None:
        raise UsageError(f"{text!r} does not say what to drop", hint=_HINT)
    module, kind, numbers = match.groups()
    if kind is None:
        return Drop(module)
    units = [n for n in re.split(r"[,+\s]+", numbers) if n]
    return _checked(module, kind, [int(n) for n in units], text)


def _checked(module: str, kind: str, units: Sequence[int], where: str) -> Drop:
    if kind not in KINDS:
        raise UsageError(f"there is no kind of unit {kind!r}", where=where, hint=f"one of {', '.join(KINDS)}")
    if not units or any(not isinstance(u, int) or isinstance(u, bool) or u < 0 for u in units):
        raise UsageError(f"{kind} has to be a list of numbers from 0 on", where=where, hint=_HINT)
    return Drop(module, kind, tuple(sorted(set(units))))


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers from 0 on, joined by ";" or ",": "0;2;4"."""
    parts = [each.strip() for each in re.split("[;,]", text)] if text else []
    if not all(each.isdecimal() for each in parts):
        raise UsageError(f"{text!r} is no list of layers", where="keep", hint="their numbers from 0 on, as in 0;2;4")
    return tuple(sorted({int(each) for each in parts}))


def read_plan(path: str | Path) -> tuple[Drop, ...]:
    """The drops in a JSON file. Raises `UsageError` for one that is not there or says something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("the plan cannot be read", where=path, why=error) from error
    entries = content.get("drop") if isinstance(content, dict) else None
    if not isinstance(entries, list) or set(content) != {"drop"}:
        raise UsageError("a plan is an object with one list", where=path, hint='{"drop": ["model.layers.4", ...]}')
    drops: list[Drop] = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        if isinstance(entry, str):
            drops += parse_drops(entry)
        elif isinstance(entry, dict) and isinstance(entry.get("module"), str):
            kinds = {k: v for k, v in entry.items() if k != "module"}
            if not kinds:
                drops.append(Drop(entry["module"]))
            for kind, units in kinds.items():
                drops.append(_checked(entry["module"], kind, units if isinstance(units, list) else [], where))
        else:
            raise UsageError("it names no module", where=where, hint='{"module": "model.layers.3.mlp", "ffn": [7]}')
    return tuple(drops)
