"""nn.Module -> Program.

A model is captured with `torch.export` at the ATen level, without decomposition, with every batch, sequence and cache
length dynamic. A causal language model becomes one graph that serves prefill and decode: the cache is among its inputs and
outputs as plain tensors. The captured program is then run at sizes that were not traced and compared with the model.

calls (what to trace) -> trace (torch.export) -> flatten, legalize (a pure flat graph) -> Program -> check (against the model)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

import fxc.schemes  # noqa: F401 - what is captured may become its operators
from fxc.data.samples import keep_examples
from fxc.errors import CaptureFailed, FxcError, first_line
from fxc.frontend.arguments import defaults, parameter_names
from fxc.frontend.calls import Call, calls_of, shapes_alone
from fxc.frontend.check import compare, counts_positions
from fxc.frontend.flatten import flat_graph, unstack
from fxc.frontend.fold import folded
from fxc.frontend.legalize import legalize
from fxc.frontend.rotary import functional_rotary
from fxc.frontend.trace import culprit, deterministic_graphs, functionalized, trace
from fxc.ir.cache import KIND
from fxc.ir.edit import sweep
from fxc.ir.infer import fake_constant, fake_mode_of
from fxc.ir.program import Input, Program, Signature, is_name
from fxc.neutral import one_at_a_time


@one_at_a_time
def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    check: bool = True,
    reads: bool = True,
) -> Program:
    """Capture `model` as a Program. The model is not changed; the program's constants share its memory.

    example_inputs: a tuple of positional arguments or a dict of keyword arguments (nested lists, tuples and dicts of
    tensors are allowed). May be None for a Hugging Face model, whose inputs follow from its configuration. The first
    dimension of every example tensor is taken as dynamic where the model permits, the sequence dimensions of token inputs,
    and those others that the model is seen to take at other sizes: frames, height and width.
    dynamic_shapes: for some inputs, which dimensions vary: {"x": (0, 1)}, or in torch.export's form; no others of theirs do.
    check: run the program at other sizes and compare it with the model. reads: call the model before it is traced, which reads
    all of its weights; without that no weight of a language model is read.

    Raises `CaptureFailed` when the model's control flow depends on its data, it calls an operator that no program may
    call or a dimension that is asked for cannot vary; `UsageError` when example inputs are needed.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), deterministic_graphs(), folded(model), functional_rotary(model):
            example_inputs = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, example_inputs)
            program = _freest(model, calls_of(model, example_inputs, dynamic_shapes, reads), check, reads)
    finally:
        for module in training:
            module.training = True
    return program


def _freest(model: nn.Module, calls: Iterator[Call], check: bool, reads: bool) -> Program:
    """The program of the first call that can be captured; the last one's error where none can."""
    failure = None
    for call in calls:
        try:
            program = _export(model, call, reads)
            _check_asked(program, call)
            if call.loses_cache:
                program.metadata["does_not_generate"] = failure.what if failure else call.loses_cache
            if check and not program.is_on_meta:
                taken = compare(program, call)
                if call.kind == KIND:
                    program.metadata["positions"] = counts_positions(model, program, call)
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


def _export(model: nn.Module, call: Call, reads: bool) -> Program:
    names = list(call.inputs)
    first_names = _first_names(model)
    try:
        # It tells the output's structure, which tracing does not let a module keep.
        with shapes_alone(reads):
            call.module(*call.inputs.values())
    except FxcError:
        raise
    except Exception as error:  # it is the model's own code that runs here
        raise CaptureFailed(
            f"the model itself fails on the example inputs: {first_line(error)}",
            where=type(model).__name__,
            hint="give example_inputs that the model takes",
        ) from error
    try:
        exported = trace(call)
    except Exception as error:
        raise CaptureFailed(
            first_line(error),
            where=culprit(error, model),
            why="torch.export could not trace it",
            hint="if its control flow depends on tensor values, compile the part that does not; "
            "set TORCH_LOGS=+dynamic for torch's own account",
        ) from error
    try:
        graph, constants = _pure_graph(exported, call)
    except CaptureFailed as impure:
        # What it writes through views, torch's own functionalization can resolve; it takes as long as tracing again.
        try:
            functional = functionalized(exported, model)
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
    metadata = {"class": type(model).__name__, "kind": call.kind, "parameters": parameter_names(model)}
    if call.kind != KIND and (meanings := defaults(model, call)):
        metadata["defaults"] = meanings
    program = Program(graph, store, aliases, signature, metadata)
    _retype(program)
    sweep(program)
    return program


def _pure_graph(exported: torch.export.ExportedProgram, call: Call) -> tuple[fx.Graph, dict[str, Tensor]]:
    graph, constants = flat_graph(exported.module(check_guards=False))
    if call.stacks:
        unstack(graph, call.stacks)
    legalize(graph)
    return graph, constants


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
