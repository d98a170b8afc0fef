"""Every Triton kernel against its reference on the GPU at hand: python -m benchmarks.gpu_checks.

For each kernel, odd shapes and real ones, and each configuration that is shipped for the chip: values within a tolerance,
every output written (memory is poisoned beforehand) and nothing behind it, twice the same bits (products of eight warps over
a long K: twelve times), the same bits from a CUDA graph that is replayed, and a changed weight seen. Prints PASS or FAIL for
each case, writes gpu-checks-<device>.json after each kernel, and exits with 1 where one failed.

Each kernel runs in a process of its own: a fault on a GPU ends everything else in its process. With TRITON_INTERPRET=1 small
shapes run in Triton's interpreter, which is how the script itself is tested; inline PTX does not run there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.gpu_checks.cases import CASES
from benchmarks.gpu_checks.chip import Chip, chip_here
from benchmarks.gpu_checks.fault import fault
from benchmarks.output import RESULTS
from fxc.kernel_bench.files import slug, write_texts
from fxc.kernel_bench.run import failure


def check(kernel: str, chip: Chip, part: Path | None = None) -> list[dict]:
    """Every case of one kernel, in this process. part: takes each row, a line of JSON, when it is known."""
    rows = []
    for case in CASES[kernel](chip):
        began = time.perf_counter()
        try:
            wrong = fault(case, chip)
        except Exception as error:  # whatever a kernel does, the others are still checked
            wrong = failure(error)
        rows.append({"kernel": kernel, "case": case.label, "fault": wrong, "seconds": round(time.perf_counter() - began, 3)})
        print(f"{'FAIL' if wrong else 'PASS'} {kernel} {case.label}{': ' if wrong else ''}{wrong}", flush=True)
        if part is not None:
            with part.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


def apart(kernel: str, limit: float) -> list[dict]:
    """The same in a process of its own. Where it breaks off, what it found before is kept."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "rows"
        limit = max(limit, 1.0)
        command = [sys.executable, "-m", "benchmarks.gpu_checks", "--only", kernel, "--here", "--part", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            # 1: a case failed, and the rows say which.
            why = "" if done.returncode in (0, 1) else f"status {done.returncode}"
            if why or (done.returncode and not part.exists()):
                why = (done.stderr.strip().splitlines() or [why])[-1][:300]
        except subprocess.TimeoutExpired:
            why = f"not over after {limit:.0f} s"
        rows = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    lines = [f"{'FAIL' if row['fault'] else 'PASS'} {kernel} {row['case']}{': ' if row['fault'] else ''}{row['fault']}"
             for row in rows]  # fmt: skip
    if why:
        rows.append({"kernel": kernel, "case": "the process", "fault": f"broke off: {why}"})
        lines.append(f"FAIL {kernel}: broke off: {why}")
    # In one piece: other threads print too.
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(CASES)}, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=150, help="of all kernels, which run at once")
    parser.add_argument("--here", action="store_true", help="all in this process")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        print("not checked: torch finds no CUDA device here", file=sys.stderr)
        return 2
    kernels = options.only.split(",") if options.only else list(CASES)
    if unknown := [name for name in kernels if name not in CASES]:
        parser.error(f"there is no kernel {', '.join(unknown)}: one of {', '.join(CASES)}")
    chip = chip_here()
    if options.part is not None:
        return 1 if any(row["fault"] for name in kernels for row in check(name, chip, options.part)) else 0
    found: dict[str, list[dict]] = {}
    if options.here or chip.interpreted:
        for name in kernels:
            found[name] = check(name, chip)
            write(found, kernels, chip, options.out)
    else:
        # They wait for the compiler most of the time, each on a core of its own. All have ended when the time is over.
        with ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1)) as pool:
            # The last ones compile the longest.
            running = {pool.submit(lambda name: apart(name, end - time.monotonic()), name): name for name in kernels[::-1]}
            for done in as_completed(running):
                found[running[done]] = done.result()
                write(found, kernels, chip, options.out)
    rows = [row for name in kernels for row in found[name]]
    failed = [row for row in rows if row["fault"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} cases pass on {name_of(chip)}")
    if absent := [name for name in kernels if not found[name]]:
        print(f"no case for this chip: {', '.join(absent)}")
    return 1 if failed else 0


def name_of(chip: Chip) -> str:
    return torch.cuda.get_device_name(chip.device) if chip.device.type == "cuda" else "interpreter"


def write(found: dict[str, list[dict]], kernels: list[str], chip: Chip, out: Path) -> None:
    """gpu-checks-<device>.json, with the kernels that are done."""
    report = {"device": name_of(chip), "capability": chip.capability, "torch": torch.__version__,
              "not_over": [name for name in kernels if name not in found],
              "rows": [row for name in kernels for row in found.get(name, [])]}  # fmt: skip
    write_texts(out, {f"gpu-checks-{slug(name_of(chip))}.json": json.dumps(report, indent=1) + "\n"})


if __name__ == "__main__":
    sys.exit(main())
