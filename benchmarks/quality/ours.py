"""What fxc makes of the model: python -m benchmarks.quality.ours JOB.json, a job of peer.py whose recipe is a pass line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import fxc
from benchmarks.output import quiet
from benchmarks.quality.score import ROWS, losses, peak


def compress(job: dict[str, Any]) -> dict[str, Any]:
    calibration = load_file(job["tokens"])["calibration"]
    began = time.perf_counter()
    model = fxc.optimize(job["model"], passes=job["recipe"]["passes"], calib=list(calibration.split(ROWS)))
    seconds = time.perf_counter() - began
    model.save(job["out"])
    return {"seconds": seconds, "memory": peak()}


def score(job: dict[str, Any]) -> dict[str, Any]:
    return {"losses": losses(fxc.load(job["out"]), load_file(job["tokens"])["held_out"])}


if __name__ == "__main__":
    quiet()
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    made = {"compress": compress, "score": score}[given["do"]](given)
    print("\n" + json.dumps(made))
