"""Random pass lines, recipes and options of the command line: an answer or one clear error, and never a trace."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import nn
from typer.testing import CliRunner

from fxc.cli.app import app
from fxc.errors import FxcError
from fxc.options import Options
from fxc.passes.base import Pass, options_of
from fxc.passes.order import order
from fxc.recipe import read_recipe

VALUES = [
    "0", "1", "-1", "0.5", "1e9", "1e400", "nan", "inf", "-inf", "true", "false", "auto", "32", "7", "128", "stream",
    "gptq", "rtn", "mse",
    "l2", "global", "re:.*", "re:(", "re:[", "*", "", "'", "'a,b'", "''''", '"', ":", "=", ",", "é", "\x1b[2J", "../x",
    "layers.0:heads=0", "a;b",
    "9" * 30, "--help", "None", "[]", "int8", "kl+task", "kl*", "0;1;2", " ",
]  # fmt: skip
COMMANDS = [
    "compile", "bisect", "export", "run", "eval", "report", "sensitivity", "inspect", "diff", "passes", "explain", "recover",
    "distill", "compare", "search", "bench",
]  # fmt: skip
OPTIONS = [
    "--passes", "--skip", "--calib", "--calib-samples", "--calib-length", "--recipe", "--dtype", "--device", "--budget",
    "--layer-budget",
    "--min-coverage", "--seed", "--limit", "--print-after", "--drop", "--plan", "--max-memory", "--dynamic", "--part",
    "--json", "--report",
    "--explain", "--tolerance", "--check", "--format", "--prompt", "--text", "--data", "--against", "--window",
    "--keep-float", "--rounds",
    "--sizes", "--strategies", "--threads", "--steps", "--loss", "--student-layers", "--teacher", "--student",
    "--formats", "--trials",
    "--resume", "--no-resume", "--no-measure", "--overwrite", "--allow-noop", "--axes", "--lowered", "--help",
    "--no-such-option", "-o",
    "--stream", "--eval-text", "--eval", "--fail-over", "--history", "--revision", "--lora", "--measure",
]  # fmt: skip

# With a model and passes that are there.
SENSIBLE = [
    [], ["--json"], ["--limit", "1"], ["--allow-noop"], ["--budget", "1e-9"], ["--print-after", "int8"], ["--dynamic", "x:0"],
    ["--skip", "re:("], ["--dtype", "bfloat16"], ["--dump-dir", "dump"], ["--drop", "0:ffn=1"], ["--seed", "-1"],
    ["--max-memory", "3GB"], ["--min-coverage", "2"], ["--device", "cuda"], ["--part", "0"], ["--resume"], ["--plan-only"],
]  # fmt: skip


def tiny() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model for the command line, by the name of this function."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), (torch.randn(2, 32),)


TINY = f"{__name__}:tiny"


def pass_line(draw: random.Random) -> str:
    items = []
    for _ in range(draw.choice([1, 1, 2, 2, 3, 5])):
        cls = draw.choice(sorted(Pass.registry.items()))[1]
        text = cls.name
        for option in draw.sample(options_of(cls), min(len(options_of(cls)), draw.choice([0, 1, 1, 2]))):
            near = [str(option.default), *VALUES]
            text += f":{option.name}={draw.choice(near)}"
        items.append(text)
    line = ",".join(items)
    for _ in range(draw.choice([0, 0, 0, 1, 3]) if line else 0):
        at = draw.randrange(len(line) + 1)
        line = line[:at] + draw.choice([*":=,'\";*[]", draw.choice(VALUES), ""]) + line[at + draw.choice([0, 1]) :]
    return line


def check_line(draw: random.Random) -> str:
    """A pass line is read and put in order, and read again as it prints; or refused."""
    line = pass_line(draw)
    try:
        passes = Options(line).passes
        order(passes)
    except FxcError as error:
        return _clear(error, line)
    again = Options(",".join(map(str, passes))).passes
    # NaN is no number that equals itself.
    assert again == passes or "nan" in str(passes), f"{line!r} is printed as {','.join(map(str, passes))!r}"
    return "read"


def check_recipe(draw: random.Random, folder: Path) -> str:
    path = folder / "recipe.toml"
    keys = ["passes", "skip", "dtype", "calib_samples", "calib_length", "train_samples", "x"]
    values = ["[]", '["int8"]', json.dumps([pass_line(draw)]), '"int8"', "3", "-1", "1.5", "true", "[1]", "{}",
    '[["a"]]', "2020-01-01",
              '"bfloat16"', '"x"', "9" * 30]  # fmt: skip
    text = "".join(f"{draw.choice(keys)} = {draw.choice(values)}\n" for _ in range(draw.randint(0, 4)))
    data = text.encode()
    if draw.random() < 0.2:
        data = data[: len(data) // 2] + draw.randbytes(5) + data[len(data) // 2 :]
    path.write_bytes(data)
    try:
        order(Options(**read_recipe(path)).passes)
    except FxcError as error:
        return _clear(error, text)
    return "read"


def check_command(draw: random.Random, folder: Path) -> str:
    """A command line ends with one of the exit codes, and with no fault of fxc."""
    if draw.random() < 0.4:
        line = draw.choice(["int8", "int8:mode=weight_only", "fp8,pack", pass_line(draw), pass_line(draw)])
        words = ["compile", TINY, "--passes", line, "-o", str(folder / "out"), "--overwrite", "--no-measure"]
        words += draw.choice(SENSIBLE)
    else:
        words = [draw.choice(COMMANDS)]
    files = [TINY, str(folder), str(folder / "nothing"), str(folder / "text.txt"), "no.module:name", "x/y", "examples/none"]
    for _ in range(draw.choice([0, 1, 1, 1, 2]) if len(words) == 1 else 0):
        words.append(draw.choice(files))
    for _ in range(draw.choice([0, 1, 2, 2, 3]) if len(words) < 3 else 0):
        words.append(draw.choice(OPTIONS))
        if draw.random() < 0.8:
            words.append(draw.choice([pass_line(draw), *VALUES, *files]))
    (folder / "text.txt").write_text("one line\nand another\n")
    # `fxc bench` measures for minutes whatever it is given.
    words = [*words, "--help"] if words[0] == "bench" else words
    done = CliRunner().invoke(app, [*words])
    text = done.output
    assert done.exit_code in (0, 2, 3, 4, 5, 6), f"{words}: exit code {done.exit_code}\n{text[-1500:]}\n{done.exception!r}"
    assert "Traceback" not in text and "this is a fault of fxc" not in text, f"{words}\n{text[-1500:]}"
    return f"exit code {done.exit_code}"


def _clear(error: FxcError, given: str) -> str:
    assert type(error) is not FxcError and error.what, f"{given!r}: {error}"
    assert len(str(error)) < 5000, f"{given!r}: {len(str(error))} characters"
    return f"refused, {error.code}"
