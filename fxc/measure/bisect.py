"""Which rewrite it was: the first of all that passes make with which a check no longer holds, found in logarithmic time.

Rewrites are numbered (`passes/rewrites.py`), and a compilation can end after any number of them. With none the check holds,
with all of them it fails; halving what lies between finds a rewrite before which it holds and after which it does not, as
LLVM's -opt-bisect-limit and torch's CompilerBisector do. Where it holds, fails and holds again there are several
such places, and one of them is found.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc.captured import Captured, capture_source, capture_teacher
from fxc.compiled.model import CompiledModel
from fxc.compiler import compile_captured, samples_of
from fxc.data.comparison import for_both
from fxc.data.labels import Samples
from fxc.data.samples import samples
from fxc.errors import UsageError, VerificationFailed, first_line
from fxc.ir.cache import is_present
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.measure.reproduce import Reproduction, reproduction
from fxc.options import Options
from fxc.passes.order import order
from fxc.passes.rewrites import Rewrite, Rewrites
from fxc.progress import Say, unsaid
from fxc.report.difference import unified_diff
from fxc.verify.compare import relative_error
from fxc.verify.gates import rounding_limit

LONGEST_OUTPUT = 300


@dataclass(frozen=True)
class Broken:
    """The rewrite with which the check fails. number: of it, from 1, among `total` (or more, where a pass broke off); why: what
    the check said; before, after: the programs of number - 1 and number rewrites, or None where it broke off while it was made;
    tries: how many programs were checked."""

    number: int
    total: int
    rewrite: Rewrite
    why: str
    before: Program
    after: Program | None
    tries: int

    def difference(self) -> str:
        """What the rewrite changed: lines of text, and the constants whose numbers it changed in place."""
        if self.after is None:
            return ""
        texts = str(self.before), str(self.after)
        lines = unified_diff(*texts, (f"{self.number - 1} rewrites", f"{self.number} rewrites"))
        there = self.before.constants
        changed = [
            f"@{name}: {int((tensor != there[name]).sum()):,} of {tensor.numel():,} numbers are others, "
            f"{int((there[name] == 0).sum()):,} -> {int((tensor == 0).sum()):,} are zero\n"
            for name, tensor in self.after.constants.items()
            if name in there and tensor.shape == there[name].shape and tensor.dtype == there[name].dtype
            and not torch.equal(_plain(tensor), _plain(there[name]))
        ]  # fmt: skip
        return lines + "".join(changed)

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number, "total": self.total, "pass": self.rewrite.by, "place": self.rewrite.place,
            "why": self.why, "difference": self.difference(), "tries": self.tries,
        }  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    """Something that can be compared, of numbers of a byte too."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


class Bisection:
    """The search for one model.

    check, a command, or tolerance, a relative error of the outputs against the original: what has to hold; with neither, what
    the gates of the passes say. The command gets the folder of an artifact in the place of `{}`, or at its end, and as FXC_OUT,
    and fails where it exits with another number than 0; no shell reads it. Raises `UsageError` for both.
    """

    def __init__(
        self, model: Any, example_inputs: Any = None, options: Options = Options(), *, check: str | None = None,
        tolerance: float | None = None, say: Say = unsaid,
    ) -> None:  # fmt: skip
        if check is not None and tolerance is not None:
            raise UsageError("one check decides", where="--check", hint="give --check or --tolerance")
        if tolerance is not None and not tolerance >= 0:
            raise UsageError(f"{tolerance} is no error", where="--tolerance", hint="0.01 is one per cent")
        self.command = _words(check) if check is not None else None
        self.tolerance, self.say = tolerance, say
        options.check()
        if options.resume is not None or options.limit is not None:
            raise UsageError("the search sets the limit, and resumes nothing", hint="leave limit and resume out")
        self.options = replace(options, allow_noop=True, verify=self._is_by_gates, dump_dir=None)
        teacher = capture_teacher(options, example_inputs)
        self.captured: Captured = capture_source(model, example_inputs, replace(options, verify=True), teacher)
        if self.captured.is_streamed:
            raise UsageError("a model that is read piece by piece is not run as a whole", hint="use a machine that holds it")
        self.teacher = teacher
        self.read = {
            name: samples_of(self.captured, options, name=name)
            for name in ("calib", "train")
            if getattr(options, name) is not None
        }
        given: Samples | list[list[Tensor]] = self.read.get("calib") or samples(self.captured.program)
        self.inputs: list[list[Tensor]] = list(given)
        self.tries = 0

    @property
    def _is_by_gates(self) -> bool:
        return self.command is None and self.tolerance is None

    def find(self) -> Broken | None:
        """The first rewrite that breaks the check; None where it holds with all of them. Raises `UsageError` where it fails
        with none of them."""
        numbered = Rewrites()
        program, why = self._tried(None, numbered)
        if why is None:
            self.say(f"with all {len(numbered.made)} rewrites the check holds")
            return None
        # Of a pass that broke off, one that did not ask was not numbered.
        total = len(numbered.made) + (program is None)
        before, said = self._tried(0)
        if said is not None:
            hint = "it has to hold for the model as it is captured: mend the check"
            raise UsageError("the check fails before any rewrite", where="--check", why=said, hint=hint)
        good, bad, after, last = 0, total, program, why
        while bad - good > 1:
            middle = (good + bad) // 2
            made, said = self._tried(middle)
            self.say(f"{middle} of {total} rewrites: {'holds' if said is None else said}")
            if said is None:
                good, before = middle, made
            else:
                bad, after, last = middle, made, said
        rewrite = numbered.made[bad - 1] if bad <= len(numbered.made) else self._next(bad)
        return Broken(bad, total, rewrite, last, before, after, self.tries)

    def reproduce(self, found: Broken) -> Reproduction:
        """The smallest part of the program that still holds before the rewrite and fails after it."""
        inputs, _ = for_both(self.inputs[0], found.before, self.captured.program)
        if found.after is None:
            return Reproduction(found.before, None, inputs)
        return reproduction(found.before, found.after, inputs, partial(self._fails_alone, found))

    def _next(self, number: int) -> Rewrite:
        """The pass that broke off as it made the rewrite of this number without asking."""
        numbered = Rewrites(number)
        self._made(numbered)
        return Rewrite(numbered.by)

    def _tried(self, limit: int | None, rewrites: Rewrites | None = None) -> tuple[Program | None, str | None]:
        """The program of so many rewrites, None where it could not be made, and what is wrong with it."""
        self.tries += 1
        rewrites = Rewrites(limit) if rewrites is None else rewrites
        made, why = self._made(rewrites)
        if made is None and self._is_by_gates:
            return self._without_gates(Rewrites(limit)), why
        if made is None:
            return None, why
        return made.program, self._wrong(made)

    def _made(self, rewrites: Rewrites) -> tuple[CompiledModel | None, str | None]:
        try:
            return compile_captured(
                self.captured, self.options, teacher=self.teacher, read=self.read, rewrites=rewrites
            ), None
        except VerificationFailed as error:
            return None, f"{error.where}: {error.what}" if error.where else error.what

    def _without_gates(self, rewrites: Rewrites) -> Program | None:
        """What a gate refused, to be shown; None where the pass broke off."""
        options = replace(self.options, verify=False)
        try:
            return compile_captured(self.captured, options, teacher=self.teacher, read=self.read, rewrites=rewrites).program
        except VerificationFailed:
            return None

    def _wrong(self, made: CompiledModel) -> str | None:
        if self.tolerance is not None:
            error = error_of(made.program, self.captured.program, self.inputs)
            return None if error <= self.tolerance else f"the outputs differ by {error:.4g}, more than {self.tolerance:g}"
        return self._run(made) if self.command is not None else None

    def _run(self, made: CompiledModel) -> str | None:
        """Save it, and run the command on it."""
        with tempfile.TemporaryDirectory(prefix="fxc-bisect-") as parent:
            out = str(Path(parent) / "out")
            made.save(out)
            words = [word.replace("{}", out) for word in self.command]
            words = words if words != self.command else [*words, out]
            try:
                done = subprocess.run(
                    words, env={**os.environ, "FXC_OUT": out}, capture_output=True, text=True, errors="replace", check=False
                )
            except OSError as error:
                hint = "no shell reads it: bash -c '...' is one"
                raise UsageError("the command cannot be run", where="--check", why=error, hint=hint) from None
        if done.returncode == 0:
            return None
        last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:]
        return f"the command exits with {done.returncode}" + "".join(f": {line[:LONGEST_OUTPUT]}" for line in last)

    def _fails_alone(self, found: Broken, before: Program, after: Program, inputs: Sequence[Tensor]) -> bool:
        """Whether a part of the program shows it too: it holds before, and not after."""
        if self.command is not None:
            models = [CompiledModel(program, {}) for program in (before, after)]
            return self._run(models[0]) is None and self._run(models[1]) is not None
        try:
            expected = run(before, inputs)
        except Exception:  # these inputs are none of it
            return False
        try:
            error = relative_error(run(after, inputs), expected)
        except Exception:  # an operator that refuses what it is given is what the rewrite broke
            return True
        return not error <= self._limit(found, before)

    def _limit(self, found: Broken, before: Program) -> float:
        """The error above which a part shows the fault: the tolerance, or the budget of the gate."""
        if self.tolerance is not None:
            return self.tolerance
        step = next((each for each in order(self.options.passes).passes if str(each) == found.rewrite.by), None)
        if step is None or not step.is_policy:
            return rounding_limit(before)
        return step.limits[0] if self.options.budget is None else self.options.budget


def error_of(program: Program, original: Program, inputs: Sequence[list[Tensor]]) -> float:
    """The largest relative error of the outputs over these inputs of the original, but for the cache, whose form passes may
    change; infinite where the program refuses what the original takes."""
    names = [each for each in original.signature.outputs if not is_present(each)]
    worst = 0.0
    for tensors in inputs:
        ours, theirs = for_both(tensors, program, original)
        try:
            expected = dict(zip(original.signature.outputs, run(original, theirs), strict=True))
        except Exception:  # sizes that the model itself refuses
            continue
        try:
            found = dict(zip(program.signature.outputs, run(program, ours), strict=True))
        except Exception:
            return float("inf")
        worst = max(worst, relative_error([found[name] for name in names], [expected[name] for name in names]))
    return worst


def bisect(
    model: Any, example_inputs: Any = None, options: Options = Options(), *, check: str | None = None,
    tolerance: float | None = None,
) -> Broken | None:  # fmt: skip
    """The first rewrite with which `check`, a command, or `tolerance` does not hold: see `Bisection`."""
    return Bisection(model, example_inputs, options, check=check, tolerance=tolerance).find()


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError("the command cannot be read", where="--check", why=first_line(error)) from None
    if not words:
        raise UsageError("there is no command", where="--check", hint="as in --check 'python judge.py {}'")
    return words
