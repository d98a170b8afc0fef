"""The difference of two programs as a unified diff, in which renumbered values are not differences.

Lines are paired by what they say without the numbers. The paired lines then tell which number of one program is which
of the other, and a pair whose operands do not correspond is a difference after all: the same operator reads other values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

_VALUE = re.compile(r"%\d+")
_CONTEXT = 2


def unified_diff(before: str, after: str, names: tuple[str, str], context: int = _CONTEXT) -> str:
    """A unified diff of two program texts, values numbered as in `before`, those only in `after` as %+0, %+1, ...; "" when
    the programs are the same but for numbers."""
    a, b = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, [_VALUE.sub("%", s) for s in a], [_VALUE.sub("%", s) for s in b], autojunk=False)
    pairs = [(i + k, j + k) for i, j, count in matcher.get_matching_blocks() for k in range(count)]
    numbers = {_defined(b[j]): _defined(a[i]) for i, j in pairs if _defined(b[j])}
    fresh = 0
    for line in b:
        if (name := _defined(line)) and name not in numbers:
            numbers[name], fresh = f"%+{fresh}", fresh + 1
    renamed = [_VALUE.sub(lambda m: numbers.get(m[0], m[0]), line) for line in b]
    paired = {i: j for i, j in pairs if a[i] == renamed[j]}
    changes = list(_unified(a, renamed, paired, context))
    return "\n".join([f"--- {names[0]}", f"+++ {names[1]}", *changes]) + "\n" if changes else ""


def _defined(line: str) -> str | None:
    """The value that a line defines: "%3" of "%3: f32[2] = ..."."""
    found = _VALUE.match(line)
    return found[0] if found else None


def _unified(a: list[str], b: list[str], paired: dict[int, int], context: int) -> Iterator[str]:
    """The lines of a unified diff, where exactly those in `paired` (index in a -> index in b, increasing) are equal."""
    marked: list[tuple[str, str, int, int]] = []
    j = 0
    for i, line in enumerate(a):
        if i in paired:
            marked += [("+", b[k], i, k) for k in range(j, paired[i])]
            marked.append((" ", line, i, paired[i]))
            j = paired[i] + 1
        else:
            marked.append(("-", line, i, j))
    marked += [("+", b[k], len(a), k) for k in range(j, len(b))]
    shown = [False] * len(marked)
    for at, (mark, *_) in enumerate(marked):
        if mark != " ":
            shown[max(0, at - context) : at + context + 1] = [True] * len(shown[max(0, at - context) : at + context + 1])
    for at, (mark, line, i, j) in enumerate(marked):
        if shown[at]:
            if at == 0 or not shown[at - 1]:
                yield f"@@ -{i + 1} +{j + 1} @@"
            yield mark + line
