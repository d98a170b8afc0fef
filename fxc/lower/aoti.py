"""Run a lowered program as machine code that AOTInductor made of it: no Python between its operators, and no compiler where the
code is in the cache folder already.

    <cache folder> / program-<hash>.pt2, and .sha256, of what it is

The hash is of the program's text, which has no weights, of torch, of the machine's level and of fxc's kernels: models of one
shape share the code. It holds no weights: it reads those of the program where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxc.errors import UsageError, first_line
from fxc.ir.program import Program
from fxc.lower.definitions import by_definition
from fxc.lower.inductor import compiler, dynamic_shapes
from fxc.neutral import one_at_a_time
from fxc_kernels.cpu import native
from fxc_kernels.cpu.packaged import KERNELS, linked

_SETTINGS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.dynamic_threads": True,  # as many as torch has in each call
}


class Package(nn.Module):
    """Flat tensors positionally, a flat tuple of tensors back; one package for all sizes. It is compiled, or found, when it is
    made. Raises `UsageError` without a C++ compiler, and for what Inductor does not compile."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        module = by_definition(program).module()
        make = functools.partial(_compile, program, module)
        with native.kept(f"program-{_hash(program)}.pt2", "program.lock", make) as path:
            self._package = torch._inductor.aoti_load_package(str(path))
        values = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        wanted = self._package.get_constant_fqns()
        if missing := sorted(set(wanted) - set(values)):
            raise UsageError("the compiled code wants constants that the program does not have", why=", ".join(missing[:3]))
        self._package.load_constants({name: values[name] for name in wanted}, check_full_update=True, user_managed=True)
        self._kept = values  # whose memory the code reads

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self._package(*(each.contiguous() for each in inputs))
        return (found,) if isinstance(found, Tensor) else tuple(found)


def compile_package(
    module: fx.GraphModule, examples: Sequence[Tensor], path: Path, command: str, settings: dict[str, Any]
) -> None:
    """Write `module` as a package at `path`, with fxc's kernels linked in where it calls them.

    examples: inputs that it takes, of sizes other than 0 and 1 where they vary; command: the C++ compiler; settings: more of
    Inductor's. Raises `native.NotBuilt`, and whatever Inductor's lowerings and the compiler do.
    """
    called = {node.target for node in module.graph.nodes} & set(KERNELS)
    with torch.no_grad(), linked(called, command) as own:
        exported = torch.export.export(module, tuple(examples), dynamic_shapes=dynamic_shapes(module.graph))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=own | settings)


@one_at_a_time
def _compile(program: Program, module: fx.GraphModule, path: Path) -> None:
    try:
        command = compiler()
    except RuntimeError as error:
        raise UsageError(
            "the aoti backend needs a C++ compiler for code that is not in the cache folder yet", where="backend=aoti",
            why=error, hint="install g++ (or set CXX), copy the cache folder of a machine of this kind, or use backend=eager",
        ) from error  # fmt: skip
    examples = [_example(node.meta["val"]) for node in program.placeholders]
    try:
        compile_package(module, examples, path, command, _SETTINGS)
    except Exception as error:  # Inductor wraps whatever its lowerings and the C++ compiler raise
        raise UsageError(
            "Inductor does not compile this program ahead of time", where="backend=aoti", why=first_line(error),
            hint="use backend=eager",
        ) from error  # fmt: skip


def _example(value: Tensor) -> Tensor:
    """A tensor of the sizes of capture."""
    return torch.zeros([size if isinstance(size, int) else int(size.node.hint) for size in value.shape], dtype=value.dtype)


def _hash(program: Program) -> str:
    try:
        level = native.level()
    except native.NotBuilt:
        level = "none"
    parts = (str(program), torch.__version__, level, native.sources(), repr(_SETTINGS))
    return native.digest(*(part.encode() for part in parts))
