"""One small randomly initialised model for each architecture that fxc promises to take, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_DECODER = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _causal(config_class: str, **options) -> nn.Module:
    import transformers

    config = getattr(transformers, config_class)(**{**_DECODER, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


def _auto(auto_class: str, config_class: str, **options) -> nn.Module:
    import transformers

    return getattr(transformers, auto_class).from_config(getattr(transformers, config_class)(**options))


def _bert_like() -> dict:
    return {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip


def _whisper_encoder() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=320, d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).get_encoder()


def _clip() -> nn.Module:
    import transformers

    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 320, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(40, 96)
        self.down = nn.Linear(96, 40, bias=False)
        self.head = nn.Linear(40, 10)

    def forward(self, x):
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(x))))


class GroupedCnn(nn.Module):
    """Grouped and depthwise convolution, batch norm, concatenation, flatten before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.BatchNorm2d(48)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([self.grouped(x), self.depthwise(x)], dim=1)
        return self.head(self.pool(torch.relu(self.norm(x))))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen2": lambda: _causal("Qwen2Config"),
    "qwen3": lambda: _causal("Qwen3Config", head_dim=16),
    "llama": lambda: _causal("LlamaConfig"),
    "mistral": lambda: _causal("MistralConfig", sliding_window=6, head_dim=16),
    "gemma": lambda: _causal("GemmaConfig", head_dim=16, tie_word_embeddings=True),
    "gemma2": lambda: _causal("Gemma2Config", head_dim=16, sliding_window=6, tie_word_embeddings=True),
    "gpt2": lambda: _auto(
        "AutoModelForCausalLM", "GPT2Config", vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "bert": lambda: _auto("AutoModelForSequenceClassification", "BertConfig", **_bert_like()),
    "distilbert": lambda: _auto(
        "AutoModel", "DistilBertConfig", vocab_size=320, dim=64, hidden_dim=128, n_layers=2, n_heads=4,
        max_position_embeddings=128,
    ),
    "vit": lambda: _auto(
        "AutoModelForImageClassification", "ViTConfig", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8,
    ),
    "resnet": lambda: _auto(
        "AutoModelForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2],
        layer_type="basic", num_labels=40,
    ),
    "mobilenetv2": lambda: _auto(
        "AutoModelForImageClassification", "MobileNetV2Config", depth_multiplier=0.35, image_size=64, num_labels=40,
    ),
    "t5": lambda: _auto(
        "AutoModelForSeq2SeqLM", "T5Config", vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ),
    "whisper_encoder": _whisper_encoder,
    "clip": _clip,
    "mixtral": lambda: _causal("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: _causal(
        "Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
    ),
    "mlp": Mlp,
    "cnn": GroupedCnn,
}  # fmt: skip

EXAMPLES = {"mlp": lambda: (torch.randn(3, 40),), "cnn": lambda: (torch.randn(2, 3, 16, 16),)}


def build(name: str) -> tuple[nn.Module, tuple | None]:
    """The model of the family `name`, seeded and in eval mode, and its example inputs where it needs them."""
    torch.manual_seed(hash_of(name))
    model = FAMILIES[name]().eval()
    return model, EXAMPLES[name]() if name in EXAMPLES else None


def hash_of(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
