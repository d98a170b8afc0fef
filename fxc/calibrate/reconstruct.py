"""Train tensors that stand for constants of a block until it gives what it should, sample by sample.

What is minimised is the squared error of the block's outputs, as a share of their energy: of half a block of a transformer that
is the best unit there is (BRECQ, Li et al., arXiv 2102.05426; "A Free Lunch in LLM Compression", arXiv 2510.14444). No gradient
goes through any other block. Some samples are held out, and the best state of the tensors by these is what they are left in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxc.calibrate.stream import Passage, reader
from fxc.progress import Track, untracked
from fxc.schemes.scheme import product_of, scheme_of

# One of so many samples is held out.
HELD_OUT = 8
# So many times the held-out samples are looked at.
LOOKS = 8


@dataclass(frozen=True)
class Fit:
    """What training did for held-out samples: the share of the energy of the block's outputs that is lost, before and after.
    Where it was no better the tensors are as they were, and the two are the same."""

    before: float
    after: float


def reconstruct(
    passage: Passage,
    constants: Mapping[str, Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Callable[[float], float] = lambda done: 1 - done,
    first: Callable[[], None] | None = None,
    steps: int = 200,
    batch: int = 8,
    seed: int = 0,
    held_out: Sequence[int] | None = None,
    within: Callable[[], AbstractContextManager] = nullcontext,
    least: float = 0.0,
    track: Track = untracked,
    what: str = "",
) -> Fit | None:
    """Let `optimizer` train its tensors, so that with `constants` (name -> what it is, of these tensors) the block gives what
    it gave; they are left as they were best for held-out samples.

    schedule: share of the steps that is done -> what the rates at the beginning are multiplied by. first: what changes the
    tensors at once, before they are trained. batch: samples for each
    step, drawn by `seed`. held_out: the samples to judge by, every eighth if it is None. within: what products run in while it
    trains. least: where no more is lost, nothing is trained. None where there are fewer than two samples: then there is nothing
    to judge by, and nothing changes.
    """
    if passage.count < 2:
        return None
    held_out = range(0, passage.count, HELD_OUT) if held_out is None else held_out
    training = [at for at in range(passage.count) if at not in held_out]
    read = reader(passage.program, passage.outputs, passage.reads(0), call=trainable)
    weights = _weights(passage)

    def lost(
        some: Sequence[int], made: Mapping[str, Tensor], within: Callable[[], AbstractContextManager] = nullcontext
    ) -> Iterator[Tensor]:
        """Of samples, the mean share of the energy of a mean one, in parts."""
        for state, aims in passage.together(some):
            with within():
                given = read(state, made)
            gaps = [(given[node].float() - aim.float()).square().sum() for node, aim in zip(passage.outputs, aims, strict=True)]
            yield sum(gap * weight for gap, weight in zip(gaps, weights)) / (len(weights) * len(some))

    def judged() -> float:
        with torch.no_grad():
            made = {name: make() for name, make in constants.items()}
            groups = [list(held_out[at : at + batch]) for at in range(0, len(held_out), batch)]
            return sum(float(part) * len(some) for some in groups for part in lost(some, made)) / len(held_out)

    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    before = best = judged()
    if before <= least:
        return Fit(before, before)
    kept = [tensor.detach().clone() for tensor in tensors]
    if first is not None:
        first()
        if (now := judged()) < best:
            best, kept = now, [tensor.detach().clone() for tensor in tensors]
        else:
            _put(tensors, kept)
    order = torch.Generator().manual_seed(seed)
    looks = {round(steps * n / LOOKS) for n in range(1, LOOKS + 1)}
    for step in track(range(1, steps + 1), what, steps):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule((step - 1) / steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            made = {name: make() for name, make in constants.items()}
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
            chosen = torch.randperm(len(training), generator=order)[:batch].tolist()
            for part in lost([training[at] for at in chosen], leaves, within):
                part.backward()
            # What a block gives need not depend on all of them.
            reached = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            torch.autograd.backward([made[name] for name in reached], list(reached.values()))
        optimizer.step()
        if step in looks and (now := judged()) < best:
            best, kept = now, [tensor.detach().clone() for tensor in tensors]
    _put(tensors, kept)
    return Fit(before, best)


@torch.no_grad()
def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _weights(passage: Passage) -> list[float]:
    """Of each output, one by the energy of a mean sample."""
    squares = torch.tensor([[float(each.float().square().sum()) for each in passage.gave(at)] for at in range(passage.count)])
    return squares.mean(0).clamp(min=1e-30).reciprocal().tolist()


def trainable(node: fx.Node, args: tuple, kwargs: dict) -> object:
    """What `node` gives, of operators with gradients: a product with a packed weight is one with the weight that it stands for.
    Where it rounds its activations it gives what it gives, with the gradient of one that does not."""
    product = product_of(node.target)
    if product is None:
        return node.target(*args, **kwargs)
    given = dict(zip((argument.name for argument in node.target._schema.arguments), args)) | kwargs
    scheme, x = scheme_of(node.target), given["x"]
    weight = scheme.dense({part: given.get(part) for part in scheme.parts}).to(x.dtype)
    others = [given[name] for name in ("bias", "offsets") if name in given]
    value = product.layer(x, weight, *others)
    if product.activations is None:
        return value
    with torch.no_grad():
        exact = node.target(*args, **kwargs)
    return value + (exact - value).detach()
