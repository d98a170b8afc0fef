"""The table of what goes where, as markdown, and the page of the documentation around it."""

from __future__ import annotations

from typing import Any

from benchmarks.exports.cells import FORMATS
from fxc.kernel_bench.files import versions_text

_HEAD = """\
# What goes where

Which model can go out of fxc in which format, tried and not guessed: `python -m benchmarks.exports` compiles a model of each
family and exports it, and every export loads what it wrote with the other tool, runs it and compares the outputs with the
program's before the folder is there. Models are tiny, with random weights, but for those that are named trained. The command
writes this page.

| `fxc export --format` | what it writes | who loads it | install |
|---|---|---|---|
| none: `fxc compile`, "artifact" | program, weights and report | `fxc.load`, `fxc run` | |
| `fxc` | a Hugging Face folder of packed weights | `AutoModel.from_pretrained` after `import fxc` | |
| `hf` | a plain folder of float weights | `AutoModel.from_pretrained` | |
| `compressed-tensors` | the same with packed weights | transformers, vLLM | `fxc[compressed-tensors]` |
| `gguf` | `model.gguf`, tokenizer inside | llama.cpp and what is built on it | `fxc[gguf]` |
| `onnx` | `model.onnx`, opset 20, sizes that vary, a decoder's cache | ONNX Runtime | `fxc[onnx]` |
| `aoti` | `model.pt2`, compiled for this machine's kind of CPU | torch alone, or C++ | a C++ compiler, for writing |

A number is the relative error of the outputs in the other tool. "yes": written, loaded and equal within the format's tolerance
(rounding, and 2 % where activations are rounded as the model runs); an artifact's program is the same to the bit. A letter is a
reason, below; an asterisk says that other versions than those below gave it.
vLLM was not run: the only wheel that pip finds (0.33.0) is built for CUDA 13 and wants torch 2.14 and an older transformers.
"""


def table(report: dict[str, Any]) -> str:
    """The table alone, with the reasons."""
    reasons: dict[str, str] = {}
    shown = [column.name for column in FORMATS if any(column.name in row for row in report["cells"].values())]
    known = report.get("versions", {})
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for source, row in report["cells"].items():
        cells = [_cell(row[name], reasons, known) if name in row else "not run" for name in shown]
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- **{letter}** {_escaped(reason)}" for reason, letter in reasons.items())]
    if llama := _by_llama(report):
        lines += ["", "GGUF files run by llama.cpp (llama-cpp-python), greedily after a prompt, and the compiled model:", ""]
        lines += ["| | " + " | ".join(llama) + " |", "|---" * (len(llama) + 1) + "|"]
        rows = [source for source in report["cells"] if any(source in column for column in llama.values())]
        lines += [f"| {source} | " + " | ".join(llama[name].get(source, "") for name in llama) + " |" for source in rows]
    lines += ["", f"{versions_text(report.get('versions', {}))}."]
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any]) -> str:
    return f"{_HEAD}\n{table(report)}"


def _cell(found: dict[str, Any], reasons: dict[str, str], known: dict[str, Any]) -> str:
    mark = "" if found.get("versions", {}).items() <= known.items() else "\\*"
    if found["status"] == "agrees":
        return (f"{found['error']:.0e}" if found.get("error") else "yes") + mark
    reason = f"{found['status']}: {found['why']}" if "why" in found else found["status"]
    letter = reasons.setdefault(reason, _letter(len(reasons)))
    return (letter if found["status"] == "refused" else f"{found['status']} ({letter})") + mark


def _by_llama(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Column -> row -> what llama.cpp did."""
    found: dict[str, dict[str, str]] = {}
    for source, row in report["cells"].items():
        for name, each in row.items():
            if "llama.cpp" in each:
                found.setdefault(name, {})[source] = each["llama.cpp"]
    return found


def _letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    letter = chr(ord("a") + number % 26)
    return letter if number < 26 else _letter(number // 26 - 1) + letter


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
