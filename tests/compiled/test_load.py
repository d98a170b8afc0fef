"""A compiled model under load: many threads that generate at once, many calls, many loads, two models in one process."""

import gc
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny import save

import fxc

THREADS, ROUNDS = 16, 3


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("load")
    made = []
    for name, passes in (("llama", "int8"), ("qwen2", "int4:group=32")):
        out = place / f"{name}-out"
        fxc.optimize(str(save(name, place / name)), passes=passes, budget=9.0, layer_budget=9.0).save(out)
        made.append(out)
    return made


def prompt(number: int) -> torch.Tensor:
    return torch.randint(3, 300, (1, 3 + number % 4), generator=torch.Generator().manual_seed(number))


def generated(model, number: int) -> list[int]:
    return model.generate(input_ids=prompt(number), max_new_tokens=5, do_sample=False)[0].tolist()


def test_sixteen_threads_generate_what_single_calls_do(artifacts):
    """Two models in one process, each called by half of the threads, and both of them first called there."""
    models = [fxc.load(each, keep_compressed=True) for each in artifacts]
    found: dict[tuple[int, int], list[int]] = {}
    begin = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        begin.wait()
        for step in range(ROUNDS):
            found[thread, step] = generated(models[thread % 2], thread + step)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == THREADS * ROUNDS, "a thread broke off"
    for (thread, step), tokens in found.items():
        assert tokens == generated(models[thread % 2], thread + step)


def resident() -> int:
    """Bytes of this process's pages in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth(work, warm: int, times: int) -> tuple[int, int]:
    """Bytes by which Python's objects and the process grew over `times` calls of `work`, after `warm` others."""
    for _ in range(warm):
        work()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0], resident()
        for _ in range(times):
            work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before[0], resident() - before[1]
    finally:
        tracemalloc.stop()


def test_memory_is_flat_over_many_calls(artifacts):
    model, ids = fxc.load(artifacts[0], keep_compressed=True), prompt(1)
    objects, pages = growth(lambda: model(input_ids=ids, use_cache=False), 20, 300)
    assert objects < 100_000 and pages < 20_000_000, (objects, pages)


def test_memory_is_flat_over_many_loads(artifacts):
    def load() -> None:
        fxc.load(artifacts[0], keep_compressed=True)(input_ids=prompt(1), use_cache=False)

    objects, pages = growth(load, 4, 12)
    assert objects < 1_500_000 and pages < 60_000_000, (objects, pages)
