"""A model that fits on no test machine: Qwen2.5-72B's configuration on meta, captured, printed, parsed, planned."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, re, sys, time
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import fxc
from fxc.ir import parse_program, print_program
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes

layers = int(sys.argv[1])
config = Qwen2Config(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=layers, num_attention_heads=64,
    num_key_value_heads=8,
)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
clock = time.process_time
times = {}

began = clock()
program = fxc.capture(model)
times["capture"] = clock() - began
# Not getrusage: its maximum starts at the size of the process that this one was forked from.
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

began = clock()
text = print_program(program)
parsed = parse_program(text)
times["print and parse"] = clock() - began
assert print_program(parsed) == text

from collections import Counter

from fxc.analysis.groups import groups
from fxc.passes.canonicalize import Canonicalize

Canonicalize().run(parsed, Context())
began = clock()
found = groups(parsed)
times["axes"] = clock() - began
units = Counter((g.kind, g.size, g.pinned is None) for g in found)
axes_peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

small, steps = run_passes(program, Context(), Options("int8"))
print(json.dumps({
    "parameters": program.numel(), "bytes": program.nbytes(), "int8_bytes": small.nbytes(), "changed": steps[-1].changed,
    "nodes": len(program.graph.nodes), "peak_bytes": peak, "seconds": times,
    "units": [[*key, n] for key, n in units.items()], "axes_peak_bytes": axes_peak,
}))
"""


# 19 GB of weights. All 80 take the better part of a minute, and each is as the one before.
LAYERS = 8


def test_72b_is_captured_printed_parsed_and_planned_without_weights():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(LAYERS)], check=True, capture_output=True, text=True, timeout=600
    )
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["parameters"] == pytest.approx(2.49e9 + LAYERS * 0.8777e9, rel=1e-3)
    assert found["changed"] == 7 * LAYERS + 1
    assert found["int8_bytes"] < 0.58 * found["bytes"], "two bytes are left of each number in the table of tokens"
    assert found["peak_bytes"] < 1.5e9
    units = {tuple(key): n for *key, n in found["units"]}
    assert units["head", 64, True] == units["kv_head", 8, True] == units["ffn", 29568, True] == LAYERS
    assert found["seconds"]["axes"] < 6 and found["axes_peak_bytes"] < 2e9


if __name__ == "__main__":
    exec(SCRIPT)  # prints processor seconds: python tests/models/test_scale.py 80
