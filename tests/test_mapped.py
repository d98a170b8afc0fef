"""What is read of a mapped file is let go, and nothing that is not in the file."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fxc import mapped
from fxc.ir.store import Constants

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what of a mapping is in memory")


@pytest.fixture(autouse=True)
def every_byte_counts(monkeypatch):
    monkeypatch.setattr(mapped, "LEAST_BYTES", 1)


@pytest.fixture
def tensor(tmp_path):
    save_file({"a": torch.arange(2 * MIB, dtype=torch.int32)}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt", device="cpu") as opened:
        yield opened.get_tensor("a")


def resident(tensor):
    """Bytes in memory of the mapping that `tensor` is in."""
    text = Path("/proc/self/smaps").read_text()
    for found in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*?^Rss:\s+(\d+) kB", text, re.MULTILINE | re.DOTALL):
        if int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16):
            return int(found[3]) * 1024
    raise AssertionError("no mapping")


def test_what_was_read_goes_and_comes_back(tensor):
    total = tensor.sum().item()
    assert resident(tensor) >= 7 * MIB
    assert mapped.let_go([tensor]) >= 7 * MIB
    assert resident(tensor) < MIB
    assert tensor.sum().item() == total


def test_what_was_written_stays(tensor):
    tensor[5] = -1
    assert mapped.let_go([tensor]) == 0
    assert tensor[5] == -1 and tensor[6] == 6


def test_what_is_in_no_file_stays(tensor):
    own = torch.ones(2 * MIB)
    assert mapped.let_go([own, torch.ones(3), torch.ones(0), own.t(), torch.ones(2, 3, device="meta")]) == 0
    assert own.sum() == 2 * MIB


def test_little_is_not_worth_asking_for(tensor, monkeypatch):
    monkeypatch.setattr(mapped, "LEAST_BYTES", 9 * MIB)
    monkeypatch.setattr(mapped, "unwritten", lambda: pytest.fail("asked"))
    assert mapped.let_go([tensor]) == 0


def test_without_proc_nothing_is_let_go(tensor, monkeypatch):
    monkeypatch.setattr(mapped, "Path", lambda path: Path("/nowhere"))
    assert mapped.let_go([tensor]) == 0


def test_what_is_read_one_after_another_is_let_go_when_it_is_much(tensor, monkeypatch):
    monkeypatch.setattr(mapped, "READ_BYTES", 6 * MIB)
    half = tensor.split(MIB)[0]
    with mapped.Reading() as reading:
        tensor.sum()
        reading.done([half])
        assert resident(tensor) >= 7 * MIB
        reading.done([half])
        assert resident(tensor) < 5 * MIB
        tensor.sum()
        reading.done([tensor[:0], tensor])
        assert resident(tensor) < MIB


def test_a_piece_goes_where_somebody_knows_that_it_is_mapped(tensor):
    own = torch.ones(2 * MIB)
    reading = mapped.Reading([tensor, own])
    tensor.sum()
    mapped.passed(own[MIB:])
    mapped.passed(tensor[:MIB])
    assert resident(tensor) < 5 * MIB and own.sum() == 2 * MIB
    del reading
    tensor.sum()
    mapped.passed(tensor)
    assert resident(tensor) >= 7 * MIB


def test_what_is_larger_than_may_be_read_is_let_go_when_the_next_is(tmp_path, monkeypatch):
    """As the weights of a large model are: whoever asks for one reads it afterwards."""
    monkeypatch.setattr(mapped, "READ_BYTES", MIB)
    save_file({name: torch.ones(MIB) for name in "abc"}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt", device="cpu") as opened:
        tensors = {name: opened.get_tensor(name) for name in "abc"} | {"small": torch.ones(1)}
    constants, most = Constants(tensors, spill=None), 0
    for name in "abc":
        read = constants[name]
        assert constants["small"] == 1 and read.sum() == MIB
        most = max(most, resident(tensors["a"]))
    assert 4 * MIB <= most < 9 * MIB
