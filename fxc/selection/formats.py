"""What a group of layers may become: passes, and a recipe that says of each pass for which layers it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.base import Pass, parse_passes
from fxc.passes.linears import PackLinears
from fxc.passes.patterns import matches
from fxc.passes.tables import PackTables
from fxc.schemes import int8

DEFAULTS = (
    "int8:mode=weight_only", "int8", "int4:group=32", "int4:group=128", "int4:group=32:algorithm=gptq",
    "int4:group=64:algorithm=gptq", "int4:group=128:algorithm=gptq", "int4:bits=3:group=32:algorithm=gptq",
    "int4:bits=3:group=128:algorithm=gptq", "int4:bits=2:group=32:algorithm=gptq",
)  # fmt: skip
"""What groups may become besides float, where nobody says otherwise. Not grid, which takes the bytes of gptq and loses more,
nor 2:4, which in 4 bits takes those of 3 bits and loses several times as much."""

CONVOLUTIONS = "int8:mode=static"


@dataclass(frozen=True)
class Format:
    """passes: which packing passes, one after the other, make it; none: float, as the model came."""

    passes: tuple[PackLinears, ...] = ()

    def __str__(self) -> str:
        return ",".join(str(_without_tables(each)) for each in self.passes) or "float"

    def uses_data(self) -> bool:
        return any(each.uses_data() for each in self.passes)


FLOAT = Format()


def parse_format(text: str) -> Format:
    """Raises `UsageError` for passes that are no formats of layers, or that are for some of them already. Tables are packed
    like layers where the pass can do that."""
    passes = parse_passes(text)
    for each in passes:
        if not isinstance(each, PackLinears):
            raise UsageError(f"{each.name} packs no layers", where="formats", hint="formats are int8, int4, fp8, sparse24")
        if each.only:
            raise UsageError("the search says itself for which layers a format is", where="formats", hint="leave only= out")
    return Format(tuple(_with_tables(each) for each in passes))


def parse_formats(text: str | Iterable[str] | None, program: Program | None = None) -> list[Format]:
    """float, and those in `text`, between semicolons, or in several texts; None: `DEFAULTS`, and for a program with
    convolutions that which takes them."""
    usual = (*DEFAULTS, CONVOLUTIONS) if program is not None and _convolves(program) else DEFAULTS
    texts = usual if text is None else text.split(";") if isinstance(text, str) else text
    found = [parse_format(each) for each in texts if each.strip()]
    if not found:
        raise UsageError("there is no format to choose from", where="formats", hint="as in 'int8;int4:group=32:algorithm=gptq'")
    return [FLOAT, *dict.fromkeys(found)]


def _convolves(program: Program) -> bool:
    return bool(program.graph.find_nodes(op="call_function", target=int8.CONV2D))


def _with_tables(of: PackLinears) -> PackLinears:
    """As tables take int8 and int4 alone, of three bits a table has four."""
    return replace(of, embeddings=of.name) if isinstance(of, PackTables) else of


def _without_tables(of: Pass) -> Pass:
    named = {field.name: field.default for field in fields(of)}
    return replace(of, embeddings=named["embeddings"]) if "embeddings" in named else of


def recipe_of(
    formats: Sequence[Format],
    layers: Sequence[Sequence[str]],
    tables: frozenset[str],
    floats: Sequence[str] = (),
    left: Sequence[str] = (),
) -> list[Pass]:
    """The passes that make each of `formats` for its `layers`, and of nothing else; one for all layers names none. tables:
    which of all layers are looked up; floats: layers that are float by choice; left: those that no format takes."""
    made: list[Pass] = []
    chosen = [name for some in layers for name in some] + list(floats)
    every = [*chosen, *left]
    for form, names in zip(formats, layers, strict=True):
        if not names:
            continue
        only = "" if len(names) == len(chosen) else ";".join(_pattern(name, every) for name in names)
        for each in form.passes:
            own = each if tables & set(names) else _without_tables(each)
            made.append(replace(own, only=only))
    return made


def _pattern(name: str, every: Iterable[str]) -> str:
    """What matches the layer `name` alone, of all."""
    if any(matches(name, other) for other in every if other != name):
        return f"re:^{re.escape(name)}$"
    return name
