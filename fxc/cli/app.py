"""The fxc command: parses, calls, prints. Whatever takes long to import is imported by the command that needs it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from fxc.cli.bench_app import bench
from fxc.cli.bisect import bisect
from fxc.cli.failures import Commands
from fxc.cli.parameters import (
    Backend,
    Device,
    Dtype,
    Json,
    KeepFloat,
    MaxMemory,
    Plugin,
    Resume,
    Revision,
    Stream,
    Trust,
    bytes_of,
    checked_device,
    checked_dtype,
    dynamic_shapes_of,
    output_for,
)  # fmt: skip
from fxc.cli.teach import OPEN, distill, recover
from fxc.errors import UsageError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a model smaller and faster, and measure what it costs.",
)
app.add_typer(bench, name="bench")
app.command(context_settings=OPEN)(recover)
app.command(context_settings=OPEN)(distill)
app.command()(bisect)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fxc {version('fxc')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if not os.environ.get("FXC_DEBUG"):
        # transformers reads its variable when it is imported, which no command has done yet.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.filterwarnings("ignore")


@app.command("compile")
def compile_(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, package.module:function, or an artifact.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder to write; by default ./MODEL-PASSES, as in pylm-int8-prune.")
    ] = None,
    passes: Annotated[
        str | None, typer.Option(help="What to do, as in int8,prune or int8:mode=weight_only; int8 by default.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with passes, skip and dtype.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a glob, or re:... Repeatable.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Data to learn from: a text, a .jsonl file or a folder of images.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --calib; 64 by default.")] = None,
    calib_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Data for recover to train on: as --calib, or datasets:NAME:SPLIT; else it is --calib.")
    ] = None,
    train_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --train; 4096 by default.")] = None,
    train_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Another model to teach recover: a source; by default the model as it came.")
    ] = None,
    calib_disk: Annotated[
        Path | None, typer.Option(help="Keep the hidden states of --calib's samples in this folder and not in memory.")
    ] = None,
    resume: Resume = None,
    eval_text: Annotated[
        Path | None, typer.Option(help="Measure perplexity on this text after every pass; else it is not measured.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    backend: Annotated[
        str | None, typer.Option(help="Make ready what this backend runs: for aoti code, kept for all models of its shape.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    budget: Annotated[
        float | None, typer.Option(help="The largest relative error of the outputs that a pass may cause; else its own.")
    ] = None,
    layer_budget: Annotated[
        float | None, typer.Option(help="The largest relative error of one layer that a pass may cause; else its own.")
    ] = None,
    min_coverage: Annotated[float, typer.Option(help="Fail when less of the weight bytes is rewritten, 0 to 1.")] = 0.0,
    allow_noop: Annotated[bool, typer.Option("--allow-noop", help="Accept a pass that changes nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    dump_dir: Annotated[Path | None, typer.Option(help="Write the program's text after each pass to this folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that passes draw at random.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Make the first so many rewrites alone, as 'fxc bisect' numbers them.")
    ] = None,
    print_after: Annotated[list[str] | None, typer.Option(help="Print the text after this pass to stderr.")] = None,
    verify: Annotated[bool, typer.Option(help="Check capture and every pass with numbers.")] = True,
    measure: Annotated[bool, typer.Option(help="Time the model after every pass, or time nothing.")] = True,
    drop: Annotated[
        list[str] | None, typer.Option(help="Prune this: MODULE:heads=0,5 (kv_heads, ffn, channels), or MODULE. Repeatable.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A JSON file of what to prune. --plan without one is --plan-only.", metavar="[FILE]")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Say what memory, disk and time it takes, and write nothing.")
    ] = False,
    stream: Stream = None,
    max_memory: MaxMemory = None,
    dynamic: Annotated[
        list[str] | None, typer.Option(help="Dimensions of an input that vary, NAME:0,1; else found by trying. Repeatable.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Compile this module alone; language_model of a model that reads images too.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Print all tables: bytes, gates, what stayed and why.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Compile a model and write it as an artifact."""
    from fxc.cli.compile import CompileRequest, compile_model

    options = {
        "passes": passes, "skip": skip, "calib": calib, "calib_samples": calib_samples,
        "calib_length": calib_length, "train": train, "train_samples": train_samples, "train_length": train_length,
        "teacher": teacher,
        "calib_disk": calib_disk, "dtype": dtype, "device": device, "backend": backend, "revision": revision,
        "trust_remote_code": trust_remote_code, "budget": budget, "layer_budget": layer_budget, "allow_noop": allow_noop,
        "dump_dir": dump_dir, "seed": seed, "limit": limit, "verify": verify, "part": part,
        "dynamic_shapes": dynamic_shapes_of(dynamic or []), "stream": stream,
        "max_memory": bytes_of("--max-memory", max_memory) if max_memory is not None else None,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None and value != []}
    request = CompileRequest(
        model, given, out, recipe, eval_text, min_coverage, overwrite, tuple(print_after or ()), measure, tuple(drop or ()),
        plan, report, resume, plan_only,
    )  # fmt: skip
    with output_for(as_json) as output:
        compile_model(request, output)


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf (float weights), fxc (transformers, with fxc), compressed-tensors (vLLM), gguf (llama.cpp), onnx or aoti.",
        ),
    ] = "hf",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Write a compiled model for other tools, which load it without fxc."""
    from fxc.cli.export import export_model

    with output_for(as_json) as output:
        export_model(output, artifact, out, kind, overwrite)


@app.command()
def push(
    artifact: Annotated[Path, typer.Argument(help="An artifact, or a folder that fxc export wrote.")],
    repo: Annotated[str, typer.Argument(help="The repository, USER/NAME; made where there is none.", metavar="USER/NAME")],
    kind: Annotated[
        str, typer.Option("--format", help="artifact, or an export of it: fxc, hf, compressed-tensors, gguf, onnx or aoti.")
    ] = "artifact",
    private: Annotated[bool | None, typer.Option(help="Of a repository that is made; else as your account has it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card, and upload nothing.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Upload a compiled model to the Hugging Face hub, with a card that says what was done to it."""
    from fxc.cli.push import push_model

    with output_for(as_json) as output:
        push_model(output, artifact, repo, kind, private, dry_run)


@app.command()
def run(
    out: Annotated[Path, typer.Argument(help="An artifact.")],
    prompt: Annotated[str | None, typer.Option(help="A text to continue, or that an encoder reads; greedily.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 64,
    text: Annotated[str | None, typer.Option(help="A text to encode or to classify.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image to classify or to encode (needs Pillow).")] = None,
    backend: Backend = "eager",
    device: Device = None,
    keep_float: KeepFloat = None,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Under torchrun: a part of the heads and FFN channels in each process.")
    ] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Run a compiled model on one input."""
    from fxc.cli.run import run_model

    if (prompt is None) == (text is None and image is None):
        raise UsageError("give --prompt, or else --text or --image or both", hint="--prompt is for models that generate")
    with output_for(as_json) as output:
        run_model(
            output, out, prompt, max_new_tokens, text, image, backend, checked_device(device), keep_float, tensor_parallel
        )


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(help="A model or an artifact.")],
    text: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --against: a text, a .jsonl file or a folder of images, with labels or without.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Measure agreement with this model too, usually the original.")] = None,
    history: Annotated[Path | None, typer.Option(help="With --against: add a line of JSON to this file, and plot it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to plot the history: .svg, .png or .pdf; else beside it.")] = None,
    fail_over: Annotated[
        str | None, typer.Option(help="With --against: exit with 5 where quality is worse by more, as in 1% or 0.01.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")] = 256,
    windows: Annotated[int | None, typer.Option(min=1, help="Use only so many windows, or lines, of the text.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="With --against, name the first layer that is off by more.")] = 0.01,
    backend: Backend = "eager",
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and with --against how near two models are."""
    from fxc.cli.evaluate import EvalRequest, evaluate

    request = EvalRequest(
        model, text, against, window, windows, tolerance, backend, checked_device(device), checked_dtype(dtype), revision,
        trust_remote_code, data, history, plot, fail_over,
    )  # fmt: skip
    with output_for(as_json) as output:
        evaluate(request, output)


@app.command()
def report(
    artifact: Annotated[Path, typer.Argument(help="An artifact.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to write; by default report.html in it.")] = None,
    timed: Annotated[bool, typer.Option("--measure", help="Time its layers on this machine and draw the roofline.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Write the page that says what was done to a model, layer by layer: one HTML file, which opens offline."""
    from fxc.cli.report import write_report

    with output_for(as_json) as output:
        write_report(output, artifact, out, timed)


@app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, package.module:function, or an artifact.")],
    calib: Annotated[Path | None, typer.Option(help="Data to measure on, and to learn from: as of 'fxc compile'.")] = None,
    passes: Annotated[str, typer.Option(help="What each layer is tried with, as in int4:group=32.")] = "int8",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Draw the bars to this file too: .svg, .png or .pdf.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a glob, or re:... Repeatable.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --calib; 64 by default.")] = None,
    calib_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Measure what each layer alone costs when it is compressed, the worst first."""
    from fxc.cli.sensitivity import show_sensitivity

    options = {
        "passes": passes, "calib": calib, "skip": skip, "calib_samples": calib_samples, "calib_length": calib_length,
        "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with output_for(as_json) as output:
        show_sensitivity(output, model, {name: value for name, value in options.items() if value is not None}, out)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, package.module:function, or an artifact.")],
    strategies: Annotated[
        list[str] | None,
        typer.Option(
            help="A pass line, a recipe file (.toml), none, or default: a good set. Repeatable, or with semicolons between, "
            "as in 'none;int8;prune:heads=0.25,int8'. default if left out."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data to measure quality on: as --calib, also with labels; else heldout.txt in MODEL, or made up."),
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(help="Use at most so many samples of --data; 200 windows of a text, 1000 others by default.")
    ] = None,
    eval_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 256 by default.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Data to learn from: a text, a .jsonl file or a folder of images.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --calib; 64 by default.")] = None,
    calib_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    train: Annotated[Path | None, typer.Option(help="Data for recover to train on; else it is --calib.")] = None,
    train_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --train; 4096 by default.")] = None,
    train_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    sizes: Annotated[
        str, typer.Option(help="Where to time: batch x length, as in 1x128,8x512, or batches, as in 1,8; else by the model.")
    ] = "",
    new: Annotated[int | None, typer.Option(help="Tokens that a language model generates after each prompt; else 32.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often each is timed, in turns; the median counts; else 7.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for torch.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder for artifacts, tables, pictures; by default ./MODEL-compare.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a folder that holds a comparison.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a glob, or re:... Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that passes draw at random.")] = 0,
    backend: Backend = "eager",
    device: Device = None,
    dtype: Dtype = None,
    part: Annotated[
        str | None, typer.Option(help="Compare this module alone; language_model of a model that reads images too.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Compile a model in several ways, and show what each costs in size, memory, time and quality."""
    from fxc.cli.compare import compare_strategies

    options = {
        "data": data, "eval_samples": eval_samples, "eval_length": eval_length, "calib": calib, "calib_samples": calib_samples,
        "calib_length": calib_length, "train": train, "train_samples": train_samples, "train_length": train_length,
        "sizes": sizes, "new": new, "rounds": rounds, "threads": threads, "force": force, "skip": skip, "seed": seed,
        "backend": backend, "device": device, "dtype": dtype, "part": part, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None and value != []}
    with output_for(as_json) as output:
        compare_strategies(output, model, strategies or ["default"], out, given)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, package.module:function, or an artifact.")],
    budget: Annotated[
        str, typer.Option(help="size=0.4x (or 4.1MB), latency=0.6x, quality=1%: any of them, with commas between.")
    ],
    calib: Annotated[Path, typer.Option(help="Data to learn from: as of 'fxc compile'.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The artifact to write; the recipe is OUT.toml beside it.")],
    data: Annotated[
        Path | None, typer.Option("--eval", help="Data to measure quality on: as --calib, also with labels; else made up.")
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="Where latency is measured: batch x length, as in 1x128,8x512, or batches, as in 1,8.")
    ] = "",
    formats: Annotated[
        str | None, typer.Option(help="What layers may become, as in 'int8;int4:group=32:algorithm=gptq'; else a good set.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Compile and measure at most so many.")] = 24,
    minutes: Annotated[float, typer.Option(help="Begin no trial that would end later; what is not tried then is said.")] = 10.0,
    eval_samples: Annotated[
        int | None, typer.Option(help="Use at most so many samples of --eval; 200 windows of a text, 1000 others by default.")
    ] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --calib; 64 by default.")] = None,
    calib_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a glob, or re:... Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, and of all that passes draw at random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there, with what is beside it.")] = False,
    backend: Backend = "eager",
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Find which compression is best for which layers, within budgets of size, latency and quality."""
    from fxc.cli.search import search_model

    options = {
        "budget": budget, "calib": calib, "eval": data, "sizes": sizes, "formats": formats, "trials": trials,
        "minutes": minutes, "eval_samples": eval_samples,
        "calib_samples": calib_samples, "calib_length": calib_length, "skip": skip, "seed": seed,
        "backend": backend, "device": checked_device(device), "dtype": checked_dtype(dtype), "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None and value != []}
    with output_for(as_json) as output:
        search_model(output, model, out, overwrite, given)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A model or an artifact.")],
    text: Annotated[bool, typer.Option("--text", help="Print the program.")] = False,
    axes: Annotated[bool, typer.Option("--axes", help="Show which weights share an axis, and what may be pruned.")] = False,
    every: Annotated[bool, typer.Option("--all", help="List everything, not only the largest.")] = False,
    lowered: Annotated[
        bool,
        typer.Option("--lowered", help="Print the program as --device runs it with --backend; for cuda also without a GPU."),
    ] = False,
    device: Device = None,
    backend: Backend = "eager",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Show what a model is made of: operators, bytes by kind and by layer, its program."""
    from fxc.cli.show import inspect_lowered, inspect_model

    with output_for(as_json) as output:
        if lowered:
            inspect_lowered(output, model, device, backend, revision, trust_remote_code)
            return
        inspect_model(output, model, text, axes, every, revision, trust_remote_code)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A model or an artifact.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    trust_remote_code: Trust = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Show how two programs differ, and in how many bytes."""
    from fxc.cli.show import diff_models

    with output_for(as_json) as output:
        diff_models(output, a, b, trust_remote_code)


@app.command()
def passes(
    explain: Annotated[str | None, typer.Option(help="Order these passes and say why, as in int8,prune.")] = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """List the passes, or explain the order in which some would run."""
    from fxc.cli.show import explain_passes, list_passes

    with output_for(as_json) as output:
        list_passes(output) if explain is None else explain_passes(output, explain)


@app.command()
def explain(
    code: Annotated[str, typer.Argument(help="The code of an error, as in FXC-E5.")],
    as_json: Json = False,
) -> None:
    """Say what an error's code means, and what to do."""
    from fxc.cli.show import explain_code

    with output_for(as_json) as output:
        explain_code(output, code)


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Build the kernels in C++ first, for every kind of CPU: for an image.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can run, and why not."""
    from fxc.cli.show import examine_machine

    with output_for(as_json) as output:
        examine_machine(output, build)
