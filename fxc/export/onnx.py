"""A compiled model as an ONNX file, which ONNX Runtime and whatever else reads ONNX loads.

`torch.onnx.export` writes the program, with what `onnx_products` puts in the place of packed products; sizes that vary in the
program vary in the file. It computes in float32: numbers of two bytes are stored as they are and widened when the file is
loaded. Inputs and outputs are called as in the program, and a decoder's cache as optimum calls it:

    input_ids [batch, sequence], attention_mask [batch, past + sequence], position_ids [batch, sequence]          int64
    past_key_values.LAYER.key, .value [batch, heads, past, width]  ->  logits, present.LAYER.key, present.LAYER.value
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc.artifact.companions import write
from fxc.data.samples import samples
from fxc.errors import UsageError, VerificationFailed, first_line
from fxc.export.configuration import describe_config
from fxc.export.folder import Target, check_has_values
from fxc.export.hugging_face import in_float32
from fxc.export.onnx_products import ACCURACY_LEVEL, written_out
from fxc.export.packed import as_float, packed_weights
from fxc.export.runs import TWO_BYTES, rounded_apart, runs
from fxc.frontend.check import tolerance
from fxc.ir.cache import has_cache, is_causal_lm, is_past, is_present
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.lower.inductor import dynamic_shapes
from fxc.verify.compare import difference

NAME = "model.onnx"
OPSET = 20
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_BESIDE = 1_000_000_000  # bytes of weights from which on they are in a file beside the graph: one of protobuf holds 2 GB
EXACT = ("session.x64quantprecision", "1")
"""The setting of a session with which ONNX Runtime's products of int8 do not saturate on a CPU without VNNI."""
_ROUNDED_IN_BLOCKS = 0.1
"""Relative error of outputs where MatMulNBits rounds activations in its own way; its numbers are compared without that."""


@dataclass(frozen=True)
class Written:
    """What `export` wrote. operators: type of ONNX -> how many; error: relative, of the outputs in ONNX Runtime; zeros: none,
    ever; warnings: what is other there than here."""

    folder: Path
    file: Path
    model_class: str
    operators: dict[str, int]
    error: float
    zeros: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it is, for people."""
        names = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "DequantizeLinear", "Conv")
        held = ", ".join(f"{self.operators[name]} {name}" for name in names if name in self.operators)
        return f"{self.model_class} as ONNX: {held}; relative error in ONNX Runtime {self.error:.1e}"


def export(
    program: Program,
    config: Any,
    files: Mapping[str, Path | bytes],
    folder: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Written:
    """Write `program` as `folder`/model.onnx, with tokenizer and configuration beside it: all of it, run by ONNX Runtime and
    compared, or nothing. Arguments as of `hugging_face.export`; config may be None.

    Raises `UsageError` where onnx, onnxscript or onnxruntime is not installed, and with the layer and the reason where ONNX has
    no operator for what the program does; `VerificationFailed` where ONNX Runtime does not load it or gives other outputs.
    """
    companions = {name: file for name, file in files.items() if name != "config.json"}
    own = frozenset({"config.json"})
    target = Target(
        Path(folder), "onnx", "folder of an ONNX export", f"{NAME}*", own, NAME, companions, overwrite, sources
    )  # fmt: skip
    target.check()
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"{' and '.join(missing)} not installed", where="--format onnx", why="they write the file and run it",
            hint="pip install 'fxc[onnx]'",
        )  # fmt: skip
    check_has_values(program, folder)
    wide = in_float32(program)
    made = _model(_stored_narrow(written_out(wide), program), program)
    with target.staged(2 * program.nbytes()) as place:
        with _quiet():
            made.save(place / NAME, external_data=program.nbytes() > _BESIDE)
        write(companions, place)
        operators = _operators(place / NAME)
        error = _check_written(place, target.folder, wide, operators)
        said = _write_config(place, program, config)
    if not torch.cpu._is_vnni_supported() and "MatMulInteger" in operators:
        why = f"unless the session has {'='.join(EXACT)}"
        said.append(f"ONNX Runtime's products of int8 saturate on a CPU without VNNI, as this one is, {why}")
    model_class = program.metadata.get("class") or "a program"
    return Written(target.folder, target.folder / NAME, model_class, operators, error, warnings=said)


def _stored_narrow(written: Program, program: Program) -> Program:
    """Constants that `program` has in two bytes are stored so, and widened where they are read."""
    for node in written.graph.find_nodes(op="get_attr"):
        narrow = program.constants.get(node.target)
        if narrow is None or narrow.dtype not in TWO_BYTES:
            continue
        written.constants[node.target] = narrow
        with written.graph.inserting_after(node):
            made = written.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    return written


# --------------------------------------------------------------------------------------------------------------------- names


def input_names(program: Program) -> list[str]:
    """What the inputs are called in the file."""
    return [
        "past_key_values." + name.partition(".")[2] if has_cache(program) and is_past(name) else name
        for name in (declared.name for declared in program.signature.inputs)
    ]


def output_names(program: Program) -> list[str]:
    """What the outputs are called in the file, where no two values have one name."""
    taken = set(input_names(program))
    return [f"{name}_out" if name in taken else name for name in program.signature.outputs]


def _size_names(program: Program) -> dict[tuple[str, int], str]:
    """(input, dimension) -> what a size that varies is called."""
    names: dict[tuple[str, int], str] = {}
    known: dict[str, str] = {}
    is_decoder = is_causal_lm(program)
    for name, node in zip(input_names(program), program.placeholders, strict=True):
        for dimension, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            if dimension == 0:
                called = "batch"
            elif is_decoder:
                called = "past" if name.startswith("past_key_values.") else "total" if name == "attention_mask" else "sequence"
            else:
                called = known.get(str(size)) or ("sequence" if "sequence" not in known.values() else f"size_{len(known)}")
                known[str(size)] = called
            names[name, dimension] = called
    return names


# --------------------------------------------------------------------------------------------------------------------- write


def _model(written: Program, program: Program) -> Any:
    """torch's ONNX program of `written`."""
    inputs = [t.float() if t.dtype in TWO_BYTES else t for t in samples(program)[0]]
    try:
        with _quiet(), torch.no_grad():
            made = torch.onnx.export(
                written.module(), tuple(inputs), dynamo=True, dynamic_shapes=dynamic_shapes(program.graph), opset_version=OPSET,
                input_names=input_names(program), output_names=output_names(program), external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch.onnx wraps whatever its translations raise
        raise _untranslated(error, program) from error
    _name_sizes(made.model, program)
    return made


def _untranslated(error: Exception, program: Program) -> UsageError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    node = next((n for n in program.graph.nodes if n.op == "call_function" and str(n.target) in text), None)
    return UsageError(
        "torch.onnx does not translate it" if node is None else f"torch.onnx has no translation of {node.target}",
        where=program.metadata.get("class") if node is None else layer_at(program, node),
        why=first_line(cause),
        hint="fxc.load reads the artifact as it is",
    )


def _name_sizes(model: Any, program: Program) -> None:
    """Give sizes that vary the names of `_size_names`, wherever they are said."""
    called = _size_names(program)
    found: dict[str, str] = {}
    for value in model.graph.inputs:
        for dimension, size in enumerate(value.shape):
            if (value.name, dimension) in called and not isinstance(size, int):
                found.setdefault(str(size.value), called[value.name, dimension])
                value.shape[dimension] = called[value.name, dimension]
    for value in model.graph.outputs:
        for dimension, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is not None:
                value.shape[dimension] = re.sub(r"\bs\d+\b", lambda match: found.get(match[0], match[0]), str(size.value))
    for node in model.graph:
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None  # in names that are gone; ONNX Runtime infers them


def _write_config(place: Path, program: Program, config: Any) -> list[str]:
    """config.json of what the program is now, where there is one. Returns what to warn of."""
    if config is None:
        return []
    made, why = describe_config(as_float(program, packed_weights(program)), config)
    if made is None:
        return [f"there is no config.json beside it, which some tools read sizes from: {why}"]
    made.dtype = torch.float32
    (place / "config.json").write_text(json.dumps(json.loads(made.to_json_string()), indent=2, sort_keys=True) + "\n")
    return []


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx and its helpers say of packages and of their own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --------------------------------------------------------------------------------------------------------------------- check


def _operators(path: Path) -> dict[str, int]:
    import onnx

    return dict(Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node))


def _check_written(place: Path, folder: Path, wide: Program, operators: Mapping[str, int]) -> float:
    """Run the file beside the program, in float32. Of MatMulNBits first the numbers, without its rounding of activations.
    Returns the error as it is written."""
    rounds = "MatMulInteger" in operators or "QuantizeLinear" in operators
    allowed = rounded_apart(wide) if rounds else tolerance(torch.float32)
    in_blocks = "MatMulNBits" in operators
    if in_blocks:
        exact = _with_accuracy_level(place, 1)
        _compare(exact, folder, wide, allowed)
        exact.unlink()
    return _compare(place / NAME, folder, wide, _ROUNDED_IN_BLOCKS if in_blocks else allowed)


def _with_accuracy_level(place: Path, level: int) -> Path:
    """A file beside the written one, of the same weights, whose MatMulNBits multiply in `level`."""
    import onnx

    model = onnx.load(place / NAME, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                assert attribute.i == ACCURACY_LEVEL
                attribute.i = level
    path = place / "check.onnx"
    onnx.save(model, path)
    return path


def _compare(path: Path, folder: Path, wide: Program, allowed: float) -> float:
    try:
        session = _session(path, "MatMulInteger" in _operators(path))
    except Exception as error:  # whatever ONNX Runtime objects to
        raise VerificationFailed(f"ONNX Runtime does not load it: {first_line(error)}", where=folder) from error
    worst = 0.0
    for inputs, expected in runs(wide, is_wide=True):
        try:
            found = session.run(None, {name: t.numpy() for name, t in zip(input_names(wide), inputs, strict=True)})
        except Exception as error:
            sizes = ", ".join(str(list(t.shape)) for t in inputs[:3])
            raise VerificationFailed(
                f"ONNX Runtime fails at the sizes {sizes}: {first_line(error)}", where=folder,
                hint="where torch.onnx takes a size for a constant: compile with --dynamic for those that vary",
            ) from error  # fmt: skip
        pairs = zip(wide.signature.outputs, map(torch.from_numpy, found), expected, strict=True)
        kept = [(_real(wide, name, mine, inputs), _real(wide, name, theirs, inputs)) for name, mine, theirs in pairs]
        seen = difference([mine for mine, _ in kept], [theirs for _, theirs in kept])
        worst = max(worst, seen.error, float("inf") if seen.unequal and allowed <= tolerance(torch.float32) else 0.0)
    if not worst <= allowed:
        raise VerificationFailed(
            f"ONNX Runtime gives other outputs than the program: relative error {worst:.1e}, and {allowed:.0e} is rounding",
            where=folder, hint="nothing was written; fxc.load reads the artifact as it is",
        )  # fmt: skip
    return worst


def _real(program: Program, name: str, value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Of what a decoder gives, what is of tokens: a column of padding attends to nothing, and tools differ in what that is."""
    if not is_causal_lm(program):
        return value
    mask = inputs[1].bool()
    return value.transpose(1, 2)[mask] if is_present(name) else value[mask[:, -inputs[0].shape[1] :]]


def _session(path: Path, has_integers: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if has_integers:  # and of static convolutions ONNX Runtime loads none with it
        options.add_session_config_entry(*EXACT)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
