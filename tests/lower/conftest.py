"""These tests say what torch's and oneDNN's forms do. Those in C++ have test_native_forms.py."""

import pytest


@pytest.fixture(autouse=True)
def no_kernels_in_cpp(monkeypatch):
    monkeypatch.setenv("FXC_CPU_LEVEL", "none")
