"""What a loaded language model takes of memory, and how soon it answers: `python -m benchmarks.memory`.

    python -m benchmarks.memory --threads 2
    python -m benchmarks.memory --model tiny --new 4 --out /tmp

The model has the shape of its configuration and random weights; it is written as a Hugging Face folder and compiled without
verification. Each row is a process of its own: bytes are what it has in memory beyond a process that has imported torch,
transformers and fxc, when the model is loaded and has answered, and at most while it was. Results: memory-<cpu>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.decode.model import MODELS, config_of
from benchmarks.output import RESULTS, note, write
from fxc.kernel_bench.files import markdown_table, slug, versions_text

PASSES = ("int8:embeddings=int8", "int4:embeddings=int4")
ORIGINAL = "transformers"

LOADED = """
import json, re, sys, time
from pathlib import Path
import torch, transformers, fxc

def held(what):
    return int(re.search(rf"^{what}:\\s*(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024

kind, folder, threads, prompt, new = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
before, began = held("VmRSS"), time.perf_counter()
if kind == "transformers":
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
else:
    model = fxc.load(folder)
loaded = time.perf_counter() - began
ids = torch.arange(prompt)[None]
with torch.no_grad():
    model(input_ids=ids)
    first = time.perf_counter() - began
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
print(json.dumps({"before": before, "held": held("VmRSS") - before, "peak": held("VmHWM") - before,
                  "load_s": loaded, "first_s": first, "layers": sorted({each.op for each in getattr(model, "layers", [])})}))
"""


def row(kind: str, folder: Path, options: argparse.Namespace) -> dict:
    command = [sys.executable, "-c", LOADED, kind, str(folder), str(options.threads), str(options.prompt), str(options.new)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def measure(options: argparse.Namespace) -> list[dict]:
    from transformers import AutoModelForCausalLM

    import fxc

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "original"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(options.model, None), dtype=torch.bfloat16)
        model.save_pretrained(source)
        del model
        for name in (ORIGINAL, *options.passes):
            folder = source
            if name != ORIGINAL:
                folder = Path(scratch) / f"artifact-{len(rows)}"
                fxc.optimize(source, passes=name, verify=False).save(folder)
            rows.append({"model": name, "saved": size_of(folder), **row(name, folder, options)})
            note(str(rows[-1]))
    return rows


def markdown(report: dict) -> str:
    heads = ["", "saved, GB", "loaded, GB", "at most, GB", "load, s", "first answer, s", "layers run as"]
    body = [
        [each["model"], *(f"{each[what] / 1e9:.2f}" for what in ("saved", "held", "peak")),
         f"{each['load_s']:.1f}", f"{each['first_s']:.1f}", ", ".join(each["layers"])]
        for each in report["rows"]
    ]  # fmt: skip
    machine = report["hardware"]
    about = (
        f"{report['model']}, bfloat16, random weights; {machine['cores']} cores, threads: {report['threads']}, load before: "
        f"{report['load_before']}. Beyond the {report['rows'][0]['before'] / 1e9:.2f} GB of a process that has imported torch, "
        f"transformers and fxc; {report['prompt']} tokens read and {report['new']} written. "
        f"{versions_text(report['versions'])}."
    )
    title = f"# Memory of a loaded model, {report['hardware']['cpu']}"
    return "\n".join([title, "", about, "", *markdown_table(heads, body)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=list(MODELS))
    parser.add_argument("--passes", type=lambda text: text.split(";"), default=list(PASSES), help="with semicolons between")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    report = {
        "hardware": table.hardware(), "versions": table.versions(), "model": options.model, "threads": options.threads,
        "prompt": options.prompt, "new": options.new, "load_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    report["rows"] = measure(options)
    write(options.out / f"memory-{slug(report['hardware']['cpu'])}.json", report, md=markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
