"""The training loop: steps over batches, the rate by a schedule, and the best state by held-out samples kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fxc import ranks
from fxc.calibrate.journal import Journal
from fxc.errors import VerificationFailed
from fxc.mapped import keep_freed, keep_no_more
from fxc.progress import Pace, Track, in_words, untracked
from fxc.train.fit import Fit, Point
from fxc.train.muon import Muon
from fxc.train.plan import Kind, Plan
from fxc.train.precision import has_bfloat16, scaler

# Training ends after so many steps in a row without a finite gradient. A loss scale has halved to nothing by then.
HOPELESS = 25
# What a loop goes on with, besides tensors that are somebody else's.
COUNTERS = ("looked", "batches", "in_vain", "in_row", "best", "kept")


@dataclass(frozen=True)
class Pieces:
    """What a loop learns from. lost: of a batch, by its number, its loss in parts that add up, each with its graph, one after
    another; judged: the loss on held-out samples; counted: what a batch holds, in `unit`."""

    lost: Callable[[int], Iterable[Tensor]]
    judged: Callable[[], float]
    counted: Callable[[int], int] | None = None
    unit: str = "samples"


def train(
    parameters: Mapping[str, nn.Parameter],
    pieces: Pieces,
    plan: Plan,
    *,
    kinds: Mapping[str, Kind] | None = None,
    rates: Mapping[str, float] | None = None,
    before_step: Callable[[float], None] | None = None,
    settled: float = 0.0,
    first_counts: bool = True,
    state: Sequence[Tensor] = (),
    buffers: nn.Module | None = None,
    apart: Collection[str] = (),
    matrices: Collection[str] = (),
    journal: Journal | None = None,
    track: Track = untracked,
    what: str = "training",
) -> Fit:
    """Train `parameters` in place and leave them as they were best.

    kinds: name -> what the parameter is, by its dimensions where it is not named; rates: name -> what its rate is multiplied by
    besides; before_step: is told the share that is done (masks that grow, rounding that begins), before each step and look;
    settled: from which share on what is trained is of the kind that is wanted: a state before counts as none, but for the
    first; state: what else changes with the parameters, and is kept with them; buffers: a module whose buffers change, without
    being kept (masks); apart: parameters of which each process has a part (`fxc.train.shards`), whose gradient is the sum
    of all already; matrices: what Muon is for, if the plan has it (`fxc.train.muon`); journal: where each look is saved with
    all that the rest depends on, and from where it goes on: to the same bits, where the length is in steps.

    A step whose gradient is not finite is not taken, and does not count; in float16 the loss scale halves. Under torchrun every
    process calls this with the same parameters, but for those that are apart. Raises VerificationFailed where gradients are
    not finite many times in a row, and no state counts yet.
    """
    ranks.join()
    loop = _Loop(
        parameters, pieces, plan, kinds or {}, rates or {}, before_step, settled, first_counts, state, buffers, apart, matrices
    )
    loop.go_on(journal)
    keep_freed()
    try:
        loop.run(journal, track, what)
    finally:
        keep_no_more()
    return loop.finish()


class _Loop:
    def __init__(
        self, parameters: Mapping[str, nn.Parameter], pieces: Pieces, plan: Plan, kinds: Mapping[str, Kind],
        rates: Mapping[str, float], before_step: Callable[[float], None] | None, settled: float, first_counts: bool,
        state: Sequence[Tensor], buffers: nn.Module | None, apart: Collection[str], matrices: Collection[str],
    ) -> None:  # fmt: skip
        self.pieces, self.plan, self.settled, self.first_counts = pieces, plan, settled, first_counts
        self.before_step = before_step or (lambda done: None)
        self.parameters, self.state, self.buffers = list(parameters.values()), list(state), buffers
        self.apart = [parameters[name] for name in sorted(apart)]
        self.whole = [each for name, each in parameters.items() if name not in apart]
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            kind = kinds.get(name, "weight" if parameter.ndim > 1 else "vector")
            decay = plan.weight_decay if kind == "weight" else 0.0
            factor = plan.factor(kind) * rates.get(name, 1.0)
            turns = bool(plan.muon) and name in matrices and name not in apart
            key = (turns, factor * plan.muon if turns else factor, decay)
            groups.setdefault(key, []).append(parameter.requires_grad_())
        by_adamw, by_muon = [], []
        for (turns, factor, decay), some in groups.items():
            (by_muon if turns else by_adamw).append({"params": some, "factor": factor, "weight_decay": decay})
        self.optimizers: list[torch.optim.Optimizer] = []
        if by_adamw:
            self.optimizers.append(torch.optim.AdamW(by_adamw, plan.rate, betas=(0.9, 0.95), fused=True))
        if by_muon:
            self.optimizers.append(Muon(by_muon, plan.rate, dtype=torch.bfloat16 if has_bfloat16() else torch.float32))
        self.scaler = scaler(plan.precision)
        # So many looks there are; in few steps fewer.
        self.looks = plan.looks if plan.minutes else min(plan.looks, plan.steps)
        self.looked = self.batches = self.in_vain = self.in_row = 0
        self.losses: list[float] = []
        self.seen, self.speed = 0, 0.0
        self.began = time.monotonic()

    def go_on(self, journal: Journal | None) -> None:
        """Begin where an earlier process was, or at the beginning."""
        saved = ranks.agreed(journal.pending() if journal and journal.done else None)
        if saved is None:
            before = self.pieces.judged()
            self.fit = Fit(before, before, precision=self.plan.precision)
            self.best = before if self.first_counts and not math.isnan(before) else math.inf
            self.kept = _copies(self._every)
            return
        self.fit = Fit(**saved["fit"] | {"curve": [Point(**each) for each in saved["fit"]["curve"]]})
        for name in COUNTERS:
            setattr(self, name, saved[name])
        _copy(self._every, saved["now"])
        for optimizer, own in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.scaler.load_state_dict(saved["scaler"])
        for name, tensor in saved["buffers"].items():
            owner, _, own = name.rpartition(".")
            setattr(self.buffers.get_submodule(owner), own, tensor)
        self.began = time.monotonic() - self.fit.seconds

    def run(self, journal: Journal | None, track: Track, what: str) -> None:
        pace = Pace([1.0] * self.looks, self.looked)
        while self.looked < self.looks and self.fit.stopped is None:
            began, self.seen = time.monotonic(), 0
            text = ", ".join(filter(None, (what, *self._told(), self._left(pace))))
            for done in track(self._until(self.looked + 1), text, self._count()):
                self._step(done)
            self.speed = self.seen / max(time.monotonic() - began, 1e-9)
            self._look()
            if journal:
                journal.save_stage(asdict(self.fit.curve[-1]), self._all())

    def finish(self) -> Fit:
        _copy(self._every, self.kept)
        self.fit.after = self.best
        return self.fit

    @property
    def _every(self) -> list[Tensor]:
        return [*self.parameters, *self.state]

    def _done(self) -> float:
        """The share of the training that is done, from 0 to 1."""
        if self.plan.minutes:
            return min(ranks.agreed(time.monotonic() - self.began) / (60 * self.plan.minutes), 1.0)
        return self.fit.steps / self.plan.steps

    def _until(self, look: int) -> Iterator[float]:
        """Steps up to this look, each as the share that was done before it."""
        while self.fit.stopped is None and (done := self._done()) < look / self.looks:
            yield done

    def _count(self) -> int | None:
        """How many steps there are up to the next look; None where it is time that counts."""
        if self.plan.minutes:
            return None
        return math.ceil((self.looked + 1) * self.plan.steps / self.looks) - self.fit.steps

    def _step(self, done: float) -> None:
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.plan.rate * group["factor"] * self.plan.rate_at(done)
        self.before_step(done)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total = 0.0
        with torch.enable_grad():
            for part in self.pieces.lost(self.batches):
                self.scaler.scale(part).backward()
                total += float(part.detach())
        ranks.add_gradients(self.whole)
        self.seen += self.pieces.counted(self.batches) if self.pieces.counted else 0
        self.batches += 1
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self._norm()
        nn.utils.clip_grads_with_norm_(self.parameters, self.plan.max_norm, norm)
        if bool(norm.isfinite()):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.losses.append(ranks.added(total))
            self.fit.steps += 1
            self.in_row = 0
        else:
            self._skipped()
        self.scaler.update()

    def _norm(self) -> Tensor:
        """Of all gradients together, of all processes."""
        whole, apart = ([each.grad for each in some if each.grad is not None] for some in (self.whole, self.apart))
        norm = nn.utils.get_total_norm(whole)
        return (norm.square() + ranks.added_tensor(nn.utils.get_total_norm(apart).square())).sqrt() if self.apart else norm

    def _skipped(self) -> None:
        self.fit.skipped += 1
        self.in_row += 1
        if self.in_row < HOPELESS:
            return
        self.fit.stopped = f"{HOPELESS} gradients in a row were not finite"
        if math.isinf(self.best):
            hint = "a smaller rate" + (", or precision=bfloat16" if self.plan.precision == "float16" else "")
            raise VerificationFailed(f"training broke off: {self.fit.stopped}", hint=hint)

    def _look(self) -> None:
        done = self._done()
        self.looked = max(self.looked + 1, int(done * self.looks))
        self.before_step(done)
        now, seconds = self.pieces.judged(), ranks.agreed(time.monotonic() - self.began)
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        self.fit.curve.append(Point(self.fit.steps, seconds, loss, now))
        self.fit.seconds = seconds
        if done < self.settled:
            return
        if now < self.best:
            self.best, self.kept, self.in_vain = now, _copies(self._every), 0
            return
        self.in_vain += 1
        if self.plan.patience and self.in_vain >= self.plan.patience and self.looked < self.looks:
            self.fit.stopped = f"{self.in_vain} looks at held-out samples in a row were no better"

    def _all(self) -> dict[str, object]:
        """All that the rest depends on."""
        buffers = dict(self.buffers.named_buffers()) if self.buffers is not None else {}
        return {
            **{name: getattr(self, name) for name in COUNTERS}, "fit": asdict(self.fit), "buffers": buffers,
            "now": [each.detach() for each in self._every],
            "optimizers": [each.state_dict() for each in self.optimizers], "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def _told(self) -> Iterator[str]:
        """How far it is, in words."""
        yield f"step {self.fit.steps + 1}" + ("" if self.plan.minutes else f" of {self.plan.steps}")
        if not self.fit.curve:
            yield f"held-out loss {self.fit.before:.4g}"
            return
        last = self.fit.curve[-1]
        if last.loss is not None:
            yield f"loss {last.loss:.4g}"
        yield f"held-out loss {last.held_out:.4g}"
        if self.speed:
            yield f"{self.speed:,.0f} {self.pieces.unit} a second"

    def _left(self, pace: Pace) -> str | None:
        if self.plan.minutes:
            return in_words(60 * self.plan.minutes - (time.monotonic() - self.began))
        return pace.left(self.looked)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [each.detach().clone() for each in tensors]


@torch.no_grad()
def _copy(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for each, value in zip(tensors, values, strict=True):
        each.copy_(value)


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
