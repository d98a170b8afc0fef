"""Kernels in C++ take torch's number of threads, and models that run at once share it."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from repo import REPO
from torch import nn

import fxc
from fxc_kernels.cpu import native, native_int4

COUNTED = """
import os, torch
torch.set_num_threads(1)  # what comes first begins none
from fxc.schemes import int4
from fxc_kernels.cpu import native, native_int4
qweight, scale, _ = int4.quantize_weight(torch.zeros(512, 64), 32, True)
packed = native_int4.pack(lambda rows: int4.unpack(qweight[rows], 4), 4, scale, None)
x = torch.ones(64, 64)
tasks = lambda: set(os.listdir("/proc/self/task"))
native_int4.why_not()
before = tasks()
torch.set_num_threads({threads})
with native.Running():
    {more}
    native_int4.native_int4_linear(x, *packed, None, 512, 32)
print(len(tasks() - before))
"""


@pytest.fixture(autouse=True)
def there_is_one():
    if why := native_int4.why_not():
        pytest.skip(why)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not say which threads there are")
@pytest.mark.parametrize(
    ("threads", "more", "begun"), [(1, "", 0), (2, "", 1), (3, "", 2), (4, "native.Running().__enter__()", 1)]
)
def test_a_kernel_begins_as_many_threads_as_it_was_given(threads, more, begun):
    command = [sys.executable, "-c", COUNTED.format(threads=threads, more=more)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == begun


class Meeting(nn.Module):
    """In the place of a lowered module: all threads are inside of it at once, and each says how many threads kernels have."""

    def __init__(self, count):
        super().__init__()
        self.barrier, self.seen = threading.Barrier(count, timeout=60), []

    def forward(self, *tensors):
        self.barrier.wait()
        self.seen.append(native.threads())
        self.barrier.wait()
        return tensors


def test_models_in_two_threads_share_the_cores_and_give_them_back():
    torch.manual_seed(0)
    x = torch.randn(70, 64)
    models = [fxc.optimize(nn.Linear(64, 64), (x,), verify=False) for _ in range(2)]
    try:
        torch.set_num_threads(2)
        assert native.threads() == 2
        alone = Meeting(1)
        models[0].run([x], alone)
        both = Meeting(2)
        running = [threading.Thread(target=model.run, args=([x], both)) for model in models]
        for each in running:
            each.start()
        for each in running:
            each.join()
        assert alone.seen == [2] and both.seen == [1, 1] and native.threads() == 2
        with pytest.raises(ZeroDivisionError):
            models[0].run([x], lambda *tensors: 1 // 0)
        assert native.threads() == 2, "also after one that failed"
    finally:
        torch.set_num_threads(1)


def test_two_models_called_in_two_threads_give_what_each_gives_alone():
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    models = []
    for spec in ("int8", "int4:group=32"):
        models.append(fxc.optimize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), (x,), spec, verify=False))
        models[-1].keep_compressed = True  # or two calls may run in two forms
    given = [torch.randn(1 + at % 40, 64) for at in range(60)]
    expected = [[model(each) for each in given] for model in models]
    wrong = []

    def call(model, results):
        torch.set_num_threads(2)
        for each, result in zip(given, results, strict=True):
            if not torch.equal(model(each), result):
                wrong.append(each.shape)

    try:
        running = [threading.Thread(target=call, args=pair) for pair in zip(models * 2, expected * 2, strict=True)]
        for each in running:
            each.start()
        for each in running:
            each.join()
    finally:
        torch.set_num_threads(1)
    assert not wrong
