"""Watching a program run."""

import weakref

import torch
from families import Mlp, build

import fxc
from fxc.calibrate.hessian import Hessian
from fxc.data.decoder import decoder_inputs
from fxc.ir.names import layer_at
from fxc.ir.observe import inputs_of, observe, stops_at, values_at
from fxc.passes.float64 import in_float64, widened

LINEAR = torch.ops.aten.linear.default


def test_values_outputs_and_replacement():
    model, x = Mlp(), torch.randn(2, 40)
    program = fxc.capture(model, (x,))
    module = program.module()
    last = program.results[0].name
    first = next(n.name for n in program.graph.nodes if n.op == "call_function")
    with torch.no_grad():
        (expected,) = module(x)
        assert torch.equal(values_at(module, [x], {last})[last], expected)
        seen = []
        (same,) = observe(module, [x], {first: lambda value: seen.append(value)})
        assert torch.equal(same, expected) and len(seen) == 1
        (other,) = observe(module, [x], {first: torch.zeros_like})
    assert not torch.equal(other, expected)
    values = values_at(module, [x], {first, last})
    assert set(values) == {first, last}


def test_gradients_reach_a_watched_value():
    x = torch.randn(2, 40, requires_grad=True)
    program = fxc.capture(Mlp(), (x.detach(),))
    first = next(n.name for n in program.graph.nodes if n.op == "call_function")
    kept = {}
    (out,) = observe(program.module(), [x], {first: lambda value: kept.update(value=value)})
    (gradient,) = torch.autograd.grad(out.sum(), [kept["value"]])
    assert gradient.shape == kept["value"].shape and gradient.abs().sum() > 0


def linears_of(program):
    return program.graph.find_nodes(op="call_function", target=LINEAR)


def statistics(program, samples) -> tuple[dict[str, Hessian], set[torch.dtype]]:
    """What a calibrated algorithm does: H = 2/n X^T X of every layer, sample by sample; and the dtypes that were seen."""
    found: dict[str, Hessian] = {}
    earlier: list[weakref.ref] = []
    present: list[weakref.ref] = []
    dtypes = set()

    def each(node, x):
        assert all(ref() is None for ref in earlier), "an earlier sample is still held"
        present.append(weakref.ref(x))
        dtypes.add(x.dtype)
        found.setdefault(layer_at(program, node), Hessian(x.shape[-1], dtype=torch.float64)).add(x)

    module, watches = program.module(), inputs_of(linears_of(program), each)
    with torch.no_grad():
        for inputs in samples:
            observe(module, inputs, watches)
            earlier, present = present, []
    assert len(earlier) == len(linears_of(program))
    return found, dtypes


def test_statistics_of_layers_are_streamed_in_either_dtype():
    model, _ = build("qwen2")
    program = fxc.capture(model.bfloat16(), check=False)
    samples = [decoder_inputs(program, torch.arange(start, start + 12)[None]) for start in (5, 40, 90)]
    own, dtypes = statistics(program, samples)
    assert dtypes == {torch.bfloat16}
    wide, dtypes = statistics(in_float64(program), [[widened(t) for t in inputs] for inputs in samples])
    assert dtypes == {torch.float64}
    assert own.keys() == wide.keys() and len(own) == 15
    attention = "model.layers.0.self_attn"
    assert torch.equal(own[f"{attention}.q_proj"].mean, own[f"{attention}.v_proj"].mean), "they read the same"
    for name in own:
        near = (own[name].mean - wide[name].mean).norm() / wide[name].mean.norm()
        assert 0 < near < 0.1, (name, near)

    read = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, __: read.append(args[0][0].double()))
    for inputs in samples:
        model(inputs[0])
    hook.remove()
    x = torch.cat(read)
    torch.testing.assert_close(own["model.layers.1.mlp.down_proj"].mean, 2 / len(x) * x.T @ x, rtol=1e-2, atol=1e-2)


def test_gradients_by_what_a_layer_reads():
    """Inputs are integers: the gradient begins at what the layer reads, which takes its place for all that read it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    ids = torch.tensor([[1, 2, 3]])
    program = fxc.capture(model, (ids,))
    kept = {}

    def each(node, x):
        kept[node] = x.detach().requires_grad_()
        return kept[node]

    first, last = linears_of(program)
    (out,) = observe(program.module(), [ids], inputs_of([first], each))
    (gradient,) = torch.autograd.grad(out.sum(), [kept[first]])
    x = model[0](ids).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model[1:](x).sum(), [x])
    torch.testing.assert_close(gradient, expected)
    assert last not in kept


def test_where_a_program_stops():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    assert stops_at(program.module(), [torch.randn(3, 40)]) is None
    assert stops_at(program.module(), [torch.randn(3, 41)]) == linears_of(program)[0].name
