"""optimize and load: the two functions that most programs call."""

from __future__ import annotations

import copy
import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxc.artifact import companions, store
from fxc.artifact.staging import check_writable
from fxc.data.calibration import calibration_samples, check_data
from fxc.errors import CaptureFailed, InputRefused, UsageError
from fxc.export.configuration import describe_config, difference
from fxc.frontend.capture import capture
from fxc.ir.program import Program
from fxc.lower.target import check_target
from fxc.neutral import one_at_a_time
from fxc.passes.base import Context, Pass, check_data_is_given, parse_passes
from fxc.passes.facts import DENSE_WEIGHTS, FLOAT_WEIGHTS
from fxc.pipeline import Step, run_passes
from fxc.progress import Track, untracked
from fxc.runtime.model import NOT_A_CHECKPOINT, WEIGHTS_KEY, CompiledModel, compiled_model
from fxc.source.load import as_dtype, check_is_model, kind_of, load_source


@one_at_a_time
def optimize(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    passes: str | Sequence[str | Pass] = "int8",
    *,
    dynamic_shapes: Any = None,
    skip: str | Iterable[str] = (),
    calib: Any = None,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    backend: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    budget: float | None = None,
    layer_budget: float | None = None,
    allow_noop: bool = False,
    dump_dir: str | Path | None = None,
    part: str | None = None,
    on_step: Callable[[Step, Program], None] | None = None,
) -> CompiledModel:
    """Compile a model: capture it, run `passes` over it, and return it ready to call.

    model: an `nn.Module`, which is not changed and may be changed afterwards, or a source: a Hugging Face folder, a hub id
    (with `revision`), an fxc artifact, or "package.module:function", which is run and returns a model or
    (model, example_inputs).
    example_inputs: a tuple of positional or a dict of keyword arguments; may be left out for Hugging Face models.
    passes: "int8,prune:heads=0.25" or a list of such items or `Pass` objects; "" only captures. `prune` alone chooses how much
    goes: `report["passes"]` says what and how it was judged ("notes"), and which pass does it again ("repeat").
    dynamic_shapes: which sizes of the inputs vary, where that is not to be found by trying: see `fxc.capture`.
    part: the module of the model to compile alone, by name; "language_model" of a model that reads images too.
    skip: a pattern of module names to leave alone, with all that is in them, or several: globs or "re:...". One that matches
    nothing is a `UsageError`; the report's "skipped" says what each was applied to.
    calib: data for passes that learn from it: the path of a text, of a .jsonl file or of a folder of images, or an iterable
    of what one call takes (see `fxc.data.calibration.calibration_samples`); the gates do not use it.
    tokenizer: the model's tokenizer or processor, which is saved with it and cuts the texts of `calib`, or a folder that holds
    one; of a folder or hub id its own is taken.
    dtype: "auto" keeps the model's own, else "float32", "bfloat16", "float16". device, backend: where and how the result
    runs, "cpu" and "eager" by default.
    verify, budget, layer_budget, allow_noop, dump_dir, on_step: see `fxc.pipeline.run_passes`.

    Raises `FxcError`: `UsageError`, `InputRefused`, `CaptureFailed`, `VerificationFailed` or `ResourceError`.
    """
    parsed = parse_passes(passes)
    if calib is not None:
        check_data(calib)
    as_dtype(dtype)
    check_target(device, backend)
    check_data_is_given(parsed, calib is not None)
    if dump_dir is not None:
        check_writable(Path(dump_dir) / "program")
    given = companions.of_tokenizer(tokenizer) if tokenizer is not None else None
    captured = capture_source(
        model,
        example_inputs,
        dynamic_shapes=dynamic_shapes,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        part=part,
        check=verify,
    )
    if given is not None:
        captured.files = companions.with_tokenizer(captured.files, given)
        captured.has_own_tokenizer = False
    return compile_captured(
        captured,
        parsed,
        skip=skip,
        calib=calib,
        dtype=dtype,
        device=device,
        backend=backend,
        verify=verify,
        budget=budget,
        layer_budget=layer_budget,
        allow_noop=allow_noop,
        dump_dir=dump_dir,
        on_step=on_step,
    )


@one_at_a_time
def compile_captured(
    captured: Captured,
    passes: Sequence[Pass],
    *,
    skip: str | Iterable[str] = (),
    calib: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    backend: str | None = None,
    verify: bool = True,
    budget: float | None = None,
    layer_budget: float | None = None,
    allow_noop: bool = False,
    dump_dir: str | Path | None = None,
    on_step: Callable[[Step, Program], None] | None = None,
    track: Track = untracked,
) -> CompiledModel:
    """The second half of `optimize`, for a source that is captured already and keeps its program. track: shows how far it has
    come with calibration samples."""
    before = captured.program
    context = Context(skip=skip, track=track)
    context.check_skip(before)
    if calib is not None:
        with nullcontext(captured.folder) if captured.has_own_tokenizer else companions.laid_out(captured.files) as folder:
            context.samples = calibration_samples(before, calib, folder=folder, config=captured.config, track=track)
    config, why_not = captured.config, None

    def watch(step: Step, after: Program) -> None:
        """Say in the configuration what removal leaves, before a pass that packs weights hides their shapes."""
        nonlocal config, why_not
        is_smaller = step.parameters_after < step.parameters_before
        is_packed = FLOAT_WEIGHTS.check(after) or DENSE_WEIGHTS.check(after)
        if is_smaller and not is_packed and captured.config is not None:
            described, why_not = describe_config(after, captured.config)
            config = captured.config if described is None else described
        if on_step is not None:
            on_step(step, after)

    program, steps = run_passes(
        before,
        passes,
        context,
        verify=verify,
        budget=budget,
        layer_budget=layer_budget,
        allow_noop=allow_noop,
        dump_dir=Path(dump_dir) if dump_dir else None,
        on_step=watch,
    )
    if captured.borrowed:
        own_constants(program, before)
    report = {
        "source": captured.source,
        "dtype": str(dtype).removeprefix("torch."),
        "skip": list(context.skip),
        "skipped": context.skipped,
        "bytes_before": captured.nbytes,
        "bytes_after": program.nbytes(),
        "parameters_before": before.numel(),
        "parameters_after": program.numel(),
        "coverage": _coverage(before, steps),
        "passes": [*captured.passes, *(s.as_json() for s in steps)],
    }
    files, changes = captured.files, {}
    if config is not captured.config and (changes := difference(captured.config, config)):
        files = files | {"config.json": _config_json(config, program.metadata["class"])}
    if plan := next((s.repeat for s in steps if s.repeat), None):
        drops = parse_passes(plan)[0].drop.split(";")
        files = files | {"plan.json": (json.dumps({"drop": drops}, indent=0) + "\n").encode()}
    if changes or why_not:
        report["configuration"] = {"changes": changes, "not_exportable": why_not}
    return compiled_model(
        program,
        report,
        config=config,
        files=files,
        source=captured.folder,
        device=device,
        backend=backend,
    )


def _coverage(before: Program, steps: Sequence[Step]) -> float:
    """Of the bytes that were there when the first pass came that rewrites weights, the share that was rewritten."""
    there = next((s.bytes_before for s in steps if s.covered_bytes), before.nbytes())
    return round(sum(s.covered_bytes for s in steps) / max(there, 1), 4)


@dataclass
class Captured:
    """A captured source. config: its Hugging Face configuration, if it has one; files: tokenizer and configuration files;
    source: what it is, as JSON; nbytes: bytes of its weights as they came; folder: where it is, if it is a folder; passes:
    what an artifact went through already; borrowed: whether the program's constants are the tensors of the caller's model;
    has_own_tokenizer: whether its tokenizer is the one in `folder`."""

    program: Program
    config: Any
    files: dict[str, Any]
    source: dict[str, Any]
    nbytes: int
    folder: Path | None = None
    passes: list[dict[str, Any]] = field(default_factory=list)
    borrowed: bool = False
    has_own_tokenizer: bool = True


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


@one_at_a_time
def capture_source(
    model: nn.Module | str | Path,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    part: str | None = None,
    check: bool = True,
) -> Captured:
    """The program of a model or of a source, with what belongs to it."""
    check_is_model(model)
    if isinstance(model, nn.Module):
        given, nbytes = model, _nbytes(model)
        wanted = as_dtype(dtype)
        if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
            model = copy.deepcopy(model).to(wanted)
            example_inputs = tree_map_only(Tensor, lambda t: t.to(wanted) if t.is_floating_point() else t, example_inputs)
        borrowed = model is given
        model, part = _part_of(model, part)
        program = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, check=check)
        read = _check_whole(model, program, part, example_inputs)
        nbytes = read if part else nbytes
        config = getattr(model, "config", None)
        source = {"kind": "module", "class": type(model).__name__} | ({"part": part} if part else {})
        files = _files_of_module(model)
        return Captured(program, config, files, source, nbytes, borrowed=borrowed)
    source = str(model)
    if kind_of(source) == "artifact":
        if dtype != "auto":
            raise UsageError("an artifact keeps the dtype that it has", hint="compile the original model with dtype=...")
        if dynamic_shapes is not None:
            raise UsageError("an artifact keeps the sizes that vary in it", hint="compile the original with dynamic_shapes=...")
        if part is not None:
            raise UsageError("an artifact is compiled as a whole", where="part", hint="compile the original with part=...")
        return _capture_artifact(Path(source))
    loaded = load_source(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    inputs = example_inputs if example_inputs is not None else loaded.example_inputs
    model, part = _part_of(loaded.model, part)
    program = capture(model, inputs, dynamic_shapes=dynamic_shapes, check=check)
    read = _check_whole(model, program, part, example_inputs)
    sizes = [f["size"] for f in loaded.source.get("files", {}).values()]
    unused = loaded.source.get("unused", {}).get("bytes", 0)
    files = companions.of_folder(loaded.tokenizer_dir) if loaded.tokenizer_dir else _files_of_module(model)
    config = getattr(model, "config", None)
    nbytes = read if part else sum(sizes) - unused if sizes else _nbytes(loaded.model)
    origin = loaded.source | ({"part": part} if part else {})
    return Captured(program, config, files, origin, nbytes, folder=loaded.tokenizer_dir)


# Of the weights that a capture leaves out, the share of all that nobody need be told of: a pooler, a mask token.
_NEGLIGIBLE = 0.01
LANGUAGE_MODEL = "language_model"


def _part_of(model: nn.Module, part: str | None) -> tuple[nn.Module, str | None]:
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
    given = part is not None or example_inputs is not None or program.metadata.get("kind") != "causal_lm"
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


def _capture_artifact(path: Path) -> Captured:
    read = store.read(path)
    report = read.manifest.get("report", {})
    source = report.get("source", {"kind": "artifact"})
    files, nbytes = companions.of_folder(path), read.program.nbytes()
    return Captured(read.program, _config_of(path), files, source, nbytes, folder=path, passes=report.get("passes", []))


@one_at_a_time
def load(
    directory: str | Path,
    device: str | torch.device | None = None,
    backend: str | None = None,
    *,
    static_cache: bool = False,
    keep_compressed: bool = False,
) -> CompiledModel:
    """The compiled model in the artifact `directory`, verified. Executes nothing that the files say.

    static_cache: let a language model decode over buffers of a fixed size, on CUDA as a CUDA graph: see
    `CompiledCausalLM.use_static_cache`.
    keep_compressed: run layers compressed also where their float form was measured to be faster: less memory, and the same
    choice on every load.

    Raises `InputRefused` for a damaged or hostile artifact, `UsageError` for a device or backend that does not exist.
    """
    path = Path(directory)
    check_target(device, backend)
    if not store.is_artifact(path):
        raise UsageError(
            "this is not an fxc artifact: it has no fxc.json",
            where=str(path),
            hint="'fxc compile MODEL -o DIR' writes one",
        )
    read = store.read(path)
    model = compiled_model(
        read.program,
        read.manifest.get("report", {}),
        config=_config_of(path),
        files=companions.of_folder(path),
        source=path,
        device=device,
        backend=backend,
        keep_compressed=keep_compressed,
    )
    if static_cache and not hasattr(model, "use_static_cache"):
        raise UsageError("only a causal language model has a cache", where="static_cache", hint="leave static_cache out")
    return model.use_static_cache() if static_cache else model


def _config_of(path: Path) -> Any:
    if not (path / "config.json").exists():
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InputRefused(f"transformers cannot read it: {error}", where=str(path / "config.json")) from None
    if getattr(config, WEIGHTS_KEY, None) == NOT_A_CHECKPOINT:
        delattr(config, WEIGHTS_KEY)
    return config


def _nbytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _files_of_module(model: nn.Module) -> dict[str, Any]:
    files: dict[str, Any] = {}
    if hasattr(getattr(model, "config", None), "to_json_string"):
        files["config.json"] = _config_json(model.config, type(model).__name__)
    if hasattr(getattr(model, "generation_config", None), "to_json_string"):
        files["generation_config.json"] = model.generation_config.to_json_string(use_diff=False).encode()
    return files


def _config_json(config: Any, architecture: str) -> bytes:
    content = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
