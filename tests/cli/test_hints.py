"""What a message advises exists: the commands, options, functions, arguments and passes that it names."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator

import pytest
import typer
from repo import REPO

import fxc
from fxc.cli.app import app
from fxc.compiled.model import CompiledModel
from fxc.errors import UsageError
from fxc.passes.base import Pass, parse_passes
from fxc.pipeline import run_passes
from fxc.runtime.static_cache import StaticDecoder
from fxc.selection.budget import Budget
from fxc.source.load import load_source

# Options of nvidia-smi.
OTHERS = {"--id", "--query-gpu", "--format"}
# Environment variables, and what a model of the user writes itself.
NAMES = {"FXC_TRACE", "TORCH_LOGS", "training"}


def command_options() -> dict[str, set[str]]:
    """Of "compile" or "bench model", the options."""
    found: dict[str, set[str]] = {}

    def walk(command, path: str) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(inner, f"{path} {name}".strip())
        found[path] = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}

    walk(typer.main.get_command(app), "")
    return found


COMMANDS = command_options()
OPTIONS = set().union(*COMMANDS.values()) | {"--help"} | OTHERS
CALLS = (
    fxc.optimize,
    fxc.compare,
    fxc.search,
    Budget,
    fxc.Options,
    fxc.load,
    load_source,
    CompiledModel.save,
    CompiledModel.export_fxc,
    run_passes,
    StaticDecoder.__init__,
)
ARGUMENTS = {name for call in CALLS for name in inspect.signature(call).parameters} | NAMES
PASS_SPEC = re.compile(rf"\b(?:{'|'.join(Pass.registry)})(?::\w+=[\w.]+)+")
ARGUMENTS |= {field.name for each in Pass.registry.values() for field in dataclasses.fields(each)}


def text_of(node: ast.AST) -> str:
    """Every string below `node`; what is filled in later is {}."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(text_of(v) if isinstance(v, ast.Constant) else "{}" for v in values)
        case _:
            return " ; ".join(filter(None, map(text_of, ast.iter_child_nodes(node))))


def hints_in(source: str) -> Iterator[tuple[int, str]]:
    """Where a hint is given: as an argument, or under a name that says so."""
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else ()
        named = any(isinstance(t, ast.Name) and t.id.strip("_").lower() in ("hint", "hints", "damaged") for t in targets)
        if (named or (isinstance(node, ast.keyword) and node.arg == "hint")) and (text := text_of(node.value)):
            yield node.value.lineno, text


def messages_in(source: str) -> Iterator[tuple[int, str]]:
    """Every string that is no docstring."""
    tree = ast.parse(source)
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in documented and (text := text_of(node)):
            yield node.lineno, text


def wrong_names(text: str) -> list[str]:
    """The commands and options in a message that fxc has not."""
    wrong = []
    for command, rest in re.findall(r"(?<!\w)['`]fxc ([a-z]+)([^'`]*)", text):
        if (command, rest) == ("program", " 1"):  # the first line of a program's text
            continue
        longer = f"{command} {rest.split()[0]}" if rest.split() and rest.split()[0].isalpha() else command
        name = longer if longer in COMMANDS else command
        if name not in COMMANDS:
            wrong.append(f"fxc {command}")
        wrong += [
            f"fxc {name} {option}" for option in re.findall(r"--[a-z][\w-]*", rest) if option not in COMMANDS.get(name, ())
        ]
    return wrong + [option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if option not in OPTIONS]


def wrong_advice(text: str) -> list[str]:
    """The functions, arguments and passes in a hint that fxc has not."""
    wrong = [f"fxc.{name}" for name in re.findall(r"\bfxc\.(\w+)", text) if name != "json" and not hasattr(fxc, name)]
    wrong += [f"{name}=" for name in re.findall(r"(?<![\w:.{-])(\w+)=(?!=)", text) if name not in ARGUMENTS]
    for spec in PASS_SPEC.findall(text):
        try:
            parse_passes(spec.rstrip("."))
        except UsageError as error:
            wrong.append(f"{spec}: {error.what}")
    return wrong


SOURCES = sorted((REPO / "fxc").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_what_is_advised_exists(path):
    source = path.read_text()
    assert [(line, wrong) for line, text in messages_in(source) if (wrong := wrong_names(text))] == []
    assert [(line, wrong) for line, text in hints_in(source) if (wrong := wrong_advice(text))] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("'fxc doctor' says why; --calib FILE", []),
        ("'fxc docter' says why", ["fxc docter"]),
        ("'fxc run OUT --passes x'", ["fxc run --passes"]),
        ("give --subfolders", ["--subfolders"]),
        ("fxc.optimize(model, tokenizer=...), or prune:uniform=true:heads=0.25", []),
        ("fxc.optimise(model)", ["fxc.optimise"]),
        ("give tokeniser=...", ["tokeniser="]),
        ("prune:head=0.25", ["prune:head=0.25: the pass prune has no option 'head=0.25'"]),
    ],
)
def test_the_check_sees_what_does_not_exist(text, wrong):
    assert wrong_names(text) + wrong_advice(text) == wrong


def test_hints_are_found():
    found = sum(1 for path in SOURCES for _ in hints_in(path.read_text()))
    assert found > 150 and len(COMMANDS) >= 10
