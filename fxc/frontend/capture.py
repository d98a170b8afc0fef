"""nn.Module -> Program.

A model is captured with `torch.export` at the ATen level, without decomposition, with every batch, sequence and cache
length dynamic. A causal language model becomes one graph that serves prefill and decode: the cache is among its inputs and
outputs as plain tensors. The captured program is then run at sizes that were not traced and compared with the model.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

import fxc.schemes  # noqa: F401 - what is captured may become its operators
from fxc.data.samples import keep_examples
from fxc.errors import CaptureFailed, FxcError, UsageError, first_line
from fxc.frontend.calls import AUTO, Call, WithStackedCache, calls_of
from fxc.frontend.fold import folded
from fxc.frontend.legalize import legalize
from fxc.frontend.rotary import functional_rotary
from fxc.ir.cache import empty_cache, is_past, positions_of
from fxc.ir.edit import sweep
from fxc.ir.infer import fake_constant, fake_mode_of
from fxc.ir.program import Input, Program, Signature, is_name
from fxc.ir.recurrent import symbolic_lengths
from fxc.ir.structure import flatten
from fxc.neutral import one_at_a_time


@one_at_a_time
def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    check: bool = True,
) -> Program:
    """Capture `model` as a Program. The model is not changed; the program's constants share its memory.

    example_inputs: a tuple of positional arguments or a dict of keyword arguments (nested lists, tuples and dicts of
    tensors are allowed). May be None for a Hugging Face model, whose inputs follow from its configuration. The first
    dimension of every example tensor is taken as dynamic where the model permits, the sequence dimensions of token inputs,
    and those others that the model is seen to take at other sizes: frames, height and width.
    dynamic_shapes: for some inputs, which dimensions vary: {"x": (0, 1)}, or in torch.export's form; no others of theirs do.
    check: run the program at other sizes and compare it with the model.

    Raises `CaptureFailed` when the model's control flow depends on its data, it calls an operator that no program may
    call or a dimension that is asked for cannot vary; `UsageError` when example inputs are needed.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), _deterministic_graphs(), folded(model), functional_rotary(model):
            example_inputs = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, example_inputs)
            program = _freest(model, calls_of(model, example_inputs, dynamic_shapes), check)
    finally:
        for module in training:
            module.training = True
    return program


def _freest(model: nn.Module, calls: Iterator[Call], check: bool) -> Program:
    """The program of the first call that can be captured; the last one's error where none can."""
    failure = None
    for call in calls:
        try:
            program = _export(model, call)
            _check_asked(program, call)
            if check and not program.is_on_meta:
                taken = compare(program, call)
                if call.has_cache:
                    program.metadata["positions"] = _default_positions(model, program, call)
                else:
                    keep_examples(program, taken)
            return program
        except CaptureFailed as error:
            failure = error
    raise failure


def _check_asked(program: Program, call: Call) -> None:
    for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
        for dimension, size in enumerate(node.meta["val"].shape):
            if (declared.name, dimension) in call.asked and isinstance(size, int):
                raise CaptureFailed(
                    f"dimension {dimension} of {declared.name} cannot vary: torch.export took its size, {size}, for a constant",
                    where=program.metadata["class"],
                    why="the model computes with it as with a number, or it has to equal a size that is fixed",
                    hint="leave that dimension out",
                )


@contextmanager
def _silent_export():
    """Without the graph that torch prints, and its warnings, where tracing fails: the error says what happened. TORCH_LOGS
    brings them back."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")]
    loggers = [each for each in loggers if not each.disabled]
    trace = importlib.import_module("torch.export._trace")
    try:
        for each in loggers:
            each.disabled = True
        trace.print = lambda *_, **__: None
        yield
    finally:
        trace.__dict__.pop("print", None)
        for each in loggers:
            each.disabled = False


@contextmanager
def _deterministic_graphs():
    previous = os.environ.get("USE_HUB_KERNELS")
    os.environ["USE_HUB_KERNELS"] = "0"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["USE_HUB_KERNELS"]
        else:
            os.environ["USE_HUB_KERNELS"] = previous


# --------------------------------------------------------------------------------------------------------------- export


def _export(model: nn.Module, call: Call) -> Program:
    names = list(call.inputs)
    first_names = _first_names(model)
    try:
        call.module(*call.inputs.values())  # tells the output's structure, which tracing does not let a module keep
    except FxcError:
        raise
    except Exception as error:  # it is the model's own code that runs here
        raise CaptureFailed(
            f"the model itself fails on the example inputs: {first_line(error)}",
            where=type(model).__name__,
            hint="give example_inputs that the model takes",
        ) from error
    try:
        with _silent_export(), symbolic_lengths():
            exported = _trace(call)
    except Exception as error:  # torch.export raises many kinds; each means that this model cannot be captured as it is
        raise CaptureFailed(
            first_line(error),
            where=_culprit(error, model),
            why="torch.export could not trace it",
            hint="if its control flow depends on tensor values, compile the part that does not; "
            "set TORCH_LOGS=+dynamic for torch's own account",
        ) from error
    try:
        graph, constants = _pure_graph(exported, call)
    except CaptureFailed as impure:
        # What it writes through views, torch's own functionalization can resolve; it takes as long as tracing again.
        try:
            functional = _functionalized(exported, model)
        except CaptureFailed:
            raise
        except Exception as error:  # torch's own decomposition fails in many ways; what stands is why it was tried
            raise impure from error
        graph, constants = _pure_graph(functional, call)
    except (AttributeError, RuntimeError, AssertionError) as error:  # torch could not make a module of what it exported
        raise CaptureFailed(
            f"torch.export's result cannot be read: {first_line(error)}",
            where=type(model).__name__,
            hint="a module that gives itself new tensors while it runs is the usual cause: compute them in __init__",
        ) from error
    canonical, aliases = _canonical_names(first_names, constants)
    for node in graph.find_nodes(op="get_attr"):
        node.target = canonical[node.target]
    store = {canonical[name]: tensor.detach() for name, tensor in constants.items()}
    signature = Signature(
        [Input(n, call.defaults.get(n)) for n in names], list(call.module.names), call.call, call.module.result
    )
    metadata = {"class": type(model).__name__, "kind": call.kind, "parameters": _parameter_names(model)}
    if not call.has_cache and (defaults := _defaults(model, call)):
        metadata["defaults"] = defaults
    program = Program(graph, store, aliases, signature, metadata)
    _retype(program)
    sweep(program)
    return program


def _pure_graph(exported: torch.export.ExportedProgram, call: Call) -> tuple[fx.Graph, dict[str, Tensor]]:
    graph, constants = _flatten_graph(exported.module(check_guards=False))
    if call.stacks:
        _unstack(graph, call.stacks)
    legalize(graph)
    return graph, constants


def _functionalized(exported: torch.export.ExportedProgram, model: nn.Module) -> torch.export.ExportedProgram:
    with _silent_export():
        functional = exported.run_decompositions({})
    signature = functional.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        kind = "buffer" if signature.buffers_to_mutate else "input"
        raise CaptureFailed(
            f"the model writes to its {kind} {written[0].removeprefix('m.')}",
            where=type(model).__name__,
            why="a program keeps nothing from one call to the next",
            hint="return the value instead",
        )
    return functional


def _parameter_names(model: nn.Module) -> list[str]:
    """The names of the arguments of the model's forward, in order, for callers who give them by position."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]


def _defaults(model: nn.Module, call: Call) -> dict[str, list[Any]]:
    """Name of an argument that no tensor was given for -> what leaving it out means: the values, as structures, that give
    the same. Hugging Face models put their configuration's value for None. What is no plain value is left out."""
    bound = call.call["kwargs"] | dict(zip(_parameter_names(model), call.call["args"]))
    config = getattr(model, "config", None) if hasattr(model, "main_input_name") else None
    declared = {n: p.default for n, p in inspect.signature(model.forward).parameters.items()}
    meanings: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*declared, *bound]):
        default = declared.get(name, inspect.Parameter.empty)
        values = [] if default is inspect.Parameter.empty else [default]
        if name in call.module.options:
            values = [call.module.options[name], None]
        elif name not in declared or values == [None]:
            values = [getattr(config, name), None] if getattr(config, name, None) is not None else values
        tensors: list[Tensor] = []
        try:
            found = [flatten(v, tensors, []) for v in values]
        except UsageError:
            continue
        if found and not tensors and not isinstance(bound.get(name), int) and _is_finite(found):
            meanings[name] = found
    return meanings


def _is_finite(value: Any) -> bool:
    """Whether JSON has every number in `value`."""
    if isinstance(value, (list, dict)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _culprit(error: BaseException, model: nn.Module) -> str:
    """The module of the model in whose forward a trace failed, by the frames of the error."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = names.get(id(owner), "") or found
        trace = trace.tb_next
    return f"{type(model).__name__}, in {found}" if found else type(model).__name__


def _trace(call: Call) -> torch.export.ExportedProgram:
    args = list(call.inputs.values())
    if call.stacks:
        past = [t for name, t in call.inputs.items() if is_past(name)]
        rows = args[: -len(past)]
        stacked = tuple(torch.stack([past[i] for i in stack]) for stack in call.stacks)
        dynamic = ({0: AUTO, 1: AUTO},) * len(rows) + (({1: AUTO, 3: AUTO},) * len(stacked),)
        module = WithStackedCache(call.module.m, call.stacks)
        return torch.export.export(module, (*rows, *stacked), dynamic_shapes=dynamic, strict=False)
    dynamic = (tuple(call.dynamic[n] for n in call.inputs),)  # one entry for all of a variadic forward's arguments
    return torch.export.export(call.module, tuple(args), dynamic_shapes=dynamic, strict=False)


def _unstack(graph: fx.Graph, stacks: list[list[int]]) -> None:
    """Give the graph a placeholder for each tensor of the cache in place of the stacked ones."""
    stacked = graph.find_nodes(op="placeholder")[-len(stacks) :]
    placeholders: dict[int, fx.Node] = {}
    mode = fake_mode_of(graph)
    for stack, whole in zip(stacks, stacked, strict=True):
        (unbound,) = (user for user in whole.users if user.target is torch.ops.aten.unbind.int)
        for item in list(unbound.users):
            value = item.meta["val"]
            with graph.inserting_before(whole):
                index = stack[item.args[1]]
                node = placeholders[index] = graph.placeholder(f"past_{index}")
            with mode:
                node.meta = {"val": torch.empty(value.shape, dtype=value.dtype, device="cpu"), "fqn": "", "by": ""}
            item.replace_all_uses_with(node)
            graph.erase_node(item)
        graph.erase_node(unbound)
        for user in list(whole.users):  # what is left asks for the sizes of the stack
            user.args = (placeholders[stack[0]], user.args[1] - 1)
        graph.erase_node(whole)
    for before, index in zip(sorted(placeholders), sorted(placeholders)[1:]):
        placeholders[before].append(placeholders[index])


def _flatten_graph(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The exported module's graph with one placeholder an input and a flat tuple returned, regions inlined; and the
    tensors that it reads, by FQN."""
    graph, constants = fx.Graph(), {}
    mapping: dict[fx.Node, Any] = {}

    def copy(source: fx.GraphModule, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = _attribute(source, node.target)
            if isinstance(value, fx.GraphModule):
                return
            name = node.target.removeprefix("m.") if source is module else f"{node.target}"
            constants[name] = value
            mapping[node] = graph.create_node("get_attr", name)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            mapping[node] = _inline(source, node, mapping, copy)
        else:
            args, kwargs = _substitute(node.args, mapping), _substitute(node.kwargs, mapping)
            if node.target is operator.getitem and isinstance(args[0], (list, tuple)):
                mapping[node] = args[0][args[1]]  # a result of an inlined region
                return
            mapping[node] = graph.call_function(node.target, args, kwargs)
        if isinstance(mapping[node], fx.Node):
            mapping[node].meta = {"val": node.meta.get("val"), "fqn": _module_of(node), "by": ""}

    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for index, node in enumerate(placeholders):
        mapping[node] = graph.placeholder(f"input_{index}")
        mapping[node].meta = {"val": node.meta["val"], "fqn": "", "by": ""}
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copy(module, node)
    results, _ = torch.utils._pytree.tree_flatten(_substitute(module.graph.output_node().args[0], mapping))
    graph.output(tuple(results))
    return graph, constants


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _substitute(argument: Any, mapping: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return mapping[argument]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_substitute(a, mapping) for a in argument)
    if isinstance(argument, dict):
        return {k: _substitute(v, mapping) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_substitute(a, mapping) for a in (argument.start, argument.stop, argument.step)))
    # A program is neutral to the device: lowering puts the target's in.
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _inline(source: fx.GraphModule, node: fx.Node, mapping: dict, copy: Any) -> Any:
    """The results of a region that only sets a mode (no gradients, autocast off), its nodes copied in place."""
    name = str(node.target)
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        raise CaptureFailed(f"the model uses the control-flow operator {name}", hint="rewrite that part without it")
    if name == "wrap_with_autocast" and node.args[2] is not False and node.args[2] is not None and node.args[2]:
        raise CaptureFailed("the model runs a part under autocast", hint="capture it in the wanted dtype: dtype=...")
    region_node = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
    region = _attribute(source, region_node.target)
    operands = node.args[node.args.index(region_node) + 1 :]
    inner = [n for n in region.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(inner, operands, strict=True):
        mapping[placeholder] = mapping[operand]
    for inside in region.graph.nodes:
        if inside.op not in ("placeholder", "output"):
            copy(region, inside)
    return _substitute(region.graph.output_node().args[0], mapping)


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.removeprefix("m").removeprefix(".") if path == "m" or path.startswith("m.") else path


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if not is_name(name):
            raise CaptureFailed(
                "its name cannot stand in a program: letters, digits, '_' and '-' only, and no name that every nn.Module has",
                where=name,
                hint="rename that parameter or the module that holds it",
            )
        names[name] = first.setdefault(id(tensor), name)
    return names


def _canonical_names(names: dict[str, str], constants: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Every constant's name -> the first name of the same tensor; and the other names of tied weights."""
    canonical = {name: names.get(name, name) for name in constants}
    used = set(canonical.values())
    return canonical, {name: to for name, to in names.items() if name != to and to in used}


def _retype(program: Program) -> None:
    """Give constants their types, and values theirs, in which a size that export found to be a number is that number."""
    mode = fake_mode_of(program.graph)

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        if not isinstance(value, Tensor) or not any(isinstance(n, torch.SymInt) and n.node.expr.is_number for n in value.shape):
            return value
        with mode:
            shape = [int(n) if isinstance(n, torch.SymInt) and n.node.expr.is_number else n for n in value.shape]
            return torch.empty(shape, dtype=value.dtype, device="cpu")

    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = fake_constant(mode, program.constants[node.target])
        elif node.op != "output":
            node.meta["val"] = plain(node.meta["val"])


# ---------------------------------------------------------------------------------------------------------------- check


def compare(program: Program, call: Call) -> list[list[Tensor]]:
    """Run program and model at `call.other_sizes`; raise `CaptureFailed` where they differ by more than rounding. Returns the
    examples and at most two other sets of inputs that both take."""
    module, taken = program.module(), []
    for inputs in call.other_sizes:
        if call.may_fix and not _fits(program, inputs):
            continue
        sizes = ", ".join(str(list(t.shape)) for t in inputs[:3])
        try:
            expected = call.module(*inputs)
        except Exception:
            continue
        try:
            found = module(*inputs)
        except Exception as error:
            raise CaptureFailed(
                f"the captured program fails at the sizes {sizes}, which the model takes: {first_line(error)}",
                where=program.metadata["class"],
                hint="give example_inputs of other sizes, so that no size is taken for a constant",
            ) from error
        for name, a, b in zip(program.signature.outputs, found, expected, strict=True):
            worst = relative_difference(a, b)
            if worst > tolerance(b.dtype):
                _refuse_random(program, call, inputs)
                raise CaptureFailed(
                    f"the captured program differs from the model by {worst:.1e} in {name} at the sizes {sizes}",
                    where=program.metadata["class"],
                    why=f"the tolerance for {b.dtype} is {tolerance(b.dtype):.0e}",
                    hint="the model's control flow may depend on sizes or values",
                )
        taken.append(inputs)
    return taken[:3]


def _fits(program: Program, inputs: list[Tensor]) -> bool:
    """Whether the sizes of `inputs` are those that the program demands."""
    shapes = [node.meta["val"].shape for node in program.placeholders]
    return all(
        not isinstance(wanted, int) or wanted == size
        for tensor, shape in zip(inputs, shapes, strict=True)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def _refuse_random(program: Program, call: Call, inputs: list[Tensor]) -> None:
    """Raise `CaptureFailed` if the model itself gives something else at every run."""
    once, again = call.module(*inputs), call.module(*inputs)
    if all(relative_difference(a, b) <= tolerance(b.dtype) for a, b in zip(once, again, strict=True)):
        return
    node = next((n for n in program.graph.nodes if _is_random(n)), None)
    raise CaptureFailed(
        "the model is random: two runs on the same inputs differ",
        where=program.metadata["class"] if node is None else node.meta.get("fqn") or program.metadata["class"],
        why=node and f"it calls {node.target}, also in evaluation mode",
        hint="give F.dropout the module's own training flag; let a model that samples take its noise as an input",
    )


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments
    given = {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), node.args)) | node.kwargs
    return given.get("train", given.get("training")) is not False and given.get("p", given.get("dropout_p")) not in (0, 0.0)


def _default_positions(model: nn.Module, program: Program, call: Call) -> str:
    """What the model takes for the positions when it is not told: "arange" counts every column, "mask" those before padding."""
    ids = call.other_sizes[0][0]
    past = empty_cache(program, len(ids), ids.device)
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    errors = {}
    for name, positions in (
        ("arange", torch.arange(ids.shape[1]).expand(len(ids), -1)),
        ("mask", positions_of(mask, ids.shape[1])),
    ):
        found = program.module()(ids, mask, positions, *past)[0]
        errors[name] = relative_difference(found[mask.bool()], expected[mask.bool()])
    return "mask" if errors["mask"] < errors["arange"] else "arange"


def tolerance(dtype: torch.dtype) -> float:
    """How far two correct evaluations of one model may differ, relative to the largest value: some roundings of `dtype`."""
    return 64 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite when shapes differ or only one of the two is finite."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    scale = b[b.isfinite()].abs().amax().item() if b.isfinite().any() else 0.0
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).amax().item()
    return float("inf") if difference != difference else difference / max(scale, 1e-30)
