"""Capturing a model that is larger than memory: its weights are mapped from files, and most of them are not read.

That a capture computes what the model does, and how the model counts positions, is tried on the same model with its first
layers and the first words of a large vocabulary alone.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxc.frontend.calls import takes_cache
from fxc.frontend.capture import capture
from fxc.ir.program import Program

# More layers are not left, and one of layers that are larger.
LAYERS = 2
LARGE = 1 << 28
# So many words are left of a vocabulary whose tables are larger.
WORDS = 4096
# What is seen on the small model and holds for the whole.
_SEEN = ("positions", "examples")


def capture_larger(model: nn.Module, example_inputs: Any, dynamic_shapes: Any, check: bool) -> tuple[Program, Program | None]:
    """The program of `model`, whose constants are the model's own tensors, and if `check` that of its first layers, which was
    compared with them; of a model without a list of layers it is of all of it. Raises `CaptureFailed` as `capture` does."""
    small = None
    with _uncollected():
        if check:
            # The caller's own inputs may hold any word.
            with shortened(model, words=example_inputs is None):
                small = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
        program = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, check=False, reads=False)
    if small is not None:
        program.metadata |= {key: small.metadata[key] for key in _SEEN if key in small.metadata}
    return program, small


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of circles, which goes again and again through all that a trace of many layers holds."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@contextmanager
def shortened(model: nn.Module, words: bool = True) -> Iterator[None]:
    """While open, each list of many layers of one class in `model` has only its first ones; lists within layers are whole. Of a
    large vocabulary there are its first words, if `words` and where no others are drawn."""
    whole: dict[nn.ModuleList, dict[str, nn.Module | None]] = {}
    within: list[str] = []
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in within)
        if is_list and len(module) > LAYERS and len({type(each) for each in module}) == 1:
            within.append(name)
            whole[module] = module._modules
    for module, layers in whole.items():
        nbytes = sum(each.numel() * each.element_size() for each in module[0].parameters())
        module._modules = dict(list(layers.items())[: 1 if nbytes > LARGE else LAYERS])
    config = getattr(model, "config", None)
    counts = {name: getattr(config, name) for name in ("num_hidden_layers",) if config is not None and hasattr(config, name)}
    tables = _large_tables(model) if words else {}
    try:
        for name in counts:
            setattr(config, name, min([counts[name], *(len(module) for module in whole)]))
        first: dict[int, nn.Parameter] = {}  # of weights that are tied, one
        for table, (words, _, parameters) in tables.items():
            for name, each in parameters.items():
                table._parameters[name] = first.setdefault(id(each), nn.Parameter(each[:WORDS], False))
            setattr(table, words, WORDS)
        if tables:
            config.get_text_config().vocab_size = WORDS
        yield
    finally:
        for table, (words, count, parameters) in tables.items():
            table._parameters.update(parameters)
            setattr(table, words, count)
            config.get_text_config().vocab_size = count
        for module, modules in whole.items():
            module._modules = modules
        for name, value in counts.items():
            setattr(config, name, value)


def _large_tables(model: nn.Module) -> dict[nn.Module, tuple[str, int, dict[str, nn.Parameter]]]:
    """The embedding of a decoder and its head, if they are plain and one of them is large: of each what its number of words is
    called, the number, and its parameters."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        return {}
    tables, count = (model.get_input_embeddings(), model.get_output_embeddings()), model.config.get_text_config().vocab_size
    kinds = {nn.Embedding: "num_embeddings", nn.Linear: "out_features"}
    if not all(type(each) in kinds and len(each.weight) == count for each in tables):
        return {}
    is_large = max(each.weight.numel() * each.weight.element_size() for each in tables) > LARGE
    if not is_large or (tables[0].padding_idx or 0) >= WORDS:
        return {}
    # What goes into a decoder with a cache is drawn below `vocab_size`. Others are given words that their configuration names:
    # an end to pool at, the start of what is written.
    if not takes_cache(model) and max(_words_named(model.config.to_dict()), default=0) >= WORDS:
        return {}
    return {each: (kinds[type(each)], count, {n: p for n, p in each._parameters.items() if p is not None}) for each in tables}


def _words_named(config: Mapping[str, Any]) -> Iterator[int]:
    """The ids of words that a configuration names, and those within it."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _words_named(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, int))
