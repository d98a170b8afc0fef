"""A compiled language model as a GGUF file, which llama.cpp and what is built on it load.

Weights become what `ggml` has for them, float ones F32, F16 or BF16 as they are; tensors are called as the package gguf
says, and the tokenizer is in the file. Layers of unlike sizes are held where llama.cpp has a graph that reads the number of
heads and of channels of each layer: `deci` for models like Llama, `openelm` for those with norms of queries and keys.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxc.errors import UsageError, VerificationFailed
from fxc.export import ggml
from fxc.export.folder import Target, check_has_values
from fxc.export.gguf_vocabulary import Vocabulary, vocabulary
from fxc.export.layers import Layers, check_computes, layers_of, permuted, trimmed
from fxc.export.packed import Packed
from fxc.ir.program import Program
from fxc.safety import check_config, listed

NAME = "model.gguf"
_PROJECTION = re.compile(r"(.*)\.(q|k)_proj\.(weight|bias)")
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp computes a kind of model. name: of its graph; interleaved: whether it turns neighbours (0, 1) of a head
    together, where transformers turns (0, width / 2); one_more: whether norms are stored as 1 + weight; tied: whether the head
    is always the embedding; width_is_free: whether heads times their width may be another number than the hidden size."""

    name: str
    interleaved: bool = False
    one_more: bool = False
    tied: bool = False
    width_is_free: bool = True


_DECI = _Architecture("deci", interleaved=True)
_OPENELM = _Architecture("openelm", tied=True)
# model_type -> the graph for it, and the one that takes layers of unlike sizes.
_ARCHITECTURES: dict[str, tuple[_Architecture, _Architecture | None]] = {
    "llama": (_Architecture("llama", interleaved=True), _DECI),
    "mistral": (_Architecture("llama", interleaved=True), _DECI),
    "qwen2": (_Architecture("qwen2", width_is_free=False), _DECI),
    "qwen3": (_Architecture("qwen3"), _OPENELM),
    "gemma": (_Architecture("gemma", one_more=True, tied=True), None),
    "gemma2": (_Architecture("gemma2", one_more=True, tied=True), None),
}


@dataclass(frozen=True)
class Written:
    """What `export` wrote. architecture: the graph of llama.cpp; types: of its tensors -> how many; zeros: weights that were
    put in and add nothing; warnings: what is other there than here."""

    folder: Path
    file: Path
    model_class: str
    architecture: str
    types: dict[str, int]
    zeros: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it is, for people."""
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        return f"{self.model_class} as llama.cpp's {self.architecture}: {types}"


def export(
    program: Program,
    config: Any,
    files: Mapping[str, Path | bytes],
    folder: str | Path,
    *,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
) -> Written:
    """Write `program` as `folder`/model.gguf: all of it, read back and compared, or nothing. Arguments as of
    `hugging_face.export`; of `files` the tokenizer goes into the file.

    Raises `UsageError` where gguf is not installed, and with the reason where llama.cpp has no graph for the model;
    `VerificationFailed` where the weights by their names are not all that the program does.
    """
    target = Target(Path(folder), "gguf", "folder of a GGUF export", NAME, overwrite=overwrite, sources=sources)
    target.check()
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "the package gguf writes the file, and is not installed", where="--format gguf", hint="pip install 'fxc[gguf]'"
        )
    check_has_values(program, folder)
    kind = getattr(config, "model_type", None)
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UsageError(f"fxc writes no GGUF of {kind or 'a model without a configuration'}", where="--format gguf",
                         why=f"it knows the names and graphs of {known}")  # fmt: skip
    check_config(config.to_dict(), where="config.json", trust_remote_code=False)
    layers = layers_of(program, config)
    config = trimmed(config, layers)
    architecture = _architecture(kind, layers, config)
    warnings = _what_differs(config, architecture)
    if layers.repeated:
        warnings.append(f"keys and values are stored for each query head where these share unevenly: {listed(layers.repeated)}")
    check_computes(program, config, layers)
    tensors = _tensors(layers, config, architecture, warnings)
    rows = layers.weights[_embedding(layers)].shape[0]
    words = vocabulary(files, config, rows)
    if words.why_not:
        warnings.append(f"the file has no tokenizer and is for token numbers: {words.why_not}")
    with target.staged(sum(data.numel() * data.element_size() for _, data, _ in tensors.values())) as place:
        _write(place / NAME, tensors, config, layers, architecture, words, rows)
        _check_written(place / NAME, tensors)
    types: dict[str, int] = {}
    for name, _, _ in tensors.values():
        types[name] = types.get(name, 0) + 1
    model_class = program.metadata["class"]
    return Written(target.folder, target.folder / NAME, model_class, architecture.name, types, sorted(layers.added), warnings)


# ------------------------------------------------------------------------------------------------------------- architecture


def _architecture(kind: str, layers: Layers, config: Any) -> _Architecture:
    usual, uneven = _ARCHITECTURES[kind]
    sizes = layers.sizes[0]
    if layers.is_uniform and (usual.width_is_free or sizes.heads * layers.width == config.hidden_size):
        return usual
    hint = "prune every layer alike (uniform=true); fxc.load reads the artifact as it is"
    why = "its layers differ" if not layers.is_uniform else f"it has {sizes.heads} heads of {layers.width}"
    if uneven is None:
        what = f"llama.cpp's graph for {kind} has one size for all layers, and {why}"
        raise UsageError(what, where="--format gguf", hint=hint)
    names = layers.weights
    if uneven.tied and not _is_tied(layers):
        raise UsageError(
            f"of models with norms of queries and keys, llama.cpp takes layers that differ only with a tied head, and {why}",
            where="lm_head", hint=hint,
        )  # fmt: skip
    biased = [name for name in names if name.endswith("_proj.bias")]
    if uneven is _OPENELM and biased:
        raise UsageError(f"llama.cpp's graph {uneven.name} has no biases", where=biased[0], why=why, hint=hint)
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UsageError(f"llama.cpp's graph {uneven.name} has silu, and this is {config.hidden_act}", where="hidden_act")
    return uneven


def _what_differs(config: Any, architecture: _Architecture) -> list[str]:
    """What llama.cpp computes otherwise. Raises `UsageError` where that is wrong from the first token on."""
    scaling = dict(getattr(config, "rope_parameters", None) or {})
    if scaling.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UsageError(f"fxc writes no GGUF of rotary embeddings {scaling['rope_type']!r}", where="config.rope_parameters")
    if scaling.get("rope_type") == "llama3" and architecture is _OPENELM:
        raise UsageError("llama.cpp's graph openelm has no factors of rotary frequencies", where="config.rope_parameters")
    scalar, width = getattr(config, "query_pre_attn_scalar", None), getattr(config, "head_dim", None)
    is_27b = config.num_hidden_layers == 46
    if architecture.name == "gemma2" and scalar != (config.hidden_size // config.num_attention_heads if is_27b else width):
        raise UsageError(
            f"llama.cpp scales queries of gemma2 by the width of a head, {width}, and here it is {scalar}",
            where="config.query_pre_attn_scalar",
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    slides = window and ("sliding_attention" in kinds or not kinds)
    if architecture.name == "gemma2":
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(config.num_hidden_layers)]
        if list(kinds) != alternating:
            raise UsageError(
                "llama.cpp lets every other layer of gemma2 slide, and here it is others", where="config.layer_types",
                hint="prune no whole layers, or an even number of neighbours",
            )  # fmt: skip
    elif slides:
        return [f"llama.cpp lets these layers see everything: beyond sliding_window={window} tokens it computes something else"]
    return []


def _embedding(layers: Layers) -> str:
    return next(name for name in layers.weights if name.endswith("embed_tokens.weight"))


def _is_tied(layers: Layers) -> bool:
    head = layers.weights.get("lm_head.weight")
    return head is None or head is layers.weights.get(_embedding(layers))


# ------------------------------------------------------------------------------------------------------------------ tensors

_Stored = tuple[str, Tensor, Tensor | Packed]
"""(name of the type, what the file holds: uint8 [N, bytes] of blocks or a float tensor, the weight that it stands for)."""


def _tensors(layers: Layers, config: Any, architecture: _Architecture, warnings: list[str]) -> dict[str, _Stored]:
    import gguf

    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, len(layers.sizes))
    float_instead: dict[str, list[str]] = {}
    made: dict[str, _Stored] = {}
    for name, found in layers.weights.items():
        if name == "lm_head.weight" and _is_tied(layers):
            continue
        turned = _turned(name, found, layers, architecture)
        if name.endswith(".weight") and turned is None:
            continue  # one of three that are stored together
        base, _, suffix = name.rpartition(".")
        theirs = names.get_name(base)
        if theirs is None or suffix not in ("weight", "bias"):
            continue  # a buffer: frequencies, scales. What matters of them was compared by computing with the weights alone
        if architecture is _OPENELM and base.endswith("q_proj"):
            theirs = theirs.replace("attn_q", "attn_qkv")
        if architecture.one_more and theirs.endswith("norm"):
            turned = turned.float() + 1
        stored = _stored(turned)
        if isinstance(stored, str):
            float_instead.setdefault(stored, []).append(base)
            stored = _as_float(turned)
        made[f"{theirs}.{suffix}"] = stored
    warnings += [f"held as {_as_float_type(why)}: {why}, as {listed(sorted(where))}" for why, where in float_instead.items()]
    if (factors := _rope_factors(config, layers.width)) is not None:
        made["rope_freqs.weight"] = ("F32", factors, factors)
    return made


def _turned(name: str, found: Tensor | Packed, layers: Layers, architecture: _Architecture) -> Tensor | Packed | None:
    """The weight as the graph reads it; None where it is part of another one."""
    if architecture is _OPENELM and (match := re.fullmatch(r"(.*\.self_attn)\.(q|k|v)_proj\.weight", name)):
        return _joined([layers.weights[f"{match[1]}.{part}_proj.weight"] for part in "qkv"]) if match[2] == "q" else None
    match = _PROJECTION.fullmatch(name)
    if match is None or not architecture.interleaved:
        return found
    heads = found.shape[0] // layers.width
    order = torch.arange(found.shape[0]).view(heads, 2, layers.width // 2).transpose(1, 2).flatten()
    return permuted(found, order)


def _joined(weights: list[Tensor | Packed]) -> Tensor | Packed:
    """Rows of several weights as one: packed where all are so, in one way."""
    first = weights[0]
    alike = all(isinstance(w, Packed) and w.scheme is first.scheme and w.parts.keys() == first.parts.keys() and
                w.parts["scale"].shape[1:] == first.parts["scale"].shape[1:] for w in weights)  # fmt: skip
    if isinstance(first, Packed) and alike:
        parts = {part: torch.cat([w.parts[part] for w in weights]) for part in first.parts}
        shape = (sum(w.shape[0] for w in weights), first.shape[1])
        return Packed(first.layer, first.scheme, first.readers, parts, shape, first.dtype)
    return torch.cat([w.dense().to(w.dtype) if isinstance(w, Packed) else w for w in weights])


def _stored(found: Tensor | Packed) -> _Stored | str:
    """As the file holds it, or why a packed weight has no blocks."""
    if isinstance(found, Packed):
        made = ggml.blocks(found)
        return made if isinstance(made, str) else (*made, found)
    # Vectors are added and multiplied with float32 in ggml.
    found = found.float() if found.ndim < 2 else found
    return _FLOATS[found.dtype], found.contiguous(), found


def _as_float(found: Packed) -> _Stored:
    dense = found.dense()
    half = dense.half()
    if float((half.float() - dense).norm() / dense.norm().clamp(min=1e-30)) <= ggml.LIMIT:
        return "F16", half, found
    return "F32", dense, found


def _as_float_type(why: str) -> str:
    return "F32" if "float16 does not hold" in why else "F16"


def _rope_factors(config: Any, width: int) -> Tensor | None:
    """What llama.cpp divides the frequencies by, for rotary embeddings of the kind llama3 (Llama 3.1, section 3.4.2 of
    arXiv 2407.21783)."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "llama3":
        return None
    low, high = rope["original_max_position_embeddings"] / rope["low_freq_factor"], (
        rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    )
    factors = []
    for i in range(0, width, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / width)
        if length < high:
            factors.append(1.0)
        elif length > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


# -------------------------------------------------------------------------------------------------------------------- write


def _write(
    path: Path, tensors: Mapping[str, _Stored], config: Any, layers: Layers, architecture: _Architecture,
    words: Vocabulary, rows: int,
) -> None:  # fmt: skip
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    kinds = [kind for kind, data, _ in tensors.values() if data.ndim > 1]
    writer.add_file_type(_FILE_TYPES[max(set(kinds), key=lambda kind: (kinds.count(kind), kind))])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers.sizes))
    one_for_all = layers.is_uniform and architecture not in (_DECI, _OPENELM)
    for add, values in (
        (writer.add_feed_forward_length, [each.channels for each in layers.sizes]),
        (writer.add_head_count, [each.heads for each in layers.sizes]),
        (writer.add_head_count_kv, [each.kv_heads for each in layers.sizes]),
    ):
        add(values[0] if one_for_all else values)
    writer.add_key_length(layers.width)
    writer.add_value_length(layers.width)
    writer.add_rope_dimension_count(layers.width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if architecture.name == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        for add, value in (
            (writer.add_attn_logit_softcapping, config.attn_logit_softcapping),
            (writer.add_final_logit_softcapping, config.final_logit_softcapping),
        ):
            # What llama.cpp takes for no value is its own, and so much is none.
            add(float(value) if value else 1e30)
    _write_words(writer, words)
    for name, (kind, data, _) in tensors.items():
        if data.dtype in (torch.uint8, torch.bfloat16):
            array = data.view(torch.uint8).numpy()
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_words(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    if words.model == "no_vocab":
        return
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.prefix is not None:
        writer.add_add_space_prefix(words.prefix)
    for name, number in words.ids.items():
        {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}[name](number)
    writer.add_add_bos_token(words.starts_with_bos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _check_written(path: Path, tensors: Mapping[str, _Stored]) -> None:
    """Read the file as gguf reads it, and compare each tensor with the numbers that it stands for."""
    import gguf

    read = {each.name: each for each in gguf.GGUFReader(path).tensors}
    if read.keys() != tensors.keys():
        raise VerificationFailed(f"the file holds other tensors than were written: {listed(read.keys() ^ tensors.keys())}")
    for name, (_, _, given) in tensors.items():
        # One at a time: those of all of them take four bytes a number.
        meant = given.dense() if isinstance(given, Packed) else given.float()
        found = torch.from_numpy(gguf.dequantize(read[name].data, read[name].tensor_type).copy())
        error = float((found - meant).norm() / meant.norm().clamp(min=1e-30)) if found.shape == meant.shape else math.inf
        if not error <= ggml.LIMIT:
            raise VerificationFailed(f"the file holds other numbers: relative error {error:.1e}", where=name)
