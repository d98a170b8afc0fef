"""What example inputs are: integers, flags and complex numbers that become floats, and views of other tensors."""

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import FxcError

GENERATOR = torch.Generator().manual_seed(0)


class IntoLinear(nn.Module):
    shape = (4, 64)

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 48)

    def forward(self, x):
        return self.head(self.layer(x.float() / 2).relu())


class IntoLinearByTo(IntoLinear):
    def forward(self, x):
        return self.head(self.layer(x.to(self.layer.weight.dtype)))


class IntoLinearOfTokens(IntoLinear):
    shape = (2, 5, 64)


class IntoTwo(IntoLinear):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(64, 64)

    def forward(self, x):
        x = x.float()
        return self.head(self.layer(x) + self.other(x))


class IntoConvolution(nn.Module):
    shape = (2, 3, 16, 16)

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 48)

    def forward(self, x):
        return self.head(self.layer(x.float() / 2).relu().mean((2, 3)))


class IntoConvolutionOfSound(nn.Module):
    shape = (2, 8, 32)

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv1d(8, 16, 3), nn.Linear(16, 48)

    def forward(self, x):
        return self.head(self.layer(x.float()).mean(-1))


class IntoEmbedding(nn.Module):
    shape = (4, 6)

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Embedding(8, 64), nn.Linear(64, 48)

    def forward(self, x):
        return self.head(self.layer(x.long()))


class AbsoluteIntoLinear(IntoLinear):
    def forward(self, x):
        return self.head(self.layer(x.abs()))


class PartsIntoLinear(IntoLinear):
    def forward(self, x):
        return self.head(self.layer(x.real)) + self.head(self.layer(torch.view_as_real(x)[..., 1]))


MODELS = [IntoLinear, IntoLinearByTo, IntoLinearOfTokens, IntoTwo, IntoConvolution, IntoConvolutionOfSound, IntoEmbedding]
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def near(found, expected, tolerance=0.1):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-6


def works(model, x, tmp_path, passes="int8"):
    compiled = fxc.optimize(model, (x,), passes)
    compiled.save(tmp_path / "a")
    with torch.no_grad():
        for each in (compiled, fxc.load(tmp_path / "a"), fxc.load(tmp_path / "a", keep_compressed=True)):
            for given in (x, x[:1], torch.cat([x, x, x])):
                near(each(given), model(given), 0.1)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_and_flags_become_floats(kind, dtype, tmp_path):
    torch.manual_seed(0)
    works(kind().eval(), torch.randint(0, 2, kind.shape, generator=GENERATOR).to(dtype), tmp_path)


@pytest.mark.parametrize("kind", [AbsoluteIntoLinear, PartsIntoLinear], ids=lambda kind: kind.__name__)
def test_complex_numbers(kind, tmp_path):
    torch.manual_seed(0)
    try:
        works(kind().eval(), torch.randn(4, 64, dtype=torch.complex64, generator=GENERATOR), tmp_path)
    except FxcError as error:
        assert error.hint, error


class TwoInputs(IntoLinear):
    def forward(self, x, y):
        return self.head(self.layer(x)) + self.head(self.layer(y))


class WritesThroughViews(IntoLinear):
    """Needs torch's functionalization, which asks a view for the tensor that it is a view of."""

    def forward(self, x, y):
        z = x.new_empty(x.shape)
        a, b = z[..., :32], z[..., 32:]
        a.copy_(x[..., :32])
        b.copy_(y[..., 32:] * 2)
        return self.head(self.layer(z))


BASE = torch.randn(8, 64, generator=GENERATOR)
VIEWS = {
    "slices of rows": lambda: (BASE[:4], BASE[4:]),
    "slices of columns": lambda: (torch.randn(4, 200)[:, :64], torch.randn(4, 128)[:, 64:]),
    "every second": lambda: (BASE[::2], torch.randn(4, 128)[:, ::2]),
    "transposed": lambda: (torch.randn(64, 4).t(), torch.randn(64, 4).T),
    "expanded": lambda: (torch.randn(1, 64).expand(4, 64), torch.randn(64).expand(4, 64)),
    "two views of one": lambda: (BASE[:4], BASE[2:6]),
    "one twice": lambda: (BASE, BASE),
    "a view and its base": lambda: (BASE, BASE.view(8, 64)),
    "unbound": lambda: tuple(torch.randn(2, 4, 64).unbind(0)),
    "chunks": lambda: torch.randn(4, 128).chunk(2, dim=1),
    "squeezed": lambda: (torch.randn(4, 1, 64)[:, 0], torch.randn(1, 4, 64).squeeze(0)),
    "leaves with gradients": lambda: (torch.randn(4, 64, requires_grad=True), nn.Parameter(torch.randn(4, 64))),
    "results with gradients": lambda: (torch.randn(4, 64, requires_grad=True) * 2, torch.randn(4, 64)),
    "views of leaves": lambda: (torch.randn(8, 64, requires_grad=True)[:4], nn.Parameter(torch.randn(8, 64))[4:]),
    "of numpy": lambda: (torch.from_numpy(BASE[:4].numpy()), torch.from_numpy(BASE.numpy())[4:]),
    "made in inference mode": lambda: in_inference_mode(),
    "detached": lambda: (BASE[:4].detach(), BASE[4:].data),
    "from a list": lambda: [BASE[:4], BASE[4:]],
    "flipped": lambda: (BASE.flip(0), torch.randn(64, 8).t().flip(1)),
}  # fmt: skip


def in_inference_mode():
    with torch.inference_mode():
        return torch.randn(8, 64)[:4], torch.randn(4, 64)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("kind, name", [
    *((TwoInputs, name) for name in VIEWS),
    *((WritesThroughViews, name) for name in ("slices of columns", "expanded", "two views of one", "views of leaves")),
])  # fmt: skip
def test_an_example_may_be_a_view(kind, name):
    torch.manual_seed(0)
    model, given = kind().eval(), VIEWS[name]()
    before = [t.detach().clone() for t in given]
    compiled = fxc.optimize(model, given, "int8")
    with torch.no_grad():
        near(compiled(*given), model(*given))
        other = torch.randn(3, 64), torch.randn(3, 64)
        near(compiled(*other), model(*other))
    assert all(torch.equal(a, b) for a, b in zip(given, before))
    assert all(t.grad is None for t in given if t.is_leaf)


@pytest.mark.parametrize("length", [9, 12])
def test_ids_cut_from_longer_ones(length):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 48)).eval()
    ids = torch.randint(0, 50, (4, 12), generator=GENERATOR)
    compiled = fxc.optimize(model, (ids[:, :length],), "int8")
    for given in (ids[:, :length], ids[:2, :5], ids[:, 1:2]):
        near(compiled(given), model(given).detach())
