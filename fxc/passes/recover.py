"""Train what other passes have left, until it does again what the model did.

    constant @up.weight: f32[2, 4]
    %0: f32[s0, 4] = input "x"
    %1: f32[s0, 2] = aten.linear(%0, @up.weight)  # up
    return "out" %1
    ---
    constant @up.weight: f32[2, 4]
    %0: f32[s0, 4] = input "x"
    %1: f32[s0, 2] = aten.linear(%0, @up.weight)  # up
    return "out" %1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxc.data.labels import Samples
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.digest import digest_of
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Original, Pass, Result, check_data_is_given
from fxc.passes.canonicalize import Canonicalize
from fxc.passes.facts import CANONICAL
from fxc.passes.learning import key_of
from fxc.passes.teacher import teacher_of
from fxc.train import ranks
from fxc.train.batches import Batches
from fxc.train.halves import recover_halves
from fxc.train.loop import train
from fxc.train.lora import adapt, merge
from fxc.train.losses import Loss, default_loss
from fxc.train.needs import needs_of
from fxc.train.plan import Plan
from fxc.train.precision import autocast, chosen
from fxc.train.schedules import RAMP, Sparser, l1, norm_scales
from fxc.train.taught import Taught
from fxc.train.trainable import Trainable

HELD_OUT = 8
# Blocks are trained on so many samples at most, whose hidden states are kept.
BLOCK_SAMPLES = 256
# The packed program gives what the trained one gave, to so much of it: what differs is the order of sums, in the program's
# dtype.
SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}
EVERYTHING = ("weight", "vector", "scale")
KINDS = {"all": EVERYTHING, "norms": ("vector",), "scales": ("scale", "vector")}


@dataclass(frozen=True)
class Recover(Pass):
    """Train what other passes have left on training or calibration data, by what the model gave before the first of them. What
    is packed is trained as float with what packing rounds (quantization-aware training) and packed again, what is zero stays
    zero, and what is removed stays so. What was best on samples held out is kept: where nothing was better, everything stays
    as it was.

    loss: a weighted sum, as kl+0.5*features. kl: soft labels, the divergence from the model's logits at `temperature` (Hinton
    et al., arXiv 1503.02531); topk: of its `k` likeliest classes and all others together, which are kept for samples that come
    again; task: the next token, or labels; features, features_cosine: what blocks end with; outputs, cosine: what the model
    gives; pooled: the mean of that over tokens. By default kl where it gives logits, else outputs.
    steps: optimizer steps of AdamW; minutes: if given, so long instead. batch: samples in a step. rate: the learning rate,
    which rises and falls by `schedule`.
    method: blocks: attention and feed-forward parts one after another, until each gives what the model's gave, `block_steps`
    steps at `block_rate`, a share of the mean size of a weight's numbers (`fxc.train.halves`). By the loss: all: all weights;
    norms: gains and biases alone; scales: those of packed weights, with gains and biases. auto: blocks, and then by the loss
    scales, gains and biases, or all weights where layers, heads or channels were removed. With a schedule (below): all.
    lora: the rank of the product of two thin matrices through which the loss trains all weights, and which is merged in the
    end; weights that are no larger than these are trained as they are.
    precision: what products run in while it trains; weights are float32. auto: bfloat16 where the machine multiplies it itself.
    What a model has in a smaller type than float32 runs in its own.
    accumulate: in so many parts a batch is computed, for less memory; checkpointing: of each block only
    what it is given is kept, for less memory still and a third more time. patience: training by the loss ends after so many of
    ten looks at the held-out samples that were no better; 0: never. scale_rate: of scales of packed weights, as a factor of the
    rate.
    sparsity: the share of each layer's float weight that becomes zero while it trains, by the cubic schedule of Zhu and Gupta
    (arXiv 1710.01878), the smallest first. l1: so much times the sum of the scales of batch norms is added to the loss (Network
    Slimming, arXiv 1708.06519), after which prune:criterion=bn_scale takes channels out. layer_drop: the probability of leaving
    a residual branch out in a step (LayerDrop, arXiv 1909.11556), before layers are taken out; dropout: of leaving out each
    number of one.
    batch_statistics: batch norms go by each batch, and their statistics follow. quantize_after: the share of the steps before
    which packed weights are not rounded. With sparsity, the best state counts from when all zeros are there; with l1 and
    layer_drop, which make ready for what comes, the last one does.
    """

    loss: str = ""
    temperature: float = 1.0
    k: int = 64
    steps: int = 400
    minutes: float = 0.0
    batch: int = 8
    rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    method: Literal["auto", "blocks", "all", "norms", "scales"] = "auto"
    block_steps: int = 200
    block_rate: float = 0.02
    lora: int = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulate: int = 1
    checkpointing: bool = False
    patience: int = 0
    scale_rate: float = 1.0
    sparsity: float = 0.0
    l1: float = 0.0
    layer_drop: float = 0.0
    dropout: float = 0.0
    batch_statistics: bool = False
    quantize_after: float = 0.0

    name: ClassVar[str] = "recover"
    is_policy: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False
    repeats: ClassVar[bool] = True
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    # It goes back towards the model, by how much is what it is for: before and after are measured on held-out samples.
    limits: ClassVar[tuple[float, float]] = (float("inf"), float("inf"))

    def __post_init__(self) -> None:
        self._plan(0)
        if self.block_steps < 1 or self.block_rate <= 0:
            raise UsageError("block_steps is at least 1, and block_rate above 0", where="recover")
        if self.lora < 0 or (self.lora and (self.method not in ("auto", "all") or self.sparsity)):
            what = f"lora={self.lora} is no rank with which all weights are trained by the loss"
            raise UsageError(what, where="recover", hint="lora=16 with method=all or auto, and no sparsity=")
        for name in ("sparsity", "layer_drop", "dropout", "quantize_after"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not from 0 up to 1", where="recover")
        if self.checkpointing and self.batch_statistics:
            why = "a block that is run again would count its batch twice"
            raise UsageError("checkpointing goes without batch_statistics", where="recover", why=why, hint="leave one out")
        if self.l1 < 0:
            raise UsageError(f"l1={self.l1} is below 0", where="recover")
        if self.loss:
            Loss.parse(self.loss, self.temperature, self.k)

    def uses_data(self) -> bool:
        return True

    def uses_training(self) -> bool:
        return True

    def needs_data(self) -> str | None:
        return "what it is trained on is"

    def may_change_nothing(self) -> bool:
        return True

    def run(self, program: Program, context: Context) -> Result:
        if program.is_on_meta:
            return Result(notes=["not trained: the weights are on meta"])
        check_data_is_given([self], bool(context.samples), bool(context.training))
        ranks.join()
        training, held_out = _split(context)
        loss = Loss.parse(self.loss or default_loss(program), self.temperature, self.k)
        original = teacher_of(context, program)
        self._check_precision(program)
        loss.check(program, original.program, training.labels, training.unlabelled)
        student = Trainable(
            program, context.floats, layer_drop=self.layer_drop, dropout=self.dropout, batch_statistics=self.batch_statistics,
            checkpointing=self.checkpointing,
        )  # fmt: skip
        kinds = self._kinds(student, original, loss)
        student.train_only(kinds)
        if not student.named():
            raise UsageError(f"method={self.method} has nothing to train in it", where=str(self), hint="method=all")
        taught = Taught(
            student, original.program, loss, precision=chosen(self.precision),
            as_teacher=original.inputs, as_student=original.outputs, seed=context.seed, penalty=self._penalty(student),
            in_order=original.is_other,
        )  # fmt: skip
        taught.projections(training)
        result, spent = Result(), 0.0
        key = self._key(program, original, training, held_out, context)
        if self.method == "blocks" or (self.method == "auto" and not self._schedules and not original.is_other):
            student.train_only(EVERYTHING)
            spent = self._blocks(student, original, taught, training, held_out, context, key, result)
            student.train_only(kinds)
        if self.method != "blocks":
            self._by_loss(student, taught, training, held_out, context, key, spent, result)
        if result.changed:
            student.write()
            self._check(student, program, held_out[0])
        return result

    @property
    def _schedules(self) -> bool:
        """Whether it makes something else of the model than it was."""
        return bool(self.sparsity or self.l1 or self.layer_drop or self.dropout or self.batch_statistics or self.quantize_after)

    def _kinds(self, student: Trainable, original: Original, loss: Loss) -> tuple[str, ...]:
        """What the loss trains."""
        if self.method in KINDS:
            return KINDS[self.method]
        if self.lora:
            return EVERYTHING
        whole = sum(t.numel() for t in original.program.constants.values() if t.ndim > 1)
        is_learned = original.is_other or not loss.needs_teacher or _matrices(student) < whole
        return EVERYTHING if is_learned or self._schedules or self.method == "blocks" else KINDS["scales"]

    def _blocks(
        self, student: Trainable, original: Original, taught: Taught, training: Samples, held_out: Samples,
        context: Context, key: dict[str, object], result: Result,
    ) -> float:  # fmt: skip
        """Train half-blocks, and say so in `result`; nothing is changed where the loss on held-out samples is no lower. How
        many seconds it took. key: of where it is saved."""
        journal = context.saves.journal(key | {"part": "half-blocks"}) if context.saves else None
        if journal and journal.done:
            saved = journal.stage(0)
            context.say(f"{self} goes on: half-blocks are done")
            _put(student, saved["parameters"])
            result.notes.append(saved["note"])
            result.changed += saved["changed"]
            return saved["seconds"]
        judge, began = taught.judged(held_out, held_out.labels), time.monotonic()
        before, kept = judge(), [each.detach().clone() for each in student.parameters()]
        teacher = original.program.copy()
        Canonicalize().run(teacher, Context())
        # Shares of energy are too small for float16 without scaling.
        precision = "float32" if self.precision == "float16" else chosen(self.precision)
        halves = recover_halves(
            student, teacher, training[:: -(-len(training) // BLOCK_SAMPLES)], held_out[: BLOCK_SAMPLES // HELD_OUT],
            as_teacher=original.inputs, steps=self.block_steps, rate=self.block_rate, seed=context.seed,
            within=lambda: autocast(precision), track=context.track,
        )  # fmt: skip
        after = judge() if halves.fits else before
        better = after < before
        if not better:
            _put(student, kept)
        said = _said(before, after) if halves.fits else "nothing was changed"
        note = f"{halves}; the loss on {len(held_out)} held-out samples {said}"
        changed, seconds = len(student.latents) if better else 0, time.monotonic() - began
        if journal:
            own = [each.detach() for each in student.parameters()]
            journal.save_stage({"parameters": own, "note": note, "changed": changed, "seconds": seconds})
        result.notes.append(note)
        result.changed += changed
        return seconds

    def _by_loss(
        self, student: Trainable, taught: Taught, training: Samples, held_out: Samples, context: Context,
        key: dict[str, object], spent: float, result: Result,
    ) -> None:  # fmt: skip
        """Train by the loss, and say so in `result`. key: of where it is saved; spent: seconds so far."""
        plan = self._plan(context.seed)
        if plan.minutes:
            if plan.minutes * 60 <= spent:
                result.notes.append(f"nothing is left of {plan.minutes:g} minutes to train by the loss")
                return
            plan = replace(plan, minutes=plan.minutes - spent / 60)
        adapted = adapt(student, self.lora, context.seed) if self.lora else []
        if adapted:
            student.train_only(EVERYTHING)
        parameters = student.named()
        count = sum(each.numel() for each in parameters.values())
        parameters |= taught.projections(training)
        needs = needs_of(
            student.program, count, training, -(-plan.batch // plan.accumulate), in_blocks=self.checkpointing
        )
        context.say(f"{self} trains {count:,} numbers on {len(training)} samples, judged on {len(held_out)}, with {needs}")
        needs.check(str(self))
        sparser = Sparser(student, self.sparsity) if self.sparsity else None

        def before_step(done: float) -> None:
            student.rounds(done >= self.quantize_after)
            if sparser is not None:
                sparser(done)

        prepares = bool(self.l1 or self.layer_drop)
        journal = context.saves.journal(key | {"part": "by the loss"}) if context.saves else None
        if journal and journal.began:
            looks = plan.looks if plan.minutes else min(plan.looks, plan.steps)
            context.say(f"{self} goes on: {journal.began} of {looks} parts are done")
        with torch.random.fork_rng(devices=()):
            fit = train(
                parameters,
                taught.pieces(
                    Batches(training, self.batch, context.seed), held_out, training.labels, held_out.labels,
                    accumulate=self.accumulate,
                ),
                plan, kinds=student.kinds, before_step=before_step, state=student.state, buffers=student,
                first_counts=not (prepares or sparser),
                settled=1.0 if prepares else max(RAMP if sparser else 0.0, self.quantize_after),
                journal=journal, track=context.track, what="recovering",
            )  # fmt: skip
        merge(student, adapted)
        better = fit.after < fit.before or prepares or sparser is not None
        result.training = fit
        said = _said(fit.before, fit.after, better)
        result.notes.append(f"{fit.steps} steps in {fit.precision}; the loss on {len(held_out)} held-out samples {said}")
        if fit.stopped:
            result.notes.append(f"it ended early: {fit.stopped}")
        result.changed += len(student.latents) if better else 0

    def _check_precision(self, program: Program) -> None:
        """Raises UsageError for float16 where the program has values in bfloat16, which do not go together."""
        values = (node.meta.get("val") for node in program.graph.find_nodes(op="get_attr"))
        if self.precision == "float16" and any(getattr(value, "dtype", None) == torch.bfloat16 for value in values):
            what = "the model is in bfloat16, whose values are not float16's"
            hint = "leave it out: it trains in bfloat16; or --dtype float32"
            raise UsageError(what, where="recover:precision", hint=hint)

    def _penalty(self, student: Trainable) -> Callable[[], Tensor] | None:
        """What is added to the loss of each step."""
        if not self.l1:
            return None
        scales = norm_scales(student)
        return lambda: self.l1 * l1(scales)

    def _plan(self, seed: int) -> Plan:
        return Plan(
            self.steps, self.minutes, self.batch, self.rate, schedule=self.schedule, precision=chosen(self.precision),
            accumulate=self.accumulate, patience=self.patience, scale_rate=self.scale_rate, seed=seed,
        )  # fmt: skip

    def _key(
        self, program: Program, original: Original, training: Samples, held_out: Samples, context: Context
    ) -> dict[str, object]:
        """All that the result depends on."""
        data = {"training": training, "held out": held_out}
        data |= {f"labels, {name}": [some.labels or []] for name, some in data.items()}
        return key_of(
            self, program, context, precision=chosen(self.precision), processes=ranks.count(),
            teacher=digest_of(original.program.constants.values(), str(original.program)),
            floats=digest_of(context.floats.values(), " ".join(context.floats)),
            **{name: digest_of(tensor for sample in some for tensor in sample) for name, some in data.items()},
        )  # fmt: skip

    @torch.no_grad()
    def _check(self, student: Trainable, program: Program, sample: list[Tensor]) -> None:
        """Raises VerificationFailed unless the program, packed again, gives what was trained."""
        for name, mine, packed in zip(program.signature.outputs, student(*sample), program.module()(*sample), strict=True):
            if not mine.is_floating_point() or not mine.numel():
                continue
            gap = float((mine.float() - packed.float()).norm() / packed.float().norm().clamp(min=1e-12))
            if not gap <= SAME.get(mine.dtype, 1e-3):
                raise VerificationFailed(
                    f"the pass {self}: what was trained and what was packed of it differ by {gap:.2g}", where=name,
                    hint="this is a fault of fxc; report it with the model's configuration",
                )  # fmt: skip


@torch.no_grad()
def _put(student: Trainable, values: Sequence[Tensor]) -> None:
    for each, value in zip(student.parameters(), values, strict=True):
        each.copy_(value)


def _said(before: float, after: float, better: bool | None = None) -> str:
    better = after < before if better is None else better
    return f"{before:.4g} -> {after:.4g}" if better else f"{before:.4g}, and never better: nothing was changed"


def _matrices(student: Trainable) -> int:
    """How many numbers the constants of two dimensions or more stand for."""
    packed = {name for latent, parts in student.groups.items() for name in (latent, *parts.values())}
    others = sum(t.numel() for name, t in student.program.constants.items() if name not in packed and t.ndim > 1)
    with torch.no_grad():
        return others + sum(each.numel() for each in (latent() for latent in student.latents.values()) if each.ndim > 1)


def _split(context: Context) -> tuple[Samples, Samples]:
    """The samples to train on and those to judge by: of training data, or else of calibration data, those that the context
    holds out, else every eighth. Raises UsageError for fewer than two."""
    pairs = [(context.training, context.judging), (context.samples, context.held_out)]
    samples, held_out = (Samples.of(each) for each in next(pair for pair in pairs if pair[0]))
    if held_out:
        return samples, held_out
    if len(samples) < 2:
        raise UsageError("one sample is too few to train on: what is trained is judged by others", where="recover")
    places = range(len(samples))
    return samples.take([at for at in places if at % HELD_OUT]), samples.take(places[::HELD_OUT])
