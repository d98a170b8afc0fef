"""Where a benchmark's results go, how they are written, and what is said meanwhile."""

import json
import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from fxc.kernel_bench.files import write_texts

RESULTS = Path(__file__).resolve().parent / "results"


def note(text: str) -> None:
    """To standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def write(path: Path, report: dict, **texts: str) -> None:
    """`report` as JSON at `path`, and beside it a file for each text, with the keyword as its suffix: md="# Results"."""
    named = {path.name: json.dumps(report, indent=1) + "\n"}
    named |= {path.with_suffix(f".{suffix}").name: text for suffix, text in texts.items()}
    write_texts(path.parent, named)
    note(f"wrote {path}" + "".join(f" and {name}" for name in [*named][1:]))


def earlier(path: Path, report: dict, parts: Iterable[str]) -> dict:
    """The report at `path`, {} where there is none. Raises RuntimeError where one of these parts is not what it is in `report`,
    as on another machine or with other versions: its rows and new ones would stand side by side as if they could be
    compared."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    for part in parts:
        if found[part] != report[part]:
            raise RuntimeError(f"rows cannot be added to {path}: its {part} are {found[part]}, here {report[part]}")
    return found


def quiet() -> None:
    """transformers' progress bars and everybody's warnings would bury the table."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
