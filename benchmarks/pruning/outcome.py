"""What is asked of both contenders, and how an outcome is said: "ok", or in words what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxc.kernel_bench.run import failure
from fxc.verify.compare import relative_error

HEADS, WIDTHS = 0.25, 0.3
NEW_TOKENS = 9
Record = dict[str, Any]


def first(result: Any) -> Tensor:
    """The output that all others lead to: logits, or the last hidden state."""
    return result if isinstance(result, Tensor) else result[0]


def generated(call: Any, given: dict[str, Tensor]) -> Tensor | None:
    """Greedy tokens [B, NEW_TOKENS + prompt], the first row padded on the left; None for a model that does not write."""
    ids = given.get("input_ids")
    if "decoder_input_ids" in given:
        written = torch.zeros(len(ids), 1, dtype=torch.int64)
        for _ in range(NEW_TOKENS):
            logits = first(call(**{**given, "decoder_input_ids": written}))
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        return written
    if not hasattr(call, "generate"):
        return None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return call.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def close(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"wrong: {list(found.shape)} instead of {list(expected.shape)}"
    error = relative_error([found], [expected])
    return "ok" if error < 1e-4 else f"wrong: differs by {error:.1e}"


def same(found: Tensor | None, expected: Tensor | None) -> str | None:
    if expected is None:
        return None
    return "ok" if torch.equal(found, expected) else "wrong: other tokens"


def tried(stage: Callable[[], Any]) -> Any:
    """What `stage` gives, or in words why it failed: a stage that fails must not cost the others their measurement."""
    try:
        return stage()
    except Exception as error:
        return f"failed: {failure(error)}"


def whole(result: Any) -> Record:
    """The record of a contender that did not come through says only why."""
    return result if isinstance(result, dict) else {"failed": result.removeprefix("failed: ")}
