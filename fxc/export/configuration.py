"""The Hugging Face configuration of a program with fewer heads, channels or layers than the model it came from.

Nothing here knows a family of models. Each change of the configuration is tried: the model of it is built on meta, and the
names and shapes of its weights are compared with the program's constants. What is tried is small: numbers that divide a size
that is wrong, flags that say whether there are biases, the lengths of lists of layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxc.errors import FxcError, InputRefused, UsageError
from fxc.ir.program import Program
from fxc.safety import check_config, listed
from fxc.source.load import quiet_transformers

# Query heads, KV heads and the width of a head change together or not at all, so that these have to be known by name.
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
_WIDTHS = ("head_dim", "d_kv", "kv_channels", "attention_head_size")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_UNSET = re.compile("inner|ffn|intermediate|mlp|hidden")  # sizes that a configuration may leave to the model
_KV_INDEX = re.compile(r"\.kv_index(_\d+)?\Z")
_HINT = "prune every layer alike (uniform=true) to get a plain folder; fxc.load reads the artifact as it is"

Change = dict[tuple[str, ...], Any]
"""What to set in a configuration: path of keys -> value."""


@dataclass
class Fit:
    """How the weights of the model that `config` describes and a program's constants go together.

    model: on meta; places: name of a weight or buffer -> FQN of the constant; missing: names that no constant is for; holes:
    those of them that other layers have; wrong: names in places whose shapes differ; spare: constants that the model should
    have a place for and has not; lists: layers of each list that the program has, and that the model has, where they differ.
    """

    config: Any
    model: nn.Module
    expected: dict[str, tuple[int, ...]]
    found: dict[str, tuple[int, ...]]
    places: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    lists: list[tuple[list[int], list[int]]] = field(default_factory=list)

    @property
    def faults(self) -> tuple[int, int]:
        """The fewer the better; the first number is 0 where the configuration says what the program is."""
        sizes = sum(1 for pair in self.pairs(every=True))
        return len(self.holes) + len(self.spare) + sizes, len(self.missing)

    def pairs(self, every: bool = False) -> list[tuple[int, int]]:
        """(size in the model, size in the program) wherever they differ."""
        found = []
        for name in self.wrong:
            theirs, mine = self.expected[name], self.found[self.places[name]]
            if len(theirs) != len(mine):
                found.append((0, 0))
            found += [(a, b) for a, b in zip(theirs, mine) if a != b]
        return found if every else sorted(set(found) - {(0, 0)})


def describe_config(program: Program, config: Any) -> tuple[Any, str | None]:
    """(the configuration of `program`, None), or (None, the reason) where no configuration of its model's class says it.
    config: that of the model which the program came from."""
    try:
        return describe(program, config).config, None
    except FxcError as error:
        return None, f"{error.where}: {error.what}" if error.where else error.what


def describe(program: Program, config: Any) -> Fit:
    """The configuration of `program`, and which of its constants is which weight. Raises `UsageError` with the reason why
    no configuration of its model's class says it."""
    model_class = class_of(program, config)
    check_config(config.to_dict(), where="config.json", trust_remote_code=False)
    found = {fqn: tuple(weight(program, fqn).shape) for fqn in program.constants}
    refused: list[str] = []
    with quiet_transformers():
        try:
            best = _fit(program, model_class, copy.deepcopy(config), found)
        except Exception as error:  # transformers and the model's code raise what they like
            raise UsageError(
                f"transformers does not build it from its configuration: {_message(error)}", where=model_class.__name__
            ) from error
        while best.faults[0]:
            better = best
            for change in _changes(best):
                try:
                    tried = _fit(program, model_class, _changed(best.config, change), found)
                except Exception as error:
                    if any(path[-1] in _heads_of(best.config) for path in change):
                        refused.append(f"{_written(change)}: {_message(error)}")
                    continue
                better = min(better, tried, key=lambda fit: fit.faults)
            if better is best:
                raise _reason(best, model_class, refused)
            best = better
    best.config.architectures = [model_class.__name__]
    return best


def class_of(program: Program, config: Any) -> type:
    """The class of transformers that the program was captured from. Nothing else is ever built by a name in a program."""
    import transformers

    name = program.metadata.get("class")
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if config is None or not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        what = "it is no Hugging Face model" if config is None else "transformers has no model class of this name"
        raise UsageError(what, where=name, hint="fxc.load reads the artifact as it is")
    if found.config_class is None or not isinstance(config, found.config_class):
        raise UsageError(f"its configuration is a {type(config).__name__}", where=name, hint="compile the model again")
    return found


def weight(program: Program, fqn: str) -> Tensor:
    """The constant `fqn` as the model has it: turned back where canonicalize stored it transposed."""
    turned = program.metadata.get("transposed", [])
    if not isinstance(turned, list):
        raise InputRefused("its list of transposed constants is no list", where="program metadata")
    tensor = program.constants[fqn]
    return tensor.t() if fqn in turned and tensor.ndim == 2 else tensor


# ------------------------------------------------------------------------------------------------------------------ compare


def _fit(program: Program, model_class: type, config: Any, found: dict[str, tuple[int, ...]]) -> Fit:
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    weights = model.state_dict(keep_vars=True)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} - weights.keys()
    fit = Fit(config, model, {name: tuple(t.shape) for name, t in weights.items()}, found)
    canonical = {**dict.fromkeys(program.constants), **program.aliases}
    canonical = {name: fqn or name for name, fqn in canonical.items()}
    renamed: dict[str, str] = {}
    _renumber(_tree(canonical), _tree([*weights, *buffers]), "", "", renamed, fit.lists)
    sources = {new: canonical[old] for old, new in renamed.items()}
    fit.places = {name: sources[name] for name in weights if name in sources}
    # What is one tensor in the model is one constant, whichever of its names that has.
    tied = {id(weights[name]): fqn for name, fqn in fit.places.items()}
    fit.places |= {name: tied[id(t)] for name, t in weights.items() if name not in fit.places and id(t) in tied}
    kinds = {_kind(name) for name in fit.places}
    fit.missing = [name for name in weights if name not in fit.places]
    fit.holes = [name for name in fit.missing if _kind(name) in kinds and not _is_bias(name)]
    fit.wrong = [name for name, fqn in fit.places.items() if found[fqn] != fit.expected[name]]
    theirs = {_kind(name) for name in weights}
    homeless = [old for old, new in renamed.items() if new not in weights and new not in buffers]
    fit.spare = [name for name in homeless if _is_bias(name) or _KV_INDEX.search(name) or _kind(name) in theirs]
    return fit


def _tree(names: Any) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name in names:
        node = root
        for part in name.split("."):
            node = node.setdefault(part, {})
    return root


def _renumber(
    mine: dict[str, Any],
    theirs: dict[str, Any],
    old: str,
    new: str,
    renamed: dict[str, str],
    lists: list[tuple[list[int], list[int]]],
) -> None:
    """Names under `old` -> what the model calls them: where a list of layers has lost some, those left are counted anew."""
    if not mine:
        renamed[old] = new
        return
    have, want = (sorted(int(k) for k in tree if k.isdecimal()) for tree in (mine, theirs))
    if have and want and len(have) != len(want):
        lists.append((have, want))
    numbers = dict(zip(have, want)) if len(have) == len(want) else {}
    for part, inner in mine.items():
        other = str(numbers.get(int(part), part)) if part.isdecimal() else part
        down = [f"{path}.{name}" if path else name for path, name in ((old, part), (new, other))]
        _renumber(inner, theirs.get(other, {}), *down, renamed, lists)


def _kind(name: str) -> str:
    """What the name of a weight has in common with its like in other layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _is_bias(name: str) -> bool:
    return re.search(r"(\A|\.)bias(_\d+)?\Z", name) is not None


# ------------------------------------------------------------------------------------------------------------------ changes


def _changes(fit: Fit) -> Iterator[Change]:
    """Every change of the configuration that may bring it nearer to the program."""
    pairs = fit.pairs()
    for path, config in _sections(fit.config):
        values = config.to_dict()
        for have, want in fit.lists:
            yield from _fewer_layers(path, values, have, want)
        yield from _fewer_heads(path, config, values, pairs)
        special = {*_heads_of(config), *_KV_HEADS, *_widths_of(config)}
        for name, value in values.items():
            if name in special or name.endswith("_id"):
                continue
            if value is False and "bias" in name and any(map(_is_bias, fit.spare)):
                yield {(*path, name): True}
            elif isinstance(value, int) and not isinstance(value, bool):
                yield from ({(*path, name): size} for size in _scaled(value, pairs))
            elif value is None and _UNSET.search(name):
                yield from ({(*path, name): size} for size in sorted({a for _, a in pairs}))


def _fewer_layers(path: tuple[str, ...], values: dict[str, Any], have: list[int], want: list[int]) -> Iterator[Change]:
    """The number of layers, and what the configuration says of each layer."""
    stay = [want.index(i) for i in have] if set(have) <= set(want) else list(range(len(have)))
    of_each = {k: [v[i] for i in stay] for k, v in values.items() if isinstance(v, list) and len(v) == len(want) > max(stay)}
    for name, value in values.items():
        if type(value) is int and value == len(want):
            yield {(*path, name): len(have)} | {(*path, k): v for k, v in of_each.items()}


def _fewer_heads(path: tuple[str, ...], config: Any, values: dict[str, Any], pairs: list[tuple[int, int]]) -> Iterator[Change]:
    """Numbers of query and KV heads. Their width stays, which has to be said where it followed from the number of heads."""
    widths = [values[name] for name in _widths_of(config) if type(values.get(name)) is int]
    hidden = [values[name] for name in _mapped(config, _HIDDEN) if type(values.get(name)) is int]
    for name in _heads_of(config):
        heads = values.get(name)
        if type(heads) is not int or heads < 1:
            continue
        width = {(*path, "head_dim"): hidden[0] // heads} if not widths and hidden else {}
        shared = next((n for n in _mapped(config, _KV_HEADS) if type(values.get(n)) is int), None)
        for count in [heads, *_scaled(heads, pairs)]:
            change: Change = {(*path, name): count} | (width if count != heads else {})
            if shared is None:
                yield from [change] if count != heads else []
                continue
            groups = values[shared]
            counts = {groups, *_scaled(groups, pairs)} | ({groups * count // heads} if groups * count % heads == 0 else set())
            for each in sorted(counts - {0}):
                if (count, each) != (heads, groups):
                    yield change | {(*path, shared): each}


def _scaled(value: int, pairs: list[tuple[int, int]]) -> list[int]:
    """What `value` may be now, where sizes are multiples of it."""
    if value < 1:
        return []
    return sorted({value * b // a for a, b in pairs if a % value == 0 and value * b % a == 0} - {value, 0})


def _sections(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The configuration, and those inside of it: of the text model, of the vision model."""
    yield path, config
    for name, inner in vars(config).items():
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            yield from _sections(inner, (*path, name))


def _mapped(config: Any, names: tuple[str, ...]) -> list[str]:
    """`names`, and what this configuration calls them."""
    return list(dict.fromkeys(n for name in names for n in (type(config).attribute_map.get(name, name), name)))


def _heads_of(config: Any) -> list[str]:
    return [name for _, inner in _sections(config) for name in _mapped(inner, _HEADS)]


def _widths_of(config: Any) -> list[str]:
    return _mapped(config, _WIDTHS)


def _changed(config: Any, change: Change) -> Any:
    """A new configuration, checked by transformers as one that is read from a file."""
    values = config.to_dict()
    for path, value in change.items():
        section = values
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
    return type(config).from_dict(values)


def changed_fields(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (value before, value after) of what two configurations say differently."""
    found = {}
    ours = {path: inner.to_dict() for path, inner in _sections(before)}
    for path, inner in _sections(after):
        old = ours.get(path, {})
        for name, value in inner.to_dict().items():
            if name != "architectures" and not isinstance(value, dict) and old.get(name) != value:
                found[".".join((*path, name))] = (old.get(name), value)
    return found


# ------------------------------------------------------------------------------------------------------------------- reasons


def _written(change: Change) -> str:
    return ", ".join(f"{'.'.join(path)}={value}" for path, value in change.items() if not isinstance(value, list))


def _reason(fit: Fit, model_class: type, refused: list[str]) -> UsageError:
    """Why no configuration says it: the plainest reason there is."""
    name = model_class.__name__
    if uneven := [fqn for fqn in fit.spare if _KV_INDEX.search(fqn)]:
        return UsageError(
            "its query heads do not share keys and values evenly, and a configuration has one ratio for all",
            where=_KV_INDEX.sub("", uneven[0]),
            hint="prune whole KV groups (uniform=true) to get a plain folder; fxc.load reads the artifact as it is",
        )
    shapes: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], str]] = {}
    for weight_name, fqn in fit.places.items():
        shapes.setdefault((_kind(weight_name), fit.expected[weight_name]), {}).setdefault(fit.found[fqn], fqn)
    for alike in shapes.values():
        if len(alike) > 1:
            (one, first), (other, second) = list(alike.items())[:2]
            return UsageError(
                f"its layers differ: {first} is {list(one)} and {second} is {list(other)}",
                why="a configuration has one number for all layers",
                hint=_HINT,
            )
    if fit.holes:
        return UsageError(
            f"its layers differ: {listed(fit.holes)} {'is' if len(fit.holes) == 1 else 'are'} gone, and others stay",
            why="a configuration has one number for all layers",
            hint=_HINT,
        )
    if added := [fqn for fqn in fit.spare if _is_bias(fqn)]:
        return UsageError(
            f"{name} has no place for what removal added: {listed(added)}",
            why="a bias holds what constant channels added before they went, and no flag of the configuration switches it on",
            hint="fxc.load reads the artifact as it is",
        )
    wrong = next(iter(fit.wrong), None)
    if wrong is None:
        return UsageError(f"{name} has no place for {listed(fit.spare)}", hint="fxc.load reads the artifact as it is")
    why = "no number in its configuration changes that size alone"
    return UsageError(
        f"{name} makes {wrong} {list(fit.expected[wrong])}, and here it is {list(fit.found[fit.places[wrong]])}",
        why=f"{why}; transformers refuses {refused[0]}" if refused else why,
        hint="fxc.load reads the artifact as it is",
    )


def _message(error: Exception) -> str:
    """All of what transformers says: the first line of its validators says only that something is wrong."""
    return " ".join(str(error).split())[:300] or type(error).__name__
