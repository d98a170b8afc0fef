"""The contenders: how each one makes a model ready to call. Every library but torch and transformers is optional.

torch.ao.quantization.quantize_dynamic is left out: with today's transformers its outputs are wrong (cosine 0.92) and it
is slower than float32.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, StaticCache

import fxc
from benchmarks.text import calibration_texts

ONNX = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Contender:
    """build: workbench -> what the workload calls. needs: top-level modules. ours: its failure is a fault."""

    name: str
    build: Callable[["Workbench"], Any]
    needs: tuple[str, ...] = ()
    ours: bool = False

    def absent(self) -> list[str]:
        """The needed modules that are not installed."""
        return [name for name in self.needs if util.find_spec(name) is None]


class Workbench:
    """What the contenders share: the model's folder, its float32 original and its ONNX form, each made once."""

    def __init__(self, folder: Path, threads: int, causal: bool = False):
        self.folder, self.threads = folder, threads
        self.auto = AutoModelForCausalLM if causal else AutoModel
        self._scratch = tempfile.TemporaryDirectory(prefix="fxc-benchmark-")

    @cached_property
    def scratch(self) -> Path:
        return Path(self._scratch.name)

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)

    def original(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return self.auto.from_pretrained(self.folder, dtype=dtype).eval()

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, both [len(texts), length] int64, cut or padded to that length."""
        made = self.tokenizer(
            texts, max_length=length, truncation=True, padding="max_length", return_tensors="pt", verbose=False
        )
        return made["input_ids"], made["attention_mask"]

    @cached_property
    def onnx(self) -> Path:
        """The float32 encoder as an ONNX file with dynamic batch and length."""
        any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        inputs = self.encode(calibration_texts(2), 128)
        path = self.scratch / "model.onnx"
        torch.onnx.export(
            HiddenStates(self.original()), inputs, path, dynamic_shapes=(any_size, any_size), dynamo=True, verbose=False
        )
        return path


class HiddenStates(torch.nn.Module):
    """An encoder that takes (ids, mask) and gives its last hidden state alone: [B, S] twice -> [B, S, H]."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def compile_per_size(model: torch.nn.Module) -> Callable:
    """torch.compile with one graph per size, which is slower to start than dynamic sizes and faster to run.

    Left to itself, torch.compile counts the graphs of all contenders together, since their code is the same, and runs
    whatever comes after the eighth without compiling it. fullgraph makes reaching the limit an error.
    """
    return torch.compile(model, dynamic=False, fullgraph=True, isolate_recompiles=True, recompile_limit=64)


class OneCache(torch.nn.Module):
    """A compiled causal model with the fixed-size cache that torch.compile needs in order not to recompile per token.

    A call without a cache starts the one cache again, so only one sequence is alive at a time.
    """

    def __init__(self, model: torch.nn.Module, length: int):
        super().__init__()
        self.compiled = compile_per_size(model)
        self.cache = StaticCache(config=model.config, max_cache_len=length)

    def forward(self, input_ids: Tensor, past_key_values: StaticCache | None = None, **kwargs: Any) -> Any:
        if past_key_values is None:
            self.cache.reset()
        return self.compiled(input_ids=input_ids, past_key_values=self.cache, **kwargs)


def eager(dtype: torch.dtype) -> Callable[[Workbench], HiddenStates]:
    return lambda bench: HiddenStates(bench.original(dtype))


def compiled(dtype: torch.dtype) -> Callable[[Workbench], Callable]:
    return lambda bench: compile_per_size(HiddenStates(bench.original(dtype)))


def torchao_int8(bench: Workbench) -> Callable:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = HiddenStates(bench.original())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compile_per_size(model)


def onnxruntime_int8(bench: Workbench) -> Callable[[Tensor, Tensor], Tensor]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = bench.scratch / "int8.onnx"
    quantize_dynamic(bench.onnx, path, weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bench.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def forward(*inputs: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return forward


def openvino_forward(bench: Workbench, model: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": bench.threads, "PERFORMANCE_HINT": "LATENCY", **options}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def forward(*inputs: Tensor) -> Tensor:
        feed = [tensor.numpy() for tensor in inputs]
        return torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return forward


def openvino_bfloat16(bench: Workbench) -> Callable[[Tensor, Tensor], Tensor]:
    import openvino

    model = openvino.Core().read_model(bench.onnx)
    return openvino_forward(bench, model, INFERENCE_PRECISION_HINT="bf16")


def openvino_int8(bench: Workbench) -> Callable[[Tensor, Tensor], Tensor]:
    """Activations and weights in int8 by NNCF, calibrated on text that is not measured; the rest as OpenVINO likes."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    texts = calibration_texts(80)
    batches = [[x.numpy() for x in bench.encode(texts[at : at + 4], 128)] for at in range(0, len(texts), 4)]
    model = openvino.Core().read_model(bench.onnx)
    quantized = nncf.quantize(model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER)
    return openvino_forward(bench, quantized)


def ours(passes: str, backend: str, dtype: str = "auto") -> Callable[[Workbench], torch.nn.Module]:
    return lambda bench: fxc.optimize(str(bench.folder), passes=passes, backend=backend, dtype=dtype)


def our_encoder(passes: str, backend: str, dtype: str = "auto") -> Callable[[Workbench], HiddenStates]:
    return lambda bench: HiddenStates(ours(passes, backend, dtype)(bench))


def layers_of(built: Any) -> dict[str, int]:
    """How many layers of fxc's model in `built` run in which form on this machine, as its lowering chose."""
    modules = built.modules() if isinstance(built, torch.nn.Module) else []
    return dict(Counter(layer.op for each in modules if isinstance(each, fxc.CompiledModel) for layer in each.layers))


# The first one is what all are compared with, in numbers and in time.
ENCODERS = [
    Contender("eager-float32", eager(torch.float32)),
    Contender("compile-float32", compiled(torch.float32)),
    Contender("eager-bfloat16", eager(torch.bfloat16)),
    Contender("compile-bfloat16", compiled(torch.bfloat16)),
    Contender("onnxruntime-int8", onnxruntime_int8, (*ONNX, "onnxruntime")),
    Contender("openvino-bfloat16", openvino_bfloat16, (*ONNX, "openvino")),
    Contender("openvino-int8", openvino_int8, (*ONNX, "openvino", "nncf")),
    Contender("torchao-int8", torchao_int8, ("torchao",)),
    Contender("fxc-float32-inductor", our_encoder("canonicalize", "inductor"), ours=True),
    Contender("fxc-int8-eager", our_encoder("int8", "eager"), ours=True),
    Contender("fxc-int8-inductor", our_encoder("int8", "inductor"), ours=True),
    Contender("fxc-int8-bfloat16-eager", our_encoder("int8", "eager", "bfloat16"), ours=True),
    Contender("fxc-int8-bfloat16-inductor", our_encoder("int8", "inductor", "bfloat16"), ours=True),
]
DECODERS = [
    Contender("eager-float32", lambda bench: bench.original()),
    Contender("eager-bfloat16", lambda bench: bench.original(torch.bfloat16)),
    Contender("compile-bfloat16", lambda bench: OneCache(bench.original(torch.bfloat16), 256)),
    Contender("fxc-int8-eager", ours("int8", "eager"), ours=True),
    Contender("fxc-int8-inductor", ours("int8", "inductor"), ours=True),
]
