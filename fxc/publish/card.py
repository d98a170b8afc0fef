"""The README.md of a repository on the Hugging Face hub: what was done to the model, from the report of its artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fxc.ir.cache import KIND
from fxc.page import told
from fxc.units import ratio, size

LOADING = {
    "artifact": """\
from huggingface_hub import snapshot_download

import fxc

model = fxc.load(snapshot_download("{repo}"))
""",
    "fxc": """\
import fxc  # runs its layers in fxc's kernels
from transformers import {auto}

model = {auto}.from_pretrained("{repo}")
""",
    "hf": """\
from transformers import {auto}

model = {auto}.from_pretrained("{repo}")
""",
    "compressed-tensors": """\
from transformers import {auto}  # and pip install compressed-tensors; or: vllm serve {repo}

model = {auto}.from_pretrained("{repo}")
""",
    "gguf": """\
from llama_cpp import Llama

model = Llama.from_pretrained("{repo}", "model.gguf")
""",
    "onnx": """\
import onnxruntime
from huggingface_hub import snapshot_download

session = onnxruntime.InferenceSession(snapshot_download("{repo}") + "/model.onnx")
print([(each.name, each.type, each.shape) for each in session.get_inputs()])
""",
    "aoti": """\
import torch
from huggingface_hub import snapshot_download

run = torch._inductor.aoti_load_package(snapshot_download("{repo}") + "/model.pt2")  # its inputs: names.json
""",
}
"""Format -> how what is in the repository is loaded."""
_LIBRARIES = {"artifact": "fxc", "gguf": "gguf", "onnx": "onnx", "aoti": "pytorch"}
_MINDED = {"aoti": "The package is machine code for one kind of CPU and one version of torch: those that it was made with."}
"""Format -> what who loads it has to know."""


def card(manifest: Mapping[str, Any], metadata: Mapping[str, Any], repo: str, kind: str, nbytes: int) -> str:
    """The text of a card. manifest: of the artifact, which anybody may have written; metadata: of its program; kind: a format
    of LOADING; nbytes: of all files."""
    report = told.mapping(manifest.get("report"))
    source, versions = told.mapping(report.get("source")), told.mapping(manifest.get("versions"))
    origin = told.text(source.get("id")) if source.get("kind") == "hub" else ""
    origin = origin if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", origin) else ""
    is_decoder = metadata.get("kind") == KIND
    front = {"library_name": _LIBRARIES.get(kind, "transformers"), "tags": ["fxc", "compressed"]}
    front |= {"base_model": origin} if origin else {}
    front |= {"pipeline_tag": "text-generation"} if is_decoder else {}
    # What is JSON is YAML.
    lines = ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()), "---", ""]
    of = f" from [{origin}](https://huggingface.co/{origin})" if origin else ""
    lines += [f"# {_plain(repo)}", "", f"A {_plain(metadata.get('class'))} compressed by fxc{of}.", ""]
    lines += _table(["", "before", "after", ""], _sizes(report, nbytes))
    if passes := _passes(report):
        lines += ["", *_table(["pass", "changed", "weights after it", "rewritten"], passes)]
    for each in told.mappings(report.get("passes")):
        lines += [f"- {_plain(each.get('name'))}: {_plain(note, 400)}" for note in told.texts(each.get("notes"))]
    plugins = {told.text(told.mapping(p.get("plugin")).get("module")) for p in told.mappings(report.get("passes"))} - {""}
    if plugins:
        lines += ["", f"Passes from outside of fxc had a part in it: {', '.join(map(_plain, sorted(plugins)))}."]
    # By its own class: AutoModel would leave the head of a classifier out.
    named = told.text(metadata.get("class"))
    auto = "AutoModelForCausalLM" if is_decoder else named if re.fullmatch(r"[A-Z]\w+", named) else "AutoModel"
    lines += ["", _MINDED[kind]] if kind in _MINDED else []
    lines += ["", "```python", LOADING[kind].format(repo=repo, auto=auto).rstrip("\n"), "```", ""]
    named = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in versions.items() if isinstance(version, str))
    if named:
        lines += [f"Made with {named}.", ""]
    return "\n".join(lines)


def _sizes(report: Mapping[str, Any], nbytes: int) -> list[list[str]]:
    rows = []
    for what, field, write in (("weights", "bytes", size), ("parameters", "parameters", lambda n: f"{n:,.0f}")):
        before, after = (told.number(report.get(f"{field}_{when}")) for when in ("before", "after"))
        if before is not None and after is not None:
            rows.append([what, write(before), write(after), ratio(after, before)])
    losses = told.mapping(report.get("perplexity"))
    before, after, change = (told.number(losses.get(name)) for name in ("before", "after", "change"))
    if before is not None and after is not None and change is not None:
        tokens = told.whole(losses.get("tokens"))
        rows.append([f"perplexity, {tokens:,} tokens" if tokens else "perplexity", f"{before:.3f}", f"{after:.3f}",
                     f"{change:+.2%}"])  # fmt: skip
    coverage = told.number(report.get("coverage"))
    if coverage is not None:
        rows.append(["weight bytes that were rewritten", "", f"{coverage:.1%}", ""])
    return [*rows, ["files here", "", size(nbytes), ""]]


def _passes(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for each in told.mappings(report.get("passes")):
        changed, after, covered = (told.number(each.get(name)) for name in ("changed", "bytes_after", "covered_bytes"))
        rows.append([
            f"`{_plain(each.get('name'), 400)}`", "" if changed is None else f"{changed:,.0f}",
            "" if after is None else size(after), "" if not covered else size(covered),
        ])  # fmt: skip
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _plain(value: Any, longest: int = told.LONGEST) -> str:
    """Text that is no markup: nothing in it begins a cell, a link, a tag or code."""
    said = told.text(value, longest)
    for mark in "\\|`[]<>":
        said = said.replace(mark, {"`": "'", "<": "‹", ">": "›"}.get(mark, f"\\{mark}"))
    return said
