"""Options that several commands have, and what is made of their text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from fxc.errors import UsageError
from fxc.plugins import import_plugin

if TYPE_CHECKING:
    from fxc.report.console import Output

Resume = Annotated[
    bool | None,
    typer.Option(help="Go on where the same command was killed; with --no-resume nothing is saved to go on from."),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else, of an error too.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1.")]
Backend = Annotated[str, typer.Option(help="What runs a compiled model: eager, inductor or aoti (compiled once, then kept).")]
KeepFloat = Annotated[
    float | None,
    typer.Option(help="Of the bytes saved, the share that faster floats may take again on a CPU: 0 to 1, 1 by default."),
]
Dtype = Annotated[str | None, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="How much memory compiling may take, as in 3GB; by default what there is."),
]
Stream = Annotated[
    bool | None,
    typer.Option(help="Read the weights piece by piece, and write them so; by default where the model does not fit."),
]


def _imported(modules: list[str] | None) -> list[str] | None:
    for module in modules or ():
        import_plugin(module)
    return modules


Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="MODULE", callback=_imported, help="Import this first: the passes and formats it adds. Repeatable."
    ),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")]


def output_for(as_json: bool) -> Output:
    from fxc.report.console import Output

    return Output(as_json)


def checked_device(name: str | None) -> str | None:
    """`name` if torch knows such a device and this machine has it."""
    if name is None:
        return None
    from fxc.lower.target import check_target

    check_target(name, None)
    return name


def checked_dtype(name: str | None) -> str:
    """`name`, "auto" for None, if models are compiled in it."""
    from fxc.source.load import as_dtype

    name = "auto" if name is None else name
    as_dtype(name)
    return name


def dynamic_shapes_of(given: list[str]) -> dict[str, tuple[int, ...]] | None:
    """`x:0,1` -> {"x": (0, 1)}."""
    shapes = {}
    for each in given:
        name, _, dimensions = each.rpartition(":")
        if not name or not all(part.isdecimal() for part in dimensions.split(",")):
            raise UsageError(
                "this does not name the dimensions of an input", where=f"--dynamic {each}", hint="NAME:0,1, counted from 0"
            )
        shapes[name] = tuple(map(int, dimensions.split(",")))
    return shapes or None


_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def bytes_of(option: str, text: str) -> int:
    """3GB, 500MiB, 2.5e9 -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMGT]?I?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is not a number of bytes", where=option, hint="as in 3GB, 500MiB or 2.5e9")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def sizes_of(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{text!r} is not a list of sizes", where=option, hint="as in 1,8,32")
    return [int(part) for part in parts]
