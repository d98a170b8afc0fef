"""CompiledModel: a program that is called as the original model was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fxc import ranks
from fxc.artifact import config_json, store
from fxc.compilation import Compilation, lasting
from fxc.errors import UsageError, first_line
from fxc.export import aoti, compressed_tensors, gguf, hugging_face, onnx, quantized
from fxc.export.packed import packed_weights
from fxc.ir.binding import bind
from fxc.ir.cache import is_causal_lm, is_present, is_seq2seq
from fxc.ir.parse import parse_program
from fxc.ir.program import Program
from fxc.ir.structure import unflatten
from fxc.lower.held import held
from fxc.lower.runnable import Running, runnable
from fxc.lower.target import check_keep_float, check_target, lower
from fxc.neutral import one_at_a_time
from fxc.page.page import page
from fxc.runtime.encoder_once import MEMORY
from fxc.safety import listed

AS_IT_IS = "a model compiled by fxc runs as it is, so leave fullgraph=True and strict=True out"
_TRACED = "a compiled model can be neither scripted nor traced"
_TRACE_ORIGINAL = "script or trace the original; torch.export.export and torch.compile take a compiled model"
_OTHER_WEIGHTS = "load the weights into the original and compile that; save() and fxc.load keep a compiled model"


class CompiledModel(nn.Module):
    """A compiled model. Calling it takes the original's arguments and returns the original's output class.

    program: the portable program. record: what the compiler did, or an artifact's report of it. config: the Hugging Face
    configuration, if the original had one. files: what a saved artifact has besides program and weights. source: the folder
    the model came from, which is never written to. keep_compressed: run layers compressed also where their float form was
    measured to be faster; keep_float: see `fxc.load`.
    division: of a model that several processes run together, what this one has (`fxc.parallel`): it is called alike in each.
    layers: how each rewritten layer was lowered for `device` and `backend`, known after the first call. It has no parameters:
    its weights are constants of the program, which `state_dict()` gives. It runs under `torch.no_grad()`: inputs may require
    gradients, outputs have none, and the program itself (`program.module()`) refuses a backward pass. It can be pickled, and
    called from a function that torch.compile compiles, which leaves it as it is.
    """

    def __init__(
        self,
        program: Program,
        record: Compilation | dict[str, Any],
        *,
        config: Any = None,
        files: Mapping[str, Path | bytes] | None = None,
        source: Path | None = None,
        device: str | torch.device | None = None,
        backend: str | None = None,
        keep_compressed: bool = False,
        keep_float: float | None = None,
        division: Any = None,
    ):
        super().__init__()
        self.program = program
        self.record = record
        self.config = config
        self.files = dict(files or {})
        self.source = source
        check_target(device, backend)
        check_keep_float(device, keep_float)
        self.backend = backend or "eager"
        self.keep_compressed, self.keep_float = keep_compressed, keep_float
        self.division = division
        self._device = torch.device(device or "cpu")
        self._lowered: nn.Module | None = None
        self._lowered_program: Program | None = None
        self.layers: list[Any] = []
        self.eval()

    def __getattr__(self, name: str) -> Any:
        if name == "generate" and (why := self.program.metadata.get("does_not_generate")):
            raise AttributeError(f"this model was compiled for one forward pass, because with a cache it failed: {why}")
        return super().__getattr__(name)

    @property
    def report(self) -> dict[str, Any]:
        """What the compiler did, as JSON: see `fxc.compilation`."""
        return self.record.as_json() if isinstance(self.record, Compilation) else self.record

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the program computes in: that of its first floating-point output."""
        types = [n.meta["val"].dtype for n in self.program.results]
        return next((t for t in types if t.is_floating_point), torch.float32)

    @one_at_a_time
    def _lower(self) -> None:
        """Set the lowered module, if another thread has not done so meanwhile."""
        if self._lowered is not None:
            return
        # What is kept has to serve calls outside inference mode and outside of what may trace the first one.
        with torch.no_grad(), _disable_current_modes():
            lowered, self.layers = self._lowered_here() if self.division is None else self._lowered_in_turns()
            module = runnable(lowered, self._device, self.backend)
        self._lowered_program = lowered
        # Not a submodule: its packed weights are no part of the model's state.
        object.__setattr__(self, "_lowered", module)

    def _lowered_here(self, timings: dict[tuple, Any] | None = None) -> tuple[Program, list[Any]]:
        return lower(self.program, self._device, self.backend, self.keep_compressed, self.keep_float, timings)

    def _lowered_in_turns(self) -> tuple[Program, list[Any]]:
        """One process after another, so that none disturbs what another measures, and layers that all of them have take the
        same forms: a mixture's router has to choose the same experts in each."""
        timings, made = {}, None
        for turn in range(self.division.count):
            if turn == self.division.number:
                made = self._lowered_here(timings)
            timings = ranks.agreed(timings, of=turn)
        return made

    def lower(self) -> nn.Module:
        """Prepare the program for the device and backend, once. The first call does it otherwise."""
        if self._lowered is None:
            if self.division is not None and not self.division.parts:
                self.check_is_whole()
            if self._device == torch.device("cuda") and torch.cuda.is_available():
                # The current device is another one in another thread, and the weights are on this one.
                self._device = torch.device("cuda", torch.cuda.current_device())
            self._lower()
        return self._lowered

    def prepare(self) -> None:
        """Make all that later calls would make first: with `backend="aoti"` what another process then finds compiled."""
        self.lower()

    @property
    def lowered(self) -> Program:
        """What runs on the device: the program with operators of the device, over weights packed for it."""
        self.lower()
        return self._lowered_program

    @property
    def held(self) -> dict[str, int]:
        """What the lowered program keeps in memory: form, as "int8 packed" or "float copies" -> bytes."""
        return held(self.lowered)

    def __deepcopy__(self, memo: dict) -> CompiledModel:
        """A model of its own over the same lowered module, which nothing changes: oneDNN's packed weights have no copy."""
        memo[id(self._lowered)], memo[id(self._lowered_program)] = self._lowered, self._lowered_program
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce__(self) -> tuple:
        """Pickled as its program, constants and files: it is lowered again where it is unpickled."""
        self.check_is_whole()
        files = {name: f if isinstance(f, bytes) else Path(f).read_bytes() for name, f in self.files.items()}
        program = str(self.program), {name: t.cpu() for name, t in self.program.constants.items()}
        return _unpickled, (*program, self.record, self.config, files, self._pickled_options())

    def _pickled_options(self) -> dict[str, Any]:
        """The keywords of `compiled_model` that a pickle keeps."""
        return {
            "device": str(self._device), "backend": self.backend, "keep_compressed": self.keep_compressed,
            "keep_float": self.keep_float,
        }  # fmt: skip

    def run(
        self, tensors: list[Tensor], module: nn.Module | None = None, outputs: list[str] | None = None
    ) -> tuple[Tensor, ...]:
        """The program on flat tensors, without gradients. The results are ordinary tensors: a trainable module may read
        them, and they may be edited. module: what was made of the lowered program, to run in its place; outputs: the names of
        what it gives, if they are others."""
        if module is None:
            # A kernel of this machine is no graph that torch.export can write down; a program's operators are.
            module = self.program.module() if _are_exported(tensors) else self.lower()
        # The program says in which types it computes; autocast would change them.
        gone = ranks.others_there(ConnectionError)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False), Running(), gone:
            results = module(*[t.to(self._device) for t in tensors])
        if self.division is None:
            return results
        # To the bit, so that all processes choose the same token. Of the cache each has its own heads.
        names = outputs or self.program.signature.outputs
        own = [is_present(name) or name.startswith(MEMORY) for name in names]
        return tuple(each if is_own else ranks.agreed_tensor(each) for is_own, each in zip(own, results, strict=True))

    def check_is_whole(self) -> None:
        """Raise `UsageError` where this process has a part of the model."""
        if self.division is not None:
            raise UsageError(
                f"this is a part of a model, of process {self.division.number + 1} of {self.division.count}",
                hint="fxc.load without tensor_parallel gives the whole; of what several compile the first one has it",
            )

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks a module for."""
        raise UsageError(_TRACED, hint=_TRACE_ORIGINAL)

    @torch.compiler.disable(reason=AS_IT_IS)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check_is_not_traced()
        as_tuple = kwargs.pop("return_dict", None) is False
        tensors = bind(self.program, args, kwargs)
        try:
            outputs = self.run(tensors)
        except RuntimeError as error:
            if all(tensor.numel() for tensor in tensors):
                raise
            raise UsageError(
                "the model does not run on an input without numbers", why=first_line(error), hint="leave empty batches out"
            ) from error
        result = unflatten(self.program.signature.result, outputs)
        return result.to_tuple() if as_tuple and hasattr(result, "to_tuple") else result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        """What `to`, `cuda`, `half` and their like come down to, also when a module that holds this one is moved. The
        program stays where and what it is: raises `UsageError` unless that is what is asked for."""
        why = None
        try:
            probe = torch.empty(0, dtype=self.dtype, device=self._device)
            found = fn(probe)
            if (found.device, found.dtype) == (probe.device, probe.dtype):
                return self
        except (RuntimeError, AssertionError) as error:  # torch's own for a device that this machine has not
            why = error
        raise UsageError(
            f"a compiled model stays on its device ({self._device}) and in its dtype ({self.dtype})",
            why=why,
            hint="fxc.load(directory, device=...) or fxc.optimize(..., device=...) for another device, "
            "fxc.optimize(..., dtype=...) for another dtype",
        )

    def train(self, mode: bool = True) -> CompiledModel:
        """`eval()` and `train(False)` change nothing. Raises `UsageError` for `train()`."""
        if mode:
            raise UsageError(
                "a compiled model cannot be put into training mode",
                why="it has no parameters, and dropout and batch statistics were captured as in evaluation",
                hint="train the original and compile it again, or call train() on the other modules alone",
            )
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> CompiledModel:
        """`requires_grad_(False)` changes nothing. Raises `UsageError` for True."""
        if requires_grad:
            raise UsageError(
                "a compiled model has no gradients", why="its weights are constants of the program", hint="train the original"
            )
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """What `state_dict()` holds of this module: the program's constants, by name."""
        destination.update({prefix + name: tensor for name, tensor in self.program.constants.items()})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes what `state_dict()` gave, and changes nothing. Raises `UsageError` for anything else."""
        if strict and (unknown := sorted(state_dict.keys() - self.program.constants.keys())):
            raise UsageError(f"the state holds what the compiled model has not: {listed(unknown)}", hint=_OTHER_WEIGHTS)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        """Compare instead of copying: a compiled model's weights are packed for the device already, and stay what they are."""
        for name, tensor in self.program.constants.items():
            given = state_dict.get(prefix + name)
            if given is None and not strict:
                continue
            if given is None:
                raise UsageError("the state has no values for it", where=prefix + name, hint=_OTHER_WEIGHTS)
            same = isinstance(given, Tensor) and (given.dtype, given.shape) == (tensor.dtype, tensor.shape)
            if not same or not torch.equal(given.to(tensor.device), tensor):
                raise UsageError("a compiled model keeps its weights", where=prefix + name, hint=_OTHER_WEIGHTS)

    @one_at_a_time
    def save(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        source: str | Path | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """Write the artifact that `fxc.load` reads. All of it is written and verified, or nothing. source: the folder that
        the model came from, which `directory` may not be."""
        self.check_is_whole()
        store.save(
            self.program,
            Path(directory),
            manifest={"report": lasting(self.report)},
            page=lambda manifest: page(self.program, manifest),
            extra_files=config_json.marked(self.files),
            overwrite=overwrite,
            source=Path(source) if source is not None else None,
            max_shard_bytes=max_shard_bytes,
        )

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> hugging_face.Exported:
        """Write a Hugging Face folder: of float weights a plain one (`export_hugging_face`), of packed ones that which
        transformers loads where fxc is imported (`export_fxc`). Raises what these do."""
        export = self.export_fxc if packed_weights(self.program) else self.export_hugging_face
        return export(directory, overwrite=overwrite)

    def export_fxc(
        self, directory: str | Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
    ) -> hugging_face.Exported:
        """Write a Hugging Face folder of packed weights, which `AutoModel.from_pretrained` loads after `import fxc`: all of it,
        loaded back and compared, or nothing. Raises `UsageError` with the layer and the reason where the model has no place for
        a weight, as where its layers differ, or a table of embeddings is packed."""
        return quantized.export(
            self.program, self.config, self.files, directory,
            overwrite=overwrite, sources=self._sources(), max_shard_bytes=max_shard_bytes,
        )  # fmt: skip

    def export_hugging_face(self, directory: str | Path, *, overwrite: bool = False) -> hugging_face.Exported:
        """Write a plain Hugging Face folder, which `AutoModel.from_pretrained` loads without fxc: all of it, loaded back and
        compared, or nothing. Raises `UsageError` with the reason where no configuration says what the model is now, as
        where its layers differ or its weights are quantized."""
        return hugging_face.export(
            self.program, self.config, self.files, directory, overwrite=overwrite, sources=self._sources()
        )

    def export_compressed_tensors(
        self, directory: str | Path, *, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000
    ) -> hugging_face.Exported:
        """Write a quantized model in the compressed-tensors format, for vLLM and transformers: numbers and scales as they are,
        loaded back and compared, or nothing. Needs the package compressed-tensors. Raises `UsageError` with the layer and the
        reason where the format has no place for it."""
        return compressed_tensors.export(
            self.program, self.config, self.files, directory,
            overwrite=overwrite, sources=self._sources(), max_shard_bytes=max_shard_bytes,
        )  # fmt: skip

    def export_gguf(self, directory: str | Path, *, overwrite: bool = False) -> gguf.Written:
        """Write a language model as `directory`/model.gguf, for llama.cpp: packed levels as they are, under scales in float16,
        read back and compared, or nothing. Layers may be of unlike sizes where llama.cpp has a graph for that. Needs the
        package gguf. Raises `UsageError` with the reason where llama.cpp has no place for it."""
        return gguf.export(
            self.program, self.config, self.files, directory, overwrite=overwrite, sources=self._sources()
        )

    def export_onnx(self, directory: str | Path, *, overwrite: bool = False) -> onnx.Written:
        """Write `directory`/model.onnx, for ONNX Runtime: levels and scales as they are, floats computed in float32, sizes that
        vary, a decoder's cache as inputs and outputs; run by ONNX Runtime and compared, or nothing. Needs onnx, onnxscript and
        onnxruntime. Raises `UsageError` with the layer and the reason where ONNX has no operator for it."""
        return onnx.export(
            self.program, self.config, self.files, directory, overwrite=overwrite, sources=self._sources()
        )

    def export_aoti(self, directory: str | Path, *, overwrite: bool = False) -> aoti.Written:
        """Write `directory`/model.pt2, compiled by AOTInductor for this machine's CPU, which torch runs without fxc or a
        compiler: packed weights as they are; loaded back and compared, or nothing. Raises `UsageError` without a C++ compiler,
        and with the layer and the reason for what a package cannot hold."""
        return aoti.export(self.program, self.files, directory, overwrite=overwrite, sources=self._sources())

    def _sources(self) -> list[Path]:
        """The folders that the model came from, which no export may touch."""
        self.check_is_whole()
        sources = [self.source] if self.source is not None else []
        match self.report.get("source"):
            case {"kind": "folder", "id": str(origin)}:
                with suppress(RuntimeError):  # somebody else's home
                    sources.append(Path(origin).expanduser())
        return sources

    def extra_repr(self) -> str:
        size = f"{self.program.nbytes() / 1e6:.1f} MB"
        return f"{self.program.metadata.get('class')}, {size}, {self._device}, {self.backend}"


def check_is_not_traced() -> None:
    """Raise `UsageError` inside of torch.jit.trace."""
    if torch.jit.is_tracing():
        raise UsageError(_TRACED, hint=_TRACE_ORIGINAL)


def _are_exported(tensors: list[Tensor]) -> bool:
    """Whether torch.export gives these. That it runs is said of all threads, and its tensors are its own."""
    if not torch.compiler.is_exporting():
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(each, FakeTensor) for each in tensors)


@one_at_a_time
def _unpickled(
    text: str, constants: dict[str, Tensor], record: Any, config: Any, files: dict, options: dict
) -> CompiledModel:
    check_target(options["device"], options["backend"])
    return compiled_model(parse_program(text, constants), record, config=config, files=files, **options)


def compiled_model(program: Program, record: Compilation | dict[str, Any], **options: Any) -> CompiledModel:
    """A `CompiledModel` of the kind that the program is: with `generate()` for a causal language model."""
    if is_causal_lm(program):
        from fxc.compiled.generate import CompiledCausalLM

        return CompiledCausalLM(program, record, **options)
    if is_seq2seq(program):
        from fxc.compiled.own_loop import class_for

        return class_for(program)(program, record, **options)
    return CompiledModel(program, record, **options)
