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

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxc import ranks
from fxc.data.labels import Samples
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.digest import digest_of
from fxc.ir.program import Program
from fxc.passes.base import Context, Fact, Original, Pass, Result, check_data_is_given
from fxc.passes.facts import CANONICAL
from fxc.passes.learning import key_of
from fxc.passes.recover.by_blocks import train_by_blocks
from fxc.passes.recover.by_loss import EVERYTHING, penalty, train_by_loss
from fxc.passes.recover.lesson import Lesson
from fxc.passes.teacher import teacher_of
from fxc.schemes.parameters import parameters_by_constant
from fxc.train.latent import dense_of
from fxc.train.losses import Loss, default_loss
from fxc.train.plan import Plan
from fxc.train.precision import chosen
from fxc.train.taught import Taught
from fxc.train.trainable import Trainable

HELD_OUT = 8
# The rate of matrices that Muon turns, in rates of AdamW.
MUON = 4.0
# The packed program gives what the trained one gave, to so much of it: what differs is the order of sums, in the program's
# dtype. Where activations are rounded, one that lies between two levels may fall to the other.
SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SAME_ROUNDED = 3e-2
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
    gives; pooled: the mean of that over tokens. By default outputs, or kl where it gives logits, and where much of it was
    removed 5*features besides, with which it is back in fewer steps.
    steps: optimizer steps; minutes: if given, so long instead, of which blocks take half at most, and a tenth
    for their steps where the loss trains all weights after. batch: samples in a
    step. optimizer: muon: float matrices go by Muon (`fxc.train.muon`), at four times the rate, and everything else by
    AdamW; adamw: everything; auto: muon where matrices are trained whole: without lora and shard.
    rate: the learning rate of AdamW, which rises over `warmup`, a share of the steps, and falls by `schedule`. max_norm: the
    largest norm of a gradient.
    method: blocks: attention and feed-forward parts one after another, until each gives what the model's gave: the layer that
    it ends with is solved for by least squares, and then all of it is trained, `block_steps` steps at `block_rate`, a share of
    the mean size of a weight's numbers (`fxc.train.halves`). By the loss: all: all weights;
    norms: gains and biases alone; scales: those of packed weights, with gains and biases. auto: blocks, and then by the loss
    scales, gains and biases, or all weights where layers, heads, channels or single numbers were removed, or 3 bits are
    left. With a schedule (below): all.
    lora: the rank of the product of two thin matrices through which the loss trains all weights, and which is merged in the
    end; weights that are no larger than these are trained as they are.
    precision: what products run in while it trains; weights are float32. auto: bfloat16 where the machine multiplies it itself.
    What a model has in a smaller type than float32 runs in its own.
    accumulate: in so many parts a batch is computed, for less memory; checkpointing: of each block only what it is given is
    kept, for less memory still, and computed twice. shard: of several processes (torchrun) each holds a part of the weights
    that the loss trains, of their gradients and moments, and with checkpointing gathers those of one block at a time; a killed
    run begins this part again. patience: training by the loss ends after so many of ten looks at the held-out samples that were
    no better; 0: never. scale_rate: of scales of packed weights, as a factor of the rate.
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
    rate: float = 5e-4
    optimizer: Literal["auto", "muon", "adamw"] = "auto"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    max_norm: float = 1.0
    method: Literal["auto", "blocks", "all", "norms", "scales"] = "auto"
    block_steps: int = 100
    block_rate: float = 0.02
    lora: int = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulate: int = 1
    checkpointing: bool = False
    shard: bool = False
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
        self.plan(0)
        if self.block_steps < 0 or self.block_rate <= 0:
            raise UsageError("block_steps is at least 0, and block_rate above 0", where="recover")
        if self.lora < 0 or (self.lora and (self.method not in ("auto", "all") or self.sparsity)):
            what = f"lora={self.lora} is no rank with which all weights are trained by the loss"
            raise UsageError(what, where="recover", hint="lora=16 with method=all or auto, and no sparsity=")
        for name in ("sparsity", "layer_drop", "dropout", "quantize_after"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not from 0 up to 1", where="recover")
        if self.shard and (self.lora or self.sparsity or self.l1 or self.layer_drop or self.precision == "float16"):
            hint = "leave it out, or train all weights in float32 or bfloat16"
            raise UsageError("shard goes without lora, sparsity, l1, layer_drop and float16", where="recover", hint=hint)
        if self.checkpointing and self.batch_statistics:
            why = "a block that is run again would count its batch twice"
            raise UsageError("checkpointing goes without batch_statistics", where="recover", why=why, hint="leave one out")
        if self.optimizer == "muon" and self._parts_of_matrices:
            hint = "leave optimizer=muon out, or shard and lora"
            raise UsageError("Muon turns whole matrices, and goes without shard and lora", where="recover", hint=hint)
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
        if self.shard and ranks.count() == 1:
            hint = "start it with torchrun, or leave it out"
            raise UsageError("shard=true divides weights among processes, and there is one", where="recover", hint=hint)
        original = teacher_of(context, program)
        self._check_precision(program)
        student = Trainable(
            program, context.floats, layer_drop=self.layer_drop, dropout=self.dropout, batch_statistics=self.batch_statistics,
            checkpointing=self.checkpointing,
        )  # fmt: skip
        is_smaller = _matrices(program) < _matrices(original.program)
        is_smaller = is_smaller or any(latent.is_reduced for latent in student.latents.values())
        default = default_loss(program, original.program if is_smaller and not original.is_other else None)
        loss = Loss.parse(self.loss or default, self.temperature, self.k)
        loss.check(program, original.program, training.labels, training.unlabelled)
        kinds = self._kinds(student, is_smaller or original.is_other or not loss.needs_teacher)
        student.train_only(kinds)
        if not student.named():
            raise UsageError(f"method={self.method} has nothing to train in it", where=str(self), hint="method=all")
        taught = Taught(
            student, original.program, loss, precision=chosen(self.precision),
            as_teacher=original.inputs, as_student=original.outputs, seed=context.seed, penalty=penalty(student, self.l1),
            in_order=original.is_other,
        )  # fmt: skip
        taught.projections(training)
        key, spent = self._key(program, original, training, held_out, context), 0.0
        lesson = Lesson(self, original, student, taught, training, held_out, context, key)
        if self.method == "blocks" or (self.method == "auto" and not self._schedules and not original.is_other):
            student.train_only(EVERYTHING)
            spent = train_by_blocks(lesson, again=self.method != "blocks" and kinds is EVERYTHING)
            student.train_only(kinds)
        if self.method != "blocks":
            train_by_loss(lesson, spent)
        if lesson.result.changed:
            student.write()
            self._check(student, program, held_out[0])
        return lesson.result

    @property
    def _parts_of_matrices(self) -> bool:
        return self.shard or self.lora > 0

    @property
    def _schedules(self) -> bool:
        """Whether it makes something else of the model than it was."""
        return bool(self.sparsity or self.l1 or self.layer_drop or self.dropout or self.batch_statistics or self.quantize_after)

    def _kinds(self, student: Trainable, learns: bool) -> tuple[str, ...]:
        """What the loss trains. learns: whether there is more to learn than what rounding has lost."""
        if self.method in KINDS:
            return KINDS[self.method]
        if self.lora:
            return EVERYTHING
        has_others = any(kind in KINDS["scales"] for kind in student.kinds.values())
        return KINDS["scales"] if has_others and not (learns or self._schedules or self.method == "blocks") else EVERYTHING

    def _check_precision(self, program: Program) -> None:
        """Raises UsageError for float16 where the program has values in bfloat16, which do not go together."""
        values = (node.meta.get("val") for node in program.graph.find_nodes(op="get_attr"))
        if self.precision == "float16" and any(getattr(value, "dtype", None) == torch.bfloat16 for value in values):
            what = "the model is in bfloat16, whose values are not float16's"
            hint = "leave it out: it trains in bfloat16; or --dtype float32"
            raise UsageError(what, where="recover:precision", hint=hint)

    def plan(self, seed: int) -> Plan:
        return Plan(
            self.steps, self.minutes, self.batch, self.rate, schedule=self.schedule, warmup=self.warmup, max_norm=self.max_norm,
            precision=chosen(self.precision), accumulate=self.accumulate, patience=self.patience, scale_rate=self.scale_rate,
            muon=0.0 if self.optimizer == "adamw" or self._parts_of_matrices else MUON, seed=seed,
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
        """Raises VerificationFailed unless the program, packed again, has the weights that were trained and gives the same."""
        hint = "this is a fault of fxc; report it with the model's configuration"
        for name, parts in student.groups.items():
            if parts:
                trained, stored = student.latents[name](), {part: program.constants[fqn] for part, fqn in parts.items()}
                packed = dense_of(student.latents[name].scheme, stored)
                if not torch.allclose(trained, packed.view_as(trained).float(), rtol=1e-2, atol=1e-6):
                    what = f"the pass {self}: a weight that was trained is not what was packed of it"
                    raise VerificationFailed(what, where=student.layers[name], hint=hint)
        for name, mine, packed in zip(program.signature.outputs, student(*sample), program.module()(*sample), strict=True):
            if not mine.is_floating_point() or not mine.numel():
                continue
            gap = float((mine.float() - packed.float()).norm() / packed.float().norm().clamp(min=1e-12))
            if not gap <= max(SAME.get(mine.dtype, 1e-3), SAME_ROUNDED if student.rounds_activations else 0):
                raise VerificationFailed(
                    f"the pass {self}: what was trained and what was packed of it differ by {gap:.2g}", where=name,
                    hint=hint,
                )  # fmt: skip


def _matrices(program: Program) -> int:
    """How many numbers the constants of two dimensions or more stand for."""
    return sum(count for fqn, count in parameters_by_constant(program).items() if program.constants[fqn].ndim > 1)


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
