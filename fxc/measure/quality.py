"""How good a model still is, as one number with its standard error, measured alike for an original and for what became of it.

    perplexity   of a causal language model, on data: exp of the mean loss of the next token
    accuracy     where the data has labels: the share that the model gets right
    cosine       of another model where there are no labels: of its output with the original's, the mean over samples, a
                 sequence taken as the mean of its tokens
    kl           of a causal language model without data: the divergence in nats a token of its distribution from the
                 original's, on texts that the original writes itself

Every contender is given the same inputs, so that differences are taken pair by pair: what is hard for one is hard for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fxc.captured import Captured
from fxc.compiled.model import CompiledModel
from fxc.compiler import readers_of
from fxc.data.calibration import calibration_samples, check_data
from fxc.data.hub import is_dataset
from fxc.data.labels import Samples
from fxc.data.samples import drawn
from fxc.data.text import encode, tokenizer_of
from fxc.errors import UsageError, VerificationFailed
from fxc.ir.cache import is_causal_lm
from fxc.ir.digest import digest_of
from fxc.ir.next_token import counted, losses_of
from fxc.ir.program import Program
from fxc.ir.structure import unflatten
from fxc.measure.perplexity import WORST_LOSS, perplexity
from fxc.progress import Track, untracked

Kind = Literal["perplexity", "accuracy", "cosine", "kl"]
WINDOW = 256
WINDOWS, SAMPLES, DRAWN = 200, 1000, 32
"""At most so many windows of a text, other samples, and samples that are made up."""
# How labels of tokens say that one has none.
_IGNORED = -100


@dataclass(frozen=True)
class Quality:
    """totals, counts: of each unit (a window, a sample) the sum of what is measured, and over how many it is; of: what is
    counted, in words."""

    kind: Kind
    of: str
    totals: list[float]
    counts: list[int]

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def value(self) -> float:
        mean = sum(self.totals) / self.count
        return math.exp(mean) if self.kind == "perplexity" else mean

    @property
    def error(self) -> float | None:
        """The standard error of `value`, from how units differ; None for a single one."""
        error = _standard_error(self.totals, self.counts)
        return error if error is None or self.kind != "perplexity" else error * self.value

    def loss_against(self, original: Quality) -> tuple[float, float | None]:
        """How much worse than `original`, negative where better, and the standard error of that from the paired differences of
        the units: the relative rise of perplexity, or by how much accuracy (0 to 1) or the cosine falls, divergence rises."""
        if (self.kind, self.counts) != (original.kind, original.counts):
            raise ValueError("the two were not measured on the same data")
        differences = [after - before for before, after in zip(original.totals, self.totals, strict=True)]
        mean, error = sum(differences) / self.count, _standard_error(differences, self.counts)
        if self.kind == "perplexity":
            return math.expm1(mean), None if error is None else error * math.exp(mean)
        return (-mean if self.kind in ("accuracy", "cosine") else mean), error

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value, "standard_error": self.error, "count": self.count, "of": self.of}

    def whole(self) -> dict[str, Any]:
        """All of it, as JSON from which `from_whole` makes it again."""
        return {"kind": self.kind, "of": self.of, "totals": self.totals, "counts": self.counts}

    @classmethod
    def from_whole(cls, found: Any) -> Quality | None:
        """What `whole` gave; None for anything else."""
        try:
            made = cls(found["kind"], found["of"], list(map(float, found["totals"])), list(map(int, found["counts"])))
        except (TypeError, KeyError, ValueError):
            return None
        return made if made.count and len(made.totals) == len(made.counts) else None


def _standard_error(totals: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of the ratio of the sums, over units that were drawn: the linearised error of a ratio estimator."""
    units, count = len(totals), sum(counts)
    if units < 2:
        return None
    mean = sum(totals) / count
    return math.sqrt(sum((t - n * mean) ** 2 for t, n in zip(totals, counts)) * units / (units - 1)) / count


class Evaluation:
    """What quality is measured on: read, and cut into tokens, once for all contenders.

    kind: which measure it is; data: what it is, in words.
    """

    def __init__(
        self, program: Program, kind: Kind, data: str, samples: Samples, tokens: Tensor | None = None, window: int = WINDOW,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.data = kind, data
        self._program, self._samples, self._tokens, self._window, self._limit = program, samples, tokens, window, limit
        self._output = next((i for i, n in enumerate(program.results) if n.meta["val"].dtype.is_floating_point), None)
        self._expected: list[Tensor] | None = None

    @cached_property
    def digest(self) -> str:
        """A hash of all that `measure` depends on besides the model."""
        tensors = [t for sample in self._samples for t in sample] + list(self._samples.labels or [])
        tensors += [] if self._tokens is None else [self._tokens]
        return digest_of(tensors, f"{self.kind} {self._window} {self._limit} {len(self._samples)}")

    def measure(self, model: nn.Module, track: Track = untracked) -> Quality:
        """Of the original itself or of what was made of it (a `CompiledModel`). Raises `VerificationFailed` where it gives
        numbers that are not finite."""
        if self._tokens is not None:
            found = perplexity(model, self._tokens, self._window, limit=self._limit, track=track)
            return Quality(self.kind, "tokens", found.losses, found.counts)
        of, measured = {
            "perplexity": ("tokens", self._losses), "accuracy": ("labels", self._right),
            "cosine": ("samples", self._cosines), "kl": ("tokens", self._divergences),
        }[self.kind]  # fmt: skip
        if self.kind in ("cosine", "kl") and self._expected is None:
            self._expected = self._originals(track)
        totals, counts = [], []
        for place, sample in enumerate(track(self._samples, f"measuring {self.kind}", len(self._samples))):
            with torch.inference_mode():
                total, count = measured(model, sample, place)
            if not math.isfinite(total):
                what = f"the {self.kind} of sample {place + 1} is {total}"
                raise VerificationFailed(what, hint="the outputs hold NaN or infinities")
            totals.append(total)
            counts.append(count)
        if not sum(counts):
            raise UsageError("the data has nothing to score", where=self.data, hint="texts of two tokens and more, or labels")
        if self.kind == "perplexity" and sum(totals) / sum(counts) > WORST_LOSS:
            what = f"the mean loss is {sum(totals) / sum(counts):.0f} nats"
            raise VerificationFailed(what, hint="no perplexity can be computed: the model is broken")
        return Quality(self.kind, of, totals, counts)

    def _originals(self, track: Track) -> list[Tensor]:
        """What the program as it was captured gives, by its operators' own definitions."""
        module = self._program.module()
        with torch.inference_mode():
            given = track(self._samples, "running the original", len(self._samples))
            return [module(*sample)[self._output].float() for sample in given]

    def _losses(self, model: nn.Module, sample: list[Tensor], place: int) -> tuple[float, int]:
        ids, mask = sample[:2]
        there = counted(ids, mask)
        losses = losses_of(_logits(model, ids, mask), ids).reshape(there.shape)
        return losses[there].double().sum().item(), int(there.sum())

    def _divergences(self, model: nn.Module, sample: list[Tensor], place: int) -> tuple[float, int]:
        ids, mask = sample[:2]
        ours, theirs = (each.log_softmax(-1) for each in (_logits(model, ids, mask), self._expected[place]))
        there = mask != 0
        return (theirs.exp() * (theirs - ours)).sum(-1)[there].double().sum().item(), int(there.sum())

    def _right(self, model: nn.Module, sample: list[Tensor], place: int) -> tuple[float, int]:
        labels, found = self._samples.labels[place], self._given(model, sample)
        if found.shape[:-1] != labels.shape:
            raise UsageError(
                f"the output is {list(found.shape)}, and the labels are {list(labels.shape)}", where=self.data,
                hint="labels are of the classes of the last dimension: one for each sample, or for each token",
            )  # fmt: skip
        there = labels != _IGNORED
        if there.any() and not 0 <= int(labels[there].min()) <= int(labels[there].max()) < found.shape[-1]:
            wrong = next(int(n) for n in labels[there] if not 0 <= n < found.shape[-1])
            why = f"the model has the classes 0 to {found.shape[-1] - 1}"
            hint = "the labels are another model's, or begin at another number than 0"
            raise UsageError(f"sample {place + 1} has the label {wrong}", where=self.data, why=why, hint=hint)
        if not bool(found.isfinite().all()):
            return math.nan, 0
        return float((found.argmax(-1) == labels)[there].sum()), int(there.sum())

    def _cosines(self, model: nn.Module, sample: list[Tensor], place: int) -> tuple[float, int]:
        found, expected = (self._pooled(each, sample) for each in (self._given(model, sample), self._expected[place]))
        return cosine_similarity(found.double(), expected.double(), dim=-1).sum().item(), len(found)

    def _pooled(self, output: Tensor, sample: list[Tensor]) -> Tensor:
        """[B, N]: of a sequence [B, S, H] the mean over the tokens that the mask lets be."""
        if output.ndim != 3:
            return output.reshape(len(output), -1) if output.ndim > 1 else output.reshape(1, -1)
        names = [declared.name for declared in self._program.signature.inputs]
        mask = sample[names.index("attention_mask")] if "attention_mask" in names else None
        if mask is None or mask.shape != output.shape[:2]:
            return output.mean(1)
        there = (mask != 0)[..., None].float()
        return (output * there).sum(1) / there.sum(1).clamp(min=1)

    def _given(self, model: nn.Module, sample: list[Tensor]) -> Tensor:
        """The output that is measured, float32, of a compiled model or of one as it comes."""
        if isinstance(model, CompiledModel):
            return model.run(sample)[self._output].float().cpu()
        structure = self._program.signature.call
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        tensors = [tensor.to(device) for tensor in sample]
        args = [unflatten(each, tensors) for each in structure["args"]]
        result = model(*args, **{name: unflatten(each, tensors) for name, each in structure["kwargs"].items()})
        if not isinstance(result, Tensor):
            for key in self._program.signature.outputs[self._output].split("."):
                result = result[key] if isinstance(result, dict) else result[int(key)]
        return result.float().cpu()


def evaluation_of(
    captured: Captured,
    data: Any = None,
    *,
    samples: int | None = None,
    window: int = WINDOW,
    seed: int = 0,
    track: Track = untracked,
) -> Evaluation:
    """What the quality of `captured` and of all that is made of it is measured on.

    data: as `calib` of `fxc.Options`, of a text for a causal language model windows that do not overlap; None: made up, by
    `seed`. samples: at most so many of it, or windows; by default 200 windows of a text and 1000 other samples. window: tokens
    in each. Of any other model the data's labels are taken where it has some, and else agreement with the original.

    Raises `UsageError` for data that is not there, of a kind that the model does not read, or with labels that are wrong.
    """
    program = captured.program
    causal = is_causal_lm(program)
    if not any(node.meta["val"].dtype.is_floating_point for node in program.results):
        raise UsageError("the model has no floating-point output to measure", where=program.metadata.get("class"))
    if data is None:
        made = Samples(drawn(program, samples or DRAWN, seed))
        return Evaluation(program, "kl" if causal else "cosine", f"{len(made)} made-up samples", made)
    check_data(data, "evaluation")
    longest = getattr(getattr(captured.config, "text_config", None) or captured.config, "max_position_embeddings", None)
    window = min(window, longest or window)
    name = Path(data).name if isinstance(data, (str, Path)) else "the data given"
    with readers_of(captured) as folder:
        if causal and _is_text(data):
            tokens = encode(tokenizer_of(folder), _text(Path(data)))
            limit = samples or WINDOWS
            return Evaluation(program, "perplexity", f"{name}, windows of {window} tokens", Samples(), tokens, window, limit)
        read = calibration_samples(
            program, data, folder=folder, config=captured.config, limit=samples or SAMPLES, window=window, track=track,
            what="evaluation",
        )  # fmt: skip
    if causal:
        return Evaluation(program, "perplexity", f"{len(read)} samples of {name}", read)
    if read.labels is None and read.unlabelled is not None:
        raise read.unlabelled
    kind: Kind = "cosine" if read.labels is None else "accuracy"
    return Evaluation(program, kind, f"{len(read)} samples of {name}", read)


def _is_text(data: Any) -> bool:
    return isinstance(data, (str, Path)) and not is_dataset(data) and Path(data).is_file() and Path(data).suffix != ".jsonl"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read", where=path, why=error, hint="a text file in UTF-8") from None


def _logits(model: Callable[..., Any], ids: Tensor, mask: Tensor) -> Tensor:
    device = getattr(model, "device", "cpu")
    return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.float().cpu()
