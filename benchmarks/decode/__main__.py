"""A language model end to end: tokens a second with and without a CUDA graph, and the time of a long prompt.

    python -m benchmarks.decode --model qwen2.5-7b --passes int4,int8,fp8 --device cuda --batch 1,16
    python -m benchmarks.decode --model tiny --device cpu --dtype float32 --batch 1,2 --prompt 8 --new 8 --prefill 32
    python -m benchmarks.decode --model qwen2.5-0.5b --device cpu --threads 2 --backend eager,aoti --batch 1 --prefill 512 \
        --passes int8:embeddings=int8,int4:group=32:embeddings=int4 --peers

The model is built from its configuration with random weights on the device, which change nothing of the time, and compiled
there without verification. The dense model is measured in the same run, in the same ways. Each round decodes the same tokens
from the same cache, over buffers large enough for all of them. What is not measured is named. Results are written after each
cell, to decode-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.decode import peer
from benchmarks.decode.cells import Clock, cells_of, decode, generate, prefill, same_tokens
from benchmarks.decode.model import MODELS, Variant, captured, config_of, with_weights
from benchmarks.decode.report import DENSE, markdown, write
from benchmarks.output import RESULTS, note
from fxc.compiled.generate import CompiledCausalLM
from fxc.errors import first_line
from fxc.kernel_bench.cpu_platform import kind_of_cpu
from fxc.kernel_bench.files import versions
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes


def run(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = config_of(options.model, options.layers)
    clock = Clock(device, options.seconds)
    began = time.monotonic()
    program, computed = captured(config, getattr(torch, options.dtype))
    report = {
        "title": title(options, config),
        "device": device_name(device),
        "versions": versions([*table.PACKAGES, "triton"]),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "layers": config.num_hidden_layers,
        "capture_s": round(time.monotonic() - began, 2),
        "rows": [],
        "not_measured": [],
    }
    # Variants in the order in which they were asked for; backends too, because one of them compiles for minutes.
    for backend in options.backend:
        for passes in [DENSE, *options.passes]:
            measure_variant(report, program, computed, config, passes, backend, options, clock)
            write(report, options.out)
    if options.peers:
        measure_peer(report, program, computed, config, options, clock)
    return report


def measure_peer(report, program, computed, config, options, clock) -> None:
    """Rows of llama.cpp."""
    for form, passes in peer.FORMS.items():
        if why := peer.absent():
            report["not_measured"].append({"what": f"{peer.LLAMA} {form}", "why": why})
            continue
        made = with_weights(program, computed, clock.device)
        made, _ = run_passes(made, Context(), Options(passes, verify=False))
        found = peer.rows(CompiledCausalLM(made, {}, config=config), form, options, clock)
        report["rows"] += found
        for row in found:
            note(f"{form}, {peer.LLAMA}, {row['what']}: {row['tokens_per_s']:.1f} tokens/s")
        write(report, options.out)


def measure_variant(report, program, computed, config, passes, backend, options, clock) -> None:
    """All cells of one variant, added to the report; what goes wrong there is its own."""
    device, name = clock.device, f"{passes}, {backend}"
    if clock.is_over:
        report["not_measured"].append({"what": name, "why": f"{options.seconds} s were over"})
        return
    began = time.monotonic()
    try:
        made = with_weights(program, computed, device)
        if passes != DENSE:
            made, _ = run_passes(made, Context(), Options(passes.replace("+", ","), verify=False))
        variant = Variant(made, config, device, backend)
    except Exception as error:  # of Triton's compiler, say: the other variants can still be measured
        report["not_measured"].append({"what": name, "why": f"failed: {first_line(error)}", "failed": True})
        note(f"{name}: {first_line(error)}")
        return
    note(f"{name}: compiled in {time.monotonic() - began:.1f} s, {variant.nbytes / 1e9:.2f} GB of weights")
    for what, mode, batch in cells_of(options, backend):
        label = ", ".join(filter(None, (name, what, mode, f"batch {batch}")))
        if clock.is_over:
            report["not_measured"].append({"what": label, "why": f"{options.seconds} s were over"})
            continue
        try:
            if what == "decode":
                found = decode(variant, mode, batch, options, clock)
            elif what == "prefill":
                found = prefill(variant, options.prefill, options, clock)
            else:
                found = generate(variant, batch, options, clock)
        except Exception as error:  # as above
            report["not_measured"].append({"what": label, "why": f"failed: {first_line(error)}", "failed": True})
            note(f"{label}: {first_line(error)}")
            continue
        row = {"passes": passes, "backend": backend, "what": what, "mode": mode, "batch": batch}
        report["rows"].append(row | {"weights_gb": round(variant.nbytes / 1e9, 3), "forms": variant.forms} | found)
        if what == "decode" and not same_tokens(report["rows"][-1], report["rows"][:-1]):
            why = "failed: its tokens are not those of the same step in another mode"
            report["not_measured"].append({"what": label, "why": why, "failed": True})
        note(f"{label}: {found['tokens_per_s']:.1f} tokens/s")
        write(report, options.out)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else kind_of_cpu()


def title(options: argparse.Namespace, config: Any) -> str:
    name = options.model if options.model in MODELS else Path(options.model).name
    full = MODELS.get(options.model, {}).get("num_hidden_layers", config.num_hidden_layers)
    cut = f", cut to {config.num_hidden_layers} of its {full} layers" if config.num_hidden_layers != full else ""
    return f"{name}{cut}, {options.dtype}, random weights"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    parser.add_argument("--model", default="qwen2.5-7b", help=f"{', '.join(MODELS)} or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers; the result says so")
    parser.add_argument("--passes", type=words, default=["int4", "int8", "fp8"], help="variants; a+b for both in one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", type=words, default=["eager"], help="eager, inductor, aoti")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in words(text)], default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=2048, help="0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="for torch and for peers; by default as many as torch takes")
    parser.add_argument("--peers", action="store_true", help="llama.cpp too, on a CPU, one sequence")
    parser.add_argument("--seconds", type=float, help="begin no cell after so many seconds, and name those left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.modes = ["graph", "launched"] if torch.device(options.device).type == "cuda" else ["launched"]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        note("not measured: torch finds no CUDA device here")
        return 2
    report = run(options)
    write(report, options.out)
    print(markdown(report))
    return 1 if any(each.get("failed") for each in report["not_measured"]) else 0


if __name__ == "__main__":
    sys.exit(main())
