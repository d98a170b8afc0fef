"""Labels: what a sample is an example of, beside the inputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.data.inputs import Inputs
from fxc.errors import UsageError

NAMES = ("labels", "label")
HINT = (
    'rows of a .jsonl with "label", a folder of images in one folder a class, or in Python an iterable of (inputs, label) or '
    'of dicts with "labels"'
)


class Samples(list[list[Tensor]]):
    """Sets of flat inputs of a program. labels: of each set, int64 [B], or [B, N] where its tokens have labels; None where not
    every set has some, and `unlabelled` says why."""

    def __init__(
        self, samples: Iterable[list[Tensor]] = (), labels: list[Tensor] | None = None, unlabelled: UsageError | None = None
    ) -> None:
        super().__init__(samples)
        self.labels, self.unlabelled = labels, unlabelled

    @classmethod
    def of(cls, samples: Sequence[list[Tensor]]) -> Samples:
        """A plain list as samples without labels, samples as they are."""
        return samples if isinstance(samples, cls) else cls(samples)

    def take(self, which: Sequence[int]) -> Samples:
        """Those at these places."""
        labels = None if self.labels is None else [self.labels[at] for at in which]
        return Samples([self[at] for at in which], labels, self.unlabelled)

    def map(self, function: Callable[[list[Tensor]], list[Tensor]]) -> Samples:
        """The same samples and labels with other inputs."""
        return Samples([function(each) for each in self], self.labels, self.unlabelled)


def gathered(pairs: Iterable[tuple[list[Tensor], Tensor | UsageError | None]]) -> Samples:
    """Samples of pairs of inputs and their labels, or why these cannot be used, or None."""
    samples, labels, wrong = [], [], None
    for inputs, label in pairs:
        samples.append(inputs)
        if isinstance(label, Tensor):
            labels.append(label)
        elif isinstance(label, UsageError):
            wrong = wrong or label
    if len(labels) == len(samples):
        return Samples(samples, labels)
    if wrong is None and labels:
        wrong = UsageError(f"{len(samples) - len(labels)} of {len(samples)} samples have no label", hint=HINT)
    return Samples(samples, None, wrong)


def apart(item: Any, inputs: Inputs) -> tuple[Any, Any]:
    """What the model is given of an item, and its label or None. A pair is one of inputs and a label where its first is a text
    or a dict, its second a number or a name, or a few integers that the model has no second input for. What has one label may
    lack a batch dimension."""
    if isinstance(item, Mapping):
        found = [name for name in NAMES if name in item and name not in inputs.names]
        label = item[found[0]] if found else None
        return ({name: value for name, value in item.items() if name not in found}, label) if found else (item, None)
    if isinstance(item, (tuple, list)) and len(item) == 2 and not isinstance(item[0], (int, float)):
        first, second = item
        if isinstance(first, (str, Mapping)):
            return first, second
        if isinstance(second, (int, str, np.integer)):
            wanted = inputs.program.placeholders[0].meta["val"].ndim
            is_one = isinstance(first, (Tensor, np.ndarray)) and first.ndim == wanted - 1
            return (first[None] if is_one else first), second
        required = [declared.name for declared in inputs.program.signature.inputs if declared.default is None]
        is_label = isinstance(second, (Tensor, np.ndarray)) and second.ndim < 2 and "int" in str(second.dtype)
        if is_label and (len(required) == 1 or "input_ids" in inputs.names):
            return first, second
    return item, None


class Classes:
    """The classes of a model. config: the Hugging Face configuration of it, whose label2id names them."""

    def __init__(self, config: Any = None) -> None:
        self.names: dict[str, int] = dict(getattr(config, "label2id", None) or {})

    def label(self, given: Any, sample: Sequence[Tensor], inputs: Inputs, where: object) -> Tensor | UsageError | None:
        """int64 [B] or [B, N] of what is given as the label of a sample, why it is none, or None for no label."""
        if given is None:
            return None
        try:
            return self._label(given, sample, inputs, where)
        except UsageError as error:
            return error

    def of_folders(self, root: Path, paths: Sequence[Path]) -> dict[Path, Any]:
        """Of each image its class by the folder in `root` that it is in: what label2id calls so, else folders by number, else
        in order. Nothing where some are in no folder, or all are in one that is no class."""
        parts = [path.relative_to(root).parts for path in paths]
        folders = sorted({each[0] for each in parts})
        if any(len(each) < 2 for each in parts):
            return {}
        if any(folder in self.names for folder in folders):
            return {path: each[0] for path, each in zip(paths, parts, strict=True)}
        if len(folders) < 2:
            return {}
        numbers = {each: int(each) if all(map(str.isdecimal, folders)) else at for at, each in enumerate(folders)}
        return {path: numbers[each[0]] for path, each in zip(paths, parts, strict=True)}

    def _label(self, given: Any, sample: Sequence[Tensor], inputs: Inputs, where: object) -> Tensor:
        if isinstance(given, str):
            if given not in self.names:
                known = ", ".join(list(self.names)[:8]) or "none"
                why = f"the configuration's label2id knows {known}"
                raise UsageError(f"{given!r} is no class of this model", where=where, why=why, hint="give its number")
            given = self.names[given]
        try:
            label = torch.as_tensor(given).detach().cpu()
        except (ValueError, TypeError, RuntimeError, OverflowError):
            raise UsageError(f"a label cannot be of the type {type(given).__name__}", where=where, hint=HINT) from None
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise UsageError(f"the label {given!r} is not the number of a class", where=where, hint="an integer from 0")
        batch = sample[0].shape[0]
        label = label.long()
        if label.ndim == 0 or (label.ndim == 1 and batch == 1 and len(label) != 1):
            label = label[None]
        tokens = sample[inputs.names.index("input_ids")] if "input_ids" in inputs.names else None
        if len(label) != batch or (label.ndim > 1 and tokens is not None and label.shape != tokens.shape):
            expected = f"{batch} classes" + ("" if tokens is None else f", or {list(tokens.shape)} of tokens")
            raise UsageError(f"labels are {list(label.shape)}, and the sample is of {expected}", where=where, hint=HINT)
        return label
