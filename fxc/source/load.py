"""Where a model comes from: a folder, the Hugging Face hub, or a function. All is checked before anything is loaded.

- `load_source("path/to/folder")`: a Hugging Face folder; it wins over a hub id that is spelled the same
- `load_source("org/name", revision="v1")`: a hub id, from the local cache when there is no network
- `load_source("package.module:function")`: runs your code, which returns a model or (model, example_inputs)
"""

import contextlib
import importlib
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fxc.errors import FxcError, InputRefused, ResourceError, UsageError
from fxc.safety import check_finite, check_relative_name, listed
from fxc.source.checkpoint import Checkpoint, check_folder
from fxc.source.hub import fetch

log = logging.getLogger(__name__)

Kind = Literal["artifact", "folder", "hub", "factory"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Loaded:
    """model: in eval mode, without gradients. tokenizer_dir: where its tokenizer, processor and config files are.

    source: JSON for the manifest: kind, id; of a checkpoint also dtype (as stored) and files (name -> sha256, size),
    of a hub id revision and commit; unused: the tensors of the checkpoint that the model's class has no place for.
    """

    model: nn.Module
    example_inputs: tuple | dict | None
    tokenizer_dir: Path | None
    source: dict[str, Any]


def kind_of(source: str) -> Kind:
    """What `source` names; a folder that exists wins over everything else that it could mean."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody, who is nobody here
        raise UsageError("there is no such folder", where=source, why=error) from None
    if _is_there(path) and path.is_dir():
        return "artifact" if (path / "fxc.json").exists() else "folder"
    if _is_there(path):
        raise UsageError(
            "this is a file, and a model is a folder",
            where=source,
            hint="name the folder that holds config.json and the weights, a hub id, or package.module:function",
        )
    if FACTORY.fullmatch(source):
        return "factory"
    if HUB_ID.fullmatch(source):
        return "hub"
    raise UsageError(
        "no such model",
        where=source,
        why=f"it is no folder (seen from {Path.cwd()}), and not of the form of a hub id or package.module:function",
        hint="check the path",
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name of a file: it is too long, or has a zero in it
        return False


def check_is_model(model: object) -> None:
    """Raise `UsageError`, with what to give instead, for what people pass by mistake in the place of a model or its name."""
    what, hint = f"a {type(model).__name__} is no model", "give an nn.Module, the path of a Hugging Face folder, or a hub id"
    if isinstance(model, (str, Path)):
        return
    if isinstance(model, nn.Module):
        _check_is_whole(model)
        return
    within = [name for name, part in _parts(model) if isinstance(part, nn.Module)]
    if isinstance(model, type) and issubclass(model, nn.Module):
        what, hint = f"{model.__name__} is a class", f"give an instance, {model.__name__}(...)"
    elif isinstance(model, torch.export.ExportedProgram):
        hint = "give the module that was exported: fxc exports it itself, so that sizes stay free"
    elif _holds_weights(model):
        what, hint = "these are weights and not a model", "load them into the model first: model.load_state_dict(...)"
    elif isinstance(model, (list, tuple)):
        what, hint = f"a {type(model).__name__} is not one model", "compile one model at a time"
    elif within:
        hint = f"give a model within it: {listed(within)}"
    elif model is None:
        what = "no model is given"
    raise UsageError(what, where="model", hint=hint)


def _check_is_whole(model: nn.Module) -> None:
    """Raise `UsageError` for a module that cannot be captured because of what it is."""
    what, where = f"a {type(model).__name__} is no model", "model"
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [n for n, t in tensors if isinstance(t, nn.parameter.UninitializedTensorMixin)]
    if scripted:
        what, where = "TorchScript is no model that fxc can read", scripted[0] or "model"
        hint = "give the module that was scripted or traced"
    elif not _can_be_evaluated(model):
        hint = "give the module that was exported"
    elif lazy:
        what, hint = f"{lazy[0]} has no shape yet", "call the model once, so that its lazy modules are initialised"
    elif type(model).forward is nn.Module.forward and "forward" not in vars(model):
        what, hint = f"a {type(model).__name__} has no forward", "give a module that calls those within it"
    else:
        return
    raise UsageError(what, where=where, hint=hint)


def _parts(thing: object) -> list[tuple[str, Any]]:
    """What is in a mapping by key or in an object by attribute, and how it is written."""
    if isinstance(thing, Mapping):
        return [(f"[{key!r}]", value) for key, value in thing.items()]
    return [(f".{name}", value) for name, value in getattr(thing, "__dict__", {}).items()]


def _holds_weights(thing: object) -> bool:
    return isinstance(thing, Mapping) and any(isinstance(v, torch.Tensor) or _holds_weights(v) for v in thing.values())


def _can_be_evaluated(model: nn.Module) -> bool:
    """False for the modules that torch.export gives, which can neither be put into eval mode nor exported again."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
    except NotImplementedError:
        return False
    finally:
        for module in training:
            module.training = True
    return True


def load_source(
    source: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    check_values: bool = True,
    most: int | None = None,
) -> Loaded:
    """Load the model that `source` names. dtype "auto" keeps what the weights are stored in, whatever the config says.
    check_values: read all weights, and see that they are numbers; else they are mapped and not read. most: so many bytes of
    weights may be in memory that transformers makes of others, as a mixture's experts; None for any.

    UsageError: there is no such source, or an option does not go with it. InputRefused: it is unsafe, damaged or
    unsupported. ResourceError: it is too large. An fxc artifact is a UsageError here: ask `kind_of` first.
    """
    kind, target = kind_of(source), as_dtype(dtype)
    if kind == "artifact":
        raise UsageError("this is an fxc artifact, compiled already", where=source, hint="open it with fxc.load()")
    if revision is not None and kind != "hub":
        raise UsageError(f"--revision goes with a hub id, and this is a {kind}", where=source, hint="leave it out")
    if subfolder is not None:
        check_relative_name(subfolder, where="subfolder")

    if kind == "factory":
        loaded = call_factory(source)
        if target is not None:
            loaded.model.to(target)
    else:
        if kind == "hub":
            trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
            folder, commit = fetch(source, revision, subfolder, **trust)
            origin = {"revision": revision or "main", "commit": commit}
        else:
            folder, origin = Path(source).expanduser() / (subfolder or ""), {}
            if HUB_ID.fullmatch(source):
                log.info("%s: taking the local folder %s, not the hub id", source, folder.resolve())
        checkpoint = check_folder(folder, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        stored = str(checkpoint.dtype).removeprefix("torch.") if checkpoint.dtype else None
        described = {"kind": kind, "id": source, "subfolder": subfolder, **origin, "dtype": stored}
        model, unused = from_checkpoint(checkpoint, target, trust_remote_code, most)
        described |= {"files": checkpoint.files}
        if unused:
            described["unused"] = {"bytes": sum(checkpoint.tensors.get(n, 0) for n in unused), "tensors": listed(unused)}
        loaded = Loaded(model, None, folder, described)

    model = loaded.model.eval().requires_grad_(False)
    if check_values:
        check_finite(model.named_parameters())
        check_finite(model.named_buffers(), inf_allowed=True)
    if device is not None:
        model.to(device)
    return loaded


def as_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype, or None for "auto". Raises `UsageError` for one that no model is compiled in."""
    if isinstance(dtype, str) and dtype in ("auto", *DTYPES):
        return DTYPES.get(dtype)
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    raise UsageError(f"unknown dtype {dtype!r}", where="dtype", hint=f"one of auto, {', '.join(DTYPES)}")


def call_factory(source: str) -> Loaded:
    """Import the module, with the current folder importable, and call the function without arguments."""
    module, function = source.split(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        result = getattr(importlib.import_module(module), function)()
    except FxcError:
        raise
    except Exception as exc:
        # It is the user's code: whatever it raises is for them to read, and stays attached as the cause.
        raise UsageError(
            "the function that makes the model failed",
            where=source,
            why=f"{type(exc).__name__}: {exc}",
            hint=f"python -c 'import {module}; {module}.{function}()' shows the whole traceback",
        ) from exc
    finally:
        sys.path.remove(here)
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module) or not isinstance(inputs, tuple | dict | None):
        parts = result if isinstance(result, tuple) else (result,)
        raise UsageError(
            "the function did not return a model",
            where=source,
            why=f"it returned {', '.join(type(part).__name__ for part in parts) or 'nothing'}",
            hint="return an nn.Module, or (module, example_inputs) with a tuple or a dict of tensors",
        )
    return Loaded(model, inputs, None, {"kind": "factory", "id": source})


def from_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None, trust_remote_code: bool, most: int | None = None
) -> tuple[nn.Module, list[str]]:
    """The model that transformers makes of a checked folder, all of its weights from the checkpoint, and the tensors of the
    checkpoint that it does not use. most: see `load_source`."""
    folder = checkpoint.folder
    with quiet_transformers():
        import transformers

        try:
            model_class = class_of(checkpoint, trust_remote_code)
            if most is not None:
                _check_fits(checkpoint, model_class, most)
            model, report = model_class.from_pretrained(
                str(folder),
                dtype=dtype or checkpoint.dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=checkpoint.is_safetensors,
                weights_only=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except FxcError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as exc:
            raise ResourceError("not enough memory to load the model", where=folder, why=exc) from exc
        except pickle.UnpicklingError as exc:
            # Not quoted: torch's text goes on to advise loading without the guard.
            raise InputRefused(
                "the pickle holds something else than tensors, so reading it could run code",
                where=folder,
                why=", ".join(checkpoint.weights),
                hint="do not load it elsewhere either; take the model's safetensors version",
            ) from exc
        except Exception as exc:
            # A bad folder makes transformers raise errors of any kind; this one says which, and is kept as the cause.
            raise InputRefused(
                f"transformers {transformers.__version__} cannot load it",
                where=folder,
                why=f"{type(exc).__name__}: {str(exc).strip()[:600]}",
                hint="check that the folder is complete, and that this version of transformers knows its model_type",
            ) from exc
    if missing := report["missing_keys"]:
        raise InputRefused(
            f"the checkpoint lacks {len(missing)} of the model's weights, which would be random numbers",
            where=folder,
            why=listed(missing),
            hint=f"config.json asks for {model_class.__name__}: name the class that the weights were saved from",
        )
    unused = sorted(report["unexpected_keys"])
    if unused and not checkpoint.config.get("architectures"):
        raise InputRefused(
            f"config.json does not say which class it is for, and {type(model).__name__} leaves out {len(unused)} weights",
            where=folder / "config.json",
            why=listed(unused),
            hint='add "architectures": ["..."] with the class that the weights were saved from',
        )
    if unused:
        log.warning("%s: %s does not use %d tensors: %s", folder, model_class.__name__, len(unused), listed(unused))
    return model, unused


def _check_fits(checkpoint: Checkpoint, model_class: type, most: int) -> None:
    """Raise `ResourceError` where transformers makes more than `most` bytes of weights out of others while it loads: those are
    in memory, and are no part of a file that could be read piece by piece."""
    made = _merged(checkpoint, model_class)
    if sum(made.values()) > most:
        raise ResourceError(
            f"{sum(made.values()) / 1e9:.2f} GB of its weights cannot be read piece by piece, and {most / 1e9:.2f} GB are left",
            where=checkpoint.folder,
            why=f"transformers makes them of others while it loads, as it stacks a mixture's experts: {listed(sorted(made))}",
            hint="a machine with more memory, or a larger --max-memory",
        )


def _merged(checkpoint: Checkpoint, model_class: type) -> dict[str, int]:
    """The weights of the model that are several tensors in the checkpoint: name -> bytes."""
    import transformers

    if not hasattr(model_class, "config_class") or not checkpoint.tensors:
        return {}  # remote code: what it does is known when it is done
    config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = model_class(config)
    base = f"{model.base_model_prefix}."
    names = {name.removeprefix(base) for name in checkpoint.tensors}
    mine = {name: each for name, each in model.named_parameters() if name.removeprefix(base) not in names}
    left = names - {name.removeprefix(base) for name in model.state_dict()}
    if len(left) <= len(mine):  # they have other names alone
        return {}
    size = checkpoint.dtype.itemsize if checkpoint.dtype else 4
    return {name: each.numel() * size for name, each in mine.items()}


# In this order a class is looked for that has a place for every weight.
_HEADS = (
    "CausalLM", "Seq2SeqLM", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
    "ImageClassification", "ImageTextToText", "SemanticSegmentation", "ObjectDetection", "AudioClassification", "CTC",
)  # fmt: skip


def class_by_weights(checkpoint: Checkpoint) -> type:
    """The class of transformers, of those for this configuration, that has a place for each of the checkpoint's weights, with a
    head if one is among them; AutoModel where none has."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=False, local_files_only=True)
    for head in _HEADS:
        mapping = getattr(getattr(transformers, f"AutoModelFor{head}", None), "_model_mapping", {})
        # An encoder's weights for masked words fit the class that continues texts too, which does not run as an encoder.
        reads_masks = type(config) in transformers.AutoModelForMaskedLM._model_mapping
        is_encoder = reads_masks and not getattr(config, "is_decoder", False)
        if type(config) not in mapping or not checkpoint.tensors or (head == "CausalLM" and is_encoder):
            continue
        found = mapping[type(config)]
        found = found[0] if isinstance(found, tuple) else found
        with torch.device("meta"):
            model = found(config)
        base = f"{model.base_model_prefix}."
        heads = {name for name in model.state_dict() if not name.startswith(base)}
        mine = heads & checkpoint.tensors.keys()
        if checkpoint.tensors.keys() <= model.state_dict().keys() and mine:
            name, head = found.__name__, ", ".join(sorted(mine)[:3])
            log.warning("%s names no class: taken as %s, because of %s", checkpoint.folder / "config.json", name, head)
            return found
    return transformers.AutoModel


def class_of(checkpoint: Checkpoint, trust_remote_code: bool) -> type:
    """The class that `architectures` names, or the one that the weights are for; with trust, the auto class that the model's
    code is for."""
    import transformers

    config, folder = checkpoint.config, checkpoint.folder
    if trust_remote_code and isinstance(config.get("auto_map"), dict):
        autos = [name for name in config["auto_map"] if name.startswith("AutoModel") and hasattr(transformers, name)]
        return getattr(transformers, autos[0] if autos else "AutoModel")
    names = config.get("architectures")
    if not names:
        return class_by_weights(checkpoint)
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    raise InputRefused(
        f"transformers {transformers.__version__} has no such model",
        where=folder / "config.json",
        why=f"architectures = {names}",
        hint="a newer transformers may have it; a model of your own comes in as package.module:function",
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No hub kernels while loading, and no progress bars where nobody watches."""
    before = os.environ.get("USE_HUB_KERNELS")
    os.environ["USE_HUB_KERNELS"] = "0"
    try:
        from transformers.integrations import hub_kernels
        from transformers.utils import logging as hf_logging

        # The variable is read once, at import, and transformers may have been imported long before.
        enabled, hub_kernels._kernels_enabled = hub_kernels._kernels_enabled, False
        bars = hf_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
        if bars:
            hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            hub_kernels._kernels_enabled = enabled
            if bars:
                hf_logging.enable_progress_bar()
    finally:
        if before is None:
            del os.environ["USE_HUB_KERNELS"]
        else:
            os.environ["USE_HUB_KERNELS"] = before
