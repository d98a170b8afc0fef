"""Strategies: what each contender of a comparison is made by, and how a list of them is written.

    none; int8:mode=static; prune:keep=0;2;4,int8; my.toml

One is a pass line, as `--passes` takes it, the path of a recipe file, or "none": the model as fxc runs it, with nothing done to
it. Commas belong to a pass line, and so do semicolons in a value; one before the name of a pass, "none", "default" or a recipe
begins the next strategy.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxc.errors import UsageError
from fxc.passes.base import Pass, check_data_is_given, parse_passes, quoted_masked
from fxc.recipe import AMOUNTS, read_recipe

NONE, DEFAULT = "none", "default"
ORIGINAL = "original"
"""The name of the model as it comes, which is always among the contenders."""

_PRUNED = "prune:budget=0.1"
_RECOVERED = f"{_PRUNED},recover:steps=200:block_steps=50"
DEFAULTS = (
    NONE, "bf16", "int8:mode=weight_only", "int8", "int8:mode=static", "int4", "sparse24", _PRUNED, _RECOVERED,
    f"{_RECOVERED},int8",
)  # fmt: skip
"""What "default" stands for: nothing, mixed precision, int8 weights alone, int8, static int8, int4 in groups of 128, 2:4,
the most pruning that costs a tenth of the quality, the same trained for 200 steps afterwards, and that in int8."""

_LONGEST = 80
_NEXT = re.compile(r"([^:,;]*)")


@dataclass(frozen=True)
class Strategy:
    """text: as it was written; passes: in the order as written; skip, dtype, amounts: what a recipe says besides, amounts as
    fields of `Options`."""

    text: str
    passes: tuple[Pass, ...]
    skip: tuple[str, ...] = ()
    dtype: str | None = None
    amounts: dict[str, Any] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        return any(each.uses_data() for each in self.passes)

    @property
    def trains(self) -> bool:
        return any(each.uses_training() for each in self.passes)

    def check_data(self, has_calib: bool, has_train: bool) -> None:
        """Raises `UsageError`, with what to give, where it cannot do without data that is not there."""
        check_data_is_given(self.passes, has_calib, has_train)

    @property
    def effort(self) -> float:
        """About how many times as long it takes as rounding the weights: to share out the time that is left."""
        return 1 + 20 * self.trains + 4 * any(each.name == "prune" for each in self.passes) + 2 * self.learns


def parse_strategies(given: str | Path | Iterable[str | Path]) -> list[Strategy]:
    """The strategies in one text or several, "default" among them for `DEFAULTS`, each once. Raises `UsageError` for a pass, an
    option or a file that does not exist, before anything is done."""
    texts = [given] if isinstance(given, (str, Path)) else list(given)
    if wrong := [each for each in texts if not isinstance(each, (str, Path))]:
        hint = "give texts, as in ['int8', 'prune:heads=0.25,int8'], or the path of a recipe"
        raise UsageError(f"a {type(wrong[0]).__name__} is no strategy", where="strategies", hint=hint)
    parts = [part for text in texts for part in (_split(text) if isinstance(text, str) else [str(text)])]
    names = [name for part in parts for name in (DEFAULTS if part == DEFAULT else [part])]
    if not names:
        raise UsageError("there is no strategy to compare", where="strategies", hint="default, or as in int8;int4;prune,int8")
    return [_strategy(name) for name in dict.fromkeys(names)]


def _split(text: str) -> list[str]:
    """What stands between semicolons that begin another strategy."""
    masked = quoted_masked(text)
    parts, begin = [], 0
    for at in [i for i, each in enumerate(masked) if each == ";"]:
        is_in_value = "=" in masked[begin:at].rpartition(",")[2].rpartition(":")[2]
        if not is_in_value or _begins(text[at + 1 :]):
            parts.append(text[begin:at])
            begin = at + 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def _begins(rest: str) -> bool:
    """Whether a strategy begins here."""
    word = _NEXT.match(rest.strip())[1].strip()
    return word in (NONE, DEFAULT) or word in Pass.registry or word.endswith(".toml")


def _strategy(text: str) -> Strategy:
    if text == NONE:
        return Strategy(text, ())
    if text == ORIGINAL:
        hint = f"leave it out: it is always there; {NONE!r} is the model as fxc runs it, with nothing done to it"
        raise UsageError("the model as it comes is no strategy", where="strategies", hint=hint)
    if text.endswith(".toml"):
        said = read_recipe(Path(text).expanduser())
        amounts = {name: said[name] for name in AMOUNTS if name in said}
        passes = tuple(parse_passes(said.get("passes", "int8")))
        return Strategy(text, passes, tuple(said.get("skip", ())), said.get("dtype"), amounts)
    try:
        passes = tuple(parse_passes(text))
    except UsageError as error:
        hint = f"{error.hint}; a strategy is a pass line, a recipe file (.toml), {NONE} or {DEFAULT}" if error.hint else None
        raise UsageError(error.what, where=error.where or f"strategy {text}", why=error.why, hint=hint) from None
    if not passes:
        raise UsageError("a strategy without passes", where=f"strategy {text}", hint=f"{NONE} compares the model as it is")
    return Strategy(text, passes)


def slug_of(strategy: Strategy) -> str:
    """The name of its folder, the same whatever else is compared: letters, digits, dots, _ and -, and a hash of the text where
    something of that is lost."""
    plain = re.sub(r"[:=,]", "-", strategy.text)
    if len(plain) <= _LONGEST and re.fullmatch(r"(?:[a-z0-9_-]|(?<=\d)\.(?=\d))+", plain):
        return plain
    name = Path(strategy.text).stem if strategy.text.endswith(".toml") else strategy.text
    rest = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_LONGEST].strip("-")
    return f"{rest or 'strategy'}-{hashlib.sha256(strategy.text.encode(errors='surrogateescape')).hexdigest()[:8]}"
