"""fxc: one line for every model, stage by stage."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fxc
from benchmarks.pruning.models import Model, built, inputs
from benchmarks.pruning.oracle import exactness
from benchmarks.pruning.outcome import HEADS, WIDTHS, Record, close, first, generated, same, tried
from fxc.analysis.groups import groups
from fxc.compiled.model import compiled_model
from fxc.ir.program import Program
from fxc.verify.compare import relative_error

PASSES = f"prune:heads={HEADS}:ffn={WIDTHS}:channels={WIDTHS}"
SHARE = {"head": HEADS, "ffn": WIDTHS, "channel": WIDTHS}
# Random models have no quality to lose: what is measured is whether removal is exact, not whether the choice is good.
NO_BUDGET = {"budget": float("inf"), "layer_budget": float("inf")}


@dataclass
class Unit:
    """One group of coupled axes: what it is (head, ffn, channel, ...), where, how many units, why it may not shrink, and how
    many weights sum over it: of heads, the number of attentions that have them in common."""

    kind: str
    scope: str
    size: int
    pinned: str | None
    sums: int
    members: frozenset[tuple[str, int]] = field(default_factory=frozenset)


def units(program: Program) -> list[Unit]:
    """The groups that the compiler's own analysis finds in `program`."""
    return [
        Unit(g.kind, g.scope, g.size, g.pinned, len(g.sites), frozenset((m.fqn, m.dim) for m in g.members))
        for g in groups(program)
    ]


def removals(before: list[Unit], after: list[Unit]) -> list[Record]:
    """Of each group that was asked for something: its units before and after, and how many were asked to go. A group is found
    again by the constants that it is in; one that is in none of them any more is gone as a whole."""
    asked = [unit for unit in before if unit.kind in SHARE]
    common = [(len(a.members & b.members), i, j) for i, a in enumerate(asked) for j, b in enumerate(after) if a.kind == b.kind]
    again: dict[int, int] = {}
    for count, i, j in sorted(common, key=lambda each: -each[0]):
        if count and i not in again and j not in again.values():
            again[i] = j
    records = []
    for i, unit in enumerate(asked):
        record = {"kind": unit.kind, "scope": unit.scope, "sums": unit.sums}
        record["units"] = [unit.size, after[again[i]].size if i in again else 0]
        record["asked"] = 0 if unit.pinned else int(SHARE[unit.kind] * unit.size)
        records.append(record | ({"pinned": unit.pinned} if unit.pinned else {}))
    return records


def counted(records: list[Record], model: Model) -> dict[str, list[int]]:
    """heads: [attentions that lost all the heads that were asked, attentions there are]; widths: the same of groups of
    channels. A pinned one counts as there only where the model by its construction has so many that can be narrowed."""
    result = {}
    for name, kinds, expected in (("heads", ("head",), model.heads), ("widths", ("ffn", "channel"), model.widths)):
        free = [(r, r["sums"] if name == "heads" else 1) for r in records if r["kind"] in kinds and "pinned" not in r]
        done = sum(count for r, count in free if r["units"][0] - r["units"][1] >= r["asked"])
        result[name] = [done, max(expected, sum(count for _, count in free))]
    return result


def parameters(program: Program, module: nn.Module) -> int:
    """Numbers in the program's constants without those that are buffers of `module`, as other tools count."""
    buffers = {name for name, _ in module.named_buffers()}
    return sum(tensor.numel() for name, tensor in program.constants.items() if name not in buffers)


def ours(model: Model) -> Record:
    """What fxc makes of `model`, stage by stage."""
    module, example = built(model), model.example() if model.example else None
    stages: dict[str, Program] = {}
    spent: dict[str, float] = {}

    def keep(step: Any, program: Program) -> None:
        name = step.name.partition(":")[0]
        stages[name], spent[name] = program, step.seconds
        removed[name] = [asdict(each) for each in step.removed]
        refusals.extend({"pass": name, "fqn": r.fqn, "reason": r.reason} for r in step.refusals)

    refusals: list[Record] = []
    removed: dict[str, list[Record]] = {}
    start = time.perf_counter()
    small = fxc.optimize(module, example, passes=PASSES, on_step=keep, **NO_BUDGET)
    seconds = time.perf_counter() - start
    masked = compiled_model(stages["prune"], {}, config=getattr(module, "config", None))
    sizes = inputs(module, example)
    record: Record = {
        "parameters": [parameters(program, module) for program in (stages["prune"], small.program)],
        "removed": removed,
        "refusals": refusals,
        "seconds": {"all": round(seconds, 2), "passes": round(sum(spent.values()), 2)},
    }
    record["groups"] = tried(lambda: removals(units(stages["prune"]), units(small.program)))
    if isinstance(record["groups"], list):
        record |= counted(record["groups"], model)
    record["difference"] = tried(lambda: exactness(stages["prune"], small.program))
    # How much the masks matter: where they change nothing, agreement says nothing.
    record["moved"] = tried(lambda: round(relative_error([first(masked(**sizes[1]))], [first(module(**sizes[1]))]), 5))
    record["forward"] = tried(lambda: close(first(small(**sizes[1])), first(masked(**sizes[1]))))
    if (outcome := tried(lambda: same(generated(small, sizes[0]), generated(masked, sizes[0])))) is not None:
        record["generate"] = outcome
    record |= stored(small, sizes)
    return record


def stored(small: Any, sizes: list[dict[str, Tensor]]) -> Record:
    """Saved, loaded, and what was saved quantized."""
    with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as scratch:
        folder = Path(scratch) / "sliced"
        expected = tried(lambda: [first(small(**each)) for each in sizes])

        def reload() -> str:
            small.save(folder)
            loaded = fxc.load(folder)
            again = [first(loaded(**each)) for each in sizes]
            # Weights lie elsewhere in memory, and by that convolutions choose how they sum.
            return next((said for said in map(close, again, expected) if said != "ok"), "ok")

        def quantize() -> Record:
            tiny = fxc.optimize(str(folder), passes="int8", allow_noop=True)
            error = relative_error([first(tiny(**sizes[1]))], [expected[1]])
            layers = sum(step["changed"] for step in tiny.report["passes"] if step["name"] == "int8")
            return {"layers": layers, "bytes": [small.program.nbytes(), tiny.program.nbytes()], "difference": round(error, 5)}

        return {"reload": tried(reload), "int8": tried(quantize)}
