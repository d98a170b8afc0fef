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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fxc.artifact.companions import write
from fxc.data.samples import samples
from fxc.errors import UsageError, VerificationFailed, first_line
from fxc.export.folder import Target, check_has_values
from fxc.export.hugging_face import in_float32
from fxc.export.packed import packed_weights, refused
from fxc.export.runs import TWO_BYTES, rounded_apart, runs
from fxc.frontend.check import tolerance
from fxc.ir.program import Program
from fxc.lower.aoti import compile_package
from fxc.lower.cpu import lower_to_kernels
from fxc.lower.definitions import by_definition, definition
from fxc.lower.inductor import compiler
from fxc.lower.siblings import LayerChoice
from fxc.safety import listed
from fxc.schemes.scheme import product_of
from fxc.verify.compare import difference
from fxc_kernels.cpu.native import NotBuilt

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
    command = _compiler()
    products: dict[str, int] = {}
    for node in program.graph.nodes:
        if product := product_of(node.target):
            products[product.kind] = products.get(product.kind, 0) + 1
    lowered, choices = lower_to_kernels(program)
    without = [each for each in choices if each.op == "unchanged"]
    for each in packed_weights(lowered).values():
        if any(definition(node) is None for node in each.readers):
            why = "products over rows sorted by expert have no operator that a package holds"
            raise refused(each, "AOTInductor", why, "leave the experts out with --skip")
    module = by_definition(lowered).module()
    with target.staged(2 * program.nbytes()) as place:
        _compile(module, program, place / NAME, command)
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
    try:
        return compiler()
    except RuntimeError as error:
        raise UsageError(
            "a package is compiled, and there is no C++ compiler", where="--format aoti", why=error,
            hint="install g++, or set CXX",
        ) from error  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- compile


def _compile(module: fx.GraphModule, program: Program, path: Path, command: str) -> None:
    try:
        compile_package(module, samples(program)[0], path, command, {})
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
