"""The bundled language model: compressed, and trained on Python files of the standard library that it is not judged by."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fxc
from benchmarks.output import note
from benchmarks.python_source import python_source
from benchmarks.recovery.row import Row, timed
from benchmarks.workloads import PYLM
from fxc.data.text import encode, tokenizer_of
from fxc.measure.perplexity import perplexity
from fxc.source.load import load_source

WINDOW = 256
WINDOWS = 200
SAMPLES = 8192
HALF = "half of the calibrated loss gone"
UNIFORM = "prune:heads=0.25:ffn=0.3:uniform=true:criterion=taylor"


@dataclass(frozen=True)
class Work:
    """passes: what compresses; minutes: of training; options: of `recover` besides; bar: of what is lost of perplexity."""

    name: str
    passes: str
    minutes: float
    bar: str
    options: str = ""


WORKS = (
    Work("heads 25 % + FFN 30 %, uniform", UNIFORM, 8, "ahead of plain distillation"),
    Work("heads 25 % + FFN 30 %, uniform, half of the time", UNIFORM, 4, "plain distillation in twice the time"),
    Work("heads 25 % + FFN 30 %", UNIFORM.replace(":uniform=true", ""), 20, "within 1.5 %"),
    Work("heads 50 % + FFN 50 %", "prune:heads=0.5:ffn=0.5:criterion=taylor", 20, "within 8 %"),
    Work("one layer of five dropped", "prune:layers=0.2", 10, "within 3 %"),
    Work("2:4, SparseGPT", "sparse24:criterion=sparsegpt", 20, "within 3 %"),
    Work("2 bits, groups of 32", "int4:bits=2:group=32:algorithm=gptq", 10, HALF),
    Work("3 bits, groups of 32", "int4:bits=3:group=32:algorithm=gptq", 10, HALF),
)


def rows(only: set[str], share: float, precision: str) -> list[Row]:
    """One for each work, and for the first one also plain distillation. share: of the minutes."""
    tokens = encode(tokenizer_of(PYLM), (PYLM / "heldout.txt").read_text(encoding="utf-8"))

    def judged(model: object) -> float:
        return perplexity(model, tokens, WINDOW, limit=WINDOWS).value

    made: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "train.txt"
        text.write_text(python_source(40_000_000), encoding="utf-8")
        given = {
            "calib": text, "calib_length": WINDOW, "train": text, "train_length": WINDOW, "train_samples": SAMPLES,
            "dtype": "float32",
        }  # fmt: skip
        before = judged(load_source(str(PYLM)).model)
        chosen = {name for each in only for name in _named(each)}
        for work in WORKS:
            if only and work.name not in chosen:
                continue
            note(f"{work.name}: {work.minutes * share:.1f} minutes")
            compressed = fxc.optimize(PYLM, passes=work.passes, calib=text, calib_length=WINDOW, dtype="float32")
            without = judged(compressed)
            spec = f"{work.passes},recover:minutes={work.minutes * share}:precision={precision}{work.options}"
            trained, seconds = timed(lambda spec=spec: fxc.optimize(PYLM, passes=spec, **given))
            made.append(Row(work.name, work.bar, before, without, judged(trained), seconds, spec))
            note(str(made[-1]))
            if work is WORKS[0]:
                folder = Path(scratch) / "plain"
                compressed.save_pretrained(folder)
                student = load_source(str(folder), dtype="float32").model
                seconds = 60 * work.minutes * share
                steps = distilled(student, _windows(text), seconds, precision)
                how = f"plain torch: KL, AdamW 1e-3, cosine, 8 x {WINDOW} tokens, {steps} steps"
                name = f"{work.name}, plain distillation"
                made.append(Row(name, "reference", before, without, judged(student), seconds, how))
                note(str(made[-1]))
    return made


def _named(part: str) -> list[str]:
    """The work of that name, else all whose names have it in them."""
    names = [work.name for work in WORKS]
    return [part] if part in names else [name for name in names if part in name]


PRECISIONS = ("float32", "bfloat16", "float16")


def precisions(share: float) -> list[Row]:
    """The same steps on the same samples with products in each precision: they are to end alike."""
    tokens = encode(tokenizer_of(PYLM), (PYLM / "heldout.txt").read_text(encoding="utf-8"))
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "train.txt"
        text.write_text(python_source(4_000_000), encoding="utf-8")
        data = {"calib": text, "train": text, "calib_length": 128, "train_length": 128, "train_samples": 512}
        given = data | {"dtype": "float32"}
        before, without = (
            perplexity(model, tokens, WINDOW, limit=WINDOWS).value
            for model in (load_source(str(PYLM)).model, fxc.optimize(PYLM, passes=UNIFORM, calib=text, dtype="float32"))
        )
        for precision in PRECISIONS:
            note(f"{precision}: {round(60 * share)} steps")
            spec = f"{UNIFORM},recover:method=all:steps={round(60 * share)}:batch=4:precision={precision}"
            trained, seconds = timed(lambda spec=spec: fxc.optimize(PYLM, passes=spec, **given))
            after = perplexity(trained, tokens, WINDOW, limit=WINDOWS).value
            made.append(Row(f"products in {precision}", "the same within noise", before, without, after, seconds, spec))
    return made


def distilled(student: nn.Module, windows: Tensor, seconds: float, precision: str) -> int:
    """The reference: soft labels of the model as it comes, and nothing else, for so long; how many steps that were."""
    teacher = load_source(str(PYLM), dtype="float32").model
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    draw = torch.Generator().manual_seed(1)
    began, steps = time.monotonic(), 0
    student.train().requires_grad_()
    while (done := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, steps / 20 + 0.05) * 0.5 * (1 + math.cos(math.pi * done)) + 1e-5
        ids = windows[torch.randint(len(windows), (8,), generator=draw)]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            with torch.no_grad():
                aim = teacher(input_ids=ids).logits
            given = student(input_ids=ids).logits
        loss = nn.functional.kl_div(
            given.float().log_softmax(-1).flatten(0, 1), aim.float().log_softmax(-1).flatten(0, 1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        steps += 1
    student.eval()
    return steps


def _windows(text: Path) -> Tensor:
    tokens = encode(tokenizer_of(PYLM), text.read_text(encoding="utf-8"))
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
