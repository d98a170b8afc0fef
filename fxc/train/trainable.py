"""A program as a module that can be trained, and what was trained as the program again.

Every product with a packed weight becomes the float operator that it stands for, on a weight that a latent gives
(`fxc.train.latent`); what it rounds its activations to is rounded as before, with the gradient of numbers that are not rounded.
Trained are what layers read as their weight or bias, and what a value is multiplied by or added to channel by channel: gains of
norms, scales of layers. Tables of positions, statistics of batch norms and other constants stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxc.errors import UsageError
from fxc.ir.call import Call
from fxc.ir.names import layer_of, parts_of
from fxc.ir.program import Program
from fxc.ir.thinned import thinned
from fxc.schemes.scheme import product_of, scheme_of
from fxc.train.attention import faster
from fxc.train.batch_norm import BatchNorm
from fxc.train.checkpoint import in_pieces
from fxc.train.latent import Cast, Float, Latent, Rounded, packed, through
from fxc.train.noise import Noise, branches
from fxc.train.plan import Kind

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Arguments of operators that are parameters of a layer, as their schemas call them.
PARAMETERS = ("weight", "bias")
BATCH_NORM = aten.batch_norm.default
BY_CHANNEL = (aten.mul.Tensor, aten.add.Tensor)


class Trainable(nn.Module):
    """`program` as a module: its inputs one by one, a tuple of its outputs back. It is not changed before `write`.

    latents: the name of a constant, or of the one that holds a packed weight's numbers -> what is trained of it;
    layers: the same names -> the layer that each is of, as users call it.
    """

    def __init__(
        self,
        program: Program,
        floats: Mapping[str, Tensor] | None = None,
        *,
        layer_drop: float = 0.0,
        dropout: float = 0.0,
        batch_statistics: bool = False,
        checkpointing: bool = False,
    ) -> None:
        """floats: weights that are packed in the program, as they were just before, by name: they tell what was zero, and
        towards which side a level was rounded. In training (`train()`): layer_drop, dropout: what `Noise` leaves out;
        batch_statistics: batch norms go by the statistics of the batch, and those that they keep follow (`state`);
        checkpointing: blocks are run again for their gradients, and what they compute is not kept."""
        super().__init__()
        self.program = program
        self.noise = Noise(layer_drop, dropout) if layer_drop or dropout else None
        self.norms: dict[str, BatchNorm] | None = {} if batch_statistics else None
        self.groups: dict[str, dict[str, str]] = {}
        self.latents: dict[str, Latent] = {}
        self.layers: dict[str, str] = {}
        for node in program.graph.nodes:
            self._find(node, floats or {})
        if not self.latents:
            raise UsageError("there is nothing to train in it", why="no layer of it reads a weight that is a constant")
        self._modules_of = nn.ModuleList(self.latents.values())
        self._module = self._built()
        self.checkpointing = checkpointing
        self._runs = self._in_pieces(self._module, self._made)
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._runs(*inputs)

    def also(self, nodes: Sequence[fx.Node]) -> Callable[..., tuple[Tensor, ...]]:
        """`forward` that gives these values of the program besides, after its outputs."""
        graph, copies = fx.Graph(), {}
        outputs = graph.graph_copy(self._module.graph, copies)
        graph.output((*outputs, *(copies[self._made[node]] for node in nodes)))
        module = fx.GraphModule(self._module, graph, class_name="Trainable")
        return self._in_pieces(module, {node: copies.get(made) for node, made in self._made.items()})

    @property
    def module(self) -> fx.GraphModule:
        """The graph that runs, in which a latent is called where its weight is read first (`latent_at`)."""
        return self._module

    def latent_at(self, node: fx.Node) -> str | None:
        """The name of the latent that a node of `module` calls, if it does."""
        return self._targets.get(node.target) if node.op == "call_module" else None

    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names of constants."""
        parameters = {
            f"{name}:{own}": parameter
            for name, latent in self.latents.items()
            for own, parameter in latent.named_parameters()
        }
        return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    @property
    def kinds(self) -> dict[str, Kind]:
        """What each parameter is (`Latent.kind`), by the same names."""
        named = self.latents.items()
        return {f"{name}:{own}": latent.kind[own] for name, latent in named for own, _ in latent.named_parameters()}

    @property
    def state(self) -> list[Tensor]:
        """What changes in training besides parameters: the statistics of batch norms."""
        return [each for norm in (self.norms or {}).values() for each in norm.buffers()]

    @property
    def rounds_activations(self) -> bool:
        """Whether a product of it does."""
        return bool(self._roundings)

    def rounds(self, does: bool) -> None:
        """Whether packed weights, and activations, are rounded while it trains, as they are at first."""
        for each in self.modules():
            if isinstance(each, (Rounded, Cast, Rounding)):
                each.rounds = does

    def train_only(self, kinds: Collection[str]) -> None:
        """Let the parameters of other kinds (`Latent.kind`) stay as they are."""
        for latent in self.latents.values():
            latent.settle()
            for own, parameter in latent.named_parameters():
                parameter.requires_grad_(latent.kind[own] in kinds)

    def write(self, program: Program | None = None) -> None:
        """Put what was trained into `program`, the one it was made of or a copy: packed again where it was packed."""
        constants = (program or self.program).constants
        for name, latent in self.latents.items():
            for part, tensor in latent.stored().items():
                constants[self.groups[name].get(part, name)] = tensor
        for norm in (self.norms or {}).values():
            constants.update(norm.stored())

    def _in_pieces(self, module: fx.GraphModule, made: Mapping[fx.Node, fx.Node]) -> fx.GraphModule:
        return in_pieces(module, self.program, made) if self.checkpointing else module

    def _find(self, node: fx.Node, known: Mapping[str, Tensor]) -> None:
        if node.op != "call_function":
            return
        constants = self.program.constants
        scheme, parts = scheme_of(node.target), parts_of(node)
        if scheme is not None:
            name = parts[scheme.numbers]
            if name not in self.latents:
                layer = layer_of(node, name)
                tensors = {part: constants[each] for part, each in parts.items()}
                is_thinned = layer in thinned(self.program)
                self.latents[name] = packed(scheme, tensors, known.get(f"{layer}.weight"), is_thinned)
                self.groups[name], self.layers[name] = parts, layer
        for fqn in self._read_by(node, parts):
            if fqn not in self.latents and constants[fqn].dtype in FLOATS:
                self.latents[fqn] = Float(constants[fqn])
                self.groups[fqn], self.layers[fqn] = {}, layer_of(node, fqn).removesuffix(".bias")

    def _read_by(self, node: fx.Node, parts: Mapping[str, str]) -> list[str]:
        """The constants that `node` reads as parameters of a layer."""
        if node.target in BY_CHANNEL:
            read = [each for each in node.args if isinstance(each, fx.Node) and each.op == "get_attr"]
            read = [each for each in read if _is_by_channel(self.program.constants[each.target])]
        elif isinstance(node.target, torch._ops.OpOverload):
            given = (Call(node).get(name) for name in PARAMETERS)
            read = [each for each in given if isinstance(each, fx.Node) and each.op == "get_attr"]
        else:
            read = []
        return [each.target for each in read if each.target not in parts.values()]

    def _built(self) -> fx.GraphModule:
        graph = fx.Graph()
        self._roundings: dict[str, nn.Module] = {}
        weights: dict[str, fx.Node] = {}
        self._targets = {f"latent_{number}": name for number, name in enumerate(self.latents)}
        targets = {name: target for target, name in self._targets.items()}
        fixed = {name: f"constant_{number}" for number, name in enumerate(self.program.constants)}
        made = self._made = {}
        noisy = set(branches(self.program)) if self.noise else ()
        root: dict[str, object] = {}
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and node.target in self.latents:
                continue
            for name in self._latents_of(node):
                weights[name] = weights.get(name) or graph.call_module(targets[name])
            for each in node.all_input_nodes:
                if each.op == "get_attr" and each.target in weights and each not in made:
                    made[each] = _as(graph, weights[each.target], self.program.constants[each.target].dtype)
            if self.norms is not None and node.target is BATCH_NORM and (norm := BatchNorm.of(self.program, node)):
                target = f"norm_{len(self.norms)}"
                self.norms[node.name] = root[target] = norm
                made[node] = graph.call_module(target, tuple(_mapped(node.args[at], made) for at in range(3)))
            elif node.op == "call_function" and scheme_of(node.target) is not None:
                made[node] = self._plain(graph, node, weights, made)
            else:
                made[node] = graph.node_copy(node, lambda each: made[each])
                if node.op == "get_attr":
                    made[node].target = fixed[node.target]
            if node in noisy:
                root["noise"] = self.noise
                made[node] = graph.call_module("noise", (made[node],))
        for node in reversed(graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target is aten.to.dtype):
                graph.erase_node(node)
        read = {node.target for node in self.program.graph.find_nodes(op="get_attr")}
        root |= {fixed[name]: self.program.constants[name].detach() for name in read}
        root |= {targets[name]: self.latents[name] for name in weights}
        return faster(fx.GraphModule(root | self._roundings, graph, class_name="Trainable"))

    def _latents_of(self, node: fx.Node) -> list[str]:
        """The latents whose weights a node of the program reads."""
        names = [each.target for each in node.all_input_nodes if each.op == "get_attr"]
        if node.op == "call_function" and (scheme := scheme_of(node.target)) is not None:
            names.append(parts_of(node)[scheme.numbers])
        return [name for name in dict.fromkeys(names) if name in self.latents]

    def _plain(
        self, graph: fx.Graph, node: fx.Node, weights: Mapping[str, fx.Node], made: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        """The float operator that a product with a packed weight stands for."""
        scheme, product, read = scheme_of(node.target), product_of(node.target), Call(node)
        weight = weights[parts_of(node)[scheme.numbers]]
        first = "x" if "x" in read else "indices"
        x = made[read[first]]
        dtype = read.get("dtype") or node.meta["val"].dtype
        if product.rounded is not None:
            learned = {name: read[name] for name in product.learned}
            x = graph.call_module(f"rounding_{len(self._roundings)}", (x,), learned)
            self._roundings[x.target] = Rounding(product.rounded)
        given = {"input": x, "x": x, "weight": _as(graph, weight, dtype), "indices": x}
        schema = product.layer._schema.arguments
        taken = [given[a.name] if a.name in given else _mapped(read.get(a.name), made) for a in schema]
        while taken and taken[-1] is None:
            taken.pop()
        result = graph.call_function(product.layer, tuple(taken))
        result.meta = dict(node.meta)
        return result


class Rounding(nn.Module):
    """x as a product rounds it, in its dtype, with the gradient of x."""

    rounds = True

    def __init__(self, rounded: Callable[..., Tensor]) -> None:
        super().__init__()
        self.rounded = rounded

    def forward(self, x: Tensor, **learned: float) -> Tensor:
        if not self.rounds:
            return x
        return through(x, lambda value: self.rounded(value, **learned).to(value.dtype))


def _as(graph: fx.Graph, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`value`, which is float32, in another dtype."""
    return value if dtype == torch.float32 else graph.call_function(aten.to.dtype, (value, dtype))


def _mapped(argument: object, made: Mapping[fx.Node, fx.Node]) -> object:
    return fx.node.map_arg(argument, lambda each: made[each])


def _is_by_channel(constant: Tensor) -> bool:
    """Whether a constant has one number for each channel: all of its dimensions but one are 1."""
    return constant.ndim > 0 and constant.numel() == max(constant.shape) and constant.numel() > 1


