"""Many layers of an encoder in one call, by int8_rows.cpp: int8 products, norms with their sums, and attention within each
sequence. Nothing between them goes through the memory, threads rarely wait for each other, and Python is asked once.

Steps work on registers, matrices of as many rows as the inputs have: those first, then what the steps make, in order. Of each
step eleven numbers say what it does:

    LINEAR     from, activation, outputs, limit; constants: weight, scale, sums, bias of `native_int8.pack`, and dense or None
               as `native_int8_linear` takes it, for up to `limit` rows
    NORM       from, other or -1, is_rms, with_sum; constants: weight, bias; number: eps. Makes the norm, then the sum if asked
    ATTENTION  from, heads, heads of k and v, depth, columns where q, k and v begin, mask or -1, is_causal, is_rough (whether
               its products may be of bfloat16); number: the scale
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxc_kernels.cpu import native
from fxc_kernels.cpu.native_attention import native_attention
from fxc_kernels.cpu.native_between import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fxc_kernels.cpu.native_int8 import ACTIVATIONS, native_int8_linear

LINEAR, NORM, ATTENTION = range(3)
WIDTH = 11
CONSTANTS = {LINEAR: 5, NORM: 2, ATTENTION: 0}
# Every thread reads all weights: with fewer rows for each, the layers one by one are faster, which divide the outputs. With
# weights of more than SMALL bytes, which stay in no cache, it takes four times as many.
LEAST_ROWS, SMALL = 12, 1 << 24
# Threads take whole sequences unless one would have so many times its share.
UNEVEN = 1.15
_GIVEN, _KEPT, _SHORT = range(3)
# `Step` and `Register` of int8_rows.cpp, and what is filled in with each call: where the mask is, its kind and strides.
_STEP, _REGISTER, _POINTER, _STRIDES = (struct.Struct(f"={form}") for form in ("25qd", "4q", "q", "5q"))
_MASK_AT, _STRIDES_AT, _DATA_AT = 12 * 8, 19 * 8, 8


class Step(NamedTuple):
    """One step, by the numbers above: `numbers` behind its kind, those that its kind does not have are 0."""

    kind: int
    numbers: tuple[int, ...]

    @property
    def reads(self) -> list[int]:
        return [each for each in (self.numbers[:2] if self.kind == NORM else self.numbers[:1]) if each >= 0]

    @property
    def count(self) -> int:
        """How many registers it makes."""
        return 1 + (self.kind == NORM and self.numbers[3])


def encoded(steps: list[Step]) -> list[int]:
    return [number for step in steps for number in (step.kind, *step.numbers, *[0] * (WIDTH - 1 - len(step.numbers)))]


def _decoded(numbers: tuple[int, ...]) -> list[Step]:
    return [Step(numbers[at], numbers[at + 1 : at + WIDTH]) for at in range(0, len(numbers), WIDTH)]


@functools.cache
def _functions(level: str) -> tuple[Callable, Callable]:
    library = native.library("int8_rows", level)
    scratch, run = library.int8_rows_scratch, library.int8_rows
    scratch.restype, scratch.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    run.restype, run.argtypes = None, (ctypes.c_void_p,)
    return scratch, run


def why_not() -> str | None:
    """Why this machine cannot run it, or None."""
    return native.refusal(_functions)


def native_rows(
    inputs: list[Tensor], masks: list[Tensor], constants: list[Tensor | None], numbers: list[float], steps: list[int],
    results: list[int],
) -> list[Tensor]:  # fmt: skip
    """inputs: [B, S, K] of several K, all float32 or all bfloat16; masks: of attention, bool or of their dtype, to be expanded
    to [B, heads, S, S]; constants, numbers: of the steps, in their order; results: the registers that are given back,
    [B, S, N]. Raises `RuntimeError` without rows."""
    batch, length = inputs[0].shape[:2]
    if not batch * length:  # as models say themselves, which ask torch how wide a head of them is
        raise RuntimeError("attention of no rows: their heads have any size")
    threads = native.threads()
    by_sequence = -(-batch // threads) * threads <= UNEVEN * batch
    plan = _plan(tuple(steps), tuple([each.shape[2] for each in inputs]), tuple(results), by_sequence)
    least = LEAST_ROWS * threads * (1 if plan.weights <= SMALL else 4)
    if batch * length <= plan.limit or (threads > 1 and batch * length < least):
        return one_by_one(inputs, masks, constants, numbers, steps, results)
    inputs = [each.contiguous() for each in inputs]
    made = [inputs[0].new_empty(batch, length, plan.columns[each]) for each in results]
    given = {**dict(enumerate(inputs)), **dict(zip(results, made, strict=True))}
    masks = [each.expand(batch, -1, length, length) for each in masks]
    pointers = tuple([0 if each is None or each.is_mkldnn else each.data_ptr() for each in constants])
    table = bytearray(plan.packed(pointers, tuple(numbers)))
    for at, mask in plan.masked:
        strides = [0 if size == 1 else step for size, step in zip(masks[mask].shape, masks[mask].stride(), strict=True)]
        _POINTER.pack_into(table, at + _MASK_AT, masks[mask].data_ptr())
        _STRIDES.pack_into(table, at + _STRIDES_AT, 1 if masks[mask].dtype == torch.bool else 2, *strides)
    registers = bytearray(plan.registers)
    for number, tensor in given.items():
        _POINTER.pack_into(registers, number * _REGISTER.size + _DATA_AT, tensor.data_ptr())
    buffers = [(ctypes.c_char * len(each)).from_buffer(each) for each in (table, registers)]
    whole = (ctypes.c_int64 * 12)(
        ctypes.addressof(buffers[0]), len(plan.steps), ctypes.addressof(buffers[1]), len(plan.where), batch * length, length,
        inputs[0].dtype == torch.bfloat16, by_sequence, plan.kept, plan.short, threads, 0,
    )  # fmt: skip
    scratch, run = _functions(native.level())
    space = torch.empty(scratch(ctypes.addressof(whole)), dtype=torch.uint8)
    whole[11] = space.data_ptr()
    run(ctypes.addressof(whole))
    return made


def one_by_one(
    inputs: list[Tensor], masks: list[Tensor], constants: list[Tensor | None], numbers: list[float], steps: list[int],
    results: list[int],
) -> list[Tensor]:  # fmt: skip
    """The same, a call for each step."""
    registers, constants, numbers = list(inputs), iter(constants), iter(numbers)
    for kind, given in _decoded(tuple(steps)):
        x = registers[given[0]]
        if kind == LINEAR:
            *weights, dense = (next(constants) for _ in range(CONSTANTS[LINEAR]))
            registers.append(native_int8_linear(x, *weights, given[2], False, ACTIVATIONS[given[1]], dense, given[3]))
        elif kind == NORM:
            weight, bias, eps = next(constants), next(constants), next(numbers)
            other, is_rms, with_sum = None if given[1] < 0 else registers[given[1]], *given[2:4]
            if with_sum:
                registers += add_rms_norm(x, other, weight, eps) if is_rms else add_layer_norm(x, other, weight, bias, eps)
            else:
                registers.append(rms_norm(x, weight, eps) if is_rms else layer_norm(x, other, weight, bias, eps))
        else:
            heads, kv_heads, depth, *starts, mask, is_causal, is_rough = given[1:10]
            parts = [
                x.narrow(-1, start, count * depth).unflatten(-1, (count, depth)).transpose(1, 2)
                for start, count in zip(starts, (heads, kv_heads, kv_heads), strict=True)
            ]
            seen, is_shared = None if mask < 0 else masks[mask], heads != kv_heads
            own = {"scale": next(numbers), "enable_gqa": is_shared, "is_rough": bool(is_rough)}
            y = native_attention(*parts, seen, 0.0, bool(is_causal), **own)
            registers.append(y.transpose(1, 2).flatten(2))
    return [registers[each] for each in results]


@dataclass(eq=False)
class _Plan:
    """where, at, columns: of each register; kept, short: the columns of what a thread keeps, and has for the rows at hand;
    weights: bytes of all weights; limit: up to how many rows a layer is dense, 0 if none is."""

    steps: list[Step]
    where: list[int]
    at: list[int]
    columns: list[int]
    kept: int
    short: int
    weights: int
    limit: int
    made: tuple[tuple, bytes] | None = None

    @functools.cached_property
    def masked(self) -> list[tuple[int, int]]:
        """(where the step is in `packed`, its mask) for each that has one."""
        found = [(number * _STEP.size, step.numbers[7]) for number, step in enumerate(self.steps) if step.kind == ATTENTION]
        return [(at, mask) for at, mask in found if mask >= 0]

    @functools.cached_property
    def registers(self) -> bytes:
        """`Register` of each, but for where the given ones are."""
        places = zip(self.where, self.at, self.columns, strict=True)
        return b"".join(_REGISTER.pack(where, 0, at, columns) for where, at, columns in places)

    def packed(self, pointers: tuple[int, ...], numbers: tuple[float, ...]) -> bytes:
        """`Step` of each, but for masks. pointers: of the constants. The same as last time is not made again."""
        last = self.made
        if last is None or last[0] != (pointers, numbers):
            self.made = last = (pointers, numbers), self._pack(pointers, numbers)
        return last[1]

    def _pack(self, pointers: tuple[int, ...], numbers: tuple[float, ...]) -> bytes:
        packed, constants, values = [], iter(pointers), iter(numbers)
        to = len(self.where) - sum(step.count for step in self.steps)
        for step in self.steps:
            kind, given = step
            total = to + 1 if step.count == 2 else -1
            weight, scale, sums, bias, rest = 0, 0, 0, 0, (0,) * 12
            if kind == LINEAR:
                other, how = -1, given[1]
                weight, scale, sums, bias, _ = (next(constants) for _ in range(CONSTANTS[kind]))
            elif kind == NORM:
                other, how, weight, bias = given[1], given[2], next(constants), next(constants)
            else:
                other, how, rest = -1, given[8], (*given[1:7], *(0,) * 5, given[9])
            ends = (weight, scale, sums, bias, 0, *rest, 0.0 if kind == LINEAR else next(values))
            packed.append(_STEP.pack(kind, given[0], other, to, total, self.columns[given[0]], self.columns[to], how, *ends))
            to += step.count
        return b"".join(packed)


def widths(inputs: list[Tensor], steps: list[int], results: list[int]) -> list[int]:
    """The columns of what `native_rows` gives."""
    found = [each.shape[2] for each in inputs]
    for step in _decoded(tuple(steps)):
        found += [_width(step, found)] * step.count
    return [found[each] for each in results]


def _width(step: Step, columns: list[int]) -> int:
    """The columns of what a step makes. columns: of all registers before."""
    given = step.numbers
    return {LINEAR: given[2], NORM: columns[given[0]], ATTENTION: given[1] * given[3]}[step.kind]


@functools.lru_cache(maxsize=256)
def _plan(steps: tuple[int, ...], widths: tuple[int, ...], results: tuple[int, ...], by_sequence: bool) -> _Plan:
    """Where the registers are. What is made and read between two attentions lies with the rows at hand; the rest is kept."""
    decoded, columns = _decoded(steps), list(widths)
    born, last = [0.0] * len(widths), [0.0] * len(widths)
    time = 0.0  # how many attentions were before; in one, half as much again
    for step in decoded:
        time += 0.5 * (step.kind == ATTENTION)
        for each in step.reads:
            last[each] = time
        time += 0.5 * (step.kind == ATTENTION)
        columns += [_width(step, columns)] * step.count
        born += [time - 0.5 * (step.kind == ATTENTION)] * step.count
        last += [time] * step.count
    where, at, sizes = [], [0] * len(columns), {_KEPT: 0, _SHORT: 0}
    free: list[tuple[int, int]] = []
    for each in range(len(columns)):
        is_given = each < len(widths) or each in results
        where.append(_GIVEN if is_given else _SHORT if born[each] == last[each] else _KEPT)
    step_of = [number for number, step in enumerate(decoded) for _ in range(step.count)]
    for kind in (_KEPT, _SHORT):
        held: list[int] = []
        for each in range(len(widths), len(columns)):
            if where[each] != kind:
                continue
            begun = step_of[each - len(widths)]
            for other in list(held):
                read = [number for number, step in enumerate(decoded) if other in step.reads]
                # Not where later rows of the same steps are still to be read, nor where another thread may be at work that has
                # not come to the last attention yet.
                waits = kind == _KEPT and born[each] - last[other] < (0.5 if by_sequence else 1)
                if max(read, default=step_of[other - len(widths)]) < begun and not waits:
                    held.remove(other)
                    free.append((columns[other], at[other]))
            fitting = sorted(place for place in free if place[0] >= columns[each])
            if fitting:
                free.remove(fitting[0])
                at[each] = fitting[0][1]
                if fitting[0][0] > columns[each]:
                    free.append((fitting[0][0] - columns[each], at[each] + columns[each]))
            else:
                at[each], sizes[kind] = sizes[kind], sizes[kind] + columns[each]
            held.append(each)
        free.clear()
    linears = [step.numbers for step in decoded if step.kind == LINEAR]
    weights = sum(columns[source] * outputs for source, _, outputs, *_ in linears)
    limit = max((each[3] for each in linears), default=0)
    return _Plan(decoded, where, at, columns, sizes[_KEPT], sizes[_SHORT], weights, limit)
