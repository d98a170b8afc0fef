"""The models that are pruned, each with how it is calibrated, timed and rated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import HiddenStates
from benchmarks.python_source import python_source
from benchmarks.text import calibration_texts, texts
from benchmarks.timing import Call
from benchmarks.workloads import CONTEXT, PYLM, Decoder, Encoder
from fxc.captured import Captured, capture_source
from fxc.compiled.model import CompiledModel
from fxc.data.decoder import decoder_sample
from fxc.data.text import encode, tokenizer_of
from fxc.ir.binding import bind
from fxc.ir.program import Program
from fxc.measure.perplexity import perplexity

PREFILL = 256


class Subject:
    """A model that is pruned. sizes: at which it is timed; quality: what `rate` measures."""

    name: str
    title: str
    quality: str
    sizes: dict[str, str]
    folder: Path

    @cached_property
    def captured(self) -> Captured:
        return capture_source(str(self.folder))

    def calibration(self, scratch: Path) -> Any:
        """What `calib` takes."""
        raise NotImplementedError

    def call(self, model: Any, size: str) -> Call:
        """What is timed."""
        raise NotImplementedError

    def inputs(self, program: Program, size: str) -> list[Tensor]:
        """Flat inputs of that size."""
        raise NotImplementedError

    def rate(self, model: CompiledModel) -> float:
        raise NotImplementedError


class MiniLM(Subject):
    """Sentences; rated by the mean cosine of their embeddings with the original's."""

    name, title, quality = "minilm", "all-MiniLM-L6-v2", "cosine"

    def __init__(self, sizes: Sequence[str], threads: int):
        self.sizes = {size: f"{size}, ms per call" for size in sizes}
        self.workload = Encoder(list(sizes))
        self.bench = self.workload.workbench(threads)
        self.folder = self.bench.folder
        self.sentences = {size: self.workload.inputs(self.bench, size) for size in sizes}

    @cached_property
    def rated(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(ids, mask) and the original's embeddings."""
        given = self.bench.encode(texts(32), 128)
        return given, self.workload.vectors(HiddenStates(self.bench.original())(*given), given)

    def calibration(self, scratch: Path) -> list[str]:
        return calibration_texts(64)

    def call(self, model: Any, size: str) -> Call:
        return self.workload.call(HiddenStates(model), self.sentences[size], size)

    def inputs(self, program: Program, size: str) -> list[Tensor]:
        return bind(program, (), dict(zip(("input_ids", "attention_mask"), self.sentences[size], strict=True)))

    def rate(self, model: CompiledModel) -> float:
        given, expected = self.rated
        found = self.workload.vectors(HiddenStates(model)(*given), given)
        return torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean().item()


class PyLM(Subject):
    """The bundled language model at batch 1; rated by its perplexity on held-out text."""

    name, title, quality = "pylm", "examples/pylm", "perplexity"
    folder = PYLM

    def __init__(self, windows: int, threads: int):
        self.sizes = {
            "prefill": f"prefill of {PREFILL} tokens, ms",
            "decode": f"decode of a token after {CONTEXT}, ms",
        }
        self.workload, self.windows = Decoder(), windows
        self.ids = self.workload.inputs(self.workload.workbench(threads), "")

    @cached_property
    def tokens(self) -> Tensor:
        text = (PYLM / "heldout.txt").read_text(encoding="utf-8")
        return encode(tokenizer_of(PYLM), text)

    def calibration(self, scratch: Path) -> Path:
        path = scratch / "python.txt"
        path.write_text(python_source(), encoding="utf-8")
        return path

    def call(self, model: Any, size: str) -> Call:
        if size == "decode":
            return self.workload.call(model, self.ids, size)
        ids = self.tokens[None, :PREFILL]
        return Call(lambda _: model(input_ids=ids, use_cache=True).logits)

    def inputs(self, program: Program, size: str) -> list[Tensor]:
        return decoder_sample(program, 1, *((PREFILL, 0) if size == "prefill" else (1, CONTEXT)))

    def rate(self, model: CompiledModel) -> float:
        return perplexity(model, self.tokens, limit=self.windows).value
