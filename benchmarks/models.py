"""Latency of whole models: fxc beside torch, torch.compile, ONNX Runtime, OpenVINO and torchao, all in one process.

    python -m benchmarks.models --peers --threads 2
    python -m benchmarks.models --only 'encoder,*int8*' --sizes 8x128 --rounds 3

Every contender must first give the original's numbers; then all are timed in interleaved rounds. A full run writes
benchmarks/results/models-<cpu>.json and .md; one with --only, --sizes or --no-peers is only printed, unless --json names a
file.
On a machine that does other work too, set OMP_WAIT_POLICY=PASSIVE (else OpenMP's threads spin against the others) and
leave a core free.
"""

import argparse
import contextlib
import fnmatch
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.peers import Contender, Workbench, layers_of
from benchmarks.timing import Call, interleave
from benchmarks.workloads import Decoder, Encoder
from fxc.kernel_bench.files import slug
from fxc.kernel_bench.run import failure

WORKLOADS = ("encoder", "decoder")
SIZES = "1x32,1x128,8x128,32x128"
# Below this a contender computes something else, and its time says nothing.
LEAST_COSINE = 0.98


def chosen(contenders: list[Contender], workload: str, only: list[str], peers: bool = True) -> list[Contender]:
    """Those that `only` asks for (workload names, patterns of row names, or both) and the first one, the baseline. peers: also
    those that are not ours."""
    contenders = [each for at, each in enumerate(contenders) if peers or at == 0 or each.ours]
    workloads = [name for name in only if name in WORKLOADS]
    patterns = [name for name in only if name not in WORKLOADS] or ["*"]
    if workloads and workload not in workloads:
        return []
    matching = [each for each in contenders if any(fnmatch.fnmatch(each.name, pattern) for pattern in patterns)]
    return matching and [each for each in contenders if each in matching or each is contenders[0]]


def build(contenders: list[Contender], bench: Workbench) -> tuple[dict[str, Any], dict[str, str]]:
    """What each contender's `build` gave, and why the others are left out."""
    built, left_out = {}, {}
    for each in contenders:
        if missing := each.absent():
            left_out[each.name] = f"not measured: {', '.join(missing)} not installed"
        else:
            start = time.perf_counter()
            try:
                built[each.name] = each.build(bench)
            except Exception as error:  # one contender's fault must not cost the others their measurement
                left_out[each.name] = f"failed: {failure(error)}"
        outcome = left_out.get(each.name) or f"ready in {time.perf_counter() - start:.1f} s"
        note(f"{each.name}: {outcome}")
    return built, left_out


def agreeing(
    workload: Any, built: dict[str, Any], inputs: Any, size: str, left_out: dict[str, str]
) -> tuple[dict[str, Call], dict[str, float]]:
    """The calls whose output agrees with the first one's, and the cosines; `left_out` is told of the others."""
    calls, cosines, reference = {}, {}, None
    for name, model in built.items():
        call = workload.call(model, inputs, size)
        try:
            vectors = workload.vectors(call(), inputs)
        except Exception as error:  # as in build: torch.compile, for one, fails only at its first call
            left_out[f"{name} at {size}"] = f"failed: {failure(error)}"
            continue
        reference = vectors if reference is None else reference
        cosine = torch.nn.functional.cosine_similarity(vectors, reference, dim=-1).mean().item()
        if cosine >= LEAST_COSINE:  # false for NaN too
            calls[name], cosines[name] = call, cosine
        else:
            left_out[f"{name} at {size}"] = f"wrong: cosine {cosine:.4f}"
    return calls, cosines


def measure(
    workload: Any, only: list[str], threads: int, rounds: int, seconds: float = 0.3, peers: bool = True
) -> dict | None:
    """One workload's results, as `table` takes them; None when nothing of it is chosen."""
    contenders = chosen(workload.contenders, workload.name, only, peers)
    if not contenders:
        return None
    result = {"name": workload.name, "title": workload.title, "sizes": workload.sizes, "rows": {}}
    result |= {"left_out": {}, "layers": {}}
    if reason := workload.missing():
        result["left_out"][workload.name] = reason
        return result
    bench = workload.workbench(threads)
    built, result["left_out"] = build(contenders, bench)
    baseline = contenders[0].name
    result["rows"] = {name: {} for name in built}
    for size in workload.sizes if baseline in built else []:
        inputs = workload.inputs(bench, size)
        calls, cosines = agreeing(workload, built, inputs, size, result["left_out"])
        if baseline not in calls:
            continue
        note(f"{workload.name} {size}: timing {len(calls)} contenders over {rounds} rounds")
        timings = interleave(calls, rounds, seconds)
        for name, timing in timings.items():
            result["rows"][name][size] = table.record(timing, timings[baseline], cosines[name])
    result["layers"] = {name: counts for name, model in built.items() if (counts := layers_of(model))}
    return result


def faults(result: dict, contenders: list[Contender]) -> list[str]:
    """What must not be left out and is: the baseline, and whatever is ours."""
    must = [each.name for at, each in enumerate(contenders) if at == 0 or each.ours]
    return [text for text in result["left_out"] if any(text == name or text.startswith(f"{name} at ") for name in must)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=SIZES, help=f"the encoder's, batch x length (default {SIZES})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="patterns of row names, or encoder or decoder, with commas between")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True,
        help="measure the rivals too, those that are installed, and name the others as not measured; this is what it does "
        "without the word as well. --no-peers: fxc beside the original alone, printed and not written, unless --json is given",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; markdown goes beside it")
    options = parser.parse_args()
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) for size in options.sizes.split(",")):
        parser.error(f"--sizes {options.sizes}: write batch x length, such as {SIZES}")
    table.check_counts(parser, options)
    return options


def main() -> int:
    options = arguments()
    quiet()
    torch.set_num_threads(options.threads)
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    protocol = {
        **table.protocol(options),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    report = {"hardware": table.hardware(), "versions": table.versions(), "protocol": protocol, "workloads": []}
    # Standard output is for the tables: what libraries print there goes to standard error.
    console = Console(width=None if sys.stdout.isatty() else 120)
    broken = []
    for workload in (Encoder(options.sizes.split(",")), Decoder()):
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
            result = measure(workload, only, options.threads, options.rounds, peers=options.peers)
        if result is None:
            continue
        report["workloads"].append(result)
        broken += faults(result, workload.contenders)
        if result["rows"]:
            console.print(table.rich_table(result))
        for line in table.remarks(result):
            console.print(line, markup=False, highlight=False)
    if not report["workloads"]:
        note(f"error: --only {options.only}: no row has such a name")
        return 2
    partial = bool(only) or options.sizes != SIZES or not options.peers
    if options.json or not partial:
        path = options.json or RESULTS / f"models-{slug(report['hardware']['cpu'])}.json"
        write(path, report, md=table.markdown(report))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
