"""Whether a compilation that is killed and resumed makes the bytes of an undisturbed one: `python -m benchmarks.kills`.

`fxc compile --stream --resume` of a tiny model runs in a process that is killed (SIGKILL) at a random moment of its time, and
so is the one that goes on, until one is done before its moment comes; then the artifact is compared with that of an undisturbed
run, file by file. That goes on until so many (--kills) were killed. Parts are kept small, so that there are many of them. The
processes are forked from one that has imported everything: seconds in which there is nothing to lose. Results: kills-<cpu>.json
and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import fxc
import fxc.cli.compile
from benchmarks import larger, table
from benchmarks.output import RESULTS, note, write
from fxc.__main__ import main as command
from fxc.artifact.manifest import MANIFEST
from fxc.artifact.spill import JOURNAL
from fxc.ir import store
from fxc.kernel_bench.files import markdown_table, slug, versions_text

PASSES = ("int8", "int4:group=32", "prune:heads=0.5:ffn=0.25,int8")
PART_BYTES = 40_000


def compiled(folder: Path, passes: str, out: Path, moment: float | None) -> bool:
    """Compile in a process of its own, which is killed after `moment` seconds unless it is None. Whether it was."""
    child = os.fork()
    if not child:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        store.PART_BYTES = PART_BYTES
        sys.argv = ["fxc", "compile", str(folder), "--passes", passes, "-o", str(out), "--stream", "--resume", "--no-measure"]
        code = 1
        try:
            command()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os._exit(code)
    began = time.monotonic()
    while moment is None or time.monotonic() - began < moment:
        found, status = os.waitpid(child, os.WNOHANG if moment is not None else 0)
        if found:
            if os.waitstatus_to_exitcode(status):
                raise RuntimeError(f"{passes}: a run that nobody killed ended with {os.waitstatus_to_exitcode(status)}")
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def place(out: Path) -> str:
    """How far the run came that was killed."""
    if (out / MANIFEST).is_file():
        return "the artifact was there"
    journals = list(out.parent.glob(f".{out.name}.fxc-resume/*/{JOURNAL}"))
    parts = sum(len(path.read_text().splitlines()) - 1 for path in journals)
    if not journals:
        return "before anything was written"
    aside = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.") and "resume" not in path.name]
    return "while the artifact was written" if aside else "after some parts" if parts > 0 else "before the first part"


def trial(folder: Path, passes: str, scratch: Path, seconds: float, draw: random.Random, left: int) -> Counter[str]:
    """Killed until a run is done: how far those came that were. left: that many are to be killed at most."""
    out, places = scratch / "out", Counter[str]()
    while not (out / MANIFEST).is_file():
        moment = draw.uniform(0, 1.2 * seconds) if places.total() < left else None
        if compiled(folder, passes, out, moment):
            places[place(out)] += 1
    return places


def _clear(scratch: Path) -> None:
    shutil.rmtree(scratch)
    scratch.mkdir()


def run(folder: Path, passes: str, kills: int, scratch: Path, draw: random.Random) -> dict:
    out = scratch / "out"
    _clear(scratch)
    began = time.monotonic()
    compiled(folder, passes, out, None)
    seconds = time.monotonic() - began
    expected, places, trials, wrong = digests(out), Counter[str](), 0, []
    while places.total() < kills:
        _clear(scratch)
        places += trial(folder, passes, scratch, seconds, draw, kills - places.total())
        trials += 1
        if (found := digests(out)) != expected:
            wrong.append(sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)))
    return {
        "passes": passes, "seconds": seconds, "kills": places.total(), "runs": trials, "differ": wrong, "places": dict(places),
    }  # fmt: skip


def markdown(report: dict) -> str:
    cells = [
        [row["passes"], str(row["kills"]), str(row["runs"]), str(len(row["differ"])),
         ", ".join(f"{place}: {count}" for place, count in sorted(row["places"].items()))]
        for row in report["rows"]
    ]  # fmt: skip
    how = (
        f"`fxc compile --stream --resume` of a model of {report['weights'] / 1e6:.1f} MB, killed at random moments (seed "
        f"{report['seed']}), again and again until it was done, and then compared with an undisturbed run, all files of the "
        f"artifact. {versions_text(report['versions'])}."
    )
    head = ["passes", "killed", "finished artifacts", "of them other bytes", "how far the killed ones had come"]
    rows = "\n".join(markdown_table(head, cells))
    return f"# Killed and resumed, {report['hardware']['cpu']}\n\n{how}\n\n{rows}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all, shared among the passes")
    parser.add_argument("--passes", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where model and results go meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    passes, draw, rows = options.passes or list(PASSES), random.Random(options.seed), []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, scratch = Path(folder) / "model", Path(folder) / "runs"
        weights = larger.make(model, "tiny", larger.SHAPES["tiny"][4], False)
        scratch.mkdir()
        fxc.optimize(model, passes="int8", stream=True)  # so that all is imported, built and measured before the first fork
        for at, each in enumerate(passes):
            share = options.kills // len(passes) + (at < options.kills % len(passes))
            rows.append(run(model, each, share, scratch, draw))
            note(json.dumps(rows[-1]))
    report = {
        "weights": weights, "kills": options.kills, "seed": options.seed, "rows": rows, "hardware": table.hardware(),
        "versions": table.versions(),
    }  # fmt: skip
    text = markdown(report)
    print(text)
    write(options.out / f"kills-{slug(report['hardware']['cpu'])}.json", report, md=text)
    if any(row["differ"] for row in rows):
        sys.exit("a run that was killed and resumed made other bytes")


if __name__ == "__main__":
    main()
