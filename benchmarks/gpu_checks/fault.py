"""One check: what is wrong with a result, with the memory around it, with another run of it, or with a graph of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_checks.chip import Chip
from fxc.kernel_bench.run import failure

FP8 = torch.float8_e4m3fn
# (largest difference of the largest number, root mean square difference of the root mean square): a whole step of the type, of
# which half is rounding and the rest sums in another order; on average a rounding is a third of half a step. The interpreter
# cuts bfloat16 off where a chip rounds.
TOLERANCE = {torch.float32: (4e-6, 4e-6), torch.float16: (2**-10, 4e-4), torch.bfloat16: (2**-7, 3e-3)}
INTERPRETED_TOLERANCE = {**TOLERANCE, torch.bfloat16: (2**-7, 6e-3)}
GUARD = 256


@dataclass(frozen=True)
class Case:
    """run, expected: without arguments, tensors. wrong: `run` on something changed, which has to be seen. compare: instead of
    the tolerance, (found, expected) -> what is wrong, or "". steps: how many times the tolerance, where a result is rounded
    more often. runs: how often it runs, each time with the same bits."""

    label: str
    run: Callable[[], Any]
    expected: Callable[[], Any]
    wrong: Callable[[], Any] | None = None
    compare: Callable[[Any, Any], str] | None = None
    steps: int = 1
    runs: int = 2


def fault(case: Case, chip: Chip) -> str:
    """What is wrong with the case, or nothing."""
    tolerance = INTERPRETED_TOLERANCE if chip.interpreted else TOLERANCE
    compare = case.compare or (lambda a, b: within(a, b, tolerance, case.steps))
    expected = case.expected()
    with poisoned() as guards:
        first = case.run()
        others = [case.run() for _ in range(case.runs - 1)]
    if wrong := compare(first, expected):
        return wrong
    for guard in guards:
        if (guard != 0xA5).any():
            return "writes behind an output"
    if not all(_same(first, each) for each in others):
        return "two runs differ"
    if chip.device.type == "cuda" and (wrong := replay_fault(case, first)):
        return wrong
    # A few numbers may come out alike by chance.
    many = isinstance(expected, tuple) or expected.numel() >= 32
    if case.wrong is not None and many and not compare(case.wrong(), expected):
        return "the comparison does not see a changed weight"
    return ""


def replay_fault(case: Case, first: Any) -> str:
    """What is wrong when it is captured in a CUDA graph and replayed, its results being erased before, or nothing."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = case.run()
        for _ in range(2):
            for each in _tensors(found):
                if each.data_ptr() not in {t.data_ptr() for t in _tensors(first)}:  # an input that is handed on stays
                    _bits(each).fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            if not _same(first, found):
                return "replayed from a CUDA graph it gives other bits"
    except RuntimeError as error:
        return f"in a CUDA graph: {failure(error)}"
    return ""


def quantized(found: tuple, expected: tuple) -> str:
    """Rows of q, scale and zero point. A number that lies between two may go either way: a chip divides by other steps."""
    (q, scale, zero), (exact, exact_scale, exact_zero) = found, expected
    exact_scale = exact_scale[:, 0]
    apart = ((scale - exact_scale).abs() / exact_scale).max().item()
    if not apart <= 1e-6:
        return f"scales differ by {apart:.1e}"
    if q.dtype == FP8:
        # Neighbours in e4m3 are neighbours as integers of sign and magnitude.
        steps = (_ordinal(q) - _ordinal(exact)).abs()
    else:
        steps = ((q.int() - zero[:, None]) - (exact.int() - exact_zero)).abs()
    off = (steps > 0).float().mean().item()
    return "" if steps.max() <= 1 and off <= 2e-3 else f"{off:.2%} of the numbers differ, by up to {int(steps.max())} steps"


def normed(found: tuple, expected: tuple) -> str:
    """A norm and the sum that it is of, which is one addition and so exact."""
    tolerance = TOLERANCE if found[0].is_cuda else INTERPRETED_TOLERANCE
    if not torch.equal(found[1], expected[1]) and (found[0].is_cuda or within(found[1], expected[1], tolerance)):
        return "the sum differs"
    # The reference rounds where the kernel does, but takes the root of another sum.
    return within(found[0], expected[0], tolerance, steps=2)


def _ordinal(values: Tensor) -> Tensor:
    bits = values.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def within(found: Tensor, expected: Tensor, tolerance: dict, steps: int = 1) -> str:
    """What is wrong with `found`, or nothing."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    most, average = (steps * each for each in tolerance[found.dtype])
    # The mean of few numbers is not yet the mean.
    average = max(average, most / found.numel() ** 0.5)
    a, b = found.double(), expected.double()
    if not a.isfinite().all():
        return f"{int((~a.isfinite()).sum())} numbers are not finite"
    largest = ((a - b).abs().max() / b.abs().max()).item()
    mean = ((a - b).square().mean() / b.square().mean()).sqrt().item()
    return "" if largest <= most and mean <= average else f"differs by {largest:.1e}, on average {mean:.1e}"


@contextmanager
def poisoned() -> Iterator[list[Tensor]]:
    """Within, new memory holds NaN or the smallest integer, and has a guard behind it; gives the guards."""
    guards: list[Tensor] = []
    plain = {"empty": torch.empty, "empty_like": torch.empty_like}

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
        count = int(torch.Size(shape).numel())
        dtype = dtype or torch.get_default_dtype()
        whole = plain["empty"](count * dtype.itemsize + GUARD, dtype=torch.uint8, device=device)
        # 0xFF: NaN in every float type, e4m3 too; -1 as an integer.
        whole.fill_(0xFF)
        whole[count * dtype.itemsize :] = 0xA5
        guards.append(whole[count * dtype.itemsize :])
        return whole[: count * dtype.itemsize].view(dtype).view(shape)

    torch.empty = empty
    torch.empty_like = lambda t, **options: empty(t.shape, dtype=options.get("dtype", t.dtype), device=t.device)
    try:
        yield guards
    finally:
        torch.empty, torch.empty_like = plain["empty"], plain["empty_like"]


def _tensors(results: Any) -> list[Tensor]:
    return [each for each in (results if isinstance(results, tuple) else (results,)) if each is not None]


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(_bits(one), _bits(other)) for one, other in zip(_tensors(a), _tensors(b), strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
