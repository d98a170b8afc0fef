"""Weights that are shared, that only seem to be, and modules that are called twice: one decision each, saved and loaded so."""

import pytest
import torch
from torch import nn

import fxc

IDS = (torch.arange(10).reshape(2, 5),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(96, 64), nn.Linear(64, 64), nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids))))


@pytest.mark.fault(1)
@pytest.mark.parametrize("spec", ["", "int8", "int8:embeddings=int8", "int4:group=32:embeddings=int4", "sparsify", "pack"])
def test_a_tied_table_is_saved_once_and_gives_the_same_numbers(spec, tmp_path):
    made = fxc.optimize(Tied(), IDS, spec, budget=9.0, layer_budget=9.0)
    made.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out", keep_compressed=True)
    for name, tensor in made.program.constants.items():
        assert torch.equal(tensor, loaded.program.constants[name])
    expected, found = made.program.module()(*IDS)[0], loaded.program.module()(*IDS)[0]
    assert torch.equal(expected, found)
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert stored < made.program.nbytes() + 5000, "a side of the table was stored beside the other"


class Slices(nn.Module):
    """Three layers over views of one buffer, and two over equal numbers: none of them is tied to another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = torch.randn(96, 32)
        self.q, self.k, self.v, self.w = (nn.Linear(32, 32, bias=False) for _ in range(4))
        for layer, part in zip((self.q, self.k, self.v), whole.chunk(3)):
            layer.weight = nn.Parameter(part)
        self.w.weight = nn.Parameter(whole[:32].clone())

    def forward(self, x):
        return self.q(x) + 2 * self.k(x) + 3 * self.v(x) + 4 * self.w(x)


@pytest.mark.fault(2)
@pytest.mark.parametrize("spec", ["", "int8", "sparsify:only=q"])
def test_views_and_copies_are_not_tied(spec, tmp_path):
    x = torch.randn(4, 32)
    made = fxc.optimize(Slices(), (x,), spec)
    assert made.program.aliases == {} and len({n.split(".")[0] for n in made.program.constants}) == 4
    made.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    assert all(torch.equal(t, loaded.program.constants[n]) for n, t in made.program.constants.items())
    if spec == "sparsify:only=q":
        assert int((made.program.constants["q.weight"] == 0).sum()) == 512
        assert not any((made.program.constants[f"{n}.weight"] == 0).any() for n in "kvw")


class Twice(nn.Module):
    """A layer that meets small numbers at first, and then large ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(6 * self.layer(x))


@pytest.mark.fault(3)
@pytest.mark.parametrize("spec", ["int8:mode=static:observer=minmax:smooth=false", "fp8:mode=static"])
def test_a_range_covers_what_both_calls_of_a_module_read(spec):
    data = [(torch.randn(2, 32, generator=torch.Generator().manual_seed(n)),) for n in range(8)]
    made = fxc.optimize(Twice(), data[0], spec, calib=data, budget=9.0, layer_budget=9.0)
    calls = [n for n in made.program.graph.nodes if n.op == "call_function" and n.target.namespace == "fxc"]
    assert len(calls) == 2
    weights = {n.args[1].target for n in calls}
    assert len(weights) == 1, "the weight was packed twice"
    expected = Twice()(*data[0])
    found = made.program.module()(*data[0])[0]
    assert (found - expected).norm() / expected.norm() < 0.1, "the second call is cut off"
