"""make demo: compress the example model to int8, show what that gains and costs, and let a fresh process generate with it.

python examples/demo.py [--model examples/pylm] [--out out/pylm-int8]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import fxc
from fxc.analysis import sizes
from fxc.data.text import encode, tokenizer_of
from fxc.errors import FxcError, UsageError
from fxc.lower.inductor import require_compiler
from fxc.measure import bench
from fxc.measure.perplexity import perplexity, relative_change
from fxc.report import compilation
from fxc.report.console import Output, ratio, size
from fxc.report.lowering import describe
from fxc.source.load import load_source

HERE = Path(__file__).resolve().parent
PROMPT = "def read_lines(path):\n"
WINDOWS = 200


def main(model: Path, out: Path, output: Output) -> None:
    if not (model / "config.json").exists():
        raise UsageError("the example model is not there", where=model, hint="python examples/train_pylm.py trains it")

    with output.doing(f"compiling {model} with int8"):
        packed = fxc.optimize(model, passes="int8")
        packed.save(out, overwrite=out.exists(), source=model)

    backend = best_backend()
    with output.doing(f"timing on the CPU, backend {backend}"):
        entries = [*bench.entries_of(str(model), backend=backend), *bench.entries_of(str(out), backend=backend)]
        rows = bench.race(entries, [1], [128], new=32, rounds=5)

    original = load_source(str(model))
    text = (model / "heldout.txt").read_text(encoding="utf-8")
    tokens = encode(tokenizer_of(model), text)
    losses = [
        perplexity(m, tokens, limit=WINDOWS, track=lambda items, what, n, w=which: output.track(items, f"{what}, {w}", n))
        for m, which in ((original.model, "original"), (packed, "int8"))
    ]

    first, last = rows[0], rows[-1]
    disk = sizes.on_disk(model), sizes.on_disk(out)
    memory = entries[0].nbytes, packed.program.nbytes()
    table = [
        ("size on disk", size(disk[0]), size(disk[1]), ratio(disk[1], disk[0])),
        ("weights, as stored", size(memory[0]), size(memory[1]), ratio(memory[1], memory[0])),
        ("perplexity", f"{losses[0].value:.3f}", f"{losses[1].value:.3f}", ratio(losses[1].value, losses[0].value)),
    ]
    for phase, what in (("prefill", "prefill of 128 tokens, ms"), ("decode", "decode of a token, ms")):
        before, after = first.median(phase), last.median(phase)
        table.append((what, f"{before:.2f}", f"{after:.2f}", ratio(after, before)))
    output.table("int8", ["", ">before", ">after", ">ratio"], table)
    output.line(f"perplexity: {compilation.change_text(*relative_change(*losses))}, {losses[0].tokens:,} held-out tokens")
    output.line(compilation.coverage_text(packed.record))
    output.line(f"timed: before as {first.entry.how}, after as {last.entry.how}, on the CPU, batch 1")
    for row in rows[1:-1]:
        output.line(
            f"for comparison, {row.entry.how}: prefill {row.median('prefill'):.2f} ms, decode {row.median('decode'):.2f} ms"
        )
    for line in describe(last.entry.model.layers):
        output.line(line)

    output.line(f"\nwritten to {out}; a fresh process loads it and continues {PROMPT!r}:\n")
    command = [sys.executable, "-m", "fxc", "run", str(out), "--prompt", PROMPT, "--max-new-tokens", "60"]
    sys.stdout.flush()
    subprocess.run(command, check=True)


def best_backend() -> str:
    """inductor where there is a C++ compiler, eager elsewhere."""
    try:
        require_compiler()
    except UsageError:
        return "eager"
    return "inductor"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "pylm")
    parser.add_argument("--out", type=Path, default=Path("out") / "pylm-int8")
    arguments = parser.parse_args()
    try:
        main(arguments.model, arguments.out, Output())
    except FxcError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
