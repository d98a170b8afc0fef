"""Of a model that is larger than memory pruning and removal hold a few weights at a time, and none as a whole that is large."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pass_text import program_of
from pruned import masked
from safetensors import safe_open
from safetensors.torch import save_file

from fxc import mapped
from fxc.analysis import constants
from fxc.artifact.spill import Spill
from fxc.ir import store
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.prune import scores
from fxc.pipeline import run_passes

MIB, LAYERS, WIDTH = 1 << 20, 12, 512


@pytest.fixture(scope="module")
def plain():
    """Residual layers of two weights of 1 MiB each."""
    names = [f"layers.{at}.{name}.weight" for at in range(LAYERS) for name in ("down", "up")]
    lines = [f"constant @{name}: f32[{WIDTH}, {WIDTH}]" for name in sorted(names)]
    lines.append(f'%0: f32[s0, {WIDTH}] = input "x"')
    for at in range(LAYERS):
        x = 4 * at
        lines += [f"%{x + 1}: f32[s0, {WIDTH}] = aten.linear(%{x}, @layers.{at}.up.weight)  # layers.{at}.up",
                  f"%{x + 2}: f32[s0, {WIDTH}] = aten.relu(%{x + 1})",
                  f"%{x + 3}: f32[s0, {WIDTH}] = aten.linear(%{x + 2}, @layers.{at}.down.weight)  # layers.{at}.down",
                  f"%{x + 4}: f32[s0, {WIDTH}] = aten.add.Tensor(%{x}, %{x + 3})"]  # fmt: skip
    return program_of("\n".join([*lines, f'return "out" %{4 * LAYERS}']))


def of_files():
    """Bytes in memory of the files that this process has mapped."""
    return int(re.search(r"^RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what of a mapping is in memory")
def test_no_more_than_a_few_weights_are_in_memory(plain, tmp_path, monkeypatch):
    for module, name, value in ((mapped, "READ_BYTES", MIB), (mapped, "LEAST_BYTES", 1), (store, "PART_BYTES", 2 * MIB)):
        monkeypatch.setattr(module, name, value)
    save_file(plain.constants, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in plain.constants}
    program = replace(plain.copy(), constants=store.Constants(tensors, Spill(tmp_path / "parts", {})))
    # First, so that what torch reads of its own files is there.
    alike, _ = run_passes(plain, Context(), Options("prune:ffn=0.25"))
    get, before, most = store.Constants.__getitem__, of_files(), []

    def watched(self, name):
        most.append(of_files() - before)
        return get(self, name)

    monkeypatch.setattr(store.Constants, "__getitem__", watched)
    after, steps = run_passes(program, Context(), Options("prune:ffn=0.25"))
    assert MIB <= max(most) < 8 * MIB
    assert after.numel() == 3 * program.numel() // 4 and steps[-1].removed
    assert all(torch.equal(tensor, after.constants[name]) for name, tensor in alike.constants.items())


def test_what_is_read_piece_by_piece_is_what_is_read_at_once(monkeypatch):
    torch.manual_seed(0)
    table = torch.randn(9, 6)
    table[:, 2], table[:, 4], table[5] = 1.5, 0, 0
    known = [constants.Known(each, torch.rand(each.shape) < share) for each in (table, table.t()) for share in (0.9, 2)]
    weights = [(weight, dims) for weight in (table, table.t(), table.reshape(3, 3, 6)) for dims in ((0,), (1,), (0, 1))]

    def looked_at():
        found = [constants.uniform(each, dims) for each in known for dims in ([0], [1], [0, 1])]
        return [[each.mask, each.values] for each in found] + [[constants.is_read(*each) for each in weights]]

    whole = looked_at()
    monkeypatch.setattr(constants, "AT_ONCE", 50)
    for at_once, by_pieces in zip(whole, looked_at(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(at_once, by_pieces, strict=True))
    assert not constants.is_read(table, (0,))[4] and not constants.is_read(table, (1,))[5]


def test_magnitudes_are_added_up_piece_by_piece(plain, monkeypatch):
    whole, _ = masked(plain, "prune:ffn=0.25")
    monkeypatch.setattr(scores, "_AT_ONCE", 100_000)
    by_pieces, _ = masked(plain, "prune:ffn=0.25")
    assert all(torch.equal(each, by_pieces.constants[name]) for name, each in whole.constants.items())
