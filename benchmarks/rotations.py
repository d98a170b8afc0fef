"""What rotations are worth before rounding, on the bundled language model: weights only, layer by layer.

    python -m benchmarks.rotations --threads 1

Each format, to nearest and by GPTQ, of the model as it is and rotated: the residual stream, values within heads, both.
Calibration and perplexity as in benchmarks.algorithms, which has the windows. Layers see what they read in the uncompressed
model; table and head stay as they are. Nothing is packed: each weight is replaced by the float32 numbers that its levels
stand for. A full run writes benchmarks/results/rotations-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import fxc
from benchmarks import table
from benchmarks.algorithms import BATCH, CALIBRATION, EVALUATED, WINDOW, tokens
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.workloads import PYLM
from fxc.calibrate.grid import nearest
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.levels import Levels
from fxc.calibrate.quantize import quantized
from fxc.compiled.model import CompiledModel, compiled_model
from fxc.data.decoder import decoder_inputs
from fxc.ir.observe import inputs_of, observe
from fxc.kernel_bench.files import slug
from fxc.measure.perplexity import Perplexity, perplexity, relative_change
from fxc.schemes.scheme import LINEAR

FORMATS = {
    "4 bits, a row": Levels(4, -1), "4 bits, g128": Levels(4, 128), "3 bits, a row": Levels(3, -1),
    "3 bits, g128": Levels(3, 128), "2 bits, g128": Levels(2, 128),
}  # fmt: skip
ROTATIONS = {"as it is": "", "rotate": "rotate", "rotate:of=stream": "rotate:of=stream"}
ALGORITHMS = ("nearest", "gptq")


@dataclass
class Rotated:
    """The model after a rotation, its layers by name of their weight, and H of what each reads."""

    model: CompiledModel
    layers: dict[str, fx.Node]
    hessians: dict[str, Hessian]

    def rounded(self, levels: Levels, algorithm: str) -> tuple[CompiledModel, float]:
        """A copy with rounded weights; the mean error of the layers."""
        program, errors = self.model.program.copy(), []
        for name in self.layers:
            weight, hessian = program.constants[name], self.hessians[name]
            if algorithm == "nearest":
                made = nearest(weight, levels, hessian.mean)
            else:
                made = quantized(algorithm, weight, hessian, levels)
            program.constants[name] = made.dense()
            errors.append(made.error)
        return compiled_model(program, {}, config=self.model.config), sum(errors) / len(errors)


def prepare(passes: str, calibration: Tensor) -> Rotated:
    model = fxc.optimize(str(PYLM), passes=passes, dtype="float32")
    head = model.program.results[0]
    nodes = [n for n in model.program.graph.nodes if n.target is LINEAR and not reaches(n, head)]
    layers = {node.args[1].target: node for node in nodes}
    by_value = {node.args[0]: Hessian(node.args[0].meta["val"].shape[-1]) for node in layers.values()}
    first = {node.args[0]: node for node in layers.values()}
    watches = inputs_of(first.values(), lambda node, x: by_value[node.args[0]].add(x))
    module = model.program.module()
    with torch.inference_mode():
        for batch in calibration.split(BATCH):
            observe(module, decoder_inputs(model.program, batch), watches)
    return Rotated(model, layers, {name: by_value[node.args[0]] for name, node in layers.items()})


def reaches(node: fx.Node, result: fx.Node) -> bool:
    """Whether `result` is what `node` computes, moved at most: the head of the model."""
    while result is not node and len(result.all_input_nodes) == 1:
        [result] = result.all_input_nodes
    return result is node


def measure(calibration: int, windows: int) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Rotation, format, algorithm -> change of perplexity, its standard error, mean error of layers, seconds."""
    samples, held_out = tokens(calibration)
    before: Perplexity | None = None
    for rotation, passes in ROTATIONS.items():
        rotated = prepare(passes, samples)
        seen = perplexity(rotated.model, held_out, WINDOW, limit=windows)
        before = before or seen
        yield rotation, "float32", "", cell(before, seen, 0.0, 0.0)
        for form, levels in FORMATS.items():
            for algorithm in ALGORITHMS:
                began = time.perf_counter()
                model, error = rotated.rounded(levels, algorithm)
                seconds = time.perf_counter() - began
                seen = perplexity(model, held_out, WINDOW, limit=windows)
                yield rotation, form, algorithm, cell(before, seen, error, seconds)


def cell(before: Perplexity, after: Perplexity, error: float, seconds: float) -> dict[str, float]:
    change, spread = relative_change(before, after)
    return {"change": change, "spread": spread or 0.0, "error": error, "seconds": round(seconds, 1)}


def markdown(report: dict) -> str:
    machine, found, held_out = report["hardware"], report["found"], report["windows"] * WINDOW
    lines = [
        f"# Rotations on examples/pylm, {machine['cpu']}",
        "",
        f"Change in perplexity over {held_out:,} held-out tokens, ± the standard error of the paired difference by "
        f"window; (mean error of the layers' outputs). Calibration: {CALIBRATION} windows of {WINDOW} tokens. "
        f"{machine['cores']} cores, threads: {report['threads']}, load before: {report['load_before']}. "
        f"{table.versions_text(report['versions'])}.",
        "",
        f"| | | {' | '.join(found)} |",
        "|---" * (len(found) + 2) + "|",
    ]
    for form in FORMATS:
        for algorithm in ALGORITHMS:
            cells = [its.get(f"{form}, {algorithm}") for its in found.values()]
            texts = [
                f"{100 * c['change']:+.2f} % ±{100 * c['spread']:.2f} ({c['error']:.1e})" if c else "-" for c in cells
            ]
            lines.append(f"| {form} | {algorithm} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rotations", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few windows: whether it works; nothing is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--windows", type=int, default=EVALUATED, help="so many held-out ones are predicted")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    load = round(os.getloadavg()[0], 2)
    report = {"hardware": table.hardware(), "versions": table.versions(), "threads": options.threads, "load_before": load}
    report |= {"windows": options.windows}
    report["found"] = {rotation: {} for rotation in ROTATIONS}
    for rotation, form, algorithm, found in measure(*((BATCH, 2) if options.quick else (CALIBRATION, options.windows))):
        report["found"][rotation][", ".join(filter(None, (form, algorithm)))] = found
        note(f"{rotation}: {form} {algorithm}: {100 * found['change']:+.2f} % ±{100 * found['spread']:.2f}")
        if not options.quick:  # after each: a run that is stopped has what it found
            write(RESULTS / f"rotations-{slug(report['hardware']['cpu'])}.json", report, md=markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
