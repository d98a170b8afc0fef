"""What is said of the machine."""

from types import SimpleNamespace

import pytest
import torch

from fxc.report import machine
from fxc_kernels.cuda import dispatch


@pytest.mark.fault(31)
def test_doctor_says_whether_a_gpu_was_measured(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H200", total_memory=141 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: about.name)
    found = [each for each in machine.examine() if each.group == "cuda"]
    assert [each.name for each in found] == ["device 0", "kernels"] and "sm_90" in found[0].value
    monkeypatch.setattr(dispatch, "table", lambda chip: {("int8", 8, 8): {1: None, 16: None}} if chip == "nvidia-h200" else {})
    found = [each for each in machine.examine() if each.name == "kernels"]
    assert found[0].value == "2 measured products in the table" and found[0].ok

    about.major, about.minor = 8, 6
    (lacking,) = [each for each in machine.examine() if each.name == "fp8 layers"]
    assert "compute capability 8.6" in lacking.note and "weight_only" in lacking.note
    about.major, about.minor = 9, 0

    def broken(chip):
        raise ValueError(f"{chip}.json is no table")

    monkeypatch.setattr(dispatch, "table", broken)
    found = [each for each in machine.examine() if each.name == "kernels"]
    assert found[0].ok is False and found[0].note == "nvidia-h200.json is no table"
