"""Commands that are killed at random moments, by a seed: what is there afterwards is the old output, the new one or none, and
the command goes on to the bytes of one that was not disturbed.

    python -m benchmarks.fuzz.kills
    python -m benchmarks.fuzz.kills --only compile --count 3

A command runs once as a whole, and is timed. Then it is run again and again over an old output or over none, and killed
(SIGKILL, now and then SIGTERM or SIGINT) after a random share of that time, or at a random write to the disk. Results of a full
run: fuzz-kills.json and fuzz-kills.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.fuzz.folders import SMALL
from benchmarks.output import RESULTS, note, quiet, write

SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
# Dies at the n-th fsync or rename, which is where outputs and journals change hands.
AT_WRITE = """
import os, pathlib, signal, sys
left, sent = int(sys.argv[1]), int(sys.argv[2])
def dying(true):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), sent)
        return true(*arguments, **options)
    return call
os.fsync, os.replace, pathlib.Path.rename = dying(os.fsync), dying(os.replace), dying(pathlib.Path.rename)
from fxc.__main__ import main
sys.argv = ["fxc", *sys.argv[3:]]
main()
"""
GPTQ = "int4:group=32:algorithm=gptq"


@dataclass(frozen=True)
class Command:
    """words: a command of fxc, OUT in it for the output; resumes: whether it is run again with --resume; over: what a folder
    in its place holds when it begins."""

    words: tuple[str, ...]
    resumes: bool = False

    def line(self, out: Path, *more: str) -> list[str]:
        return [str(out) if word == "OUT" else word for word in self.words] + list(more)


def commands(place: Path) -> dict[str, Command]:
    """What is killed, over models made in `place`."""
    import transformers

    from fxc import load, optimize

    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(place / "model")
    rows = [" ".join(str(n % 320) for n in range(k, k + 24)) for k in range(12)]
    (place / "rows.jsonl").write_text("".join(f'{{"input_ids": [{row.replace(" ", ", ")}]}}\n' for row in rows))
    optimize(str(place / "model"), passes="prune:ffn=0.5:uniform=true", budget=9.0, layer_budget=9.0).save(place / "pruned")
    load(place / "pruned")
    source, data, pruned = str(place / "model"), str(place / "rows.jsonl"), str(place / "pruned")
    common = ("-o", "OUT", "--no-measure", "--budget", "9", "--layer-budget", "9")
    train = ("--steps", "6", "--batch", "2", "--method", "all", "-o", "OUT")
    return {
        "compile": Command(("compile", source, "--passes", "int8", *common)),
        "resume": Command(("compile", source, "--passes", GPTQ, "--calib", data, *common), resumes=True),
        "recover": Command(("recover", pruned, "--data", data, "--teacher", source, *train), resumes=True),
        "export": Command(("export", pruned, "-o", "OUT")),
    }


def files(folder: Path) -> dict[str, str] | None:
    """The hashes of a folder's files; None where there is no folder."""
    if not folder.exists():
        return None
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _run(words: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fxc", *words], capture_output=True, text=True, **options)


def trial(command: Command, whole: dict[str, str], old: Path, seconds: float, draw: random.Random, place: Path) -> str:
    """Kill it once, and let it go on. Returns what was there after the kill; raises AssertionError for anything else than the
    old output, the new one, or none."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    out, over = place / "out", draw.random() < 0.5
    if over:
        shutil.copytree(old, out)
    before, more = files(out), ["--overwrite"] if over else []
    sent = draw.choice(SIGNALS)
    how = _killed(command.line(out, *more), sent, seconds, draw)
    after = files(out)
    said = "old" if after == before else "new" if after == whole else "other"
    # Between the two renames of a replacement there is no output; the old one lies beside it, and comes back.
    aside = [path for path in place.iterdir() if ".fxc-old-" in path.name]
    if after is None and over:
        assert aside and files(aside[0]) == before, f"{how}: the old output is gone"
        said = "aside"
    assert said != "other", f"{how}: the output is neither the old one nor the new one"
    if said != "new" or over:
        again = _run(command.line(out, "--overwrite", *["--resume"] * command.resumes))
        if again.returncode == 2 and "no pass learns" not in again.stderr and "--resume" in again.stderr:
            again = _run(command.line(out, "--overwrite"))
        assert again.returncode == 0, f"{how}: the same command again fails: {again.stderr[-600:]}"
    assert files(out) == whole, f"{how}: what the same command makes in the end is something else"
    left = sorted(path.name for path in place.iterdir() if path.name != "out")
    assert said == "new" or left == [], f"{how}: {left} is left"
    return f"{said if said != 'old' or over else 'none'} after {how.partition(' ')[0]}"


def _killed(words: list[str], sent: signal.Signals, seconds: float, draw: random.Random) -> str:
    if draw.random() < 0.5:
        at = draw.randint(0, 40)
        command = [sys.executable, "-c", AT_WRITE, str(at), str(int(sent)), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return f"{sent.name} at write {at}" if done.returncode else "done, before it"
    child = subprocess.Popen([sys.executable, "-m", "fxc", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait = draw.uniform(0.2, 1.05) * seconds
    try:
        child.wait(timeout=wait)
        return "done, before it"
    except subprocess.TimeoutExpired:
        child.send_signal(sent)
        child.wait()
        return f"{sent.name} after {wait:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=["compile", "resume", "recover", "export"])
    parser.add_argument("--count", type=int, default=50, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of each command at most")
    parser.add_argument("--out", type=Path, help="where to write the result; of a full run it is benchmarks/results")
    options = parser.parse_args()
    quiet()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows, faults = [], []
    with tempfile.TemporaryDirectory(prefix="fxc-kills-") as folder:
        place = Path(folder)
        for name, command in commands(place).items():
            if options.only and name not in options.only:
                continue
            began = time.monotonic()
            done = _run(command.line(place / f"{name}-whole"))
            assert done.returncode == 0, done.stderr
            seconds, whole = time.monotonic() - began, files(place / f"{name}-whole")
            # An old output that is whole, and another one.
            old = shutil.copytree(place / f"{name}-whole", place / f"{name}-old")
            _make_other(old)
            outcomes, count = Counter(), 0
            for number in range(options.count):
                if time.monotonic() - began > 60 * options.minutes:
                    break
                count += 1
                try:
                    draw = random.Random(f"{name}-{options.seed}-{number}")
                    outcomes[trial(command, whole, old, seconds, draw, place / "trial")] += 1
                except AssertionError as error:
                    faults.append(f"{name} {number}: {error}")
                    note(faults[-1])
            note(f"{name}: {count} kills, {dict(outcomes)}")
            row = {"command": name, "kills": count, "of": options.count, "seconds": round(seconds, 1)}
            rows.append(row | {"outcomes": outcomes})
    report = {"seed": options.seed, "rows": rows, "faults": faults}
    print(_table(report))
    if options.out or not options.only:
        write((options.out or RESULTS) / "fuzz-kills.json", report, md=_table(report))
    return 1 if faults else 0


def _make_other(folder: Path) -> None:
    """A file of its own kind that differs and may be replaced: an artifact says more in its manifest, an export more in a
    configuration."""
    import json

    from fxc.artifact import manifest

    path = folder / "fxc.json"
    if path.exists():
        path.write_bytes(manifest.encode(json.loads(path.read_bytes()) | {"older": True}))
    else:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"older": True}))


def _table(report: dict) -> str:
    lines = [
        "# Kills", "",
        f"`python -m benchmarks.fuzz.kills`, seed {report['seed']}. Each command then ran again, to the same bytes.",
        "", "| command | kills | takes, s | what was there after a kill |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        outcomes = "; ".join(f"{count}x {name}" for name, count in sorted(row["outcomes"].items()))
        lines.append(f"| {row['command']} | {row['kills']} of {row['of']} | {row['seconds']} | {outcomes} |")
    lines += ["", f"Faults: {len(report['faults'])}", *(f"- {each}" for each in report["faults"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
