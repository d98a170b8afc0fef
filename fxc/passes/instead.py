"""What would make a program smaller where a pass found nothing to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from fxc.analysis.groups import NAMES, groups
from fxc.ir.program import Program
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.passes.prune.mask import unmaskable

# Kind of group -> the option of prune that takes a share of its units.
_OPTIONS = {"channel": "channels", "ffn": "ffn", "head": "heads"}


def instead(program: Program, tried: Iterable[str]) -> list[str]:
    """Passes and options that would find something in `program`, and in how much; tried: the names of passes that are
    asked for already."""
    found = []
    can_prune = not program.is_on_meta and not (FLOAT_WEIGHTS.check(program) or DENSE_WEIGHTS.check(program))
    if can_prune and "prune" not in tried:
        units: Counter[str] = Counter()
        for group in groups(program):
            if group.kind in _OPTIONS and group.size > 1 and not unmaskable(group):
                units[group.kind] += group.size
        found += [f"prune:{_OPTIONS[kind]}=0.25 (there are {n:,} {NAMES[kind]}s that can go)" for kind, n in units.items()]
    if any(t.dtype == torch.float32 for t in program.constants.values()):
        found.append("--dtype bfloat16, in Python dtype='bfloat16', which halves float32 weights")
    return found
