"""The words of a program's text: see `fxc.ir.text` for the form."""

from __future__ import annotations

import json
import re

from fxc.ir.program import is_name

DEEPEST = 32  # nesting of the call and result structures; an argument nests once or twice
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
_TOKEN = re.compile(
    rf"\s*(?:(?P<string>{STRING})|(?P<value>%[0-9]+)|(?P<at>@[A-Za-z0-9_.-]+)"
    r"|(?P<number>-?(?:inf\b|nan\b|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?))|(?P<name>[A-Za-z_][A-Za-z0-9_.]*)"
    r"|(?P<mark>[\[\]\(\),=]))"
)


class Bad(Exception):
    """What is wrong with the line at hand."""


class Tokens:
    """The tokens of `text`, up to the parenthesis that closes the first one; `rest` is the text after that."""

    def __init__(self, text: str):
        self.items: list[tuple[str, str]] = []
        self.position = position = depth = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise Bad(f"{text[position : position + 20]!r} cannot stand here")
            kind = match.lastgroup
            self.items.append((kind, match[kind]))
            position = match.end()
            depth += (match[kind] == "(") - (match[kind] == ")")
            if match[kind] == ")" and depth <= 0:
                break
        self.rest = text[position:]

    def kind(self) -> str:
        return self.items[self.position][0] if not self.at_end() else "end"

    def peek(self, ahead: int) -> str | None:
        index = self.position + ahead
        return self.items[index][1] if index < len(self.items) else None

    def next(self) -> str:
        if self.at_end():
            raise Bad("the line ends too early")
        self.position += 1
        return self.items[self.position - 1][1]

    def take(self, mark: str) -> bool:
        if not self.at_end() and self.items[self.position] == ("mark", mark):
            self.position += 1
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise Bad(f"{mark!r} is missing")

    def at_end(self) -> bool:
        return self.position >= len(self.items)


def string_of(text: str) -> str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise Bad(f"{text} is not a string") from None
    if not isinstance(value, str):
        raise Bad(f"{text} is not a string")
    return value


def name_of(at: str) -> str:
    if not at.startswith("@") or not is_name(at[1:]):
        raise Bad(f"{at[:80]!r} is not the name of a constant")
    return at[1:]
