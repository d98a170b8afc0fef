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


# Four layers would not fit either, with 2 GB each; all 80 take the better part of a minute.
@pytest.mark.parametrize("layers", [2, pytest.param(80, marks=pytest.mark.slow)])
def test_72b_is_captured_printed_parsed_and_planned_without_weights(layers):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(layers)], check=True, capture_output=True, text=True, timeout=600
    )
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["parameters"] == pytest.approx(2.49e9 + layers * 0.8777e9, rel=1e-3)
    assert layers < 80 or 72e9 < found["parameters"] < 73e9
    assert found["changed"] == 7 * layers + 1
    assert found["int8_bytes"] < (0.53 if layers == 80 else 0.7) * found["bytes"]
    assert found["peak_bytes"] < 1.5e9
    units = {tuple(key): n for *key, n in found["units"]}
    assert units["head", 64, True] == units["kv_head", 8, True] == units["ffn", 29568, True] == layers
    assert found["seconds"]["axes"] < 60 and found["axes_peak_bytes"] < 2e9


if __name__ == "__main__":
    exec(SCRIPT)  # prints processor seconds: python tests/models/test_scale.py 80
