"""python -m benchmarks.harness [--model examples/pylm] [--text heldout.txt] [--passes int8] [--out FILE.json]

A compiled model in the hands of lm-evaluation-harness: its class for models of transformers, `HFLM(pretrained=model)`, scores
a text, scores continuations and generates, with the original, with the compiled model, and with what transformers loads from a
folder of `fxc export --format fxc`. Needs lm-eval (pip install lm-eval), which reads nothing from the network for this.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import fxc
from benchmarks import output

STARTS = [("import ", "os\n"), ("def f(self):\n    return ", "self.x"), ("for i in ", "range(10):\n")]


def scored(model: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    """What the harness finds: log-likelihood a byte of the text, of each continuation, and what it generates."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=256, device="cpu")

    def asked(kind: str, *requests: tuple) -> list:
        return getattr(harness, kind)([Instance(kind, {}, each, number) for number, each in enumerate(requests)])

    (rolling,) = asked("loglikelihood_rolling", (text,))
    options = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    return {
        "bits_per_byte": -rolling / math.log(2) / len(text.encode()),
        "continuations": [round(found, 4) for found, _ in asked("loglikelihood", *STARTS)],
        "generated": asked("generate_until", ("import os\n", options))[0],
    }


def main() -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/pylm"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--passes", default="int8")
    parser.add_argument("--characters", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=output.RESULTS / "harness.json")
    given = parser.parse_args()
    output.quiet()
    text = (given.text or given.model / "heldout.txt").read_text()[: given.characters]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)
    compiled = fxc.optimize(given.model, passes=given.passes)
    with tempfile.TemporaryDirectory() as folder:
        compiled.export_fxc(Path(folder) / "exported")
        models = {
            "original": AutoModelForCausalLM.from_pretrained(given.model),
            f"fxc.optimize, {given.passes}": compiled,
            "from_pretrained of its export": AutoModelForCausalLM.from_pretrained(Path(folder) / "exported"),
        }
        rows = {name: scored(model, tokenizer, text) for name, model in models.items()}
    versions = {name: metadata.version(name) for name in ("lm-eval", "transformers", "torch", "fxc")}
    table = ["| | bits a byte | log-likelihood of three continuations |", "|---|---|---|"]
    table += [f"| {n} | {r['bits_per_byte']:.4f} | {', '.join(map(str, r['continuations']))} |" for n, r in rows.items()]
    head = f"# {given.model} in lm-eval {versions['lm-eval']}\n\n{len(text):,} characters of held-out text.\n\n"
    output.write(given.out, {"versions": versions, "characters": len(text), "models": rows}, md=head + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
