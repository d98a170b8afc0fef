"""Configurations that are tried on a GPU, by kernels that are interpreted or fake."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from importlib import util

import pytest
import torch
from repo import REPO
from toy_bench import TINY, Fixed, Toy

from fxc.kernel_bench import tune
from fxc.kernel_bench.shapes import Shape
from fxc.kernel_bench.weights import all_schemes, make

# The others run by their definition on CUDA.
WITH_KERNELS = [
    scheme
    for scheme in all_schemes()
    if not scheme.startswith(("int3", "int2", "int4_sparse24")) and not scheme.endswith("_static")
]

needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is for Linux")


@pytest.mark.slow
@needs_triton
def test_every_kernel_of_a_gpu_is_called_rightly_and_the_table_is_one_that_kernels_read(tmp_path, monkeypatch):
    command = [sys.executable, str(REPO / "tests" / "helpers" / "kernel_bench_interpreted.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = [row for row in found["rows"] if row["ours"]]
    assert {row["scheme"] for row in ours} == set(WITH_KERNELS) - {"int4_g32", "int4_g64"} and len(ours) == 38
    assert [(row["contender"], row["reason"]) for row in ours if row["state"] != "ok"] == []
    assert all(row["us"] == 10.0 and row["speedup"] == 1.0 and row["fraction"]["datasheet"] > 0 for row in ours)
    assert found["absent"] == {}
    assert len(found["failed"]) == 2 * 7, "of two configurations, one cannot be compiled"

    from fxc_kernels.cuda import dispatch
    from fxc_kernels.cuda.tile import Config

    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    dispatch.table.cache_clear()
    try:
        entry = dispatch.measured("nvidia-h200", "int8", 32, 128)[70]
    finally:
        dispatch.table.cache_clear()
    assert entry == dispatch.Measurement(Config(None, 32, 32, 64, 4, 1, split=2), 10.0, 10.0)


@needs_triton
@pytest.mark.parametrize("scheme", WITH_KERNELS)
def test_candidates_are_different_and_survive_the_table(scheme):
    from fxc_kernels.cuda import dispatch
    from fxc_kernels.cuda.tile import Config

    for m in (1, 2, 3, 4, 16, 64, 256, 2048, 8192):
        found = tune.candidates(scheme, m, 90)
        assert len(set(map(str, found))) == len(found) >= 1
        assert all(each is None or Config.parse(str(each)) == each for each in found)
        assert len(found) > 4 or m > 64
        assert not any(dispatch._misfit(scheme, m, each) for each in found if each), "what is written can be read"
        assert m > 4 or all(each.m >= m for each in found), "a GEMV takes no more rows than it is for"


class Inline:
    """A pool of processes that is this one."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, function, *given):
        future = Future()
        future.set_result(function(*given))
        return future


@needs_triton
def test_every_program_is_compiled_once_and_what_there_was_no_time_for_is_missing(monkeypatch):
    ran, ones = [], torch.ones

    def kernel_of(scheme):
        def kernel(x, config):
            ran.append((scheme, x.shape[0], str(config)))
            if config is not None and config.stages == 3:
                raise RuntimeError("out of resource: shared memory")

        return lambda weights: kernel

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(tune.cuda, "kernel_of", kernel_of)
    monkeypatch.setattr(tune.weights, "make", lambda *given: None)
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shapes, rows = (Shape("a", 64, 1024), Shape("b", 64, 1536), Shape("c", 32, 2048)), (1, 16, 2048)
    said: list[str] = []
    found = tune.precompile(("int8", "int4_g128"), shapes, rows, 90, said.append)
    wanted = [(scheme, m, c, k) for scheme in ("int8", "int4_g128") for m in rows for c in tune.candidates(scheme, m, 90)
              for k in (1024, 1536)]  # fmt: skip
    assert set(found) == {tune.compiled_as(*each) for each in wanted} and len(ran) == len(found) < len(wanted)
    assert any(why and "shared memory" in why for why in found.values()) and f"of {len(found)} programs" in said[0]
    assert tune.precompile(("int8",), shapes, rows, 90, said.append, deadline=0.0) == {}
    monkeypatch.setattr(tune, "_device_works", lambda: False)
    assert sum(map(bool, tune.precompile(("int8",), shapes[:1], (2048,), 90, said.append).values())) <= 16


@needs_triton
def test_what_was_not_compiled_in_time_is_not_tried(monkeypatch):
    from fxc_kernels.cuda.tile import Config

    def kernel_of(scheme):
        return lambda given: lambda x, config: torch.nn.functional.linear(x.float(), given.dense()).bfloat16()

    monkeypatch.setattr(tune.cuda, "kernel_of", kernel_of)
    few = [Config(None, 16, 32, 64, 4, stages) for stages in (2, 3, 4)]
    key = [tune.compiled_as("int8", 16, each, TINY.k) for each in few]
    timer = Fixed()
    choices = tune.Choices(Toy([], timer), 90, ("int8",), candidates=lambda *given: few,
                           compiled={key[1]: "out of resource"})  # fmt: skip
    held = {"int8": make("int8", TINY)}
    x = torch.randn(16, TINY.k).bfloat16()
    (best,) = choices.entrants(TINY, 16, x, held)
    assert timer.raced == [[str(few[0])]] and best.contender.name == "fxc int8, tuned"
    assert sorted(choices.failed.values()) == ["out of resource", "was not compiled in time"]

    def broken(scheme):
        raise RuntimeError("no memory")

    monkeypatch.setattr(tune.cuda, "kernel_of", broken)
    assert choices.entrants(TINY, 16, x, held) == [] and "RuntimeError: no memory" in choices.failed.values()
