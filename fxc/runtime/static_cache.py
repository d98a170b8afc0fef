"""Decoding over a cache of a fixed size: one step on tensors that stay where they are, on CUDA recorded as a graph.

A step reads and writes only its own tensors: token, mask, position, slot, and a buffer for each key and value. What a call
brings is copied into them, so that the same step, or its recording, serves every token. When a sequence outgrows its
buffers it moves to ones of twice the size, and to the step that belongs to them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fxc.errors import FxcError, ResourceError, UsageError, first_line
from fxc.ir.cache import cache_types
from fxc.ir.program import Program
from fxc.lower.aoti import Package
from fxc.lower.inductor import CompiledGraph
from fxc.lower.runnable import Running, runnable
from fxc.runtime.decode_graph import decode_program
from fxc.schemes import ops
from fxc.schemes.scheme import products_for

# Slots of the smallest buffers.
CAPACITY = 128
# Where nothing is recorded a step reads so many slots of them, or a multiple.
SLOTS_AT_ONCE = 64
# Steps that no cache uses at the moment are kept for the next one, up to this many: recordings, and where nothing is recorded
# buffers, which are made in no time and hold memory.
IDLE_STEPS, IDLE_BUFFERS = 8, 1
# (rows, tokens before, slots) of the check that a decoder is exact: within one vector of keys, and beyond two.
EXACT_SIZES = ((3, 9, 16), (1, 33, 64))
# How far the two paths may be apart in the check of a new decoder, relative to the largest logit: sums in another order and,
# where activations are quantized, other roundings. What a mask lets through there is a hundred times too large.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.15}

# Operators that wait for numbers from the device.
_COUNTED_BY_THE_HOST = (ops.GROUPED_MM, ops.GROUPED_LINEAR, *products_for(ops.GROUPED_LINEAR))

# Makes of a function without arguments one that does the same to the same tensors and returns the same tensor.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class CudaGraphs:
    """Records functions as CUDA graphs, which share one memory pool: none keeps anything there from one replay to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.stream: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Raises `UsageError` when a part of `function` cannot be captured, `ResourceError` when memory is short."""
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
                # One for all: a pool gives memory again only to the stream that had it. And torch's own for captures is on
                # whatever device was the first to record.
                self.stream = torch.cuda.Stream()
            # Kernels are compiled and libraries make their handles in the first calls, which no capture may hold.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate meanwhile, as for a prompt.
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    result = function()
            except (FxcError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:  # torch's own for whatever a capture does not permit
                raise UsageError(
                    "the decode step cannot be captured in a CUDA graph",
                    why=first_line(error),
                    hint="load the model without static_cache",
                ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def run_directly(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The `Record` of devices without graphs."""
    return function


@dataclass(eq=False)
class Step:
    """A decode step and its tensors, none of which is ever replaced.

    tensors: input_ids [B, 1], attention_mask [B, S], position_ids [B, 1], slot [1], then keys and values [B, heads, S, width].
    owner: the cache that is kept in them. replay: the recorded step, after the first call.
    """

    tensors: tuple[Tensor, ...]
    owner: weakref.ref | None = None
    replay: Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return self.tensors[4:]

    @property
    def size(self) -> tuple[int, int]:
        """(batch, slots)."""
        batch, slots = self.tensors[1].shape
        return batch, slots

    def is_free(self) -> bool:
        return self.owner is None or self.owner() is None


class StaticDecoder:
    """Steps of one model for each batch and buffer size that was needed.

    step: what `decode_graph` makes, compiled or not; capacity: slots of the smallest buffers, each further size is twice as
    large; record: how a step is made fast to repeat.
    """

    def __init__(self, step: nn.Module, program: Program, device: torch.device, capacity: int, record: Record) -> None:
        if capacity < 2:
            raise UsageError(f"a static cache of {capacity} slots holds nothing", hint="capacity=128")
        self.module = step
        self.types = cache_types(program)
        self.device = device
        self.capacity = capacity
        self.record = record
        self.steps: list[Step] = []
        self.copied: Any = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> StaticDecoder:
        """Copies of a model decode with the same steps, of which each cache has its own."""
        return self

    def lease(self, owner: SlotCache, batch: int, needed: int) -> Step:
        """A step with at least `needed` slots, all of them empty, that is `owner`'s for as long as it lives."""
        slots = self.capacity
        while slots < needed:
            slots *= 2
        with self._lock:
            step = next((s for s in self.steps if s.size == (batch, slots) and s.is_free()), None)
            idle = [s for s in self.steps if s.is_free() and s is not step]
            most = IDLE_BUFFERS if self.record is run_directly else IDLE_STEPS
            for old in idle[: max(0, len(idle) + 1 - most)]:
                self.steps.remove(old)
                old.replay = None  # which holds the step: without the cycle its memory is free at once
            if step is None:
                step = self._allocate(batch, slots)
                self.steps.append(step)
            step.owner = weakref.ref(owner)
        for tensor in step.tensors:
            tensor.zero_()  # also a NaN that somebody else's sequence left: masked slots are multiplied by zero
        return step

    def _allocate(self, batch: int, slots: int) -> Step:
        nbytes = sum(batch * t.shape[1] * slots * t.shape[3] * t.dtype.itemsize for t in self.types)
        try:
            # Whoever makes the first call, the tensors have to serve calls in and outside of inference mode.
            with torch.inference_mode(False):
                shapes = [((batch, 1), torch.int64), ((batch, slots), torch.int64), ((batch, 1), torch.int64)]
                shapes += [((1,), torch.int64), *(((batch, t.shape[1], slots, t.shape[3]), t.dtype) for t in self.types)]
                return Step(tuple(torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in shapes))
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"no memory for a cache of {batch} rows and {slots} slots, {nbytes / 1e9:.2f} GB",
                where=str(self.device),
                why=first_line(error),
                hint="a smaller batch, or shorter sequences",
            ) from error

    def _used(self, step: Step, used: int | None) -> tuple[Tensor, ...]:
        # What is compiled makes its inputs contiguous, and would write to copies.
        if used is None or isinstance(self.module, CompiledGraph | Package):
            return step.tensors
        ids, mask, positions, slot, *buffers = step.tensors
        slots = min(-(-used // SLOTS_AT_ONCE) * SLOTS_AT_ONCE, step.size[1])
        return ids, mask[:, :slots], positions, slot, *(each[:, :, :slots] for each in buffers)

    def run(self, step: Step, used: int | None = None) -> Tensor:
        """Logits [B, 1, vocabulary] of the step's token, whose key and value are then in its slot. used: slots that are, with
        this token; what is neither recorded nor compiled then leaves others out, but for some."""
        try:
            if self.record is run_directly:  # each thread on tensors of its own
                with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False), Running():
                    return self.module(*self._used(step, used))[0]
            # Recordings share memory: until its result is copied, no other one may start.
            with self._lock, torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                if step.replay is None:
                    step.replay = self.record(lambda: self.module(*step.tensors)[0])
                if self.device.type != "cuda":
                    return step.replay().clone()
                stream = torch.cuda.current_stream(self.device)  # another thread's may be another one
                if self.copied is not None:
                    stream.wait_event(self.copied)
                logits = step.replay().clone()
                self.copied = stream.record_event()
                return logits
        except torch.OutOfMemoryError as error:
            batch, slots = step.size
            raise ResourceError(
                f"no memory for the decode step of {batch} rows and {slots} slots",
                where=str(self.device),
                why=first_line(error),
                hint="a smaller batch, or load the model without static_cache",
            ) from error


class SlotCache(Cache):
    """The cache of one `generate` call over a `StaticDecoder`: column i of the sequence is in slot i of the step's buffers."""

    def __init__(self, decoder: StaticDecoder) -> None:
        super().__init__(layers=[])
        self.decoder = decoder
        self.step: Step | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        return -1 if self.step is None else self.step.size[0]

    def tensors(self) -> list[Tensor]:
        """Keys and values [B, heads, length, width], layer by layer: the part of the buffers in use, not a copy of it."""
        return [] if self.step is None else [t[:, :, : self.length] for t in self.step.buffers]

    def keep(self, present: list[Tensor]) -> None:
        """Take over keys and values [B, heads, length, width], of which the first are those that it has."""
        batch, _, length, _ = present[0].shape
        before = self.length
        if self.step is None or self.step.size[0] != batch or self.step.size[1] < length:
            self.reset()
            self.step, before = self.decoder.lease(self, batch, length + 1), 0
        for buffer, tensor in zip(self.step.buffers, present, strict=True):
            buffer[:, :, before:length].copy_(tensor[:, :, before:])
        self.length = length

    def decode(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Append one token: input_ids and position_ids [B, 1], attention_mask [B, length + 1]. Returns its logits
        [B, 1, vocabulary]."""
        if self.length == self.step.size[1]:
            self._grow()
        step = self.step
        ids, mask, positions, slot, *_ = step.tensors
        ids.copy_(input_ids)
        mask[:, : self.length + 1].copy_(attention_mask)
        positions.copy_(position_ids)
        slot.fill_(self.length)
        logits = self.decoder.run(step, self.length + 1)
        self.length += 1
        return logits

    def _grow(self) -> None:
        small = self.step
        self.step = self.decoder.lease(self, small.size[0], self.length + 1)
        for buffer, tensor in zip(self.step.buffers, small.buffers, strict=True):
            buffer[:, :, : self.length].copy_(tensor)
        small.owner = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def __deepcopy__(self, memo: dict) -> SlotCache:
        """A cache of its own over the same decoder."""
        other = SlotCache(self.decoder)
        if self.length:
            other.keep(self.tensors())
        return other

    def reset(self) -> None:
        if self.step is not None:
            self.step.owner = None
        self.step, self.length = None, 0

    def _cannot(self, *args: Any) -> None:
        raise UsageError(
            "a static cache keeps every row and every token until generation ends",
            where="past_key_values",
            hint="use the model without static_cache for assisted or contrastive generation",
        )

    crop = batch_repeat_interleave = batch_select_indices = update = _cannot


def static_decoder(
    lowered: Program, device: torch.device, backend: str = "eager", capacity: int = CAPACITY, record: Record | None = None,
    is_exact: bool = False,
) -> StaticDecoder:  # fmt: skip
    """Decode steps that share the constants of `lowered`, a program lowered for `device` and `backend`.

    Raises `UsageError` where the program cannot decode over buffers, or does not give the same logits there: up to rounding, or
    with `is_exact` to the bit.
    """
    program = decode_program(lowered)
    counted = [node for node in program.graph.nodes if node.target in _COUNTED_BY_THE_HOST]
    if counted and device.type == "cuda":
        raise UsageError(
            "the decode step cannot be captured in a CUDA graph: the host counts the rows of its experts",
            where=counted[0].meta.get("fqn"),
            hint="load the model without static_cache",
        )
    step = runnable(program, device, "eager")
    whole = runnable(lowered, device, "eager")
    for rows, past, slots in EXACT_SIZES if is_exact else EXACT_SIZES[:1]:
        check_step(whole, step, lowered, device, past, slots, is_exact, rows)
    if record is None:
        record = CudaGraphs(device) if device.type == "cuda" else run_directly
    if backend != "eager":
        step = runnable(program, device, backend)
    return StaticDecoder(step, lowered, device, capacity, record)


def check_step(
    whole: nn.Module, step: nn.Module, program: Program, device: torch.device, past: int = 9, slots: int = 16,
    is_exact: bool = False, rows: int = 3,
) -> None:  # fmt: skip
    """Run one token after `past` others through the program and through the step, with a row padded on the left and unused
    slots full of large numbers, of longer buffers where it is to be exact, and raise `UsageError` unless logits and cache are
    the same: up to rounding, or to the bit."""
    types = cache_types(program)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, past + 1, dtype=torch.int64)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1)[:, -1:]
    ids = torch.arange(1, rows + 1)[:, None]
    length = slots * 2 if is_exact else slots
    values = [torch.randn(rows, t.shape[1], length, t.shape[3], generator=generator).to(t.dtype) for t in types]
    values = [each[:, :, :slots] for each in values]
    for value in values:
        value[:, :, past:] *= 100
    on_device = [t.to(device) for t in (ids, mask, positions, *values)]
    (ids, mask, positions), buffers = on_device[:3], on_device[3:]
    with torch.inference_mode(False), torch.no_grad():
        expected, *present = whole(ids, mask, positions, *(t[:, :, :past].contiguous() for t in buffers))
        wide = torch.nn.functional.pad(mask, (0, slots - past - 1))
        (found,) = step(ids, wide, positions, torch.tensor([past], device=device), *buffers)
    pairs = [("logits", expected, found)]
    pairs += [(name, a, b[:, :, : past + 1]) for name, a, b in zip(program.signature.outputs[1:], present, buffers)]
    for name, a, b in pairs:
        apart = ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
        most = 0 if is_exact else TOLERANCE[a.dtype]
        if not apart <= most:
            raise UsageError(
                f"over a static cache this model's {name} differ by {apart:.1e} of the largest",
                why="the same bits are wanted" if is_exact else f"up to {most:.0e} would be rounding in {a.dtype}".replace(
                    "torch.", ""
                ),
                hint="use it without static_cache",
            )
