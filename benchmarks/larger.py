"""Models that are larger than memory: what `fxc compile --stream` takes of memory and time, by `python -m benchmarks.larger`.

    python -m benchmarks.larger --shape 7b --passes int8 --passes int4:group=128
    python -m benchmarks.larger --shape 72b --passes int4:group=128 --hollow
    python -m benchmarks.larger --shape 0.5b --passes int8 --processes 1 --processes 2 --processes 4
    python -m benchmarks.larger --shape 7b --peer --passes int8 --passes int4:group=128 --passes prune:heads=0.25:ffn=0.25

A folder of the shape is written first, in bfloat16: one layer's random weights, which every layer has, or with --hollow files
with holes, that take no disk and are read as zeros. Each row is a process of its own, or several that torchrun starts, which
share the threads; peak memory is the resident set at most of the largest, as the system counts it, mapped files among it. Of
several numbers of processes it is said whether they made the same bytes. --peer: llm-compressor's `model_free_ptq` does the
same before each row that it has a scheme for, in the environment of `benchmarks.quality`. Results:
larger-<shape>-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.output import RESULTS, note, write
from benchmarks.quality.environment import peers_python
from fxc.kernel_bench.files import markdown_table, slug, versions_text

# hidden, FFN, heads, KV heads, layers, vocabulary: Qwen2.5's.
SHAPES = {
    "tiny": (128, 256, 4, 2, 4, 320),
    "0.5b": (896, 4864, 14, 2, 24, 151936),
    "1.5b": (1536, 8960, 12, 2, 28, 151936),
    "7b": (3584, 18944, 28, 4, 28, 152064),
    "72b": (8192, 29568, 64, 8, 80, 152064),
}
PASSES = ("int8", "int4:group=128")
# What of llm-compressor's schemes packs the same weights to as many bits; embeddings stay in both.
PEER = "llm-compressor, model-free"
SCHEMES = {"int8": "W8A8", "int4:group=128": "W4A16"}
_PEER = """
import sys
from llmcompressor import model_free_ptq
folder, out, scheme, workers = sys.argv[1:]
model_free_ptq(folder, out, scheme=scheme, ignore=["re:.*embed_tokens"], max_workers=int(workers), device="cpu")
"""
_CHUNK = 1 << 26


def config_of(shape: str, layers: int) -> dict:
    hidden, ffn, heads, kv_heads, _, vocabulary = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


def tensors_of(config: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes outside of layers, and those of a layer, by what comes after its number."""
    hidden, ffn, vocabulary = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tables = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, outputs in (("q", hidden), ("k", narrow), ("v", narrow)):
        layer |= {f"self_attn.{name}_proj.weight": (outputs, hidden), f"self_attn.{name}_proj.bias": (outputs,)}
    layer |= {"self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (ffn, hidden)}
    layer |= {"mlp.up_proj.weight": (ffn, hidden), "mlp.down_proj.weight": (hidden, ffn)}
    return tables | {"model.norm.weight": (hidden,)}, layer


def make(folder: Path, shape: str, layers: int, hollow: bool) -> int:
    """Write the folder: bytes of its weights. Files are written as safetensors by hand, for no library leaves holes."""
    config = config_of(shape, layers)
    outside, layer = tensors_of(config)
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = {"model-outside.safetensors": outside}
    for at in range(layers):
        files[f"model-{at:05}.safetensors"] = {f"model.layers.{at}.{name}": size for name, size in layer.items()}
    total, weight_map = 0, {}
    for name, shapes in files.items():
        header, end = {}, 0
        for tensor, size in shapes.items():
            begin, end = end, end + 2 * torch.Size(size).numel()
            header[tensor] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
            weight_map[tensor] = name
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        first = folder / "model-00000.safetensors"
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            if hollow:
                file.truncate(8 + len(raw) + end)
            elif name == first.name or shapes is outside:
                for size in shapes.values():
                    _write_random(file, size)
            else:
                with first.open("rb") as same:
                    same.seek(-end, os.SEEK_END)
                    shutil.copyfileobj(same, file, _CHUNK)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_random(file, size: tuple[int, ...]) -> None:
    """Of a norm ones, of anything else a normal distribution."""
    if len(size) == 1:
        file.write(torch.ones(size, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        return
    for rows in torch.arange(size[0]).split(max(_CHUNK // (4 * size[1]), 1)):
        file.write(torch.randn(len(rows), size[1]).mul_(0.02).bfloat16().view(torch.uint8).numpy().tobytes())


def row(folder: Path, passes: str, out: Path, threads: int, limit: str | None, processes: int = 1) -> dict:
    """Compile in processes of their own: seconds, and the most of a resident set."""
    words = ["compile", str(folder), "--passes", passes, "-o", str(out), "--stream", "--no-measure", "--json"]
    words += ["--max-memory", limit] if limit else []
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    found, said = measured(passes, [sys.executable, *launcher, "-m", "fxc", *words], out, max(threads // processes, 1))
    made = json.loads(said)
    return {
        "passes": passes, "processes": processes, **found,
        "by_pass": {step["name"]: step["seconds"] for step in made["passes"]},
        "parameters": [made["parameters_before"], made["parameters_after"]],
    }  # fmt: skip


def peer_row(python: Path, folder: Path, passes: str, out: Path, threads: int) -> dict:
    """What `row` measures, of llm-compressor, which packs so many files at once as there are threads."""
    command = [str(python), "-c", _PEER, str(folder), str(out), SCHEMES[passes], str(threads)]
    return {"passes": f"{PEER} {SCHEMES[passes]}", "processes": 1, **measured(PEER, command, out, threads)[0]}


def measured(name: str, command: list[str], out: Path, threads: int) -> tuple[dict, str]:
    """Run a command that writes the folder `out`: seconds, the most of a resident set, bytes of weights; what it printed."""
    printed, said = out.with_suffix(".json"), out.with_suffix(".err")
    began, load = time.perf_counter(), os.getloadavg()[0]
    process = os.posix_spawnp(
        command[0], command, {**os.environ, "OMP_NUM_THREADS": str(threads)},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, str(printed), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644),
                      (os.POSIX_SPAWN_OPEN, 2, str(said), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)],
    )  # fmt: skip
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{name}: {said.read_text().strip()[-800:]}{printed.read_text()[-800:]}")
    return {
        "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024,
        "result": sum(path.stat().st_size for path in out.glob("*.safetensors")), "load_before": round(load, 2),
    }, printed.read_text()  # fmt: skip


def digest_of(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def markdown(report: dict) -> str:
    weights = report["weights"]
    digests = [{each["digest"] for each in report["rows"] if each["passes"] == row["passes"]} for row in report["rows"]]
    cells = [
        [each["passes"], str(each["processes"]), f"{each['seconds']:.0f}", f"{each['cpu_seconds']:.0f}",
         f"{weights / each['seconds'] / 1e9:.2f}", f"{each['peak'] / 1e9:.2f}", f"{each['result'] / 1e9:.2f}",
         f"{each['parameters'][1] / 1e9:.3f}" if "parameters" in each else ""]
        for each in report["rows"]
    ]  # fmt: skip
    what = "files with holes, read as zeros" if report["hollow"] else "random weights"
    how = (
        f"The shape of Qwen2.5-{report['shape'].upper()} with {report['layers']} layers, {weights / 1e9:.1f} GB in bfloat16, "
        f"{what}; {report['threads']} threads, load before: {report['load_before']}; one run each, from `fxc compile` to a "
        f"verified artifact, which is written to the disk and read again from there. {versions_text(report['versions'])}."
    )
    if any(each["processes"] > 1 for each in report["rows"]):
        how += " All numbers of processes made the same bytes." if all(len(each) == 1 for each in digests) else " BYTES DIFFER."
    heads = ["passes", "processes", "seconds", "of CPU", "GB/s of weights", "peak memory, GB", "result, GB", "parameters, 1e9"]
    rows = "\n".join(markdown_table(heads, cells))
    return f"# A model read piece by piece, {report['hardware']['cpu']}\n\n{how}\n\n{rows}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="by default all")
    parser.add_argument("--passes", action="append")
    parser.add_argument("--processes", action="append", type=int, help="1 by default")
    parser.add_argument("--hollow", action="store_true", help="weights of holes, which take no disk")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory")
    parser.add_argument("--peer", action="store_true", help="llm-compressor beside it")
    parser.add_argument("--peer-python", type=Path, help="of an environment that has it, in the place of .venv-peers")
    parser.add_argument("--folder", type=Path, help="where model and results go meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    layers = options.layers or SHAPES[options.shape][4]
    load = os.getloadavg()[0]
    rows = []
    python = (options.peer_python or peers_python()) if options.peer else None
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch) / "model"
        note(f"writing {options.shape}")
        weights = make(folder, options.shape, layers, options.hollow)
        for passes in options.passes or PASSES:
            for processes in options.processes or [1]:
                note(f"{passes}, processes: {processes}")
                out = Path(scratch) / "out"
                if python and passes in SCHEMES:
                    rows.append(peer_row(python, folder, passes, out, options.threads) | {"digest": None})
                    note(json.dumps(rows[-1]))
                    shutil.rmtree(out)
                rows.append(row(folder, passes, out, options.threads, options.max_memory, processes))
                made = [*out.glob("*.safetensors"), out / "program.fxc"]
                rows[-1]["digest"] = digest_of(made) if len(options.processes or ()) > 1 else None
                note(json.dumps(rows[-1]))
                shutil.rmtree(out)
    report = {
        "shape": options.shape, "layers": layers, "weights": weights, "hollow": options.hollow, "threads": options.threads,
        "load_before": round(load, 2), "rows": rows, "hardware": table.hardware(), "versions": table.versions(),
    }  # fmt: skip
    text = markdown(report)
    print(text)
    write(options.out / f"larger-{options.shape}-{slug(report['hardware']['cpu'])}.json", report, md=text)


if __name__ == "__main__":
    main()
