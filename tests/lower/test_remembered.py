"""What is remembered of measurements, and that nothing that goes wrong with it matters."""

import json

import pytest
import torch

from fxc.lower import choose, remembered
from fxc.lower.candidates import FLOAT, INT8
from fxc_kernels.cpu import int8_product

TIMING = {1: (1e-3, 2e-3), 16: (1e-3, 4e-3)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FXC_CACHE", str(tmp_path))
    choose.measure.cache_clear()
    yield tmp_path
    choose.measure.cache_clear()


def test_what_is_kept_is_recalled_for_the_same_threads_alone(folder):
    assert remembered.recall("a", 2) is None
    remembered.keep("a", 2, TIMING)
    remembered.keep("b", 2, TIMING)
    assert remembered.recall("a", 2) == remembered.recall("b", 2) == TIMING
    assert remembered.recall("a", 3) is None
    assert len(list(folder.iterdir())) == 1


DAMAGED = ["", "{", "[]", '{"layers": 3}', '{"layers": {"a": {"1": [0, 1]}}}', '{"layers": {"a": {"x": 1}}}']


@pytest.mark.fault(29)
@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_none_and_is_written_anew(folder, content):
    remembered.keep("a", 2, TIMING)
    (path,) = folder.iterdir()
    path.write_text(content)
    assert remembered.recall("a", 2) is None
    remembered.keep("a", 2, TIMING)
    assert remembered.recall("a", 2) == TIMING


def test_off_and_folders_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setenv("FXC_CACHE", "off")
    remembered.keep("a", 2, TIMING)
    assert remembered.recall("a", 2) is None and not list(folder.iterdir())
    (folder / "file").write_text("")
    monkeypatch.setenv("FXC_CACHE", str(folder / "file"))
    remembered.keep("a", 2, TIMING)
    assert remembered.recall("a", 2) is None


def test_a_level_of_instructions_is_a_machine_of_its_own(monkeypatch):
    whole = remembered.machine(2)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert remembered.machine(2) != whole and remembered.machine(2) != remembered.machine(1)


def test_a_layer_is_measured_once_for_all_processes(folder, monkeypatch):
    monkeypatch.setattr(choose, "_noise", lambda *race: None)
    first = choose.measure((INT8, FLOAT), 24, 16, torch.float32, True, 1)
    choose.measure.cache_clear()  # as in another process
    monkeypatch.setattr(choose, "compare", lambda *size: pytest.fail("measured again"))
    assert choose.measure((INT8, FLOAT), 24, 16, torch.float32, True, 1) == first
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["layers"].keys() == {"int8 whole float32 24x16"}


def test_what_was_measured_on_a_busy_machine_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(choose, "_noise", lambda *race: "noise")
    monkeypatch.setattr(choose, "_is_hopeless", lambda times: False)
    with pytest.raises(choose.Busy, match="M=1: noise"):
        choose.measure((INT8, FLOAT), 24, 16, torch.float32, True, 1)
    assert not list(folder.iterdir())


def test_halves_are_compared():
    assert choose._is_steady(([1.0, 1.1, 1.0, 1.2], [2.0, 2.0, 2.1, 2.0]))
    assert not choose._is_steady(([1.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]))


def test_a_form_ten_times_slower_has_lost_at_once(monkeypatch):
    calls = []

    def slow(q, weight, scale, zero_point):
        calls.append(len(q))
        for _ in range(100):
            torch.ones(64, 64) @ torch.ones(64, 64)
        return torch.zeros(len(q), len(scale))

    monkeypatch.setattr(int8_product, "int8_product", slow)
    monkeypatch.setattr(choose, "_LEAST_SHARE", 0.0)
    timing, noise = choose.compare((INT8, FLOAT), 24, 16, torch.float32, False, INT8.rows)
    assert noise is None and set(calls) == {1} and len(calls) == 2, "one call to warm up, one that decided"
    assert len(set(timing.values())) == 1 and tuple(timing) == INT8.rows
