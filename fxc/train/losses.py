"""What is minimised in training: terms by name, each a mean over what it looks at, and their weighted sum.

    task             cross-entropy of the logits: of labels, or of the next token of a language model
    kl               soft labels: T^2 KL(teacher || student) of the logits at temperature T (Hinton et al., arXiv 1503.02531)
    topk             the same of the teacher's k likeliest classes and of all others together
    features         squared error at the ends of blocks, as a share of the energy of the teacher's, of each sample
                     (FitNets, arXiv 1412.6550)
    features_cosine  1 - cosine there, of what each token or place is
    outputs          squared error of all outputs, as a share of the energy of the teacher's
    cosine           1 - cosine of all outputs, of each row of numbers
    pooled           1 - cosine of the mean over tokens, which is what many sentence embeddings are

Of tokens only those count that the attention mask lets be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from fxc.data.labels import HINT
from fxc.errors import UsageError
from fxc.ir.cache import is_causal_lm, is_present
from fxc.ir.next_token import counted, next_token_loss
from fxc.ir.program import Program
from fxc.train.divergence import divergence
from fxc.train.features import ends

# How token labels say that a token has none.
IGNORED = -100
_WEIGHT = r"\d+\.?\d*(?:e-?\d+)?|\.\d+"


class Top(NamedTuple):
    """Of a teacher's distribution over V classes the k likeliest: classes int32 [..., k], logs float32 [..., k] their log
    probabilities, rest float32 [...] that of all others together."""

    classes: Tensor
    logs: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Seen:
    """What a program was given and gave, by name.

    labels: int64, [B] of samples or [B, N] of tokens; features: what was computed at the ends of blocks, of student and teacher
    in the same order and of the same shapes; tops: of outputs the likeliest classes, where they are known already; causal:
    whether the label of a token is to be said at the one before.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    features: Sequence[Tensor] = ()
    tops: Mapping[str, Top] = field(default_factory=dict)
    causal: bool = False

    def mask(self, output: str = "") -> Tensor | None:
        """Which of the tokens that an output has a row for are there, bool [B, N]; None where nothing says it."""
        prefix = "decoder_" if "decoder_input_ids" in self.inputs and not output.startswith("encoder_") else ""
        mask, ids = self.inputs.get(f"{prefix}attention_mask"), self.inputs.get(f"{prefix}input_ids")
        return None if mask is None or ids is None or mask.ndim != 2 else mask[:, -ids.shape[1] :] != 0


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms. temperature: that logits are divided by in kl and topk; k: how many classes topk compares one by
    one."""

    terms: Mapping[str, float]
    temperature: float = 1.0
    k: int = 64

    @classmethod
    def parse(cls, text: str, temperature: float = 1.0, k: int = 64) -> Loss:
        """Of "kl+0.5*outputs". Raises UsageError for a term that does not exist."""
        terms: dict[str, float] = {}
        for item in text.split("+"):
            found = re.fullmatch(rf"\s*(?:({_WEIGHT})\s*\*\s*)?(\w+)\s*", item)
            if not found or found[2] not in TERMS:
                hint = f"a weighted sum of {', '.join(TERMS)}, as kl+0.5*task"
                raise UsageError(f"{item!r} is no loss", where="loss", hint=hint)
            terms[found[2]] = terms.get(found[2], 0.0) + float(found[1] or 1)
        if temperature <= 0:
            raise UsageError(f"temperature={temperature} is not above 0", where="loss")
        if k < 1:
            raise UsageError(f"k={k} is not at least 1", where="loss")
        return cls(terms, temperature, k)

    @property
    def needs_teacher(self) -> bool:
        return any(name != "task" for name in self.terms)

    @property
    def needs_features(self) -> bool:
        return any(name in ("features", "features_cosine") for name in self.terms)

    @property
    def needs_only_tops(self) -> bool:
        """Whether the likeliest classes are all that it needs of the teacher."""
        return self.needs_teacher and set(self.terms) <= {"task", "topk"}

    def __call__(self, student: Seen, teacher: Seen | None) -> Tensor:
        """[] float32."""
        return sum(weight * TERMS[name](student, teacher, self) for name, weight in self.terms.items())

    def check(
        self, student: Program, teacher: Program | None = None, labels: Sequence[Tensor] | None = None,
        unlabelled: UsageError | None = None,
    ) -> None:  # fmt: skip
        """Raises UsageError for what cannot be computed of these two and these labels (see `fxc.data.labels.Samples`)."""
        mine = _types(student)
        for term in self.terms:
            if term == "task":
                _check_labels(student, mine, labels, unlabelled)
                continue
            read = {"kl": logits_of, "topk": logits_of, "pooled": _tokens}.get(term, lambda given, term: floats_of(given))
            sizes = {name: value.shape for name, value in read(mine, term).items()}
            if not sizes:
                raise UsageError(f"loss={term} has nothing to compare: the model gives {', '.join(mine) or 'nothing'}")
            for name, theirs in _types(teacher).items() if teacher is not None and not term.startswith("features") else ():
                fixed = [(a, b) for a, b in zip(sizes.get(name, ()), theirs.shape) if isinstance(a, int) and isinstance(b, int)]
                if wrong := [pair for pair in fixed if pair[0] != pair[1]]:
                    raise UsageError(
                        f"loss={term} compares outputs, and {name} is {wrong[0][0]} wide where the teacher's is {wrong[0][1]}",
                        hint="loss=features has a projection between widths",
                    )


def default_loss(program: Program, whole: Program | None = None) -> str:
    """kl where a program gives logits by that name, else outputs. whole: what much was removed from to make this one of it:
    ends of blocks are compared besides, where both have some, in as few steps the surer way back."""
    if not any("logits" in name for name in program.signature.outputs):
        return "outputs"
    return "kl+5*features" if whole is not None and ends(program) and ends(whole) else "kl"


def top_of(logits: Tensor, k: int, temperature: float) -> Top:
    """Of logits [..., V], V above k."""
    classes = logits.topk(k, -1).indices
    logs, rest = _lumped(logits.float() / temperature, classes)
    return Top(classes.int(), logs, rest)


def _types(program: Program) -> dict[str, Tensor]:
    return {name: node.meta["val"] for name, node in zip(program.signature.outputs, program.results, strict=True)}


def floats_of(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is compared of a program's outputs: all floats but the cache."""
    return {name: each for name, each in outputs.items() if each.is_floating_point() and not is_present(name)}


def logits_of(outputs: Mapping[str, Tensor], term: str) -> dict[str, Tensor]:
    """The outputs that are logits by their name, or else the only output, unless it is called a state or an embedding."""
    floats = floats_of(outputs)
    named = {name: each for name, each in floats.items() if "logits" in name}
    if named:
        return named
    if len(floats) != 1 or any(word in next(iter(floats)) for word in ("hidden", "embed", "pooler")):
        hint = "loss=outputs, loss=cosine or loss=features compare whatever a model gives"
        raise UsageError(f"loss={term} is of logits, and the model gives {', '.join(floats) or 'none'}", hint=hint)
    return floats


def _tokens(outputs: Mapping[str, Tensor], term: str) -> dict[str, Tensor]:
    """The outputs that have a row for each token, [B, N, D]."""
    found = {name: each for name, each in floats_of(outputs).items() if each.ndim == 3}
    if not found:
        raise UsageError(
            f"loss={term} is of outputs [B, N, D], and the model gives {', '.join(outputs)}", hint="loss=cosine takes any"
        )
    return found


def _scored(outputs: Mapping[str, Tensor]) -> Tensor:
    """The logits that labels are for."""
    found = logits_of(outputs, "task")
    if len(found) > 1 and "logits" not in found:
        what = f"loss=task is of one output of logits, and the model gives {', '.join(found)}"
        raise UsageError(what, hint="loss=kl takes all")
    return found.get("logits", next(iter(found.values())))


def _check_labels(
    program: Program, outputs: Mapping[str, Tensor], labels: Sequence[Tensor] | None, unlabelled: UsageError | None
) -> None:
    logits = _scored(outputs)
    if labels is None:
        if is_causal_lm(program) and unlabelled is None:
            return
        why = str(unlabelled) if unlabelled is not None else "the samples that it is trained on have none"
        raise UsageError("loss=task needs labels", where="loss", why=why, hint=HINT)
    classes = classes_last(logits).shape[-1]
    wanted = logits.ndim - 1
    for at, each in enumerate(labels):
        if each.ndim != wanted:
            what = {1: "one for each sample", 2: "one for each token"}.get(wanted, f"{wanted} dimensions, the batch's first")
            raise UsageError(f"the labels of sample {at + 1} are {list(each.shape)}", where="loss=task", hint=f"give {what}")
        wrong = each[((each < 0) | (each >= classes)) & ((each != IGNORED) | (wanted == 1))]
        if len(wrong):
            raise UsageError(
                f"the label {int(wrong[0])} of sample {at + 1} is no class: the model knows 0 to {classes - 1}",
                where="loss=task",
                hint="the data is of another task than the model",
            )


def _task(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    logits, labels = _scored(student.outputs).float(), student.labels
    if labels is None:
        ids, mask = student.inputs.get("input_ids"), student.inputs.get("attention_mask")
        if ids is None or not student.causal:
            raise UsageError("loss=task needs labels", where="loss", hint=HINT)
        count = ids[:, 1:].numel() if mask is None else counted(ids, mask).sum().clamp(min=1)
        return (next_token_loss(logits, ids, mask) / count).float()
    if student.causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    # Of a batch without labels the mean is no number.
    count = (labels != IGNORED).sum().clamp(min=1)
    return cross_entropy(classes_last(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum") / count


def _kl(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    def of_one(name: str, mine: Tensor, aim: Tensor) -> Tensor:
        return divergence(classes_last(mine), classes_last(aim), loss.temperature)

    return loss.temperature**2 * _over(student, _pairs(student, teacher, "kl"), of_one)


def _topk(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    names = teacher.tops or logits_of(teacher.outputs, "topk")

    def of_one(name: str, mine: Tensor, aim: Tensor | None) -> Tensor:
        mine = classes_last(mine)
        if mine.shape[-1] <= loss.k:
            return divergence(mine, classes_last(aim), loss.temperature)
        top = teacher.tops.get(name) or top_of(classes_last(aim), loss.k, loss.temperature)
        logs, rest = _lumped(mine.float() / loss.temperature, top.classes.long())
        return divergence(torch.cat([logs, rest[..., None]], -1), torch.cat([top.logs, top.rest[..., None]], -1))

    pairs = [(name, student.outputs[name], teacher.outputs.get(name)) for name in names if name in student.outputs]
    return loss.temperature**2 * _over(student, pairs, of_one)


def _features(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    """The mean over samples of each one's share, so that parts of a batch add up."""
    pairs, mask = zip(student.features, teacher.features, strict=True), student.mask()
    return torch.stack([_share_of_samples(*pair, mask).mean() for pair in pairs]).mean()


def _features_cosine(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    pairs = zip(student.features, teacher.features, strict=True)
    return torch.stack([_mean(_away(mine, aim), student.mask()) for mine, aim in pairs]).mean()


def _outputs(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    shares = [_share(mine, aim, student.mask(name)) for name, mine, aim in _pairs(student, teacher)]
    return torch.stack(shares).mean()


def _cosine(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    return _over(student, _pairs(student, teacher), lambda name, mine, aim: _away(mine, aim))


def _pooled(student: Seen, teacher: Seen | None, loss: Loss) -> Tensor:
    gaps = []
    for name, mine, aim in _pairs(student, teacher):
        if aim.ndim == 3:
            mask = student.mask(name)
            there = torch.ones_like(aim[..., :1]) if mask is None or mask.shape != aim.shape[:2] else mask[..., None]
            count = there.sum(1).clamp(min=1)
            gaps.append(_away(*((each.float() * there).sum(1) / count for each in (mine, aim))).mean())
    return torch.stack(gaps).mean()


def _pairs(student: Seen, teacher: Seen, term: str = "") -> list[tuple[str, Tensor, Tensor]]:
    """The outputs that both give; for a term of logits those."""
    aims = logits_of(teacher.outputs, term) if term else floats_of(teacher.outputs)
    return [(name, student.outputs[name], aim) for name, aim in aims.items() if name in student.outputs]


def _over(student: Seen, pairs: Sequence[tuple], function: Callable[..., Tensor]) -> Tensor:
    """The mean over outputs of the mean of a function of each."""
    return torch.stack([_mean(function(*pair), student.mask(pair[0])) for pair in pairs]).mean()


def classes_last(values: Tensor) -> Tensor:
    """With classes, or channels, in the last dimension: of [B, C, H, W] they are not."""
    return values.movedim(1, -1) if values.ndim == 4 else values


def _lumped(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of some classes, and of all others together: of what is left of them and not of 1 minus the others,
    which is nothing in float32 where these are likely."""
    whole = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, classes, float("-inf")).logsumexp(-1)
    return logits.gather(-1, classes) - whole, rest - whole[..., 0]


def _away(mine: Tensor, aim: Tensor) -> Tensor:
    """1 - cosine along the last dimension, or along channels."""
    return 1 - cosine_similarity(classes_last(mine).float(), classes_last(aim).float(), dim=-1)


def _share(mine: Tensor, aim: Tensor, mask: Tensor | None) -> Tensor:
    gap, energy = (mine.float() - aim.float()).square(), aim.float().square()
    error, whole = (_mean(each.mean(-1) if each.ndim else each, mask) for each in (gap, energy))
    return error / whole.clamp(min=1e-12)


def _share_of_samples(mine: Tensor, aim: Tensor, mask: Tensor | None) -> Tensor:
    """[B]."""
    there = mask is not None and mask.shape == aim.shape[:2]
    gap, energy = (mine.float() - aim.float()).square(), aim.float().square()
    error, whole = ((each * mask[..., None] if there else each).flatten(1).sum(1) for each in (gap, energy))
    return error / whole.clamp(min=1e-12)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean, of tokens of those that are there."""
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


TERMS: dict[str, Callable[[Seen, Seen | None, Loss], Tensor]] = {
    "task": _task, "kl": _kl, "topk": _topk, "features": _features, "features_cosine": _features_cosine, "outputs": _outputs,
    "cosine": _cosine, "pooled": _pooled,
}  # fmt: skip
