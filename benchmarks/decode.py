"""A language model end to end: tokens a second with and without a CUDA graph, and the time of a long prompt.

    python -m benchmarks.decode --model qwen2.5-7b --passes int4,int8,fp8 --device cuda --batch 1,16
    python -m benchmarks.decode --model tiny --device cpu --dtype float32 --batch 1,2 --prompt 8 --new 8 --prefill 32

The model is built from its configuration with random weights on the device, which change nothing of the time, and compiled
there without verification. The dense model is measured in the same run, in the same ways. Each round decodes the same tokens
from the same cache, over buffers large enough for all of them. What is not measured is named. Results are written after each
cell, to decode-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import table
from fxc.frontend.capture import capture
from fxc.ir.program import Program
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes
from fxc.runtime.generate import CompiledCausalLM
from fxc.runtime.static_cache import CudaGraphs, SlotCache, StaticDecoder, run_directly, static_decoder

RESULTS = Path(__file__).resolve().parent / "results"
# The published configuration of Qwen/Qwen2.5-7B.
QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"qwen2.5-7b": QWEN25_7B, "tiny": TINY}
DENSE = "dense"
LAUNCHED_TOKENS = 16


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ the model


def config_of(model: str, layers: int | None) -> Any:
    """The configuration of one of `MODELS`, or in a Hugging Face folder. layers: as many of its layers, None for all."""
    from transformers import AutoConfig, Qwen2Config

    config = Qwen2Config(**MODELS[model]) if model in MODELS else AutoConfig.from_pretrained(model)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def captured(config: Any, dtype: torch.dtype) -> tuple[Program, dict[str, Tensor]]:
    """The program with weights on meta, and those of its constants that are no weights but follow from the configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    computed = {}
    for path, module in model.named_modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            computed[f"{path}.inv_freq"] = type(module)(config=config).inv_freq
    return capture(model, check=False), computed


def with_weights(program: Program, computed: dict[str, Tensor], device: torch.device) -> Program:
    """A copy of the program with random weights on `device`: matrices of deviation 0.02, gains of 1, biases of 0."""
    made = program.copy()
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in program.constants.items():
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if name in computed:
            value.copy_(computed[name])
        elif tensor.dim() > 1:
            value.normal_(std=0.02, generator=generator)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        made.constants[name] = value
    return made


def read_bytes(program: Program) -> int:
    """Bytes of weights that a step reads: all but the table of embeddings, of which it reads a row."""
    reads = program.graph.find_nodes(op="get_attr")
    whole = {n.target for n in reads if any(user.target is not torch.ops.aten.embedding.default for user in n.users)}
    return sum(t.numel() * t.element_size() for name, t in program.constants.items() if name in whole)


class Variant:
    """One compiled form of the model, on the device, with nothing beside it."""

    def __init__(self, made: Program, config: Any, device: torch.device, backend: str) -> None:
        self.device = device
        self.read_bytes, self.nbytes = read_bytes(made), made.nbytes()
        self.model = CompiledCausalLM(made, {}, config=config, device=device, backend=backend)
        self.lowered = self.model.lower()
        # How its compressed layers run, and how many of them: a table may have sent some back to dense.
        self.forms = dict(Counter(each.op for each in self.model.layers))
        # What runs was made of the program's weights; where that is another form, they would count twice.
        made.constants.update({name: t.to("meta") for name, t in made.constants.items()})
        self.eager = getattr(self.lowered, "graph_module", self.lowered)
        gc.collect()

    def decoder(self, capacity: int, mode: str) -> StaticDecoder:
        record = CudaGraphs(self.device) if mode == "graph" else run_directly
        return static_decoder(self.lowered, self.model.program, self.device, capacity, record)

    def prompt(self, batch: int, length: int) -> tuple[Tensor, list[Tensor]]:
        """(the next tokens [B, 1], keys and values) after a random prompt. Never compiled: only the steps after it count."""
        types = [n.meta["val"] for n in self.model.program.placeholders[3:]]
        past = [torch.empty(batch, t.shape[1], 0, t.shape[3], dtype=t.dtype, device=self.device) for t in types]
        with torch.no_grad():
            logits, *present = self.eager(*self.inputs(batch, length), *past)
            return logits[:, -1:].argmax(-1), present

    def inputs(self, batch: int, length: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(batch * 10_007 + length)
        ids = torch.randint(0, self.model.config.vocab_size, (batch, length), generator=generator).to(self.device)
        return [ids, torch.ones_like(ids), torch.arange(length, device=self.device).expand(batch, -1).contiguous()]


# ---------------------------------------------------------------------------------------------------------- measurements


class Clock:
    """Seconds on a device, and how many are left of those that the run may take."""

    def __init__(self, device: torch.device, seconds: float | None) -> None:
        self.device = device
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end

    def time(self, run: Any) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def rounds(self, run: Any, count: int) -> list[float]:
        run()
        return [self.time(run) for _ in range(count)]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_gb(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 3) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def decode(variant: Variant, mode: str, batch: int, options: argparse.Namespace, clock: Clock) -> dict:
    """One cell: greedy tokens after the prompt, the host waiting only for the last one: `new` of them a sequence, fewer where
    each kernel is launched from here, which takes tens of milliseconds a token."""
    token, present = variant.prompt(batch, options.prompt)
    length, new = options.prompt, options.new if mode == options.modes[0] else min(options.new, LAUNCHED_TOKENS)
    capacity = 1 << (length + options.new - 1).bit_length()
    mask = torch.ones(batch, length + new, dtype=torch.int64, device=variant.device)
    places = torch.arange(length + new, device=variant.device).expand(batch, -1)
    decoder = variant.decoder(capacity, mode)
    tokens: list[Tensor] = []

    def run() -> None:
        cache = SlotCache(decoder)
        cache.keep(present)
        tokens[:] = [token]
        for place in range(length, length + new):
            logits = cache.decode(tokens[-1], mask[:, : place + 1], places[:, place : place + 1])
            tokens.append(logits.argmax(-1))

    reset_peak(variant.device)
    first = clock.time(run)
    spent = clock.rounds(run, options.rounds)
    return cell(spent, new * batch) | {
        "new": new,
        "slots": capacity,
        "first_s": round(first, 3),
        # Of weights that run in another form than the stored one it would be wrong.
        "read_gb_per_s": None if "dequantized" in variant.forms else round(variant.read_bytes * new / median(spent) / 1e9, 1),
        "peak_gb": peak_gb(variant.device),
        "tokens": torch.cat(tokens[: LAUNCHED_TOKENS + 1], dim=1).tolist(),
    }


def prefill(variant: Variant, length: int, options: argparse.Namespace, clock: Clock) -> dict:
    """One cell: a prompt of `length` tokens, logits of every position among its results."""
    reset_peak(variant.device)
    return cell(clock.rounds(lambda: variant.prompt(1, length), options.rounds), length) | {"peak_gb": peak_gb(variant.device)}


def generate(variant: Variant, batch: int, options: argparse.Namespace, clock: Clock) -> dict:
    """One cell: Hugging Face's generate() over the static cache, prompt included, as a user calls it."""
    model = variant.model
    model._decoder = variant.decoder(1 << (options.prompt + options.new - 1).bit_length(), options.modes[0])
    ids, mask, _ = variant.inputs(batch, options.prompt)
    given = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}
    reset_peak(variant.device)
    spent = clock.rounds(lambda: model.generate(ids, attention_mask=mask, **given), options.rounds)
    return cell(spent, options.new * batch) | {"peak_gb": peak_gb(variant.device)}


def cell(spent: list[float], tokens: int) -> dict:
    middle = median(spent)
    return {
        "tokens_per_s": round(tokens / middle, 2),
        "low": round(tokens / max(spent), 2),
        "high": round(tokens / min(spent), 2),
        "seconds": [round(s, 6) for s in spent],
    }


# -------------------------------------------------------------------------------------------------------------- the run


def cells_of(options: argparse.Namespace, backend: str) -> list[tuple[str, str, int]]:
    """(what, mode, batch), the most wanted first."""
    best, *others = options.modes
    if backend != "eager":  # prompts would compile the whole program a second time, and each batch the step
        return [("decode", best, options.batch[0])]
    cells = [("decode", best, batch) for batch in options.batch]
    cells += [("prefill", "", 1)] if options.prefill else []
    cells += [("generate", best, options.batch[0])]
    return cells + [("decode", mode, options.batch[0]) for mode in others]


def run(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    config = config_of(options.model, options.layers)
    clock = Clock(device, options.seconds)
    began = time.monotonic()
    program, computed = captured(config, getattr(torch, options.dtype))
    report = {
        "title": title(options, config),
        "device": device_name(device),
        "versions": table.versions() | {"triton": version("triton")},
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
    return report


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
            made, _ = run_passes(made, parse_passes(passes.replace("+", ",")), Context(), verify=False)
        variant = Variant(made, config, device, backend)
    except Exception as error:  # of Triton's compiler, say: the other variants can still be measured
        report["not_measured"].append({"what": name, "why": f"failed: {first(error)}", "failed": True})
        note(f"{name}: {first(error)}")
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
            report["not_measured"].append({"what": label, "why": f"failed: {first(error)}", "failed": True})
            note(f"{label}: {first(error)}")
            continue
        row = {"passes": passes, "backend": backend, "what": what, "mode": mode, "batch": batch}
        report["rows"].append(row | {"weights_gb": round(variant.nbytes / 1e9, 3), "forms": variant.forms} | found)
        if what == "decode" and not same_tokens(report["rows"][-1], report["rows"][:-1]):
            why = "failed: its tokens are not those of the same step in another mode"
            report["not_measured"].append({"what": label, "why": why, "failed": True})
        note(f"{label}: {found['tokens_per_s']:.1f} tokens/s")
        write(report, options.out)


def same_tokens(row: dict, others: list[dict]) -> bool:
    """Whether a step launched kernel by kernel gave the tokens that its recording gave."""
    same = ("passes", "backend", "what", "batch")
    pairs = [zip(o["tokens"], row["tokens"]) for o in others if all(o[k] == row[k] for k in same)]
    return all(a[: len(b)] == b[: len(a)] for pair in pairs for a, b in pair)


def first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else table.cpu_name()


def title(options: argparse.Namespace, config: Any) -> str:
    name = options.model if options.model in MODELS else Path(options.model).name
    full = MODELS.get(options.model, {}).get("num_hidden_layers", config.num_hidden_layers)
    cut = f", cut to {config.num_hidden_layers} of its {full} layers" if config.num_hidden_layers != full else ""
    return f"{name}{cut}, {options.dtype}, random weights"


# --------------------------------------------------------------------------------------------------------------- report


def baseline(report: dict, row: dict) -> dict | None:
    """The dense row of the same cell."""
    same = ("backend", "what", "mode", "batch")
    return next((r for r in report["rows"] if r["passes"] == DENSE and all(r[k] == row[k] for k in same)), None)


def markdown(report: dict) -> str:
    options, packages = report["options"], report["versions"]
    lines = [
        f"# {report['title']}, on {report['device']}",
        "",
        f"Prompt {options['prompt']}, {options['new']} new tokens a sequence; prefill: one prompt of {options['prefill']} "
        f"tokens, logits of all of them. Tokens a second: median of {options['rounds']} rounds (lowest-highest); x: of the "
        "dense model in the same cell. graph: each step replays a CUDA graph; launched: the same step, its kernels launched "
        "one by one; generate: Hugging Face's loop, prompt included. GB/s: weights read a second. "
        + ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if packages.get(name))
        + ".",
        "",
        "| passes | backend | what | batch | tokens/s | x | GB/s | weights GB | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        dense = baseline(report, row)
        ratio = "-" if dense is None or row is dense else f"{row['tokens_per_s'] / dense['tokens_per_s']:.2f}"
        lines.append(
            f"| {row['passes']} | {row['backend']} | {row['what']} {row['mode']} | {row['batch']} | {row['tokens_per_s']:.1f} "
            f"({row['low']:.1f}-{row['high']:.1f}) | {ratio} | {row.get('read_gb_per_s') or '-'} | {row['weights_gb']} | "
            f"{'-' if row['peak_gb'] is None else row['peak_gb']} |"
        )
    forms = {f"{row['passes']}, {row['backend']}": row["forms"] for row in report["rows"] if row["forms"]}
    lines += ["", *(f"- {name}: layers run as {', '.join(f'{form} ({n})' for form, n in each.items())}"
                    for name, each in forms.items())]  # fmt: skip
    lines += ["", *(f"- not measured: {each['what']}: {each['why']}" for each in report["not_measured"])]
    return "\n".join(lines).rstrip() + "\n"


def write(report: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    for name, text in ((f"decode-{slug}.json", json.dumps(report, indent=1) + "\n"), (f"decode-{slug}.md", markdown(report))):
        part = out / f"{name}.part"  # renamed, so that whatever ends this process leaves whole files
        part.write_text(text)
        part.replace(out / name)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    parser.add_argument("--model", default="qwen2.5-7b", help=f"{', '.join(MODELS)} or a folder with a config.json")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers; the result says so")
    parser.add_argument("--passes", type=words, default=["int4", "int8", "fp8"], help="variants; a+b for both in one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", type=words, default=["eager"], help="eager, inductor or both")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in words(text)], default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=2048, help="0: none")
    parser.add_argument("--rounds", type=int, default=3)
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
