"""Compile a lowered graph with Inductor, once per kind of shape, without Dynamo.

Inductor is called directly: a Program is already one flat graph, its constants can be frozen (packed) where they are,
and a call costs one check instead of Dynamo's guards over every constant. A specialization holds for all sizes that
satisfy the conditions under which it was traced; sizes 0 and 1 are specializations of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxc.errors import UsageError, first_line
from fxc.neutral import one_at_a_time

# Far more than one program needs: (batch 1 or more) x (sequence 1 or more) x (past 0, 1 or more) is 12.
MAX_SPECIALIZATIONS = 32


def compiler() -> str:
    """The C++ compiler that Inductor calls. Raises RuntimeError where there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError(first_line(error)) from error


def require_compiler() -> None:
    """Raise UsageError when this machine has no C++ compiler that Inductor can call."""
    try:
        compiler()
    except RuntimeError as error:
        raise UsageError(
            "the inductor backend needs a C++ compiler",
            where="backend=inductor",
            why=error,
            hint="install g++ (or set CXX), or use backend=eager",
        ) from error


def dynamic_dims(graph: fx.Graph) -> list[frozenset[int]]:
    """Of each input, the dimensions whose size may change between calls."""
    shapes = [node.meta["val"].shape for node in graph.find_nodes(op="placeholder")]
    return [frozenset(d for d, n in enumerate(shape) if not isinstance(n, int)) for shape in shapes]


def dynamic_shapes(graph: fx.Graph) -> tuple[dict[int, Any], ...]:
    """The same, as torch.export takes them."""
    return tuple({d: torch.export.Dim.AUTO for d in sorted(dims)} for dims in dynamic_dims(graph))


@dataclass
class Specialization:
    run: Callable[..., Any]
    holds: Any  # the code object of its conditions, None when there are none

    def accepts(self, inputs: tuple[Tensor, ...]) -> bool:
        if self.holds is None:
            return True
        return eval(self.holds, SYMPY_INTERP, {"L": {f"t{i}": t for i, t in enumerate(inputs)}})


class CompiledGraph(nn.Module):
    """A GraphModule that runs compiled: flat tensors positionally, a flat tuple of tensors back.

    dynamic: for each input, the dimensions whose size may change between calls. freezing: whether Inductor may lay out
    constants anew, which on a CPU is what makes them fast and elsewhere only keeps them twice.
    """

    def __init__(self, graph_module: fx.GraphModule, dynamic: list[frozenset[int]], freezing: bool = True) -> None:
        super().__init__()
        require_compiler()
        self.graph_module = graph_module
        self.dynamic = dynamic
        self.freezing = freezing
        self._known: dict[tuple, list[Specialization]] = {}

    def _kind(self, inputs: tuple[Tensor, ...]) -> tuple:
        """What a specialization fixes: dtypes, static sizes, sizes 0 and 1, and the threads its loops are cut for."""
        sizes = (
            n if n < 2 or d not in dynamic else -1
            for t, dynamic in zip(inputs, self.dynamic)
            for d, n in enumerate(t.shape)
        )
        return (torch.get_num_threads(), *(t.dtype for t in inputs), *sizes)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(t.contiguous() for t in inputs)
        kind = self._kind(inputs)
        for candidate in self._known.get(kind, ()):
            if candidate.accepts(inputs):
                return tuple(candidate.run(*inputs))
        made = self._compile(inputs)
        if sum(map(len, self._known.values())) >= MAX_SPECIALIZATIONS:
            self._known.clear()
        self._known.setdefault(kind, []).append(made)
        return tuple(made.run(*inputs))

    @one_at_a_time
    def _compile(self, inputs: tuple[Tensor, ...]) -> Specialization:
        from torch._inductor.compile_fx import compile_fx

        # Without duck shapes, two sizes that happen to be equal now stay independent unless the graph says otherwise.
        shapes = ShapeEnv(duck_shape=False)
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        fakes = []
        for i, tensor in enumerate(inputs):
            kinds = [
                DimDynamic.DYNAMIC if d in self.dynamic[i] and n > 1 else DimDynamic.STATIC
                for d, n in enumerate(tensor.shape)
            ]
            context = StatelessSymbolicContext(dynamic_sizes=kinds, constraint_sizes=[None] * tensor.dim())
            fakes.append(mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"in{i}")))
        try:
            with torch.no_grad():
                run = compile_fx(self.graph_module, fakes, config_patches={"freezing": self.freezing})
        except RuntimeError as error:  # its own errors, and those of the C++ compiler, are kinds of it
            raise UsageError(
                "Inductor cannot compile this program",
                where="backend=inductor",
                why=first_line(error),
                hint="use backend=eager",
            ) from error
        conditions = shapes.produce_guards_expression(fakes)
        return Specialization(run, compile(conditions, "<shapes>", "eval") if conditions else None)
