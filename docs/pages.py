"""Hooks of MkDocs (`make docs`): pages that are made of the code and of README.md, and links to what is no page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import typer
import typer.cli
from mkdocs.structure.files import File, Files

import fxc.passes  # noqa: F401 - which registers them
from fxc.cli.app import app
from fxc.passes.base import Pass, options_of

REPO = Path(__file__).resolve().parent.parent
MADE_OF = {"README.md": "index.md", "CHANGELOG.md": "changes.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    readme = (REPO / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    made = {"index.md": readme, "command-line.md": _command_line(), "passes.md": _passes(),
            "changes.md": (REPO / "CHANGELOG.md").read_text(encoding="utf-8")}  # fmt: skip
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link to a file of the repository that a page is made of leads there, one to any other becomes its text."""

    def linked(found: re.Match) -> str:
        mark, text, target = found.groups()
        path, sign, anchor = target.partition("#")
        here = Path(page.file.src_uri).parent
        place = here / path
        made = MADE_OF.get(_normal(Path("docs") / place)) or MADE_OF.get(_normal(place))
        if made is not None:
            return f"{mark}[{text}]({os.path.relpath(made, here)}{sign}{anchor})"
        known = files.get_file_from_path(_normal(place)) is not None
        return found[0] if known else (f"{text} (`{path.removeprefix('../')}`)" if not mark else text)

    return _LINK.sub(linked, markdown)


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _command_line() -> str:
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="fxc")
    return typer.cli.get_docs_for_click(obj=command, ctx=context, name="fxc", title="On the command line")


def _passes() -> str:
    lines = ["# Passes", "", "What `--passes` takes, with the options of each and what they are by default."]
    for name, cls in sorted(Pass.registry.items()):
        kind = "a policy" if cls.is_policy else "a mechanism"
        lines += ["", f"## {name}", "", f"*{kind}.*", "", re.sub(r"\n    ", "\n", cls.__doc__ or ""), ""]
        lines += [f"- `{option.name}={option.default}`: `{option.type}`" for option in options_of(cls)]
    return "\n".join(lines) + "\n"
