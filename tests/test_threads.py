"""Models are compiled, loaded and called in several threads of one process: results are right, and nobody's modules change."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import CaptureFailed


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class Residual(nn.Module):
    """A module that is there twice, which torch.export traces through proxies of modules."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.GELU())
        self.again = self.inner

    def forward(self, x):
        return x + self.again(self.inner(x))


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 64)


@pytest.fixture(autouse=True)
def switch_often():
    """Threads change places as often as they can, so that what they share is seen halfway."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.exception() or f.result() for f in [pool.submit(function) for function in functions]]


def test_four_compilations_at_once_one_of_which_is_refused(x):
    models = [mlp().eval(), Residual().train(), Refused().train(), mlp().train()]
    models[3][0].eval()
    training = [[m.training for m in model.modules()] for model in models]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    expected = [copy.deepcopy(model).eval()(x).detach() for model in models]

    results = in_threads(*(lambda m=m: fxc.optimize(m, (x,), "int8")(x) for m in models))
    assert isinstance(results[2], CaptureFailed), results[2]
    for number in (0, 1, 3):
        assert relative(results[number], expected[number]) < 0.05
    assert [[m.training for m in model.modules()] for model in models] == training
    for model, state, result in zip(models, states, expected):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert torch.equal(model.eval()(x), result)


def test_compiled_and_loaded_models_run_while_others_are_compiled(x, tmp_path):
    compiled = fxc.optimize(mlp().eval(), (x,), "int8")
    compiled.save(tmp_path / "a")
    expected, stored = compiled(x), pickle.dumps(compiled)

    def load_and_run():
        return all(torch.equal(fxc.load(tmp_path / "a")(x), expected) for _ in range(4))

    def unpickle_and_run():
        return all(torch.equal(pickle.loads(stored)(x), expected) for _ in range(4))

    def compile_and_run():
        model = Residual().eval()
        return relative(fxc.optimize(model, (x,), "int8")(x), model(x)) < 0.05

    assert in_threads(load_and_run, compile_and_run, unpickle_and_run, compile_and_run) == [True] * 4


@pytest.mark.parametrize("make", [mlp, Residual])
def test_another_threads_model_trains_and_runs_meanwhile(make, x):
    """torch.export replaces nn.Module.__call__ for the whole process while it traces."""
    plain, done, wrong = make(), threading.Event(), []
    evaluated = copy.deepcopy(plain).eval()
    expected, calls, kinds = evaluated(x).detach(), 0, {type(module) for module in plain.modules()}

    def serve():
        nonlocal calls
        while not done.is_set():
            calls += 1
            if (error := relative(evaluated(x), expected)) > 1e-6:
                wrong.append(error)
            plain.zero_grad()
            plain(x).sum().backward()
            if any(p.grad is None for p in plain.parameters()):
                wrong.append("no gradients")
            if {type(module) for module in plain.modules()} != kinds:
                wrong.append("a proxy of a module")

    server = threading.Thread(target=serve)
    server.start()
    try:
        model = Residual().eval()
        assert relative(fxc.optimize(model, (x,), "int8")(x), model(x)) < 0.05
    finally:
        done.set()
        server.join()
    assert calls and not wrong, wrong[:3]


def test_one_compiled_model_called_first_in_many_threads(x):
    compiled = fxc.optimize(mlp().eval(), (x,), "int8")
    results = in_threads(*[lambda: compiled(x)] * 4)
    assert all(torch.equal(result, results[0]) for result in results)
