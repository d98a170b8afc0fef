"""What removal is worth: two models with 0, 10, 25 and 50 % of their heads and FFN channels gone, in time and in quality.

    python -m benchmarks.removal --threads 2
    python -m benchmarks.removal --quick

Of each share there are three forms: dense (the structure is removed), int8 (removed, then quantized) and masked (only zeroed,
which shows that zeros alone save nothing), each in eager mode and through inductor. The ideal speed-up is the inverse of the
share of multiplications that is left. A full run writes benchmarks/results/removal-<cpu>.json, .md and .svg; one with --quick
is only printed, unless --json names a file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import table
from benchmarks.models import RESULTS, note, quiet, slug
from benchmarks.peers import HiddenStates
from benchmarks.removal_plot import svg
from benchmarks.text import calibration_texts, texts
from benchmarks.timing import Call, Timing, interleave
from benchmarks.workloads import CONTEXT, PYLM, Decoder, Encoder
from fxc.compiler import Captured, capture_source, compile_captured
from fxc.data.samples import causal_lm_sample
from fxc.errors import UsageError
from fxc.ir.binding import bind
from fxc.ir.program import Program
from fxc.lower.inductor import require_compiler
from fxc.measure import evaluate
from fxc.passes.base import parse_passes
from fxc.runtime.model import CompiledModel, compiled_model
from fxc.verify.compare import run

SHARES = (0.0, 0.1, 0.25, 0.5)
# The models that are timed are chosen by the first; what the second would have chosen is only rated.
CRITERION, PLAIN = "taylor", "l2"
FORMS = ("dense", "int8", "masked")
# As in examples/demo.py, so that the perplexities can be compared.
WINDOWS = 200
PREFILL = 256
# A file of the standard library may be in the example's held-out text when its name's hash is 0 modulo this.
HELD_OUT = 16


def python_source(most: int = 1_000_000) -> str:
    """Files of the running Python's standard library, from all over it, none of which the example's held-out text can have.

    By name, as examples/train_pylm.py splits them, and by content, for a file that is there under two names.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = (PYLM / "heldout.txt").read_text(encoding="utf-8")
    sources = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("site-packages/") or "test" in name or may_be_held_out(name):
            continue
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            if 2_000 < len(text) < 40_000 and text not in held_out:
                sources.append(text)
    step = -(-sum(map(len, sources)) // most)
    return "\n".join(sources[::step])


def may_be_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


# ----------------------------------------------------------------------------------------------------------------- models


class Subject:
    """A model that is pruned. sizes: at which it is timed; quality: what `rate` measures."""

    name: str
    title: str
    quality: str
    sizes: dict[str, str]
    folder: Path

    @cached_property
    def captured(self) -> Captured:
        return capture_source(str(self.folder))

    def calibration(self, scratch: Path) -> Any:
        """What `calib` takes."""
        raise NotImplementedError

    def call(self, model: Any, size: str) -> Call:
        """What is timed."""
        raise NotImplementedError

    def inputs(self, program: Program, size: str) -> list[Tensor]:
        """Flat inputs of that size."""
        raise NotImplementedError

    def rate(self, model: CompiledModel) -> float:
        raise NotImplementedError


class MiniLM(Subject):
    """Sentences; rated by the mean cosine of their embeddings with the original's."""

    name, title, quality = "minilm", "all-MiniLM-L6-v2", "cosine"

    def __init__(self, sizes: Sequence[str], threads: int):
        self.sizes = {size: f"{size}, ms per call" for size in sizes}
        self.workload = Encoder(list(sizes))
        self.bench = self.workload.workbench(threads)
        self.folder = self.bench.folder
        self.sentences = {size: self.workload.inputs(self.bench, size) for size in sizes}

    @cached_property
    def rated(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(ids, mask) and the original's embeddings."""
        given = self.bench.encode(texts(32), 128)
        return given, self.workload.vectors(HiddenStates(self.bench.original())(*given), given)

    def calibration(self, scratch: Path) -> list[str]:
        return calibration_texts(64)

    def call(self, model: Any, size: str) -> Call:
        return self.workload.call(HiddenStates(model), self.sentences[size], size)

    def inputs(self, program: Program, size: str) -> list[Tensor]:
        return bind(program, (), dict(zip(("input_ids", "attention_mask"), self.sentences[size], strict=True)))

    def rate(self, model: CompiledModel) -> float:
        given, expected = self.rated
        found = self.workload.vectors(HiddenStates(model)(*given), given)
        return torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean().item()


class PyLM(Subject):
    """The bundled language model at batch 1; rated by its perplexity on held-out text."""

    name, title, quality = "pylm", "examples/pylm", "perplexity"
    folder = PYLM

    def __init__(self, windows: int, threads: int):
        self.sizes = {
            "prefill": f"prefill of {PREFILL} tokens, ms",
            "decode": f"decode of a token after {CONTEXT}, ms",
        }
        self.workload, self.windows = Decoder(), windows
        self.ids = self.workload.inputs(self.workload.workbench(threads), "")

    @cached_property
    def tokens(self) -> Tensor:
        text = (PYLM / "heldout.txt").read_text(encoding="utf-8")
        return evaluate.encode(evaluate.tokenizer_of(PYLM), text)

    def calibration(self, scratch: Path) -> Path:
        path = scratch / "python.txt"
        path.write_text(python_source(), encoding="utf-8")
        return path

    def call(self, model: Any, size: str) -> Call:
        if size == "decode":
            return self.workload.call(model, self.ids, size)
        ids = self.tokens[None, :PREFILL]
        return Call(lambda _: model(input_ids=ids, use_cache=True).logits)

    def inputs(self, program: Program, size: str) -> list[Tensor]:
        return causal_lm_sample(program, 1, *((PREFILL, 0) if size == "prefill" else (1, CONTEXT)))

    def rate(self, model: CompiledModel) -> float:
        return evaluate.perplexity(model, self.tokens, limit=self.windows).value


# -------------------------------------------------------------------------------------------------------------- measuring


def passes(share: float, criterion: str) -> str:
    return f"prune:heads={share:g}:ffn={share:g}:round_to=16:criterion={criterion}"


def forms(captured: Captured, share: float, calibration: Any) -> dict[str, Program]:
    """Form -> the program, all of one compilation. With nothing pruned there is no masked form."""
    stages: dict[str, Program] = {}
    compile_captured(
        captured,
        parse_passes(f"int8,{passes(share, CRITERION)}" if share else "int8"),
        calib=calibration if share else None,
        on_step=lambda step, program: stages.update({step.name.partition(":")[0]: program}),
    )
    if not share:
        return {"dense": stages["canonicalize"], "int8": stages["int8"]}
    return {"dense": stages["dead_structure"], "int8": stages["int8"], "masked": stages["prune"]}


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of the shapes [B, H, S, D], [B, h, T, D] and [B, h, T, E], which torch does not count on the CPU."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def flops(program: Program, inputs: list[Tensor]) -> int:
    """Of its matrix products and attentions, counted while it runs."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention_flops}) as counter:
        run(program, inputs)
    return counter.get_total_flops()


def weight_bytes(model: CompiledModel) -> int:
    """Of the weights as the artifact has them on disk."""
    with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as scratch:
        folder = Path(scratch) / "artifact"
        model.save(folder)
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def record(timing: Timing, baseline: Timing) -> dict:
    """Milliseconds, and how many times faster than `baseline`, paired by round: median, lowest, highest."""
    ratios = [theirs / ours for theirs, ours in zip(baseline.rounds, timing.rounds, strict=True)]
    return {
        "ms": round(timing.median, 4),
        "low": round(timing.low, 4),
        "high": round(timing.high, 4),
        "speedup": round(median(ratios), 3),
        "speedup_low": round(min(ratios), 3),
        "speedup_high": round(max(ratios), 3),
        "rounds": [round(each, 4) for each in timing.rounds],
    }


def backends() -> list[str]:
    """inductor only where there is a C++ compiler."""
    try:
        require_compiler()
    except UsageError as error:
        note(f"without inductor: {error}")
        return ["eager"]
    return ["eager", "inductor"]


def build(subject: Subject, shares: Sequence[float]) -> tuple[list[dict], dict[tuple[float, str], Program]]:
    """The rows of a result without their times, and the programs to time."""
    rows, programs = [], {}
    with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as scratch:
        calibration = subject.calibration(Path(scratch))
        for share in shares:
            row: dict[str, Any] = {"pruned": share, "passes": passes(share, CRITERION) if share else "", "forms": {}}
            for form, program in forms(subject.captured, share, calibration).items():
                programs[share, form] = program
                model = compiled_model(program, {}, config=subject.captured.config)
                about = {"parameters": program.numel(), "bytes": weight_bytes(model), subject.quality: subject.rate(model)}
                row["forms"][form] = about | {"times": {}}
                note(f"{subject.name} {share:.0%} {form}: {about}")
            if share:
                plain = compile_captured(subject.captured, parse_passes(passes(share, PLAIN)), verify=False)
                row[PLAIN] = {"parameters": plain.program.numel(), subject.quality: subject.rate(plain)}
            dense = programs[share, "dense"]
            row["flops"] = {size: flops(dense, subject.inputs(dense, size)) for size in subject.sizes}
            rows.append(row)
    return rows, programs


def measure(subject: Subject, shares: Sequence[float], rounds: int, seconds: float) -> dict:
    """One model's results."""
    rows, programs = build(subject, shares)
    ways = backends()
    models = {
        (share, form, backend): compiled_model(program, {}, config=subject.captured.config, backend=backend)
        for (share, form), program in programs.items()
        for backend in ways
    }
    for size in subject.sizes:
        note(f"{subject.name} {size}: timing {len(models)} models over {rounds} rounds")
        timings = interleave({key: subject.call(model, size) for key, model in models.items()}, rounds, seconds)
        for (share, form, backend), timing in timings.items():
            row = rows[shares.index(share)]
            baseline = timings[shares[0], "int8" if form == "int8" else "dense", backend]
            row["forms"][form]["times"].setdefault(backend, {})[size] = record(timing, baseline)
    dtype = str(models[shares[0], "dense", ways[0]].dtype).removeprefix("torch.")
    about = {"name": subject.name, "title": subject.title, "dtype": dtype, "quality": subject.quality}
    return about | {"sizes": subject.sizes, "backends": ways, "rows": rows}


# -------------------------------------------------------------------------------------------------------------- reporting


def markdown(report: dict) -> str:
    """The whole report for reading: of each model what is left and how good it is, then a table of times for each size."""
    machine, protocol = report["hardware"], report["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = [
        f"# What removal is worth on {machine['cpu']}",
        "",
        f"{machine['cores']} cores ({', '.join(machine['flags']) or 'none known'}), threads: {protocol['threads']}, "
        f"interleaved rounds: {protocol['rounds']}, load before the run: {protocol['load_before']}. {versions}.",
        "",
        "Of each model that share of the heads and of the FFN channels of every layer goes "
        f'(`passes="{passes(0.25, CRITERION)}"` and so on), '
        "without any training afterwards. dense: removed. int8: removed, then quantized. masked: set to zero.",
    ]
    for result in report["models"]:
        lines += ["", f"## {result['title']}, {result['dtype']}", "", *_quality(result)]
        for size, title in result["sizes"].items():
            lines += ["", f"### {title}", "", *_times(result, size)]
    lines += [
        "",
        "Each time is the median over the rounds, times faster than the same form with nothing pruned (masked: than dense), "
        "and below it the lowest and the highest. FLOPs are those of matrix products and attention.",
    ]
    return "\n".join(lines) + "\n"


def _quality(result: dict) -> list[str]:
    name = result["quality"]
    heads = ["pruned", "parameters", "MB", "MB int8", name, f"{name} int8", f"{name} masked", f"{name} by {PLAIN}"]
    body = []
    for row in result["rows"]:
        dense, int8 = row["forms"]["dense"], row["forms"]["int8"]
        rated = [dense, int8, row["forms"].get("masked"), row.get(PLAIN)]
        body.append(
            [
                f"{row['pruned']:.0%}",
                f"{dense['parameters']:,}",
                *(f"{each['bytes'] / 1e6:.2f}" for each in (dense, int8)),
                *(f"{each[name]:.4g}" if each else "-" for each in rated),
            ]
        )
    return _table(heads, body)


def _times(result: dict, size: str) -> list[str]:
    ways = [(form, backend) for form in FORMS for backend in result["backends"]]
    whole = result["rows"][0]["flops"][size]
    body = []
    for row in result["rows"]:
        left = row["flops"][size] / whole
        line = [f"{row['pruned']:.0%}", f"{left:.0%}", f"{1 / left:.2f}x"]
        for form, backend in ways:
            cell = row["forms"].get(form, {}).get("times", {}).get(backend, {}).get(size)
            line.append("{ms:.2f}  {speedup:.2f}x<br>{low:.2f}-{high:.2f}".format(**cell) if cell else "-")
        body.append(line)
    return _table(["pruned", "FLOPs left", "ideal", *(f"{form} {backend}" for form, backend in ways)], body)


def _table(heads: list[str], body: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(line)} |" for line in body]


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    path.with_suffix(".svg").write_text(svg(report["models"]), encoding="utf-8")
    note(f"wrote {path}, and .md and .svg beside it")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.removal", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="0 and 50 %%, small sizes, few rounds: whether it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, help="default: 7, or 2 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write; .md and .svg go beside it")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    return options


def main() -> int:
    options = arguments()
    quiet()
    torch.set_num_threads(options.threads)
    protocol = {
        "threads": options.threads,
        "rounds": options.rounds,
        "load_before": round(os.getloadavg()[0], 2),
        "quick": options.quick,
        "criterion": CRITERION,
    }
    report: dict[str, Any] = {"hardware": table.hardware(), "versions": table.versions(), "protocol": protocol, "models": []}
    shares, seconds = ((0.0, 0.5), 0.05) if options.quick else (SHARES, 0.3)
    sizes = ("1x32", "8x128") if options.quick else ("1x32", "8x128", "32x128")
    missing = Encoder([]).missing()
    if missing:
        note(f"left out: {missing}")
    # Standard output is for the tables: what libraries print there goes to standard error.
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        subjects: list[Subject] = [] if missing else [MiniLM(sizes, options.threads)]
        subjects.append(PyLM(20 if options.quick else WINDOWS, options.threads))
        for subject in subjects:
            report["models"].append(measure(subject, shares, options.rounds, seconds))
    print(markdown(report))
    if options.json or not options.quick:
        write(report, options.json or RESULTS / f"removal-{slug(report['hardware']['cpu'])}.json")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
