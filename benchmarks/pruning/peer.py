"""torch-pruning. What is here is written for each model by someone who knows how it is made."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pruning.models import PAIRS, Model, built, inputs
from benchmarks.pruning.outcome import HEADS, WIDTHS, Record, close, first, generated, tried

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Hand:
    """heads: ends of the names of projections -> their number of heads; frozen: ends of the names of the layers whose output
    may not shrink, mostly those that write the residual stream; repair: ends of the names of modules -> attributes that hold
    a number of heads, to put right afterwards; config: how the configuration has to change for a reload; eager: the model
    must not use fused attention. A number that depends on what was pruned is named: query, kv (heads that are left), groups
    (query / kv), dim (of a head), inner (query * dim), width (of the feed-forward part)."""

    heads: dict[str, int] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    repair: dict[str, dict[str, str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    eager: bool = False


_DECODER_REPAIR = {"self_attn": {"num_key_value_groups": "groups"}}
_DECODER_CONFIG = {
    "num_attention_heads": "query", "num_key_value_heads": "kv", "head_dim": "dim", "intermediate_size": "width",
}  # fmt: skip
_TOWER_CONFIG = {"num_attention_heads": "query", "intermediate_size": "width"}


def decoder_hand(query: int = 8, kv: int = 2, **options: Any) -> Hand:
    frozen = ("embed_tokens", "o_proj", "down_proj", "lm_head")
    options = {"frozen": frozen, "repair": _DECODER_REPAIR, "config": _DECODER_CONFIG, **options}
    return Hand({"q_proj": query, "k_proj": kv, "v_proj": kv}, **options)


def bert_hand(heads: int) -> Hand:
    return Hand(
        {"self.query": heads, "self.key": heads, "self.value": heads},
        ("_embeddings", "output.dense", "pooler.dense", "classifier"),
        {"attention.self": {"num_attention_heads": "query", "all_head_size": "inner"}},
        _TOWER_CONFIG,
    )


_PROJECTIONS = {"q_proj": 8, "k_proj": 8, "v_proj": 8}
_VISION = Hand(
    _PROJECTIONS,
    ("projection", "o_proj", "fc2", "classifier"),
    {"attention": {"num_attention_heads": "query", "all_head_size": "inner"}},
    {**_TOWER_CONFIG, "head_dim": "dim"},
)
HANDS = {
    **{name: decoder_hand() for name in ("qwen2_gqa", "qwen3_gqa_qknorm", "llama_gqa", "mistral_gqa")},
    "mixtral_moe": decoder_hand(
        frozen=("embed_tokens", "o_proj", "lm_head"),
        config={k: v for k, v in _DECODER_CONFIG.items() if k != "intermediate_size"},
    ),
    "gemma2_gqa": decoder_hand(eager=True),
    "llama_mha": decoder_hand(kv=8),
    "gpt2_conv1d": Hand({"c_attn": 8}, ("wte", "wpe", "c_proj", "lm_head")),
    "bert": bert_hand(8),
    "distilbert": Hand(
        {"q_lin": 8, "k_lin": 8, "v_lin": 8},
        ("_embeddings", "out_lin", "lin2", "classifier"),
        {"attention": {"n_heads": "query", "dim": "inner"}},
        {"n_heads": "query", "hidden_dim": "width"},
    ),
    "vit": _VISION,
    "deit": _VISION,
    "swin": Hand(
        {f"layers.{i}.blocks.{j}.attention.{x}_proj": n for i, n in enumerate((4, 8)) for j in (0, 1) for x in "qkv"},
        ("projection", "o_proj", "fc2", "reduction", "classifier"),
        config={"mlp_ratio": 2.797},
    ),
    "resnet": Hand(frozen=("classifier.1",), config={"embedding_size": 22, "hidden_sizes": [44, 89]}),
    "mobilenetv2_dw": Hand(frozen=("classifier",)),
    "convnext": Hand(frozen=("patch_embeddings", "dwconv", "pwconv2", "downsampling_layer.1", "classifier")),
    "t5": Hand(
        {"Attention.q": 8, "Attention.k": 8, "Attention.v": 8},
        ("shared", "embed_tokens", "Attention.o", "wo", "lm_head"),
        {"EncDecAttention": {"n_heads": "query", "inner_dim": "inner"}},
        {"num_heads": "query", "d_ff": "width"},
    ),
    "whisper_enc": Hand(
        _PROJECTIONS,
        ("conv2", "out_proj", "fc2", "embed_positions"),
        {"self_attn": {"num_heads": "query", "embed_dim": "inner"}},
        {"encoder_attention_heads": "query", "encoder_ffn_dim": "width"},
    ),
    "clip": Hand(
        _PROJECTIONS,
        ("_embedding", "out_proj", "fc2", "_projection"),
        {"self_attn": {"num_heads": "query", "embed_dim": "inner"}},
        {f"{tower}_config.{key}": value for tower in ("text", "vision") for key, value in _TOWER_CONFIG.items()},
    ),
    "plain_cnn": Hand(frozen=("classifier",)),
    "minilm_real": bert_hand(12),
    **{f"{family}_{query}_{kv}": decoder_hand(query, kv) for family in ("qwen2", "qwen3") for query, kv in PAIRS},
}


def peer_version() -> str | None:
    try:
        return metadata.version("torch-pruning")
    except metadata.PackageNotFoundError:
        return None


def theirs(name: str, seconds: float) -> Record:
    """What torch-pruning makes of the model `name`, in a process of its own that gets `seconds`."""
    command = [sys.executable, "-m", "benchmarks.pruning", "--peer", name]
    try:
        # In a file, and not through a pipe: what libraries print besides cannot get in between.
        with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as scratch:
            out = Path(scratch) / "record.json"
            done = subprocess.run([*command, str(out)], cwd=REPO, timeout=seconds, capture_output=True, text=True)
            if out.exists():
                return json.loads(out.read_text(encoding="utf-8"))
    except subprocess.TimeoutExpired:
        return {"failed": f"no result in {seconds:g} s"}
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"failed": f"ended with status {done.returncode}: {last[0][:200]}"}


def peer(model: Model) -> Record:
    """One model through torch-pruning, in this process."""
    import torch_pruning

    hand, module = HANDS[model.name], built(model)
    sizes = inputs(module, model.example() if model.example else None)
    if getattr(getattr(module, "config", None), "use_cache", None) is not None:
        module.config.use_cache = False
    if hand.eager:
        module.set_attn_implementation("eager")
    modules = {name: each for name, each in module.named_modules() if name}
    heads = {m: count for name, m in modules.items() for end, count in hand.heads.items() if name.endswith(end)}
    frozen = [m for name, m in modules.items() if name.endswith(hand.frozen)]
    layers = Layers.of(modules, heads, frozen)
    parameters = sum(p.numel() for p in module.parameters())
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        module,
        sizes[0] if model.example is None else tuple(sizes[0].values()),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=WIDTHS,
        ignored_layers=frozen,
        num_heads=dict(heads),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=HEADS,
        output_transform=first,
    )
    traced = time.perf_counter()
    pruner.step()
    ended = time.perf_counter()
    record: Record = {
        "parameters": [parameters, sum(p.numel() for p in module.parameters())],
        "heads": layers.lost(layers.queries, HEADS, model.heads),
        "widths": layers.lost(layers.wide, WIDTHS, model.widths),
        "seconds": {"graph": round(traced - start, 2), "prune": round(ended - traced, 2)},
        "forward": tried(lambda: runs(module, sizes)),
    }
    left = layers.left(heads)
    if record["heads"][0]:
        repair(modules, hand, left)
    record["repaired"] = tried(lambda: runs(module, sizes))
    tokens = tried(lambda: generated(module, sizes[0]))
    if tokens is not None:
        record["generate"] = tokens if isinstance(tokens, str) else "ok"
    if record["heads"][0] or record["widths"][0]:
        record["reload"] = tried(lambda: reloaded(module, sizes, hand, left))
    return record


@dataclass
class Layers:
    """queries: of each attention the widest of its projections; others: the rest of them; wide: what else may be narrowed;
    before: how wide they were."""

    queries: list[nn.Module]
    others: list[nn.Module]
    wide: list[nn.Module]
    before: dict[nn.Module, int]

    @classmethod
    def of(cls, modules: dict[str, nn.Module], heads: dict[nn.Module, int], frozen: list[nn.Module]) -> Layers:
        attentions: dict[str, list[nn.Module]] = {}
        for name, module in modules.items():
            if module in heads:
                attentions.setdefault(name.rpartition(".")[0], []).append(module)
        queries = [max(each, key=lambda m: m.weight.shape[0]) for each in attentions.values()]
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        wide = [m for m in modules.values() if isinstance(m, kinds) and m not in heads and m not in frozen]
        others = [m for m in heads if m not in queries]
        return cls(queries, others, wide, {m: m.weight.shape[0] for m in (*queries, *wide)})

    def lost(self, layers: list[nn.Module], share: float, expected: int) -> list[int]:
        """[how many of `layers` lost that share, how many there are]"""
        done = sum(self.before[m] - m.weight.shape[0] >= max(1, int(share * self.before[m])) for m in layers)
        return [done, max(expected, len(layers))]

    def left(self, heads: dict[nn.Module, int]) -> dict[str, int]:
        """The numbers that HANDS names."""
        dim = self.before[self.queries[0]] // heads[self.queries[0]] if self.queries else 1
        query = min((m.weight.shape[0] // dim for m in self.queries), default=0)
        kv = min((m.weight.shape[0] // dim for m in self.others), default=query)
        width = min((m.weight.shape[0] for m in self.wide), default=0)
        groups = query // kv if kv else 0
        return {"query": query, "kv": kv, "groups": groups, "dim": dim, "inner": query * dim, "width": width}


def repair(modules: dict[str, nn.Module], hand: Hand, left: dict[str, int]) -> None:
    """Put attributes right in which modules keep their number of heads."""
    for end, attributes in hand.repair.items():
        for owner in (m for name, m in modules.items() if name.endswith(end)):
            for attribute, value in attributes.items():
                if hasattr(owner, attribute):
                    setattr(owner, attribute, number(value, left))


def number(value: Any, left: dict[str, int]) -> Any:
    """A value of HANDS: by its name in `left`, or itself."""
    return left[value] if isinstance(value, str) else value


def runs(module: nn.Module, sizes: Sequence[dict[str, Tensor]]) -> str:
    with torch.no_grad():
        finite = all(first(module(**each)).isfinite().all() for each in sizes)
    return "ok" if finite else "wrong: not finite"


def reloaded(module: nn.Module, sizes: list[dict[str, Tensor]], hand: Hand, left: dict[str, int]) -> str:
    """save_pretrained, with the configuration put right by hand, and from_pretrained."""
    if not hasattr(module, "save_pretrained"):
        return "not a Hugging Face model"
    with torch.no_grad():
        expected = first(module(**sizes[1]))
    for key, value in hand.config.items():
        *path, last = key.split(".")
        owner = module.config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, number(value, left))
    with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as folder, torch.no_grad():
        module.save_pretrained(folder)
        again = type(module).from_pretrained(folder).eval()
        return close(first(again(**sizes[1])), expected)
