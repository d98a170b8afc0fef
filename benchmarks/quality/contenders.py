"""Who is compared, format by format: each a recipe for peer.py or a pass line of fxc."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FXC = "fxc"
# Half-blocks trained on the calibration data.
BLOCKS = "recover:method=blocks:block_steps=200"
# Then by the loss: four bits their scales, gains and biases, three bits everything.
LOSS = "recover:steps=200"


@dataclass(frozen=True)
class Contender:
    """format: the table's part; name: the row; recipe: what the tool is told, with "tool" its name."""

    format: str
    name: str
    recipe: dict[str, Any] = field(hash=False)

    @property
    def is_ours(self) -> bool:
        return self.recipe["tool"] == FXC


def _integers(bits: int, group: int) -> list[Contender]:
    title = f"{bits} bits, groups of {group}"
    size = {"bits": bits, "group": group}
    theirs = [
        Contender(title, f"llm-compressor {name}", {"tool": "llm-compressor", "algorithm": algorithm, **size})
        for name, algorithm in (("RTN", "rtn"), ("GPTQ", "gptq"))
    ]
    theirs.append(Contender(title, "torchao Intx weight only", {"tool": "torchao", **size}))
    line = f"int4:group={group}" + (f":bits={bits}" if bits != 4 else "")
    lines = [line, *(f"{line}:algorithm={each}" for each in ("grid", "gptq", "qronos", "round"))]
    lines += [f"{line}:algorithm=qronos,{each}" for each in (BLOCKS, *([LOSS] if group == 32 else []))]
    return theirs + [_ours(title, each) for each in lines]


def _eight() -> list[Contender]:
    title = "int8 weights and activations"
    theirs = [
        Contender(title, "llm-compressor W8A8", {"tool": "llm-compressor", "algorithm": "rtn", "bits": 8}),
        Contender(title, "llm-compressor W8A8 GPTQ", {"tool": "llm-compressor", "algorithm": "gptq", "bits": 8}),
        Contender(
            title, "llm-compressor SmoothQuant 0.8 + GPTQ",
            {"tool": "llm-compressor", "algorithm": "gptq", "bits": 8, "smooth": 0.8},
        ),
        Contender(title, "torchao dynamic", {"tool": "torchao", "bits": 8}),
    ]  # fmt: skip
    lines = ("int8", "int8:algorithm=gptq", "smooth,int8", "int8:mode=static", "smooth,int8:mode=static")
    return theirs + [_ours(title, each) for each in lines]


def _zeros(title: str, pattern: str, prune: str) -> list[Contender]:
    theirs = [Contender(title, "torch, by magnitude", {"tool": "torch", "prune": pattern})]
    theirs += [
        Contender(title, f"llm-compressor {name}", {"tool": "llm-compressor", "algorithm": algorithm, "prune": pattern})
        for name, algorithm in (("Wanda", "wanda"), ("SparseGPT", "sparsegpt"))
    ]
    lines = [f"{prune}:criterion={each}" for each in ("magnitude", "wanda", "sparsegpt")]
    lines.append(f"{prune}:criterion=sparsegpt,{BLOCKS}")
    return theirs + [_ours(title, each) for each in lines]


def _ours(title: str, passes: str) -> Contender:
    return Contender(title, f"fxc {passes}", {"tool": FXC, "passes": passes})


CONTENDERS = [
    *_eight(), *_integers(4, 32), *_integers(4, 128), *_integers(3, 32),
    *_zeros("2:4 sparse", "2:4", "sparse24"), *_zeros("half of the weights zero", "0:0", "sparsify:sparsity=0.5"),
]  # fmt: skip
