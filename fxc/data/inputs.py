"""From what a call takes to the flat inputs of a program, checked: that it has them all, that its tables have their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxc.data.decoder import decoder_inputs
from fxc.data.tables import table_size
from fxc.errors import UsageError, first_line
from fxc.ir.binding import bind
from fxc.ir.cache import is_causal_lm, is_past
from fxc.ir.program import Program
from fxc.safety import listed


@dataclass(frozen=True)
class Inputs:
    """What one program takes. config: the Hugging Face configuration of its model, which says how many tokens that takes."""

    program: Program
    config: Any = None

    @cached_property
    def names(self) -> list[str]:
        return [declared.name for declared in self.program.signature.inputs]

    @cached_property
    def longest(self) -> int | None:
        """The most tokens that the model takes."""
        text = getattr(self.config, "text_config", None) or self.config
        return getattr(text, "max_position_embeddings", None)

    @cached_property
    def tables(self) -> dict[str, int]:
        """Input -> the size of the smallest table that its integers index."""
        found = {n: table_size(node) for n, node in zip(self.names, self.program.placeholders, strict=True)}
        return {name: size for name, size in found.items() if size is not None}

    def sample(self, args: tuple, kwargs: dict[str, Any], where: object) -> list[Tensor]:
        """The flat input tensors of a call with these arguments, on the CPU; of a decoder with the mask, positions and empty
        cache that they leave out. where: where the arguments stand, for the error.

        Raises `UsageError` for what the program cannot take.
        """
        try:
            if is_causal_lm(self.program):
                args, kwargs = (), self._with_cache(args, kwargs)
            flat = bind(self.program, args, kwargs)
            self._check(flat)
        except UsageError as error:
            hint = error.hint or "give what the model is called with, and no labels, with a batch dimension"
            raise UsageError(error.what, where=where, why=error.why, hint=hint) from None
        return [tensor.detach().cpu() for tensor in flat]

    def _with_cache(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder with what they leave out: a mask, positions and an empty cache."""
        given = dict(zip(self.program.metadata.get("parameters", []), args, strict=False)) | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        ids = given.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim != 2:
            raise UsageError(f"input_ids has {ids.ndim} dimensions and must have 2", hint="give [batch, tokens]")
        if not isinstance(ids, Tensor) or any(is_past(name) for name in given):
            if len(args) > 0 and "input_ids" not in given:
                raise UsageError("the input input_ids is missing", hint="give a dict of the inputs by name")
            return given  # as it is: complete, or with a fault that binding names
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape != ids.shape:
            raise UsageError(f"attention_mask is {list(mask.shape)} and must be {list(ids.shape)}, as input_ids")
        filled = decoder_inputs(self.program, ids, mask if isinstance(mask, Tensor) else None)
        return dict(zip(self.names, filled, strict=True)) | given

    def _check(self, flat: list[Tensor]) -> None:
        for name, tensor in zip(self.names, flat, strict=True):
            if tensor.numel() == 0 and not is_past(name):
                raise UsageError(f"{name} is empty: {list(tensor.shape)}", hint="leave samples without content out")
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise UsageError(f"{name} holds NaN", hint="repair or leave out the sample")
            size = self.tables.get(name)
            wrong = [] if size is None else tensor[(tensor < 0) | (tensor >= size)].tolist()
            if wrong:
                raise UsageError(
                    f"{name} holds {wrong[0]}, and the model knows 0 to {size - 1}",
                    hint="the tokenizer belongs to another model, or labels were given as inputs",
                )
            if name == "input_ids" and self.longest and tensor.ndim == 2 and tensor.shape[1] > self.longest:
                raise UsageError(
                    f"{tensor.shape[1]} tokens, and the model takes at most {self.longest}",
                    hint="cut the sample into shorter ones",
                )

    def tensor(self, name: str, value: Any, where: str) -> Any:
        """`value` for the input `name`: lists of numbers become a tensor, with a batch dimension if that is what lacks."""
        if isinstance(value, np.ndarray):
            return torch.as_tensor(value)
        if not is_numbers(value):
            return value
        try:
            tensor = torch.tensor(value)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UsageError(
                f"{name} does not make a tensor",
                where=where,
                why=first_line(error),
                hint="lists of the same length, of numbers alone",
            ) from None
        if name not in self.names:
            return tensor
        wanted = self.program.placeholders[self.names.index(name)].meta["val"]
        if wanted.is_floating_point() or tensor.numel() == 0 or (tensor.dtype == torch.int64 and wanted.dtype == torch.bool):
            tensor = tensor.to(wanted.dtype)
        return tensor[None] if tensor.ndim == wanted.ndim - 1 else tensor

    def check_covers(self, given: Iterable[str], what: str, where: object) -> None:
        """Refuse data of one kind for a model that takes more."""
        required = {declared.name for declared in self.program.signature.inputs if declared.default is None}
        missing = sorted(required - set(given))
        if missing and not is_causal_lm(self.program):
            raise UsageError(
                f"{what} alone is too little for this model: it takes {listed(missing)} too",
                where=where,
                hint="in Python, give an iterable of dicts with all of its inputs, as in calib=[{'input_ids': ids, ...}, ...]",
            )


def is_numbers(value: Any) -> bool:
    """Whether `value` is a list, or lists in lists, of numbers, judged by the first."""
    if not isinstance(value, (list, tuple)):
        return False
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float)) or value == []
