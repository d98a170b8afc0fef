"""The faults that compression tools are known to have, what fxc does with each, and the tests that show it.

`@pytest.mark.fault(7)` on a test says that it shows what fxc does with fault 7. docs/reliability.md is made of this file and
of these marks, which are read from the tests' source.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from repo import REPO


@dataclass(frozen=True)
class Fault:
    """name: what goes wrong elsewhere; does: what fxc does."""

    name: str
    does: str


FAULTS = {
    1: Fault(
        "one side of a tied embedding and head is quantized, the other not, or a side is lost",
        "A tied weight is one constant with an alias. It stays float by default and is told of; `embeddings=` packs one set of "
        "constants that both sides read. What is saved is as large as what was compiled, and gives the same numbers.",
    ),
    2: Fault(
        "weights are taken for tied because they lie at one address",
        "Only what is the same parameter is tied. Views of one buffer are constants of their own, and are saved so.",
    ),
    3: Fault(
        "a module that is called twice is decided upon twice",
        "One decision a weight. Its parts are made once, and learned from all that its calls read; a range of static "
        "activations covers them all.",
    ),
    4: Fault(
        "the experts of a mixture, one tensor of three dimensions, are skipped silently",
        "Experts are layers, and are packed by `int8`; other formats name them as left alone. Coverage is told in bytes, and "
        "`--min-coverage` makes too little of it an error.",
    ),
    5: Fault("a pass finds nothing to do and nobody notices", "An error, with the reasons; `--allow-noop` accepts it."),
    6: Fault(
        "rows that no group, block or tile divides",
        "Decided for each layer before any work: a group that divides, or the layer stays, with the reason. Kernels take any "
        "number of rows and columns that a format has.",
    ),
    7: Fault(
        "a row or group of zeros gives a scale of zero, then NaN",
        "Scales are positive and finite whatever the row; a row of zeros gives zeros. A gate looks at every new scale.",
    ),
    8: Fault(
        "NaN or infinity in weights or scales",
        "Refused with names and counts when weights are read, when a pass makes them, and when an artifact is loaded.",
    ),
    9: Fault("tensors of no size, a batch of none", "Empty weights are left alone, empty inputs give empty outputs."),
    10: Fault(
        "dtypes that are not supported, models that are quantized already",
        "Refused before anything is loaded, with what was found and where to begin instead.",
    ),
    11: Fault(
        "weights that are not contiguous, transposed, or shared views",
        "Packed and saved by their values, whatever their strides; matrices that are stored turned are recognised.",
    ),
    12: Fault(
        "biases are lost or not pruned; a removed channel still gave a constant",
        "What a removed channel gave is folded into the bias that follows, or the channel stays where that is not exact.",
    ),
    13: Fault(
        "2:4: minus zero counts as a number, rows of other lengths",
        "Zeros are known by value, whatever their sign; of four two stay, ties included; other rows stay dense, and it is "
        "said.",
    ),
    14: Fault(
        "pruned heads no longer fit their keys and values",
        "Query heads know which keys and values they read. Every ratio is removed exactly, and where a configuration "
        "cannot say "
        "what is left, no plain export is written.",
    ),
    15: Fault(
        "channels of grouped and depthwise convolutions are pruned wrongly",
        "Groups are axes of their own: equal counts go, or the channels stay, with the reason.",
    ),
    16: Fault(
        "layers end up with different sizes and no loader takes them",
        "fxc runs them; an export is refused with the layers that differ, and `uniform=true` avoids it.",
    ),
    17: Fault("all of a layer is pruned", "One unit stays, or the whole branch goes where it provably adds nothing."),
    18: Fault(
        "control flow that depends on data cannot be captured",
        "One message with the line of the model's source and what to do, and no trace.",
    ),
    19: Fault(
        "a size of the example is baked in",
        "Every size is tried with another number; what is fixed is checked at the call, and the program is compared with "
        "the model "
        "at sizes that were not traced.",
    ),
    20: Fault(
        "a cache of another dtype or kind gives fluent nonsense",
        "Layers give the dtype that they were given, and caches have the model's. Growing, sliding and static caches "
        "generate the "
        "same tokens as the original.",
    ),
    21: Fault(
        "an index or a link leads out of the folder",
        "Refused before anything is opened, on names of every system; links within the folder and within the hub's cache pass.",
    ),
    22: Fault(
        "truncated, missing or stale shards are read as numbers",
        "Headers, sizes and names of all files are compared before loading; the file and the missing bytes are named.",
    ),
    23: Fault(
        "pickles are unpickled, or tried when something else fails",
        "Refused. Nothing is ever unpickled that could run code, and there is no second try with less care.",
    ),
    24: Fault(
        "code and kernels that come with a model run without being asked for",
        "Refused until `--trust-remote-code`; names of hub kernels in a configuration are refused always.",
    ),
    25: Fault(
        "the output is the input, or holds something already",
        "Refused, links resolved. Only artifacts are replaced, only with `--overwrite`, and by a rename.",
    ),
    26: Fault(
        "a full or read-only disk leaves half an output, or destroys the old one",
        "Space is looked at first; everything is written beside its place, synced, read back and renamed. An error at any "
        "write "
        "leaves what was there.",
    ),
    27: Fault(
        "an interruption or a kill leaves half an output",
        "What is there afterwards is the old output, the new one, or none; `--resume` goes on to the same bytes.",
    ),
    28: Fault(
        "memory runs out in the middle",
        "What a pass needs is said before it begins, and refused with what would help; what happens all the same is one error.",
    ),
    29: Fault(
        "two processes write one output, or one cache",
        "One of them writes, the others are told. A lock of a process that died holds nobody up. Caches are written by "
        "rename, and "
        "one that is damaged is made anew.",
    ),
    30: Fault(
        "the same input gives other bytes",
        "The same bytes in another process, with another hash seed, other threads and another folder, with calibration too.",
    ),
    31: Fault(
        "there is no GPU, or no compiler",
        "Everything compiles and runs on a CPU; what is missing is said with what to do.",
    ),
    32: Fault(
        "artifacts of other versions do not load, or load wrongly",
        "Artifacts of every format, made by this version, are kept and loaded by all later tests; a newer format is refused.",
    ),
    33: Fault(
        "names and files from outside reach the terminal, a page or the memory",
        "Controls and escapes are taken out, pages escape what they show, and files, nestings and numbers have limits.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A test that shows a fault; slow: whether only `make test ALL=1` runs it."""

    node: str
    slow: bool = False


@dataclass
class Marks:
    """by_fault: number -> the tests that show it; unknown: marks with something else than a number of a fault."""

    by_fault: dict[int, list[Shown]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def marks() -> Marks:
    """All marks of the tests, by their source."""
    found = Marks({number: [] for number in FAULTS})
    for path in sorted((REPO / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                _add(found, path, node)
    return found


def _add(found: Marks, path: Path, test: ast.FunctionDef) -> None:
    name = f"{path.relative_to(REPO)}::{test.name}"
    slow = any(ast.unparse(each) == "pytest.mark.slow" for each in test.decorator_list)
    for each in test.decorator_list:
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "pytest.mark.fault":
            for argument in each.args:
                number = argument.value if isinstance(argument, ast.Constant) else None
                if number in FAULTS:
                    found.by_fault[number].append(Shown(name, slow))
                else:
                    found.unknown.append(name)


def page() -> str:
    """docs/reliability.md."""
    lines = [
        "# What goes wrong with others, and what fxc does", "",
        "Faults that tools for compression are known for. The table is made from the marks of the tests "
        "(`@pytest.mark.fault(7)`) and from", "`tests/helpers/faults.py`; `make test ALL=1` runs all of them, "
        "and a test holds this page to them.", "",
        "| # | fault | what fxc does | shown by |", "|---|---|---|---|",
    ]  # fmt: skip
    found = marks().by_fault
    for number, fault in FAULTS.items():
        tests = "<br>".join(f"`{each.node.removeprefix('tests/')}`" for each in found[number])
        lines.append(f"| {number} | {fault.name} | {fault.does} | {tests} |")
    return "\n".join(lines) + "\n"
