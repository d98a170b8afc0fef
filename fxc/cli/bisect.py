"""fxc bisect: which rewrite breaks a check."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxc.cli.parameters import Dtype, Json, Revision, Trust, dynamic_shapes_of, output_for

if TYPE_CHECKING:
    from fxc.options import Options

# What `fxc bisect` takes of the options of a compilation, as one may write it.
_TAKEN = (
    "calib", "calib_samples", "calib_length", "train", "train_samples", "train_length", "teacher", "budget", "layer_budget",
    "revision", "part", "seed",
)  # fmt: skip


def bisect(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, package.module:function, or an artifact.")],
    passes: Annotated[str, typer.Option(help="What is done, as of 'fxc compile'.")] = "int8",
    check: Annotated[
        str | None,
        typer.Option(help="A command that fails where it exits with another number than 0. It is given an artifact: in the "
                     "place of {}, or at its end, and as FXC_OUT. No shell reads it."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="The relative error of the outputs against the original above which it fails.")
    ] = None,
    reproduce: Annotated[
        Path | None, typer.Option(help="Write the smallest part that still fails to this folder: text, constants, inputs.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a glob, or re:... Repeatable.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Data to learn from, and to judge by: as of 'fxc compile'.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --calib; 64 by default.")] = None,
    calib_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    train: Annotated[Path | None, typer.Option(help="Data for recover to train on; else it is --calib.")] = None,
    train_samples: Annotated[int | None, typer.Option(help="Read at most so many samples of --train; 4096 by default.")] = None,
    train_length: Annotated[int | None, typer.Option(help="Tokens in each sample of a text; 128 by default.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Another model to teach recover.")] = None,
    budget: Annotated[float | None, typer.Option(help="Of the gates: as of 'fxc compile'.")] = None,
    layer_budget: Annotated[float | None, typer.Option(help="Of the gates: as of 'fxc compile'.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that passes draw at random.")] = 0,
    part: Annotated[str | None, typer.Option(help="Compile this module alone.")] = None,
    dynamic: Annotated[
        list[str] | None, typer.Option(help="Dimensions of an input that vary, NAME:0,1; else found by trying. Repeatable.")
    ] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Find the first rewrite that breaks a check: --check, --tolerance, or with neither the gates of the passes."""
    from fxc.artifact.staging import check_target
    from fxc.measure.bisect import Bisection
    from fxc.options import Options

    options = {
        "passes": passes, "skip": skip, "calib": calib, "calib_samples": calib_samples, "calib_length": calib_length,
        "train": train, "train_samples": train_samples, "train_length": train_length, "teacher": teacher, "budget": budget,
        "layer_budget": layer_budget, "seed": seed, "part": part, "dynamic_shapes": dynamic_shapes_of(dynamic or []),
        "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    wanted = Options(**{name: value for name, value in options.items() if value is not None and value != []})
    with output_for(as_json) as output:
        if reproduce is not None:
            check_target(reproduce)
        with output.doing(f"capturing {model}"):
            search = Bisection(model, None, wanted, check=check, tolerance=tolerance, say=output.note)
        with output.doing("looking for the rewrite", elsewhere=False):
            found = search.find()
        if found is None:
            output.line("the check holds with all rewrites")
            output.json({"found": None})
            return
        output.line(f"rewrite {found.number} of {found.total}: {found.rewrite}")
        output.line(f"with {found.number - 1} the check holds, with {found.number}: {found.why}")
        if difference := found.difference():
            output.line(difference.rstrip("\n"))
        output.line(f"{found.tries} compilations; fxc compile with --limit {found.number} makes the program that fails")
        about = found.as_json() | {"model": model, "check": check, "tolerance": tolerance}
        if reproduce is not None:
            part_of_it = search.reproduce(found)
            part_of_it.save(reproduce, about)
            nodes = sum(node.op == "call_function" for node in part_of_it.before.graph.nodes)
            output.line(f"the smallest part that still fails, {nodes} nodes, is in {reproduce}")
        output.json({"found": about})


def bisect_line(model: str, options: Options) -> str:
    """The command that finds the rewrite with which the gates refuse this compilation."""
    words = ["fxc", "bisect", model, "--passes", ",".join(map(str, options.passes))]
    defaults = {each.name: each.default for each in fields(options)}
    for name in _TAKEN:
        if (value := getattr(options, name)) != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for pattern in [options.skip] if isinstance(options.skip, str) else options.skip:
        words += ["--skip", pattern]
    for name, dimensions in (options.dynamic_shapes or {}).items():
        words += ["--dynamic", f"{name}:{','.join(map(str, dimensions))}"]
    if options.dtype != "auto":
        words += ["--dtype", str(options.dtype).removeprefix("torch.")]
    return shlex.join(words + ["--trust-remote-code"] * options.trust_remote_code)
