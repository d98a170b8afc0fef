"""How the layers of a lowered model run on this machine, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fxc.ir.program import Program
from fxc.lower.held import cache_bytes, held
from fxc.lower.siblings import LayerChoice
from fxc.report.console import size


def forms(layers: Sequence[LayerChoice]) -> dict[str, int]:
    """Form -> how many layers were lowered to it."""
    return dict(sorted(Counter(choice.op for choice in layers).items()))


def describe(layers: Sequence[LayerChoice]) -> list[str]:
    """A line on the forms, and one for each reason why layers are not run as they are stored; nothing for no layers."""
    counts = forms(layers)
    if not counts:
        return []
    lines = ["layers: " + ", ".join(f"{count} {form}" for form, count in counts.items())]
    reasons: dict[str, str] = {}
    for choice in layers:
        if choice.reason.startswith("keep_float="):
            reasons.setdefault("keep_float", f"{choice.reason.partition(';')[0]}, as {choice.fqn}")
        elif "the machine was busy" in choice.reason:
            reasons.setdefault("busy", f"{choice.op}: {choice.reason.partition(';')[0]}, as {choice.fqn}")
        elif choice.op == "dequantized":
            # The measured times differ from layer to layer, and what shares a product: one example stands for all.
            reasons.setdefault(choice.reason.partition(" (")[0].partition("; ")[0], f"{choice.reason}, as {choice.fqn}")
    return lines + list(reasons.values())


def describe_held(program: Program) -> str:
    """What a lowered program keeps in memory, in a line."""
    parts = held(program)
    line = f"in memory: {size(sum(parts.values()))}: " + ", ".join(f"{size(n)} {form}" for form, n in parts.items())
    return line + (f"; and {size(cache)} of cache for each token" if (cache := cache_bytes(program)) else "")


def held_as_json(program: Program) -> dict[str, object]:
    return {"held": held(program), "cache_bytes_per_token": cache_bytes(program)}
