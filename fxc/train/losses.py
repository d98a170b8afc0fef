"""What is minimised in training: terms by name, each a mean over what it looks at, and their weighted sum.

    task      cross-entropy of the logits: of the next token of a language model, of labels else
    kl        soft labels: T^2 KL(teacher || student) of the logits at temperature T (Hinton et al., arXiv 1503.02531)
    outputs   squared error of all outputs, as a share of the energy of the teacher's
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxc.errors import UsageError
from fxc.ir.cache import is_present
from fxc.ir.next_token import counted, next_token_loss
from fxc.ir.program import Program


@dataclass(frozen=True)
class Seen:
    """What a program was given and gave, by name; labels: of a batch of labelled samples, int64 [B]."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    labels: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """Of tokens, which are there: [B, N] bool."""
        mask, ids = self.inputs.get("attention_mask"), self.inputs.get("input_ids")
        return None if mask is None or ids is None else mask[:, -ids.shape[1] :] != 0


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms. Raises UsageError for one that does not exist."""

    terms: Mapping[str, float]
    temperature: float = 1.0

    @classmethod
    def parse(cls, text: str, temperature: float = 1.0) -> Loss:
        """Of "kl+0.5*outputs"."""
        terms: dict[str, float] = {}
        for item in text.split("+"):
            found = re.fullmatch(r"\s*(?:([0-9.]+)\s*\*\s*)?(\w+)\s*", item)
            if not found or found[2] not in TERMS:
                hint = f"a weighted sum of {', '.join(TERMS)}, as kl+0.5*task"
                raise UsageError(f"{item!r} is no loss", where="loss", hint=hint)
            terms[found[2]] = terms.get(found[2], 0.0) + float(found[1] or 1)
        if temperature <= 0:
            raise UsageError(f"temperature={temperature} is not above 0", where="loss")
        return cls(terms, temperature)

    @property
    def needs_teacher(self) -> bool:
        return any(name != "task" for name in self.terms)

    def __call__(self, student: Seen, teacher: Seen | None) -> Tensor:
        """[] float32."""
        return sum(weight * TERMS[name](student, teacher, self.temperature) for name, weight in self.terms.items())


def default_loss(program: Program) -> str:
    """kl where a program gives logits, else outputs."""
    return "kl" if "logits" in program.signature.outputs else "outputs"


def _logits(seen: Seen, term: str) -> Tensor:
    if "logits" not in seen.outputs:
        hint = "loss=outputs compares whatever a model gives"
        raise UsageError(f"loss={term} is of logits, and the model gives {', '.join(seen.outputs)}", hint=hint)
    return seen.outputs["logits"]


def _task(student: Seen, teacher: Seen | None, temperature: float) -> Tensor:
    logits = _logits(student, "task")
    if student.labels is not None:
        return torch.nn.functional.cross_entropy(logits.float(), student.labels)
    ids, mask = student.inputs.get("input_ids"), student.inputs.get("attention_mask")
    if ids is None or logits.ndim != 3:
        hint = 'rows of a .jsonl with "label", or a folder of images in one folder a class'
        raise UsageError("loss=task needs labels", hint=hint)
    count = ids[:, 1:].numel() if mask is None else counted(ids, mask).sum().clamp(min=1)
    return (next_token_loss(logits, ids, mask) / count).float()


def _kl(student: Seen, teacher: Seen | None, temperature: float) -> Tensor:
    mine = (_logits(student, "kl").float() / temperature).log_softmax(-1)
    aim = (_logits(teacher, "kl").float() / temperature).log_softmax(-1)
    each = torch.nn.functional.kl_div(mine, aim, log_target=True, reduction="none").sum(-1)
    return temperature**2 * _mean(each, student.mask)


def _outputs(student: Seen, teacher: Seen | None, temperature: float) -> Tensor:
    shares = []
    for name, aim in teacher.outputs.items():
        if is_present(name) or not aim.is_floating_point() or name not in student.outputs:
            continue
        gap, energy = (student.outputs[name].float() - aim.float()).square(), aim.float().square()
        mask = student.mask if aim.ndim == 3 else None
        mine, whole = (_mean(each.mean(-1) if each.ndim else each, mask) for each in (gap, energy))
        shares.append(mine / whole.clamp(min=1e-12))
    return torch.stack(shares).mean()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean, of tokens of those that are there."""
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


TERMS: dict[str, Callable[[Seen, Seen | None, float], Tensor]] = {"task": _task, "kl": _kl, "outputs": _outputs}
