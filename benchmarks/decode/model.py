"""The model that decodes: captured on meta, random weights made on the device, compiled there."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fxc.compiled.generate import CompiledCausalLM
from fxc.frontend.capture import capture
from fxc.ir.cache import empty_cache
from fxc.ir.parse import parse_program
from fxc.ir.program import Program
from fxc.ir.text import print_program
from fxc.runtime.static_cache import CudaGraphs, StaticDecoder, run_directly, static_decoder

# The published configuration of Qwen/Qwen2.5-7B.
QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
# Of Qwen/Qwen2.5-0.5B, whose head is its embedding.
QWEN25_05B = QWEN25_7B | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"qwen2.5-7b": QWEN25_7B, "qwen2.5-0.5b": QWEN25_05B, "tiny": TINY}


def config_of(model: str, layers: int | None) -> Any:
    """The configuration of one of `MODELS`, or in a Hugging Face folder. layers: as many of its layers, None for all."""
    from transformers import AutoConfig, Qwen2Config

    config = Qwen2Config(**MODELS[model]) if model in MODELS else AutoConfig.from_pretrained(model)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def captured(config: Any, dtype: torch.dtype) -> tuple[Program, dict[str, Tensor]]:
    """The program with weights on meta, and those of its constants that are no weights but follow from the configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    computed = {}
    for path, module in model.named_modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            computed[f"{path}.inv_freq"] = type(module)(config=config).inv_freq
    # What is captured on meta has types of that device, and a program's are of none: read from its text they are.
    return parse_program(print_program(capture(model, check=False))), computed


def with_weights(program: Program, computed: dict[str, Tensor], device: torch.device) -> Program:
    """A copy of the program with random weights on `device`: matrices of deviation 0.02, gains of 1, biases of 0."""
    made = program.copy()
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in program.constants.items():
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if name in computed:
            value.copy_(computed[name])
        elif tensor.dim() > 1:
            value.normal_(std=0.02, generator=generator)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        made.constants[name] = value
    return made


def read_bytes(program: Program) -> int:
    """Bytes of weights that a step reads: all but the table of embeddings, of which it reads a row."""
    reads = program.graph.find_nodes(op="get_attr")
    whole = {n.target for n in reads if any(user.target is not torch.ops.aten.embedding.default for user in n.users)}
    return sum(t.numel() * t.element_size() for name, t in program.constants.items() if name in whole)


class Variant:
    """One compiled form of the model, on the device, with nothing beside it."""

    def __init__(self, made: Program, config: Any, device: torch.device, backend: str) -> None:
        self.device = device
        self.read_bytes, self.nbytes = read_bytes(made), made.nbytes()
        self.model = CompiledCausalLM(made, {}, config=config, device=device, backend=backend)
        module = self.model.lower()
        # How its compressed layers run, and how many of them: a table may have sent some back to dense.
        self.forms = dict(Counter(each.op for each in self.model.layers))
        # What runs was made of the program's weights; where that is another form, they would count twice.
        made.constants.update({name: t.to("meta") for name, t in made.constants.items()})
        self.eager = getattr(module, "graph_module", module)
        gc.collect()

    def decoder(self, capacity: int, mode: str) -> StaticDecoder:
        record = CudaGraphs(self.device) if mode == "graph" else run_directly
        return static_decoder(self.model.lowered, self.device, self.model.backend, capacity, record)

    def prompt(self, batch: int, length: int) -> tuple[Tensor, list[Tensor]]:
        """(the next tokens [B, 1], keys and values) after a random prompt. Never compiled: only the steps after it count."""
        past = empty_cache(self.model.program, batch, self.device)
        with torch.no_grad():
            logits, *present = self.eager(*self.inputs(batch, length), *past)
            return logits[:, -1:].argmax(-1), present

    def inputs(self, batch: int, length: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(batch * 10_007 + length)
        ids = torch.randint(0, self.model.config.vocab_size, (batch, length), generator=generator).to(self.device)
        return [ids, torch.ones_like(ids), torch.arange(length, device=self.device).expand(batch, -1).contiguous()]
