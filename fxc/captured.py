"""A model, or what a source names, as a program with what belongs to it."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxc.artifact import companions, config_json, store
from fxc.data.text import tokenizer_of
from fxc.errors import CaptureFailed, UsageError
from fxc.frontend.capture import capture
from fxc.frontend.larger import capture_larger
from fxc.ir.cache import is_causal_lm
from fxc.ir.program import Program
from fxc.memory import BESIDES, available, is_larger
from fxc.neutral import one_at_a_time
from fxc.options import Options
from fxc.source.fresh import fresh, is_configuration
from fxc.source.load import Loaded, as_dtype, check_is_model, kind_of, load_source


@dataclass
class Captured:
    """A captured source. config: its Hugging Face configuration, if it has one; files: tokenizer and configuration files;
    source: what it is, as JSON; nbytes: bytes of its weights as they came; folder: where it is, if it is a folder; passes:
    what an artifact went through already; is_compiled: whether it is one; borrowed: whether the program's constants are the
    tensors of the caller's model; is_streamed: whether they are mapped from files and were not read, for the model is larger
    than memory; small: the program of its first layers then; has_own_tokenizer: whether its tokenizer is that in `folder`;
    module: the model itself, over the same weights, where it was asked for and is no artifact."""

    program: Program
    config: Any
    files: dict[str, Any]
    source: dict[str, Any]
    nbytes: int
    folder: Path | None = None
    passes: list[dict[str, Any]] = field(default_factory=list)
    borrowed: bool = False
    is_compiled: bool = False
    is_streamed: bool = False
    small: Program | None = None
    has_own_tokenizer: bool = True
    module: nn.Module | None = None


@one_at_a_time
def capture_source(
    model: Any,
    example_inputs: Any = None,
    options: Options = Options(),
    teacher: Captured | None = None,
    *,
    keep_module: bool = False,
) -> Captured:
    """The program of a model or of a source, with what belongs to it. teacher: of a student, which may be a configuration: see
    `Options.teacher`. keep_module: keep the model as well (`Captured.module`)."""
    is_student = teacher is not None and is_configuration(model)
    if not is_student:
        check_is_model(model)
    given = companions.of_tokenizer(options.tokenizer) if options.tokenizer is not None else None
    if is_student:
        like = teacher.program.metadata.get("class")
        loaded = fresh(model, like, as_dtype(options.dtype), options.seed, options.trust_remote_code)
        captured = _captured(loaded, example_inputs, options)
    elif _is_compiled(model):
        captured = _capture_compiled(model, options)
    elif isinstance(model, nn.Module):
        _check_holds_none(model)
        captured = _capture_module(model, example_inputs, options)
    elif kind_of(str(model)) == "artifact":
        captured = _capture_artifact(Path(model), options)
    else:
        captured = _capture_loaded(str(model), example_inputs, options)
    if not keep_module:
        captured.module = None
    if given is not None:
        captured.files = companions.with_tokenizer(captured.files, given)
        captured.has_own_tokenizer = False
    elif teacher is not None:
        _take_tokenizer(captured, teacher)
    return captured


def capture_teacher(options: Options, example_inputs: Any = None) -> Captured | None:
    """`options.teacher`, captured as it is. example_inputs: of the student, which a module takes too."""
    if options.teacher is None:
        return None
    own = Options("", trust_remote_code=options.trust_remote_code, verify=options.verify)
    return capture_source(options.teacher, example_inputs if isinstance(options.teacher, nn.Module) else None, own)


def _take_tokenizer(captured: Captured, teacher: Captured) -> None:
    """A student without a tokenizer, or a processor of images, gets its teacher's."""
    for is_one in (companions.is_tokenizer_file, companions.is_processor_file):
        lent = {name: file for name, file in teacher.files.items() if is_one(name)}
        if lent and not any(map(is_one, captured.files)):
            captured.files = dict(sorted((captured.files | lent).items()))
            captured.has_own_tokenizer = False


def check_tokenizers(captured: Captured, teacher: Captured) -> None:
    """Raises UsageError where both have a tokenizer, and a number means one token to one of them and another to the other."""
    if not all(companions.has_vocabulary(each.files) for each in (captured, teacher)):
        return
    (mine, own), (its, other) = (_tokens(each) for each in (captured, teacher))
    wrong = [] if own == other else [number for number in mine.keys() & its.keys() if mine[number] != its[number]]
    if wrong:
        number = min(wrong)
        raise UsageError(
            "teacher and student have different tokenizers", where="teacher",
            why=f"{len(wrong):,} numbers mean other tokens: {number} is {its[number]!r} to the teacher, {mine[number]!r} here",
            hint="a student learns from what its teacher says of the same tokens: begin with one of the same vocabulary",
        )  # fmt: skip


def _tokens(captured: Captured) -> tuple[dict[int, str], dict[str, bytes]]:
    """Number -> token, and the files that say so."""
    files = {name: file for name, file in captured.files.items() if companions.is_tokenizer_file(name)}
    contents = {name: file if isinstance(file, bytes) else Path(file).read_bytes() for name, file in files.items()}
    with companions.laid_out(contents) as folder:
        return {number: token for token, number in tokenizer_of(folder).get_vocab().items()}, contents


def _capture_module(model: nn.Module, example_inputs: Any, options: Options) -> Captured:
    given, nbytes = model, _nbytes(model)
    wanted = as_dtype(options.dtype)
    if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
        model = _cast(copy.deepcopy(model), wanted)
        example_inputs = tree_map_only(Tensor, lambda t: t.to(wanted) if t.is_floating_point() else t, example_inputs)
    borrowed = model is given
    model, part = part_of(model, options.part)
    program = capture(model, example_inputs, dynamic_shapes=options.dynamic_shapes, check=options.verify)
    read = _check_whole(model, program, part, example_inputs)
    nbytes = read if part else nbytes
    config = getattr(model, "config", None)
    source = {"kind": "module", "class": type(model).__name__} | ({"part": part} if part else {})
    files = files_of_module(model)
    return Captured(program, config, files, source, nbytes, borrowed=borrowed, module=model)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in `dtype`, but for the frequencies of rotary positions, which transformers computes and does not store: they
    keep their type, as in `from_pretrained(dtype=...)`."""
    kept = [(module, name, module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set
            if name.endswith("inv_freq")]  # fmt: skip
    model = model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    return model


def _capture_loaded(source: str, example_inputs: Any, options: Options) -> Captured:
    streams = is_streamed(source, options)
    if streams and options.dtype != "auto":
        raise UsageError(
            "a model that is read piece by piece keeps its dtype", where="dtype", hint="the passes bf16 and fp16 change it"
        )
    left = options.max_memory if options.max_memory is not None else available()
    loaded = load_source(
        source, revision=options.revision, dtype=options.dtype, trust_remote_code=options.trust_remote_code,
        check_values=not streams, most=max(left - BESIDES, 0) if streams and left is not None else None,
    )  # fmt: skip
    return _captured(loaded, example_inputs, options, streams)


def is_streamed(source: str, options: Options) -> bool:
    """Whether the model is read piece by piece. Raises UsageError where that is asked for and cannot be."""
    files = list(Path(source).expanduser().glob("*.safetensors")) if kind_of(source) == "folder" else []
    if options.stream and not files:
        raise UsageError("only a folder of safetensors can be read piece by piece", where=source, hint="leave --stream out")
    if options.stream is not None:
        return options.stream
    return bool(files) and is_larger(sum(file.stat().st_size for file in files), options.max_memory)


def _captured(loaded: Loaded, example_inputs: Any, options: Options, streams: bool = False) -> Captured:
    inputs = example_inputs if example_inputs is not None else loaded.example_inputs
    model, part = part_of(loaded.model, options.part)
    small = None
    if streams:
        program, small = capture_larger(model, inputs, options.dynamic_shapes, options.verify)
    else:
        program = capture(model, inputs, dynamic_shapes=options.dynamic_shapes, check=options.verify)
    read = _check_whole(model, program, part, example_inputs)
    sizes = [f["size"] for f in loaded.source.get("files", {}).values()]
    unused = loaded.source.get("unused", {}).get("bytes", 0)
    files = companions.of_folder(loaded.tokenizer_dir) if loaded.tokenizer_dir else files_of_module(model)
    config = getattr(model, "config", None)
    nbytes = read if part else sum(sizes) - unused if sizes else _nbytes(loaded.model)
    origin = loaded.source | ({"part": part} if part else {})
    folder = loaded.tokenizer_dir
    return Captured(
        program, config, files, origin, nbytes, folder=folder, is_streamed=streams, small=small, module=model
    )


def _capture_artifact(path: Path, options: Options) -> Captured:
    _check_keeps(options)
    read = store.read(path)
    report = read.manifest.get("report", {})
    source = report.get("source", {"kind": "artifact"})
    files, nbytes, passes = companions.of_folder(path), read.program.nbytes(), report.get("passes", [])
    return Captured(read.program, config_json.read(path), files, source, nbytes, folder=path, passes=passes, is_compiled=True)


def _capture_compiled(model: Any, options: Options) -> Captured:
    """A model that was compiled already, as its artifact would be."""
    if hasattr(model, "check_is_whole"):
        model.check_is_whole()
    _check_keeps(options)
    program, report = model.program.copy(), model.report
    return Captured(
        program, model.config, dict(model.files), report.get("source", {"kind": "artifact"}), program.nbytes(),
        folder=model.source, passes=report.get("passes", []), borrowed=True, is_compiled=True,
        has_own_tokenizer=False,
    )  # fmt: skip


def _is_compiled(model: Any) -> bool:
    return isinstance(getattr(model, "program", None), Program)


def _check_holds_none(model: nn.Module) -> None:
    """Raises UsageError where a part of the model was compiled: it runs in kernels that this machine chose for it."""
    for name, module in model.named_modules():
        if _is_compiled(module):
            hint = "put the original in its place, and compile the whole"
            raise UsageError("a part of this model was compiled by fxc already", where=name, hint=hint)


def _check_keeps(options: Options) -> None:
    """Raises UsageError for what only an original model can be asked for."""
    if options.dtype != "auto":
        raise UsageError("an artifact keeps the dtype that it has", hint="compile the original model with dtype=...")
    if options.dynamic_shapes is not None:
        raise UsageError("an artifact keeps the sizes that vary in it", hint="compile the original with dynamic_shapes=...")
    if options.part is not None:
        raise UsageError("an artifact is compiled as a whole", where="part", hint="compile the original with part=...")


# Of the weights that a capture leaves out, the share of all that nobody need be told of: a pooler, a mask token.
_NEGLIGIBLE = 0.01
LANGUAGE_MODEL = "language_model"


def part_of(model: nn.Module, part: str | None) -> tuple[nn.Module, str | None]:
    """The module `part` of `model`, and its full name. A language model within another one is that model, called with text
    alone: its head is outside of it."""
    if part is None or (part == LANGUAGE_MODEL and hasattr(model, "generate")):
        return model, part
    names = [name for name, _ in model.named_modules() if name]
    found = next((name for name in (part, f"model.{part}") if name in names), None)
    if found is None:
        near = difflib.get_close_matches(str(part), names, n=3)
        hint = f"near it: {', '.join(near)}" if near else "it is the name of a module, as in named_modules()"
        raise UsageError(f"the model has no module {part!r}", where="part", hint=hint)
    return model.get_submodule(found), found


def _check_whole(model: nn.Module, program: Program, part: str | None, example_inputs: Any) -> int:
    """Bytes of the weights that the program reads, as the model has them. Raises `CaptureFailed` where a language model that
    was called as its configuration says, and was not asked for a part, leaves out more of its weights than a pooler."""
    unread: dict[str, int] = {}
    names = program.constants.keys() | program.aliases.keys()
    for name, tensor in model.named_parameters():
        folded = ".parametrizations." in name or name.rpartition("_")[0] in names
        if name not in names and not folded:
            unread[name] = tensor.numel() * tensor.element_size()
    total = _nbytes(model)
    buffers = sum(t.numel() * t.element_size() for name, t in model.named_buffers() if name not in names)
    given = part is not None or example_inputs is not None or not is_causal_lm(program)
    if sum(unread.values()) > _NEGLIGIBLE * total and not given:
        largest = Counter()
        for name, nbytes in unread.items():
            largest[".".join(name.split(".")[:2])] += nbytes
        raise CaptureFailed(
            f"a call with text alone leaves out {sum(unread.values()) / total:.0%} of its weights",
            where=type(model).__name__,
            why=", ".join(f"{name}: {nbytes / 1e6:.1f} MB" for name, nbytes in largest.most_common(3)),
            hint="--part language_model (part=... in code) compiles the language model alone, and says so; "
            "example_inputs with all of its inputs capture the whole",
        )
    return total - sum(unread.values()) - buffers


def _nbytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def files_of_module(model: nn.Module) -> dict[str, Any]:
    files: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "to_json_string"):
        files["config.json"] = config_json.encode(model.config, type(model).__name__)
    if hasattr(getattr(model, "generation_config", None), "to_json_string"):
        files["generation_config.json"] = model.generation_config.to_json_string(use_diff=False).encode()
    return files


def own_constants(program: Program, lender: Program) -> None:
    """Copy those constants of `program` that share memory with one of `lender`, so that editing the one leaves the other
    as it is. Shapes and strides stay."""
    lent = {_storage(t) for t in lender.constants.values() if not t.is_meta}
    copies: dict[tuple, Tensor] = {}
    for name, tensor in program.constants.items():
        if tensor.is_meta or tensor.numel() == 0 or _storage(tensor) not in lent:
            continue
        # Two names for the same numbers keep sharing them.
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:
            span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            copies[key] = tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())
        program.constants[name] = copies[key]


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
