"""The errors a user can meet, each with what happened, where, why and what to do next.

The text has three lines, the last two only when there is something to say:

    error[FXC-E3]: /models/x/model.safetensors: the file is truncated
    why: its header describes 4096 bytes and it has 4000
    try: download the file again

and after the first, where the fault is in a program, the lines of its text around the place.

The number after FXC-E is the exit code of the command line. This module imports nothing of fxc.
"""

import re
from collections.abc import Iterable

# C0 and C1 controls, line and paragraph separators, and the bidirectional marks that can reorder a line on screen.
_UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
# A whole terminal sequence goes, not only its first byte: CSI (colour, cursor), OSC (title, links), two-byte escapes.
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_CONTROL = re.compile(_UNPRINTABLE)
# Of each part of an error: what comes from outside has no end.
_LONGEST = 1200


def printable(text: object) -> str:
    """`text` on one line, safe to show on a terminal whoever wrote it: escapes go, other controls become spaces."""
    return " ".join(_CONTROL.sub(" ", _ESCAPE.sub("", str(text))).split())


def printable_lines(text: object) -> str:
    """Like `printable` for text of many lines: line breaks, tabs and spaces stay."""
    lines = _ESCAPE.sub("", str(text)).split("\n")
    return "\n".join("\t".join(_CONTROL.sub(" ", part) for part in line.split("\t")) for line in lines)


def _short(text: object) -> str:
    """`printable`, with its middle left out where it is very long."""
    line = printable(text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 200]} ... {line[-190:]}"


class FxcError(Exception):
    """Base of everything fxc raises on purpose.

    what: the fault in one phrase; where: file, layer (FQN), node or option; why: the evidence; hint: the next step; excerpt:
    lines of a program's text (`fxc.ir.text.excerpt`).
    """

    exit_code = 1

    def __init__(
        self,
        what: object,
        *,
        where: object = None,
        why: object = None,
        hint: object = None,
        excerpt: Iterable[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = _short(what)
        self.where = None if where is None else _short(where)
        self.why = None if why is None else _short(why)
        self.hint = None if hint is None else _short(hint)
        self.excerpt = [printable_lines(line) for line in excerpt]

    @property
    def code(self) -> str:
        return f"FXC-E{self.exit_code}"

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.where}: {self.what}" if self.where else f"error[{self.code}]: {self.what}"]
        lines += self.excerpt
        if self.why:
            lines.append(f"why: {self.why}")
        if self.hint:
            lines.append(f"try: {self.hint}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str | list[str] | None]:
        """What `--json` prints of it; "excerpt" only where there is one."""
        kind = type(self).__name__
        told = {"code": self.code, "kind": kind, "what": self.what, "where": self.where, "why": self.why, "hint": self.hint}
        return told | ({"excerpt": self.excerpt} if self.excerpt else {})

    def __reduce__(self) -> tuple:
        # Exception's own form loses the keywords, and errors do cross processes (pytest-xdist, torchrun).
        return _rebuild, (type(self), self.what, self.where, self.why, self.hint, self.excerpt)


def _rebuild(
    kind: type[FxcError], what: str, where: str | None, why: str | None, hint: str | None, excerpt: list[str]
) -> FxcError:
    return kind(what, where=where, why=why, hint=hint, excerpt=excerpt)


class UsageError(FxcError):
    """The call or the command line is wrong."""

    exit_code = 2


class InputRefused(FxcError):
    """The input is unsafe, corrupt or unsupported."""

    exit_code = 3


class CaptureFailed(FxcError):
    """The model could not be turned into a graph."""

    exit_code = 4


class VerificationFailed(FxcError):
    """The compiled program is not what it should be."""

    exit_code = 5


class ResourceError(FxcError):
    """Memory, disk or a device is missing or too small."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """The first line of somebody else's message, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
