"""What compilation makes of a few models is on record, for every format and kind of pruning: text, weights and report.

    FXC_REPLAY=accept pytest tests/test_replay.py   rewrites the record: the diff of tests/records/replay.json says what changed
    FXC_REPLAY=exact pytest tests/test_replay.py    compares every bit: for a change that must not change anything, on the
                                                    machine that wrote the record

Without either, what all CPUs compute alike is compared by its hash: the text, the report, and integers, whose scales come from
maxima, divisions and roundings, which IEEE fixes. What sums decide or enter (folded biases, the share of a range that int4
keeps) may differ in its last bits and is compared by a weighted sum. Random initial weights differ between CPUs as well: here
they are integers divided by a power of two.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from repo import REPO
from torch import Tensor, nn

from fxc.captured import Captured, capture_source
from fxc.compiler import compile_captured
from fxc.errors import FxcError
from fxc.ir.program import Program
from fxc.options import Options

RECORD = REPO / "tests" / "records" / "replay.json"
MODE = os.environ.get("FXC_REPLAY", "")
FORMATS = (
    "", "int8", "int8:mode=weight_only", "int4", "int4:group=32:symmetric=false", "fp8", "fp8:mode=weight_only", "sparse24",
    "sparse24,int8",
)  # fmt: skip
HEADS = "prune:heads=0.5:ffn=0.25"
PRUNED = (
    HEADS, f"{HEADS}:uniform=true,int8", f"{HEADS}:scope=global:criterion=l1,int4:group=32", f"{HEADS}:round_to=8,sparse24",
    f"{HEADS},fp8",
)  # fmt: skip
LEARNED = (
    f"{HEADS}:criterion=wanda", f"{HEADS}:criterion=taylor,int8", f"{HEADS}:criterion=mask_gradient", "prune:layers=0.5,int8",
)  # fmt: skip
CHANNELS = (
    "prune:channels=0.25", "prune:channels=0.5:criterion=bn_scale,int8", "prune:channels=0.25:scope=global:round_to=4,sparse24",
)  # fmt: skip
SOME = ("", "int8", "int4:group=32", "fp8", "sparse24,int8", PRUNED[1])
MODELS = {
    "pylm": SOME,
    "minilm": SOME,
    "mixtral": (*FORMATS[:3], *FORMATS[4:], PRUNED[0], *LEARNED),
    "t5": SOME,
    "vit": (*FORMATS, *PRUNED),
    "cnn": (*FORMATS, *CHANNELS),
    "resnet": (*FORMATS, *CHANNELS),
}
# How far the weighted sums may be apart: a few roundings of one constant, and far less than a wrong one of them.
NEAR = 1e-4


def with_weights_of_integers(model: nn.Module) -> nn.Module:
    """`model` with weights that are the same numbers on every machine, and statistics of batch norms that are plausible."""
    generator = torch.Generator().manual_seed(7)
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.data_ptr() in seen or name.endswith("inv_freq"):
            continue
        seen.add(tensor.data_ptr())
        values = torch.randint(-1000, 1001, tensor.shape, generator=generator).to(tensor.dtype) / 8192
        around_one = ("norm" in name.lower() and name.endswith("weight")) or name.endswith("running_var")
        tensor.data.copy_(1 + values if around_one else values)
    return model


def captured(name: str, pylm: Path, minilm: Path) -> Captured:
    if name in ("pylm", "minilm"):
        return capture_source(str(pylm if name == "pylm" else minilm), options=Options(verify=False))
    model, example = build(name)
    return capture_source(with_weights_of_integers(model), example, options=Options(verify=False))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def weighted_sum(tensor: Tensor) -> float:
    """Of the numbers (of packed ones the bytes) with weights that tell their places apart, relative to their mean magnitude."""
    values = tensor.detach().flatten()
    values = values.double() if values.dtype.itemsize > 1 else values.view(torch.uint8).double()
    weights = 1 + torch.arange(len(values), dtype=torch.float64) % 251 / 251
    total = float(values.abs().sum())
    return float((values * weights).sum()) / total if total else 0.0


def summary(before: Program, program: Program, report: dict[str, Any], recipe: str) -> dict[str, Any]:
    """One entry of the record. Constants that are as `before` are only named, unless there is no pass."""
    integers, floats, near = hashlib.sha256(), hashlib.sha256(), 0.0
    for name, tensor in sorted(program.constants.items()):
        is_float = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        digest = floats if is_float or "int4" in recipe else integers
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        old = before.constants.get(name)
        if recipe and old is not None and (old is tensor or (old.dtype == tensor.dtype and torch.equal(old, tensor))):
            continue
        digest.update(bytes_of(tensor))
        near += weighted_sum(tensor) if digest is floats else 0.0
    steps = [{k: v for k, v in step.items() if k != "seconds"} for step in report["passes"]]
    # What layers were before is the same for every recipe, and follows from the program as captured.
    rest = {name: value for name, value in report.items() if name != "layers"}
    told = json.dumps(rest | {"passes": steps, "source": None}, sort_keys=True, default=str)
    return {
        "lines": str(program).count("\n"),
        "text": hashlib.sha256(str(program).encode()).hexdigest()[:16],
        "report": hashlib.sha256(told.encode()).hexdigest()[:16],
        "bytes": program.nbytes(),
        "changed": {step["name"]: step["changed"] for step in steps},
        "integers": integers.hexdigest()[:16],
        "floats": floats.hexdigest()[:16],
        "near": round(near, 6),
    }


def replay(name: str, pylm: Path, minilm: Path) -> dict[str, Any]:
    source = captured(name, pylm, minilm)
    calib = [{"input_ids": torch.arange(n, n + 24)[None] % 300} for n in range(0, 90, 30)]
    made: dict[str, Any] = {}
    for recipe in MODELS[name]:
        data = calib if recipe in LEARNED else None
        try:
            model = compile_captured(source, Options(recipe, calib=data, verify=False))
            made[recipe] = summary(source.program, model.program, model.report, recipe)
        except FxcError as error:
            made[recipe] = {"refused": error.what}
    return made


# Those that take long have little that the others have not: what is special about them has tests of its own.
LONG = ("t5", "mixtral", "minilm")


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in MODELS])
def test_compilation_gives_what_is_on_record(name, pylm_dir, minilm_dir):
    found = replay(name, pylm_dir, minilm_dir)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if MODE == "accept":
        RECORD.write_text(json.dumps(record | {name: found}, indent=1, sort_keys=True) + "\n")
        return
    assert found.keys() == record[name].keys()
    for recipe, expected in record[name].items():
        differs = {k: (expected.get(k), v) for k, v in found[recipe].items() if v != expected.get(k)}
        if MODE != "exact":
            differs.pop("floats", None)
            before, after = differs.get("near", (0.0, 0.0))
            if before is not None and abs(before - after) <= NEAR:
                differs.pop("near", None)
        assert differs == {}, f"{name}, {recipe!r}: FXC_REPLAY=accept takes it"


def test_a_change_of_one_number_shows():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    source = capture_source(with_weights_of_integers(model), (torch.ones(2, 64),), options=Options(verify=False))
    made = compile_captured(source, Options("int8", verify=False))
    before = summary(source.program, made.program, made.report, "int8")
    assert before == summary(source.program, made.program, made.report, "int8")
    made.program.constants["0.qweight"][3, 5] += 1
    made.program.constants["2.bias"] = made.program.constants["2.bias"] * 1.02
    after = summary(source.program, made.program, made.report, "int8")
    assert {k for k in before if before[k] != after[k]} == {"integers", "floats", "near"}
    assert abs(before["near"] - after["near"]) > NEAR
