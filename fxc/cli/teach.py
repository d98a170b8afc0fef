"""fxc recover and fxc distill: parsed here, and carried out as a compilation with the pass `recover`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxc.cli.parameters import Dtype, Json, Plugin, Resume, Revision, Trust, output_for
from fxc.errors import UsageError

if TYPE_CHECKING:
    from fxc.passes.recover.recover import Recover

# What is not named here is an option of the pass.
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}

Data = Annotated[Path, typer.Option(help="What it is trained on: a text, a .jsonl file or a folder of images.")]
Samples = Annotated[int | None, typer.Option(help="Read at most so many samples of --data; 4096 by default.")]
Length = Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="The folder to write; by default ./MODEL-recover.")]
LossText = Annotated[str | None, typer.Option(help="A weighted sum of terms, as kl+0.5*task; kl where there are logits.")]
Steps = Annotated[str | None, typer.Option(help="Steps of the optimizer; 400 by default.")]
Minutes = Annotated[str | None, typer.Option(help="Train so long, and not a number of steps.")]
Batch = Annotated[str | None, typer.Option(help="Samples in a step; 8 by default.")]
Rate = Annotated[str | None, typer.Option(help="The largest learning rate; 0.0005 by default.")]
EvalText = Annotated[Path | None, typer.Option(help="Measure perplexity on this text before and after.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn at random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")]
Report = Annotated[bool, typer.Option("--report", help="Print all tables.")]


def recover(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What was compressed: an artifact, or any model.")],
    data: Data,
    teacher: Annotated[str | None, typer.Option(help="The model as it was: a folder, a hub id or an artifact.")] = None,
    out: Out = None,
    loss: LossText = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = None,
    rate: Rate = None,
    data_samples: Samples = None,
    data_length: Length = None,
    eval_text: EvalText = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    report: Report = False,
    resume: Resume = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Train a compressed model until it does again what it did. Every option of the pass recover is one of this command too:
    'fxc passes' lists them."""
    from fxc.teaching import check_is_taught

    step = _step(context.args, {"loss": loss, "steps": steps, "minutes": minutes, "batch": batch, "rate": rate})
    check_is_taught(step, teacher)
    options = _options(data, data_samples, data_length, seed, dtype, revision, trust_remote_code)
    _compile(model, [step], teacher, options, out, eval_text, overwrite, report, resume, as_json)


def distill(
    context: typer.Context,
    teacher: Annotated[str, typer.Option(help="The model to learn from: a folder, a hub id or an artifact.")],
    data: Data,
    student: Annotated[
        str | None,
        typer.Option(help="The model that learns: as --teacher, or a folder with a config.json and no weights."),
    ] = None,
    student_layers: Annotated[
        str | None, typer.Option(help="Instead of --student: the teacher's layers that it consists of, as 0,2,4.")
    ] = None,
    out: Out = None,
    loss: LossText = None,
    steps: Steps = None,
    minutes: Minutes = None,
    batch: Batch = None,
    rate: Rate = None,
    data_samples: Samples = None,
    data_length: Length = None,
    eval_text: EvalText = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    report: Report = False,
    resume: Resume = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Train another, smaller model to do what a model does. Every option of the pass recover is one of this command too: 'fxc
    passes' lists them."""
    from fxc.passes.prune.plan import parse_numbers
    from fxc.teaching import student_of

    step = _step(context.args, {"loss": loss, "steps": steps, "minutes": minutes, "batch": batch, "rate": rate})
    layers = None if student_layers is None else parse_numbers(student_layers)
    model, passes, taught_by = student_of(teacher, student, layers, step)
    options = _options(data, data_samples, data_length, seed, dtype, revision, trust_remote_code)
    _compile(model, passes, taught_by, options, out, eval_text, overwrite, report, resume, as_json)


def _step(words: list[str], named: dict[str, str | None]) -> Recover:
    """The pass, with the options that the command does not name itself."""
    import fxc.passes  # noqa: F401 - which registers them
    from fxc.passes.base import options_of, parse_passes
    from fxc.passes.recover.recover import Recover

    known = {field.name: field.type for field in options_of(Recover)}
    given = {name: value for name, value in named.items() if value is not None}
    words = list(words)
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in known:
            what = f"there is no option {word}" if word.startswith("-") else f"{word!r} is one argument too many"
            there = ", ".join("--" + each.replace("_", "-") for each in known)
            raise UsageError(what, hint=f"options of the pass: {there}; others: --help")
        if not equals and known[name] == "bool" and (not words or words[0] not in ("true", "false")):
            value = "true"
        elif not equals:
            if not words:
                raise UsageError(f"{word} lacks its value")
            value = words.pop(0)
        given[name] = value
    quoted = {name: value.replace("'", "''") for name, value in given.items()}
    return parse_passes("recover" + "".join(f":{name}='{value}'" for name, value in quoted.items()))[0]


def _options(
    data: Path, samples: int | None, length: int | None, seed: int, dtype: str | None, revision: str | None, trust: bool
) -> dict[str, Any]:
    options = {
        "train": data, "train_samples": samples, "train_length": length, "seed": seed,
        "dtype": dtype, "revision": revision, "trust_remote_code": trust,
    }  # fmt: skip
    return {name: value for name, value in options.items() if value is not None}


def _compile(
    model: str, passes: list[Any], teacher: str | None, options: dict[str, Any], out: Path | None, eval_text: Path | None,
    overwrite: bool, report: bool, resume: bool | None, as_json: bool,
) -> None:  # fmt: skip
    from fxc.cli.compile import CompileRequest, compile_model

    options = options | {"passes": passes} | ({} if teacher is None else {"teacher": teacher})
    request = CompileRequest(
        model, options, out, recipe=None, eval_text=eval_text, min_coverage=0.0, overwrite=overwrite, print_after=(),
        measure=False, drop=(), plan=None, report=report, resume=resume,
    )  # fmt: skip
    with output_for(as_json) as output:
        compile_model(request, output)
