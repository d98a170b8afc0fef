"""The environment of the peers: their versions of transformers and theirs alone, so that nothing of it reaches fxc."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.output import note

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
FOLDER = REPO / ".venv-peers"
REQUIREMENTS = HERE / "requirements.txt"


def peers_python() -> Path:
    """The Python of the peers' environment, which is made where it is missing or its requirements have changed.

    Raises RuntimeError with pip's last lines where it cannot be installed."""
    python, stamp = FOLDER / "bin" / "python", FOLDER / "requirements.txt"
    wanted = _torch() + "\n" + REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    note(f"making {FOLDER.name} for the peers, once: some minutes")
    venv.create(FOLDER, clear=True, with_pip=True)
    # torch first and alone: resolved together with the rest it may come with CUDA's packages.
    for what in ([_torch()], ["-r", str(REQUIREMENTS), _torch()]):
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the peers cannot be installed: {done.stderr.strip()[-500:]}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _torch() -> str:
    constraints = (REPO / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in constraints.splitlines() if line.startswith("torch=="))


if __name__ == "__main__":
    print(peers_python())
    sys.exit(0)
