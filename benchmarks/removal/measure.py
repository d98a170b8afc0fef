"""What is measured of a subject at each share: what is left of it, how good it is, and its times in every form."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.output import note
from benchmarks.removal.subjects import Subject
from benchmarks.timing import Timing, interleave
from fxc.captured import Captured
from fxc.compiled.model import CompiledModel, compiled_model
from fxc.compiler import compile_captured
from fxc.errors import UsageError
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.lower.inductor import require_compiler
from fxc.options import Options

# The models that are timed are chosen by the first; what the second would have chosen is only rated.
CRITERION, PLAIN = "taylor", "l2"


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
                plain = compile_captured(subject.captured, Options(passes(share, PLAIN), verify=False))
                row[PLAIN] = {"parameters": plain.program.numel(), subject.quality: subject.rate(plain)}
            dense = programs[share, "dense"]
            row["flops"] = {size: flops(dense, subject.inputs(dense, size)) for size in subject.sizes}
            rows.append(row)
    return rows, programs


def passes(share: float, criterion: str) -> str:
    return f"prune:heads={share:g}:ffn={share:g}:round_to=16:criterion={criterion}"


def forms(captured: Captured, share: float, calibration: Any) -> dict[str, Program]:
    """Form -> the program, all of one compilation. With nothing pruned there is no masked form."""
    stages: dict[str, Program] = {}
    compile_captured(
        captured,
        Options(f"int8,{passes(share, CRITERION)}", calib=calibration) if share else Options("int8"),
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
