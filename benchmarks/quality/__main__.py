"""What compression costs in quality on the bundled language model: fxc beside llm-compressor and torchao, in one run.

    python -m benchmarks.quality --threads 2
    python -m benchmarks.quality --only "4 bits" --no-peers
    python -m benchmarks.quality --only "2:4,half" --add

Every contender gets the same 128 windows of 256 tokens to calibrate on, and is measured on the same held-out windows. Each
compresses in a process of its own, and is loaded and measured in another one from the folder that it wrote. The peers run in an
environment of their own, which the first run makes (benchmarks/quality/environment.py). A full run writes
benchmarks/results/quality-<cpu>.json and .md; with --add rows go into the ones that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks import table
from benchmarks.algorithms import CALIBRATION, EVALUATED, WINDOW, tokens
from benchmarks.output import RESULTS, earlier, note, quiet, write
from benchmarks.quality.contenders import CONTENDERS, Contender
from benchmarks.quality.environment import peers_python
from benchmarks.quality.report import markdown
from benchmarks.quality.score import losses
from benchmarks.workloads import PYLM
from fxc.kernel_bench.files import slug
from fxc.measure.perplexity import Perplexity, relative_change

REPO = Path(__file__).resolve().parents[2]
SECONDS = 3600


def run(command: list[str], job: dict[str, Any], scratch: Path, threads: int) -> dict[str, Any]:
    """What a process prints last, as JSON. Raises RuntimeError with its last words."""
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [*command, str(scratch / "job.json")], cwd=REPO, env=environment, timeout=SECONDS, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result in {SECONDS} s") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no message"]
    if done.returncode:
        raise RuntimeError(f"ended with status {done.returncode}: {'; '.join(lines[-3:])[-300:]}")
    return json.loads(lines[-1])


def measure(contender: Contender, job: dict[str, Any], scratch: Path, threads: int) -> dict[str, Any]:
    """losses by window, seconds of compressing, peak bytes of that, bytes of the weights on disk; or failed: why not."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    job = job | {"out": str(out), "recipe": contender.recipe}
    ours = [sys.executable, "-m", "benchmarks.quality.ours"]
    command = ours if contender.is_ours else [str(peers_python()), str(Path(__file__).with_name("peer.py"))]
    try:
        made = run(command, job | {"do": "compress"}, scratch, threads)
        scored = run(command, job | {"do": "score"}, scratch, threads)
    except (RuntimeError, json.JSONDecodeError) as error:
        return {"failed": str(error)}
    nbytes = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return {"losses": scored["losses"], "seconds": round(made["seconds"], 1), "memory": made["memory"], "bytes": nbytes}


def compared(before: list[float], entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its change of perplexity and its standard error in the place of its losses."""
    if "losses" not in entry:
        return entry
    counts = [WINDOW - 1] * len(before)
    scored = (Perplexity(0.0, sum(counts), WINDOW, each, counts) for each in (before, entry["losses"]))
    change, spread = relative_change(*scored)
    return {"change": change, "spread": spread, **{key: value for key, value in entry.items() if key != "losses"}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="parts of the names of formats or contenders, with commas between")
    parser.add_argument("--no-peers", action="store_true", help="fxc alone")
    parser.add_argument("--quick", action="store_true", help="few windows: whether it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: benchmarks/results, for a full run")
    parser.add_argument("--add", action="store_true", help="to the rows of a run under the same conditions that are there")
    options = parser.parse_args()
    if options.add and options.quick and not options.out:
        parser.error("--add adds the rows of a quick run only with --out")
    return options


def in_order(formats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Formats and their rows as `CONTENDERS` has them; rows of others are dropped."""
    found: dict[str, dict[str, Any]] = {}
    for each in CONTENDERS:
        if each.name in formats.get(each.format, {}):
            found.setdefault(each.format, {})[each.name] = formats[each.format][each.name]
    return found


def main() -> int:
    options = arguments()
    quiet()
    torch.set_num_threads(options.threads)
    wanted = [each.strip() for each in options.only.split(",") if each.strip()]
    chosen = [
        each
        for each in CONTENDERS
        if (each.is_ours or not options.no_peers) and (not wanted or any(w in f"{each.format}: {each.name}" for w in wanted))
    ]
    calibration, evaluated = (8, 8) if options.quick else (CALIBRATION, EVALUATED)
    protocol = {"threads": options.threads, "window": WINDOW, "calibration": calibration, "evaluated": evaluated}
    report: dict[str, Any] = {"hardware": table.hardware(), "versions": table.versions(), "protocol": protocol, "formats": {}}
    whole = not (options.quick or wanted or options.no_peers)
    folder = options.out or (RESULTS if whole or options.add else None)
    path = folder / f"quality-{slug(report['hardware']['cpu'])}.json" if folder else None
    if path and options.add:
        report["formats"] = earlier(path, report, ("hardware", "versions", "protocol")).get("formats", {})
    with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as name:
        scratch = Path(name)
        drawn, text = tokens(calibration)
        held_out = text[: evaluated * WINDOW].view(evaluated, WINDOW)
        save_file({"calibration": drawn, "held_out": held_out.contiguous()}, scratch / "tokens.safetensors")
        before = losses(AutoModelForCausalLM.from_pretrained(PYLM, dtype="auto").eval(), held_out)
        job = {"model": str(PYLM), "tokens": str(scratch / "tokens.safetensors")}
        for contender in chosen:
            load = round(os.getloadavg()[0], 1)
            entry = compared(before, measure(contender, job, scratch, options.threads)) | {"load": load}
            report["formats"].setdefault(contender.format, {})[contender.name] = entry
            report["formats"] = in_order(report["formats"])
            said = entry.get("failed") or f"{entry['change']:+.2%} ±{entry['spread']:.2%}, {entry['seconds']} s"
            note(f"{contender.format}: {contender.name}: {said}")
            if path:  # after each: a run that is stopped has what it found
                write(path, report, md=markdown(report))
    print(markdown(report))
    return 0 if all("failed" not in e for f in report["formats"].values() for n, e in f.items() if n.startswith("fxc")) else 1


if __name__ == "__main__":
    sys.exit(main())
