"""The same weights in llama.cpp: written as GGUF by `fxc export`, run by llama-cpp-python where it is installed."""

from __future__ import annotations

import argparse
import tempfile
from importlib import util
from typing import Any

import torch

from benchmarks.decode.cells import Clock, cell
from fxc.compiled.generate import CompiledCausalLM

LLAMA = "llama.cpp"
FORMS = {"Q8_0": "int8:embeddings=int8", "Q4_0": "int4:group=32:embeddings=int4"}
"""GGUF's name for it -> the passes whose levels it holds, bit for bit."""


def absent() -> str | None:
    missing = [name for name in ("gguf", "llama_cpp") if util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def rows(model: CompiledCausalLM, form: str, options: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Decoding after a prompt, and a long prompt, one sequence, on torch's number of threads."""
    import llama_cpp

    with tempfile.TemporaryDirectory(prefix="fxc-gguf-") as place:
        file = model.export_gguf(f"{place}/out").file
        threads = torch.get_num_threads()
        longest = max(options.prompt + options.new, options.prefill) + 8
        llama = llama_cpp.Llama(
            str(file), n_ctx=longest, n_batch=longest, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        size = file.stat().st_size / 1e9
    words = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (longest,), generator=generator).tolist()

    def decoded() -> None:
        for token in ids[options.prompt : options.prompt + options.new]:
            llama.eval([token])

    def after_the_prompt() -> float:
        llama.reset()
        llama.eval(ids[: options.prompt])
        return clock.time(decoded)

    def prompt() -> None:
        llama.reset()
        llama.eval(ids[: options.prefill])

    after_the_prompt()
    found = [("decode", cell([after_the_prompt() for _ in range(options.rounds)], options.new))]
    if options.prefill:
        found.append(("prefill", cell(clock.rounds(prompt, options.rounds), options.prefill)))
    about = {"passes": form, "backend": LLAMA, "mode": "", "batch": 1, "weights_gb": round(size, 3)}
    about |= {"forms": {}, "peak_gb": None}
    return [about | {"what": what} | numbers for what, numbers in found]
