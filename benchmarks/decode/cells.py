"""What is measured of one compiled form of the model: decoding, a long prompt, and Hugging Face's loop."""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode.model import Variant
from fxc.runtime.static_cache import SlotCache

LAUNCHED_TOKENS = 16


def cells_of(options: argparse.Namespace, backend: str) -> list[tuple[str, str, int]]:
    """(what, mode, batch), the most wanted first."""
    best, *others = options.modes
    if backend != "eager":  # prompts would compile the whole program a second time, and each batch the step
        return [("decode", best, options.batch[0])]
    cells = [("decode", best, batch) for batch in options.batch]
    cells += [("prefill", "", 1)] if options.prefill else []
    cells += [("generate", best, options.batch[0])]
    return cells + [("decode", mode, options.batch[0]) for mode in others]


class Clock:
    """Seconds on a device, and how many are left of those that the run may take."""

    def __init__(self, device: torch.device, seconds: float | None) -> None:
        self.device = device
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def time(self, run: Any) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def rounds(self, run: Any, count: int) -> list[float]:
        run()
        return [self.time(run) for _ in range(count)]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_gb(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def decode(variant: Variant, mode: str, batch: int, options: argparse.Namespace, clock: Clock) -> dict:
    """One cell: greedy tokens after the prompt, the host waiting only for the last one: `new` of them a sequence, fewer where
    each kernel is launched from here, which takes tens of milliseconds a token."""
    token, present = variant.prompt(batch, options.prompt)
    length, new = options.prompt, options.new if mode == options.modes[0] else min(options.new, LAUNCHED_TOKENS)
    capacity = 1 << (length + options.new - 1).bit_length()
    mask = torch.ones(batch, length + new, dtype=torch.int64, device=variant.device)
    places = torch.arange(length + new, device=variant.device).expand(batch, -1)
    decoder = variant.decoder(capacity, mode)
    tokens: list[Tensor] = []

    def run() -> None:
        cache = SlotCache(decoder)
        cache.keep(present)
        tokens[:] = [token]
        for place in range(length, length + new):
            logits = cache.decode(tokens[-1], mask[:, : place + 1], places[:, place : place + 1])
            tokens.append(logits.argmax(-1))

    reset_peak(variant.device)
    first = clock.time(run)
    spent = clock.rounds(run, options.rounds)
    return cell(spent, new * batch) | {
        "new": new,
        "slots": capacity,
        "first_s": round(first, 3),
        # Of weights that run in another form than the stored one it would be wrong.
        "read_gb_per_s": None if "dequantized" in variant.forms else round(variant.read_bytes * new / median(spent) / 1e9, 1),
        "peak_gb": peak_gb(variant.device),
        "tokens": torch.cat(tokens[: LAUNCHED_TOKENS + 1], dim=1).tolist(),
    }


def prefill(variant: Variant, length: int, options: argparse.Namespace, clock: Clock) -> dict:
    """One cell: a prompt of `length` tokens, logits of every position among its results."""
    reset_peak(variant.device)
    return cell(clock.rounds(lambda: variant.prompt(1, length), options.rounds), length) | {"peak_gb": peak_gb(variant.device)}


def generate(variant: Variant, batch: int, options: argparse.Namespace, clock: Clock) -> dict:
    """One cell: Hugging Face's generate() over the static cache, prompt included, as a user calls it."""
    model = variant.model
    model.static_cache = True
    model._decoder = variant.decoder(1 << (options.prompt + options.new - 1).bit_length(), options.modes[0])
    ids, mask, _ = variant.inputs(batch, options.prompt)
    given = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}
    reset_peak(variant.device)
    spent = clock.rounds(lambda: model.generate(ids, attention_mask=mask, **given), options.rounds)
    return cell(spent, options.new * batch) | {"peak_gb": peak_gb(variant.device)}


def cell(spent: list[float], tokens: int) -> dict:
    middle = median(spent)
    return {
        "tokens_per_s": round(tokens / middle, 2),
        "low": round(tokens / max(spent), 2),
        "high": round(tokens / min(spent), 2),
        "seconds": [round(s, 6) for s in spent],
    }


def same_tokens(row: dict, others: list[dict]) -> bool:
    """Whether a step launched kernel by kernel gave the tokens that its recording gave."""
    same = ("passes", "backend", "what", "batch")
    pairs = [zip(o["tokens"], row["tokens"]) for o in others if all(o[k] == row[k] for k in same)]
    return all(a[: len(b)] == b[: len(a)] for pair in pairs for a, b in pair)
