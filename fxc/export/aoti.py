"""A compiled model as an AOTInductor package, which torch loads and runs without fxc, transformers or any compiler.

    run = torch._inductor.aoti_load_package("OUT/model.pt2")      # or from C++: torch::inductor::AOTIModelPackageLoader
    outputs = run(*inputs)                                        # flat tensors, in the order of OUT/names.json

The package is C++ compiled for this machine's kind of CPU, and the weights. Packed weights stay packed. Linear layers in int8
and int4 run in fxc's kernels, whose machine code is linked in (`fxc_kernels.cpu.packaged`). Where this machine has none for a
layer, and in every other format, a product is written by the definition that its format gives (`Scheme.dense`,
`Product.rounded`), int8 as a product of integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxc.artifact.companions import write
from fxc.data.samples import samples
from fxc.errors import UsageError, VerificationFailed, first_line
from fxc.export.folder import Target, check_has_values
from fxc.export.hugging_face import in_float32
from fxc.export.packed import packed_weights, refused
from fxc.export.runs import TWO_BYTES, dynamic_shapes, rounded_apart, runs
from fxc.frontend.check import tolerance
from fxc.ir.call import Call
from fxc.ir.names import layer_at, parts_of
from fxc.ir.program import Program
from fxc.lower.cpu import lower_to_kernels
from fxc.lower.siblings import LayerChoice
from fxc.safety import listed
from fxc.schemes import int8
from fxc.schemes.scheme import EMBEDDING, LINEAR, product_of, scheme_of
from fxc.verify.compare import difference
from fxc_kernels.cpu.native import NotBuilt
from fxc_kernels.cpu.packaged import KERNELS, linked

NAME = "model.pt2"
NAMES = "names.json"
_NARROW = 0.05
"""Relative error of outputs in types of two bytes, to which the compiled code rounds less often."""
_ROUNDED_IN_KERNELS = 0.1
"""The same where kernels round activations in their own way: their numbers are compared with the kernels' own first."""


@dataclass(frozen=True)
class Written:
    """What `export` wrote. products: kind of packed product -> how many; kernels: layers that run in fxc's kernels; error:
    relative, of the outputs; zeros: none, ever; warnings: what is other there than here."""

    folder: Path
    file: Path
    model_class: str
    products: dict[str, int]
    kernels: int
    error: float
    zeros: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it is, for people."""
        held = ", ".join(f"{count} {kind}" for kind, count in sorted(self.products.items())) or "float"
        held += f" ({self.kernels} in fxc's kernels)" if self.kernels else ""
        return f"{self.model_class} as an AOTInductor package: {held}; relative error {self.error:.1e}"


def export(
    program: Program,
    files: Mapping[str, Path | bytes],
    folder: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Written:
    """Write `program` as `folder`/model.pt2, compiled for this machine's CPU: all of it, loaded back, run and compared, or
    nothing. Arguments as of `hugging_face.export`.

    Raises `UsageError` without a C++ compiler and, with the layer and the reason, for products that no package can hold;
    `VerificationFailed` where the package gives other outputs.
    """
    companions = {name: file for name, file in files.items() if name != "config.json"}
    own = frozenset({NAMES})
    target = Target(
        Path(folder), "aoti", "folder of an AOTInductor package", NAME, own, NAMES, companions, overwrite, sources
    )  # fmt: skip
    target.check()
    check_has_values(program, folder)
    compiler = _compiler()
    products: dict[str, int] = {}
    for node in program.graph.nodes:
        if product := product_of(node.target):
            products[product.kind] = products.get(product.kind, 0) + 1
    lowered, choices = lower_to_kernels(program)
    without = [each for each in choices if each.op == "unchanged"]
    module = by_definition(lowered).module()
    with target.staged(2 * program.nbytes()) as place:
        _compile(module, program, place / NAME, compiler)
        write(companions, place)
        names = {
            "inputs": [each.name for each in program.signature.inputs], "outputs": list(program.signature.outputs)
        }  # fmt: skip
        (place / NAMES).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
        error = _check_written(place / NAME, target.folder, program, lowered if len(without) < len(choices) else None)
    model_class = program.metadata.get("class") or "a program"
    warnings = [f"{listed(each.fqn for each in layers)} not in fxc's kernels: {why}" for why, layers in _by_reason(without)]
    kernels = len(choices) - len(without)
    return Written(target.folder, target.folder / NAME, model_class, products, kernels, error, warnings=warnings)


def _by_reason(choices: Sequence[LayerChoice]) -> list[tuple[str, list[LayerChoice]]]:
    reasons = dict.fromkeys(each.reason for each in choices)
    return [(why, [each for each in choices if each.reason == why]) for why in reasons]


def _compiler() -> str:
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise UsageError(
            "a package is compiled, and there is no C++ compiler", where="--format aoti", why=error,
            hint="install g++, or set CXX",
        ) from error  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- definitions


def by_definition(program: Program) -> Program:
    """The program with functions of plain torch in the place of packed products. Its graph holds Python functions, and is to be
    traced. Raises `UsageError` for a product that has none."""
    for each in packed_weights(program).values():
        for node in each.readers:
            if _function(node) is None:
                why = "products over rows sorted by expert have no operator that a package holds"
                raise refused(each, "AOTInductor", why, "leave the experts out with --skip")
    program = program.copy()
    for node in list(program.graph.nodes):
        if product_of(node.target) is not None:
            _replace(program, node)
        elif getattr(node.target, "namespace", None) == "fxc":
            raise UsageError(
                f"a package holds no {node.target}", where=layer_at(program, node),
                why="operators of fxc are there where fxc is, and the package is for where it is not",
                hint="fxc.load reads the artifact as it is",
            )  # fmt: skip
    return program


def _function(node: fx.Node) -> Callable[..., Tensor] | None:
    product = product_of(node.target)
    if node.target is int8.LINEAR:
        return times_int8
    return {LINEAR: linear, EMBEDDING: lookup, int8.CONV2D: conv2d}.get(product.layer)


def _replace(program: Program, node: fx.Node) -> None:
    call, function = Call(node), _function(node)
    scheme, product = scheme_of(node.target), product_of(node.target)
    parts = {part: call.get(part) for part in parts_of(node)}
    names = [argument.name for argument in node.target._schema.arguments]
    more = {name: call.get(name) for name in names if name not in parts and name not in scheme.parts and name != "group"}

    def written(*tensors: Tensor, **others: Any) -> Tensor:
        return function(scheme, product, dict(zip(parts, tensors, strict=True)), **others)

    written.__name__ = function.__name__
    with program.graph.inserting_before(node):
        made = program.graph.call_function(written, tuple(parts.values()), more)
    node.replace_all_uses_with(made)
    program.graph.erase_node(node)


def linear(scheme: Any, product: Any, parts: dict[str, Tensor], x: Tensor, bias: Tensor | None, **learned: Any) -> Tensor:
    """x @ w^T + bias in float32, with x as the product rounds it."""
    read = x.float() if product.rounded is None else product.rounded(x, **learned)
    return functional.linear(read, scheme.dense(parts).float(), None if bias is None else bias.float()).to(x.dtype)


def times_int8(scheme: Any, product: Any, parts: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """`fxc::int8_linear` as a product of integers (fxc_kernels.int8_linear)."""
    rows = x.reshape(-1, x.shape[-1])
    q, step, zero = int8.quantize_rows(rows)
    weight = parts["qweight"]
    total = torch._int_mm(q, weight.t()) - zero * weight.sum(dim=1, dtype=torch.int32)
    out = total.float() * parts["scale"] * step
    return (out if bias is None else out + bias.float()).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def lookup(scheme: Any, product: Any, parts: dict[str, Tensor], indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table."""
    flat = indices.flatten()
    rows = scheme.dense({part: tensor.index_select(0, flat) for part, tensor in parts.items()})
    return rows.to(dtype).reshape(*indices.shape, rows.shape[-1])


def conv2d(
    scheme: Any, product: Any, parts: dict[str, Tensor], x: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, **learned: Any,
) -> Tensor:  # fmt: skip
    """A convolution in float32, with x as the product rounds it."""
    numbers = parts[scheme.numbers]
    weight = scheme.dense({**parts, scheme.numbers: numbers.flatten(1)}).view(numbers.shape)
    read = x.float() if product.rounded is None else product.rounded(x, **learned)
    wide = None if bias is None else bias.float()
    return functional.conv2d(read, weight, wide, stride, padding, dilation, groups).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------- compile


def _compile(module: fx.GraphModule, program: Program, path: Path, compiler: str) -> None:
    called = {node.target for node in module.graph.nodes} & set(KERNELS)
    try:
        with torch.no_grad(), linked(called, compiler) as settings:
            exported = torch.export.export(module, tuple(samples(program)[0]), dynamic_shapes=dynamic_shapes(program))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
    except NotBuilt as error:
        raise UsageError(
            "fxc's kernels were not built into the package", why=error, hint="with FXC_CPU_LEVEL set to none it does without"
        ) from error
    except Exception as error:  # Inductor wraps whatever its lowerings and the C++ compiler raise
        raise UsageError(
            "Inductor does not compile it into a package", where=program.metadata.get("class"), why=first_line(error),
            hint="fxc.load reads the artifact as it is, backend='inductor' included",
        ) from error  # fmt: skip


def _check_written(path: Path, folder: Path, program: Program, lowered: Program | None) -> float:
    """Run the package beside the program; returns the largest relative error. lowered: the program in fxc's kernels, where the
    package has some, which is compared first: kernels of weight-only formats round activations, as the program does not."""
    types = {node.meta["val"].dtype for node in program.results}
    products = [product_of(node.target) for node in program.graph.nodes]
    rounds = lowered is not None or any(each.rounded for each in products if each)
    allowed = rounded_apart(in_float32(program)) if rounds else tolerance(torch.float32)
    if types & set(TWO_BYTES):
        allowed = max(allowed, _NARROW)
    package = torch._inductor.aoti_load_package(str(path))
    if lowered is not None:
        _compare(package, folder, lowered, allowed)
        allowed = max(allowed, _ROUNDED_IN_KERNELS)
    return _compare(package, folder, program, allowed)


def _compare(package: Any, folder: Path, program: Program, allowed: float) -> float:
    worst = 0.0
    for inputs, expected in runs(program):
        try:
            found = package(*inputs)
        except Exception as error:
            sizes = ", ".join(str(list(t.shape)) for t in inputs[:3])
            raise VerificationFailed(f"the package fails at the sizes {sizes}: {first_line(error)}", where=folder) from error
        found = [found] if isinstance(found, Tensor) else list(found)
        seen = difference(found, expected)
        worst = max(worst, seen.error, float("inf") if seen.unequal and allowed <= tolerance(torch.float32) else 0.0)
    if not worst <= allowed:
        raise VerificationFailed(
            f"the package gives other outputs than the program: relative error {worst:.1e}, and {allowed:.0e} is rounding",
            where=folder, hint="nothing was written; fxc.load reads the artifact as it is",
        )  # fmt: skip
    return worst
