"""What the algorithms of fxc.calibrate lose in quality on the bundled language model, weights only, layer by layer.

    python -m benchmarks.algorithms --threads 2

Calibration: 128 windows of 256 tokens of the standard library's files that are not held out; perplexity: the first 51,200
tokens of those that are. Where it does not say "in order", layers see what they read in the uncompressed model. Nothing is
packed: each weight is replaced by the float32 numbers that its levels stand for. A full run writes
benchmarks/results/algorithms-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.workloads import PYLM
from fxc.calibrate.descent import descend
from fxc.calibrate.gptq import gptq
from fxc.calibrate.gradual import gradual
from fxc.calibrate.grid import grid_scales, nearest, rounded
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.levels import Levels, Quantized
from fxc.calibrate.masks import Pruned, keep_n_of_m, keep_share, pruned
from fxc.calibrate.qronos import corrected, qronos
from fxc.calibrate.refit import refit
from fxc.calibrate.sparsegpt import sparsegpt
from fxc.calibrate.wanda import scores
from fxc.kernel_bench.files import slug
from fxc.measure.perplexity import Perplexity, perplexity, relative_change

WINDOW, CALIBRATION, EVALUATED, BATCH = 256, 128, 200, 8
FORMATS = {"4 bits, g32": Levels(4, 32), "4 bits, g128": Levels(4, 128), "3 bits, g32": Levels(3, 32)}
Made = Quantized | Pruned
# (weight, hessian) -> what became of it.
Algorithm = Callable[[Tensor, Tensor], Made]


@dataclass
class Layer:
    """A linear layer, its weight as it came, and (of all layers that read the same tensor) the first one's name."""

    name: str
    module: nn.Linear
    weight: Tensor
    reads: str


@dataclass
class Bench:
    """The model that is rewritten, as it came (`whole`), and what is measured with."""

    model: nn.Module
    whole: nn.Module
    layers: list[Layer]
    calibration: list[Tensor]
    held_out: Tensor
    windows: int
    hessians: dict[str, Hessian] = field(default_factory=dict)

    def measured(self) -> Perplexity:
        return perplexity(self.model, self.held_out, WINDOW, limit=self.windows)

    def replace(self, layer: Layer, made: Made) -> None:
        layer.module.weight.data = made.dense() if isinstance(made, Quantized) else made.weight


class _Seen(Exception):
    """What a module was about to read."""


def reads(module: nn.Module, run: Callable[[], object]) -> tuple[tuple, dict]:
    """(args, kwargs) of the first call of `module` in `run`, which goes no further."""

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Seen(args, kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Seen as seen:
        return seen.args
    finally:
        handle.remove()
    raise AssertionError("the module was not called")


def prepare(calibration: int, windows: int) -> Bench:
    """The model with its linear layers (but the head), calibration windows and held-out tokens."""
    samples, held_out = tokens(calibration)
    model, whole = (AutoModelForCausalLM.from_pretrained(PYLM, dtype=torch.float32).eval() for _ in range(2))
    head = model.get_output_embeddings()
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
    inputs: dict[int, str] = {}
    layers: list[Layer] = []
    held = []

    def seen(name: str, module: nn.Linear, x: Tensor) -> None:
        held.append(x)  # or another tensor could have its id
        layers.append(Layer(name, module, module.weight.detach().clone(), inputs.setdefault(id(x), name)))

    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen(name, module, args[0]))
        for name, module in linears.items()
    ]
    with torch.inference_mode():
        model(input_ids=samples[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    return Bench(model, whole, layers, list(samples.split(BATCH)), held_out, windows)


def tokens(calibration: int) -> tuple[Tensor, Tensor]:
    """Windows of the example's training text, drawn [calibration, WINDOW], and its held-out text [T]."""
    sys.path.insert(0, str(PYLM.parent))
    from train_pylm import END, corpus

    tokenizer = PreTrainedTokenizerFast.from_pretrained(PYLM)
    training, held_out = (torch.tensor(tokenizer(END.join(texts))["input_ids"]) for texts in _thinned(*corpus()))
    drawn = torch.randint(0, len(training) - WINDOW, (calibration,), generator=torch.Generator().manual_seed(0))
    return torch.stack([training[start : start + WINDOW] for start in drawn.tolist()]), held_out


def _thinned(training: list[str], held_out: list[str]) -> tuple[list[str], list[str]]:
    # Every seventh file is enough to draw windows from, and quicker to encode.
    return training[::7], held_out


def statistics(bench: Bench) -> None:
    """H of what each layer reads in the uncompressed model: one for all that read the same tensor."""
    first = {layer.reads: layer for layer in bench.layers if layer.reads == layer.name}
    bench.hessians = {name: Hessian(layer.weight.shape[1]) for name, layer in first.items()}
    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, name=name: bench.hessians[name].add(args[0]))
        for name, layer in first.items()
    ]
    with torch.inference_mode():
        for batch in bench.calibration:
            bench.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()


def apart(bench: Bench, algorithm: Algorithm) -> float:
    """Rewrite every layer by itself; the mean error of the layers."""
    errors = []
    for layer in bench.layers:
        made = algorithm(layer.weight, bench.hessians[layer.reads].mean)
        bench.replace(layer, made)
        errors.append(made.error)
    return sum(errors) / len(errors)


@torch.inference_mode()
def in_order(bench: Bench, algorithm: Callable[[Tensor, Tensor, Tensor], Made]) -> float:
    """Rewrite layers in the order in which they run, each for what it reads by then (and what it would read)."""
    for layer in bench.layers:
        layer.module.weight.data = layer.weight
    stems = [bench.model.model, bench.whole.model]
    calls = [reads(stems[0].layers[0], lambda ids=ids: stems[0](input_ids=ids, use_cache=False)) for ids in bench.calibration]
    # What each block reads, in the model that is rewritten and in the one that is not; the rest of a call is the same in all.
    streams = [[args[0] for args, _ in calls]] * 2
    errors = []
    for at in range(len(stems[0].layers)):
        blocks = [stem.layers[at] for stem in stems]
        here = [layer for layer in bench.layers if layer.name.startswith(f"model.layers.{at}.")]
        for first in dict.fromkeys(layer.reads for layer in here):
            inner = first.removeprefix(f"model.layers.{at}.")
            both = Hessian(blocks[0].get_submodule(inner).in_features, cross=True)
            for *hidden, (_, kwargs) in zip(*streams, calls):
                seen = [
                    reads(block.get_submodule(inner), lambda block=block, x=x, kwargs=kwargs: block(x, **kwargs))
                    for block, x in zip(blocks, hidden)
                ]
                both.add(*(args[0] for args, _ in seen))
            for layer in (each for each in here if each.reads == first):
                made = algorithm(layer.weight, both.mean, both.cross)
                bench.replace(layer, made)
                errors.append(made.error)
        streams = [[block(x, **kwargs) for x, (_, kwargs) in zip(stream, calls)] for block, stream in zip(blocks, streams)]
    return sum(errors) / len(errors)


def quantizing(levels: Levels) -> dict[str, Callable[[Bench], float]]:
    half = Levels(levels.bits, levels.group, full_range=False)

    def scales(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor | None]:
        return grid_scales(weight, levels, hessian.diagonal())

    def best(weight: Tensor, hessian: Tensor, cross: Tensor) -> Quantized:
        aim = corrected(weight, hessian, cross)
        return descend(aim, hessian, gptq(aim, hessian, levels))

    return {
        "nearest": lambda bench: apart(bench, lambda w, h: nearest(w, half, h)),
        "full range": lambda bench: apart(bench, lambda w, h: nearest(w, levels, h)),
        "grid by E[x^2]": lambda bench: apart(bench, lambda w, h: rounded(w, levels, scales(w, h), h)),
        "GPTQ, full range": lambda bench: apart(bench, lambda w, h: gptq(w, h, levels)),
        "GPTQ + grid scales": lambda bench: apart(bench, lambda w, h: gptq(w, h, levels, scales(w, h))),
        "GPTQ + descent": lambda bench: apart(bench, lambda w, h: descend(w, h, gptq(w, h, levels))),
        "Qronos, in order": lambda bench: in_order(bench, lambda w, h, g: qronos(w, h, g, levels)),
        "Qronos + descent, in order": lambda bench: in_order(bench, best),
    }


def pruning(pattern: tuple[int, int] | None) -> dict[str, Callable[[Bench], float]]:
    def keep(found: Tensor, by_row: bool) -> Tensor:
        return keep_n_of_m(found, *pattern) if pattern else keep_share(found, 0.5, by_row)

    known = {
        "magnitude": lambda bench: apart(bench, lambda w, h: pruned(w, keep(w.abs(), False), h)),
        "Wanda": lambda bench: apart(bench, lambda w, h: pruned(w, keep(scores(w, h.diagonal()), True), h)),
        "SparseGPT": lambda bench: apart(bench, lambda w, h: sparsegpt(w, h, pattern)),
        "SparseGPT + refit": lambda bench: apart(bench, lambda w, h: refit(w, sparsegpt(w, h, pattern).keep, h)),
    }
    # A pattern has no rounds in between.
    return known if pattern else {**known, "gradual": lambda bench: apart(bench, lambda w, h: gradual(w, h, 0.5))}


def columns() -> dict[str, dict[str, Callable[[Bench], float]]]:
    quantized = {name: quantizing(levels) for name, levels in FORMATS.items()}
    return {**quantized, "2:4": pruning((2, 4)), "half of all": pruning(None)}


def measure(bench: Bench) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Column by column: algorithm -> change of perplexity, its standard error, mean error of layers, seconds."""
    before = bench.measured()
    statistics(bench)
    for column, algorithms in columns().items():
        found: dict[str, dict[str, float]] = {}
        for name, rewrite in algorithms.items():
            began = time.perf_counter()
            error = rewrite(bench)
            seconds = time.perf_counter() - began
            change, spread = relative_change(before, bench.measured())
            found[name] = {"change": change, "spread": spread or 0.0, "error": error, "seconds": round(seconds, 1)}
            note(f"{column}: {name}: {100 * change:+.2f} % ±{100 * (spread or 0):.2f}, error {error:.2e}, {seconds:.0f} s")
        yield column, found


def markdown(report: dict) -> str:
    machine = report["hardware"]
    lines = [
        f"# Algorithms on examples/pylm, {machine['cpu']}",
        "",
        f"Change in perplexity over {EVALUATED * WINDOW:,} held-out tokens, ± the standard error of the paired difference by "
        f"window; (mean error of the layers' outputs, seconds). Calibration: {CALIBRATION} windows of {WINDOW} tokens. "
        f"{machine['cores']} cores, threads: {report['threads']}, load before: {report['load_before']}. "
        f"{table.versions_text(report['versions'])}.",
    ]
    found = report["columns"]
    for heads in filter(None, ([name for name in found if name in FORMATS], [name for name in found if name not in FORMATS])):
        lines += ["", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name in found[heads[-1]]:
            lines.append(f"| {name} | " + " | ".join(_cell(found[head].get(name)) for head in heads) + " |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['change']:+.2f} % ±{100 * cell['spread']:.2f} ({cell['error']:.1e}, {cell['seconds']:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few windows: whether it works; nothing is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    load = round(os.getloadavg()[0], 2)
    bench = prepare(*((BATCH, 2) if options.quick else (CALIBRATION, EVALUATED)))
    report = {"hardware": table.hardware(), "versions": table.versions(), "threads": options.threads, "load_before": load}
    report["columns"] = {}
    for column, found in measure(bench):
        report["columns"][column] = found
        if not options.quick:  # after each column: a run that is stopped has what it found
            write(RESULTS / f"algorithms-{slug(report['hardware']['cpu'])}.json", report, md=markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
