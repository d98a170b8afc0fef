"""fxc bench: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxc.cli.parameters import (
    Backend,
    Device,
    Dtype,
    Json,
    KeepFloat,
    Plugin,
    checked_device,
    checked_dtype,
    output_for,
    sizes_of,
)  # fmt: skip
from fxc.errors import UsageError

bench = typer.Typer(no_args_is_help=True, help="Measure speed.")


@bench.command("model")
def bench_model(
    models: Annotated[list[str], typer.Argument(help="Models and artifacts; the first is what the others are compared with.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, as in 1,8.")] = "1",
    seq: Annotated[str, typer.Option(help="Lengths of prompts or sequences, as in 32,128.")] = "128",
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate after each prompt.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured; the median counts.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch.")] = None,
    backend: Backend = "eager",
    device: Device = None,
    dtype: Dtype = None,
    static_cache: Annotated[
        bool | None,
        typer.Option(
            "--static-cache/--growing-cache",
            help="Decode over a cache of fixed size, on CUDA as a CUDA graph; or never. Else where bits stay the same.",
        ),
    ] = None,
    keep_compressed: Annotated[
        bool, typer.Option("--keep-compressed", help="Also layers whose float form was measured to be faster.")
    ] = False,
    keep_float: KeepFloat = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Measure latency of several models in one process, in turns."""
    from fxc.cli.bench import bench_models

    sizes = sizes_of("--batch", batch), sizes_of("--seq", seq)
    with output_for(as_json) as output:
        bench_models(
            output, models, *sizes, new, rounds, threads, backend, checked_device(device), checked_dtype(dtype),
            static_cache, keep_compressed, keep_float,
        )  # fmt: skip


@bench.command("kernels")
def bench_kernels(
    scheme: Annotated[str | None, typer.Option(help="int8, int8_weight_only, int4 (or int4_g32), fp8, sparse24, ...")] = None,
    shapes: Annotated[str | None, typer.Option(help="qwen2.5-7b, llama3-8b:o, or N,K; several with commas between.")] = None,
    m: Annotated[str | None, typer.Option("--m", help="Numbers of rows (tokens), as in 1,16,64,256,2048,8192.")] = None,
    device: Device = None,
    threads: Annotated[
        str | None, typer.Option(help="Threads for torch and for its rivals; 1,2 for one run after the other.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each is measured; the median counts.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON, CSV, markdown and pictures to this folder.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="On a GPU: try all configurations, write the best to --out.")] = False,
    budget_seconds: Annotated[float | None, typer.Option(min=1, help="Begin nothing new after so long.")] = None,
    peers: Annotated[str | None, typer.Option(metavar="MODULE", help="Measure these rivals too; see the last line.")] = None,
    as_json: Json = False,
) -> None:
    """Measure linear layers: fxc's kernels beside torch's own products, and what the machine allows."""
    from fxc.cli.bench_kernels import KernelsRequest, bench_kernels

    if tune and out is None:
        raise UsageError("--tune writes a table, and needs a folder for it", hint="add --out FOLDER")
    rows = () if m is None else tuple(dict.fromkeys(sizes_of("--m", m)))
    counts = () if threads is None else tuple(dict.fromkeys(sizes_of("--threads", threads)))
    request = KernelsRequest(scheme, shapes, rows, checked_device(device), counts, rounds, out, tune, budget_seconds, peers)
    with output_for(as_json) as output:
        bench_kernels(output, request)
