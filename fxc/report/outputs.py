"""What a compiled model says to one input, in a form that a person can read."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc.artifact.companions import has_vocabulary
from fxc.compiled.model import CompiledModel
from fxc.data.text import tokenizer_of
from fxc.errors import InputRefused, UsageError
from fxc.ir.cache import is_seq2seq

_BEST = 5
_FIRST = 8


def generate(model: CompiledModel, folder: Path, prompt: str, new: int) -> dict[str, Any]:
    """What a model writes after a prompt, or for it if an encoder reads the prompt, always the likeliest token: its text, how
    many tokens it is, and the seconds it took."""
    if not hasattr(model, "generate"):
        raise UsageError("this model does not generate text", where="--prompt", hint=_what_it_takes(model))
    if model.main_input_name != "input_ids":
        raise UsageError(f"this model reads {model.main_input_name} and no text", where="--prompt", hint=_what_it_takes(model))
    tokenizer = tokenizer_of(folder)
    made = tokenizer(prompt, return_tensors="pt", verbose=False)
    if made["input_ids"].shape[1] == 0:
        raise UsageError("the prompt has no tokens", where="--prompt")
    before = time.perf_counter()
    ids = model.generate(
        made["input_ids"],
        attention_mask=made["attention_mask"],
        max_new_tokens=new,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )[0, 1 if is_seq2seq(model.program) else made["input_ids"].shape[1] :]
    seconds = time.perf_counter() - before
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"prompt": prompt, "text": text, "tokens": len(ids), "seconds": round(seconds, 4)}


def read(model: CompiledModel, folder: Path, text: str | None, image: Path | None) -> dict[str, Any]:
    """What an encoder makes of a text, a vision model of an image, or a model of both of the two: "kind" is "labels",
    with the most likely ones, or "embedding", with its size, norm and first values."""
    if hasattr(model, "generate"):
        raise UsageError("this model writes text", hint=_what_it_takes(model))
    names = {declared.name for declared in model.program.signature.inputs}
    made: dict[str, Tensor] = {}
    if text is not None:
        made |= dict(tokenizer_of(folder)(text, return_tensors="pt", truncation=True, max_length=_longest(model)))
    if image is not None:
        made["pixel_values"] = pixels(folder, image)
    given = {name: tensor for name, tensor in made.items() if name in names}
    for name, option in (("input_ids", "--text"), ("pixel_values", "--image")):
        if name in made and name not in names:
            raise UsageError("this model does not take that", where=option, hint=_what_it_takes(model))
    with torch.inference_mode():
        output = model(**given)
    return _describe(model, output, given.get("attention_mask"))


def pixels(folder: Path, image: Path) -> Tensor:
    """An image file as the model's own preprocessing makes it: [1, channels, height, width]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UsageError("reading images needs Pillow", where="--image", hint="pip install pillow") from error
    from transformers import AutoImageProcessor

    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise UsageError(
            "the model has no image processor",
            where=folder,
            hint="put its preprocessor_config.json into the original's folder and compile again",
        )
    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise UsageError("this is not an image that can be read", where=image, why=error) from error
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return processor(images=picture, return_tensors="pt")["pixel_values"]
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputRefused("transformers cannot use the image processor", where=folder, why=error) from error


def _describe(model: CompiledModel, output: Any, mask: Tensor | None) -> dict[str, Any]:
    items = dict(output) if hasattr(output, "keys") else {}
    logits = items.get("logits")
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1:
        names = getattr(model.config, "id2label", None) or {}
        best = logits[0].float().softmax(-1).topk(min(_BEST, logits.shape[1]))
        top = [{"label": str(names.get(i, i)), "probability": p} for p, i in zip(best[0].tolist(), best[1].tolist())]
        return {"kind": "labels", "top": top}
    value, how = _embedding(items, output, mask)
    return {
        "kind": "embedding",
        "of": how,
        "size": value.numel(),
        "norm": value.norm().item(),
        "first": value[:_FIRST].tolist(),
    }


def _embedding(items: dict[str, Any], output: Any, mask: Tensor | None) -> tuple[Tensor, str]:
    hidden = items.get("last_hidden_state")
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        weights = torch.ones(hidden.shape[:2]) if mask is None else mask.to(hidden.device).float()
        return ((hidden.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))[0], "the mean over the tokens"
    named = items or {"the output": output}
    name, first = next(((k, t) for k, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()), (None, None))
    if first is None:
        raise UsageError("the model's output has no floating-point tensor to show", hint="call it from Python: fxc.load")
    return first[0].float().flatten(), str(name)


def how_to_run(model: CompiledModel, folder: Path) -> str:
    """That the artifact `folder` was written, and how to load and run it: on a line of its own where a command runs it."""
    kept = model.files.keys()
    has_tokenizer = has_vocabulary(kept)
    has_processor = bool(kept & {"preprocessor_config.json", "processor_config.json"})
    takes = _what_it_takes(model)
    runs = takes.startswith("--") and (has_tokenizer or "TEXT" not in takes) and (has_processor or "FILE" not in takes)
    call = model.program.signature.call
    names = [declared.name for declared in model.program.signature.inputs]
    if hasattr(model, "generate"):
        arguments, method = f"{model.main_input_name}, max_new_tokens=64", ".generate"
    elif len(call["args"]) == len(names):
        arguments, method = ", ".join(names), ""
    else:
        arguments, method = ", ".join(f"{d.name}=..." for d in model.program.signature.inputs if d.default is None), ""
    python = f"import fxc; model = fxc.load({str(folder)!r}); model{method}({arguments})"
    command = f"fxc run {shlex.quote(str(folder))} {takes.replace(' and ', ' ')}"
    if runs:
        return f"written to {folder}\nrun it: {command}; in Python: {python}"
    return f"written to {folder}; load and run it in Python: {python}"


def _longest(model: CompiledModel) -> int:
    text = getattr(model.config, "text_config", model.config)
    return getattr(text, "max_position_embeddings", None) or 512


def _what_it_takes(model: CompiledModel) -> str:
    names = {declared.name for declared in model.program.signature.inputs}
    options = [o for name, o in (("input_ids", "--text TEXT"), ("pixel_values", "--image FILE")) if name in names]
    if hasattr(model, "generate"):
        options = ["--prompt TEXT"] if model.main_input_name == "input_ids" else []
    return " and ".join(options) or "call it from Python: fxc.load"
