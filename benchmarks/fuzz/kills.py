"""Commands that are killed, or whose disk is full, at random moments, by a seed: what is there afterwards is the old output,
the new one or none, and the command goes on to the bytes of one that was not disturbed.

    python -m benchmarks.fuzz.kills
    python -m benchmarks.fuzz.kills --only compile --count 3

A command runs once as a whole, and is timed. Then it is run again and again over an old output or over none, and killed
(SIGKILL, now and then SIGTERM or SIGINT) after a random share of that time, or at a random write to the disk; or at such a
write the disk, a tmpfs of its own that only root can mount, is filled to its end. Each runs in a fork of this process. Results
of a full run: fuzz-kills.json and fuzz-kills.md.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.fuzz.folders import SMALL
from benchmarks.fuzz.forked import run, start, warm
from benchmarks.output import RESULTS, note, quiet, write

SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
DISK = "64m"
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

    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(place / "model")
    rows = [" ".join(str(n % 320) for n in range(k, k + 24)) for k in range(12)]
    (place / "rows.jsonl").write_text("".join(f'{{"input_ids": [{row.replace(" ", ", ")}]}}\n' for row in rows))
    source, data, pruned = str(place / "model"), str(place / "rows.jsonl"), str(place / "pruned")
    common = ("-o", "OUT", "--no-measure", "--budget", "9", "--layer-budget", "9")
    made = Command(("compile", source, "--passes", "prune:ffn=0.5:uniform=true", *common)).line(place / "pruned")
    code, said, _ = warm(made)
    assert code == 0, said
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


def trial(
    command: Command, whole: dict[str, str], old: Path, draw: random.Random, place: Path, disturb: Callable[[list[str]], str]
) -> str:
    """Run it while `disturb` kills it or fills the disk, and let it go on. Returns what was there in between; raises
    AssertionError for anything else than the old output, the new one, or none."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    out, over = place / "out", draw.random() < 0.5
    if over:
        shutil.copytree(old, out)
    before, more = files(out), ["--overwrite"] if over else []
    how = disturb(command.line(out, *more))
    after = files(out)
    said = "old" if after == before else "new" if after == whole else "other"
    # Between the two renames of a replacement there is no output; the old one lies beside it, and comes back.
    aside = [path for path in place.iterdir() if ".fxc-old-" in path.name]
    if after is None and over:
        assert aside and files(aside[0]) == before, f"{how}: the old output is gone"
        said = "aside"
    assert said != "other", f"{how}: the output is neither the old one nor the new one"
    if said != "new" or over:
        code, text = run(command.line(out, "--overwrite", *["--resume"] * command.resumes))
        if code == 2 and "no pass learns" not in text and "--resume" in text:
            code, text = run(command.line(out, "--overwrite"))
        assert code == 0, f"{how}: the same command again fails: {text[-600:]}"
    assert files(out) == whole, f"{how}: what the same command makes in the end is something else"
    left = sorted(path.name for path in place.iterdir() if path.name != "out")
    assert said == "new" or left == [], f"{how}: {left} is left"
    return f"{said if said != 'old' or over else 'none'} after {how.partition(' at ')[0]}"


def _killed(words: list[str], seconds: float, writes: int, draw: random.Random) -> str:
    sent = draw.choice(SIGNALS)
    if draw.random() < 0.5:
        at = draw.randrange(writes)
        code, _ = run(words, at_write=(at, lambda: os.kill(os.getpid(), sent)))
        return f"{sent.name} at write {at}" if code else "the end"
    fork, wait = start(words), draw.uniform(0.02, 1.05) * seconds
    try:
        fork.wait(wait)
    except TimeoutError:
        fork.kill(sent)
        return f"{sent.name} at {wait:.1f} s"
    return "the end"


def _filled(words: list[str], filler: Path, writes: int, draw: random.Random) -> str:
    def fill() -> None:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(filler.parent).free)

    at = draw.randrange(writes)
    try:
        code, text = run(words, at_write=(at, fill))
    finally:
        filler.unlink(missing_ok=True)
    how = f"a full disk at write {at}" if code else "the end"
    assert "Traceback" not in text and "fault of fxc" not in text, f"{how}: {text[-600:]}"
    assert code in (0, 6), f"{how}: exit code {code}, {text[-600:]}"
    return how


@contextmanager
def _disk(place: Path) -> Iterator[Path | None]:
    """A small disk at `place`; None where this user cannot mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "fxc-kills", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        note(f"no full disks: {done.stderr.strip()}")
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=["compile", "resume", "recover", "export"])
    parser.add_argument("--count", type=int, default=50, help="kills of each command, and as many full disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of each command and kind at most")
    parser.add_argument("--out", type=Path, help="where to write the result; of a full run it is benchmarks/results")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report: dict = {"seed": options.seed, "rows": [], "faults": []}
    # As Ctrl-C does: the disk is taken away again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fxc-kills-") as folder, _disk(Path(folder) / "disk") as disk:
        for name, command in commands(Path(folder)).items():
            if options.only and name not in options.only:
                continue
            _all_of(name, command, Path(folder), disk, options, report)
            if options.out or not options.only:
                write((options.out or RESULTS) / "fuzz-kills.json", report, md=_table(report))
    print(_table(report))
    return 1 if report["faults"] else 0


def _all_of(name: str, command: Command, place: Path, disk: Path | None, options: argparse.Namespace, report: dict) -> None:
    code, said, writes = warm(command.line(place / f"{name}-warm"))
    assert code == 0, said
    began = time.monotonic()
    code, said = run(command.line(place / f"{name}-whole"))
    assert code == 0, said
    seconds, whole = time.monotonic() - began, files(place / f"{name}-whole")
    # An old output that is whole, and another one.
    old = shutil.copytree(place / f"{name}-whole", place / f"{name}-old")
    _make_other(old)
    kinds = {"kills": (place, lambda draw: lambda words: _killed(words, seconds, writes, draw))}
    if disk is not None:
        kinds["full disks"] = disk, lambda draw: lambda words: _filled(words, disk / "filler", writes, draw)
    for kind, (where, disturb) in kinds.items():
        outcomes, count, began = Counter(), 0, time.monotonic()
        for number in range(options.count):
            if time.monotonic() - began > 60 * options.minutes:
                break
            count += 1
            draw = random.Random(f"{name}-{kind}-{options.seed}-{number}")
            try:
                outcomes[trial(command, whole, old, draw, where / "trial", disturb(draw))] += 1
            except AssertionError as error:
                report["faults"].append(f"{name}, {kind} {number}: {error}")
                note(report["faults"][-1])
        note(f"{name}: {count} {kind}, {dict(outcomes)}")
        row = {"command": name, "kind": kind, "done": count, "of": options.count, "seconds": round(seconds, 1)}
        report["rows"].append(row | {"outcomes": outcomes})


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
        "# Kills and full disks", "",
        f"`python -m benchmarks.fuzz.kills`, seed {report['seed']}. Each command then ran again, to the same bytes.",
        "", "| command | what | takes, s | what was there afterwards |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        outcomes = "; ".join(f"{count}x {name}" for name, count in sorted(row["outcomes"].items()))
        lines.append(f"| {row['command']} | {row['done']} of {row['of']} {row['kind']} | {row['seconds']} | {outcomes} |")
    lines += ["", f"Faults: {len(report['faults'])}", *(f"- {each}" for each in report["faults"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
