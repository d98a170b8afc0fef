"""What the peers make of the model, in their own environment: python benchmarks/quality/peer.py JOB.json

The job says {"model": folder, "tokens": file, "out": folder, "do": "compress" or "score", "recipe": {...}}; the result, JSON,
is the last line of what is printed. "tokens" is a file of safetensors with "calibration" and "held_out", both [N, S] int64.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from score import losses, peak


def compress(job: dict[str, Any]) -> dict[str, Any]:
    recipe, calibration = job["recipe"], load_file(job["tokens"])["calibration"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    began = time.perf_counter()
    if recipe["tool"] == "llm-compressor":
        _llm_compressor(model, recipe, calibration)
    elif recipe["tool"] == "torchao":
        model = _torchao(job["model"], recipe)
    else:
        _magnitude(model, recipe)
    seconds = time.perf_counter() - began
    model.save_pretrained(job["out"])
    if "prune" in recipe:
        _check_zeros(model)
    return {"seconds": seconds, "memory": peak()}


def score(job: dict[str, Any]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(job["out"], dtype="auto").eval()
    return {"losses": losses(model, load_file(job["tokens"])["held_out"])}


def _linears(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]


def _check_zeros(model: nn.Module) -> None:
    """Raises RuntimeError where a tool has not made zeros of what it was told to, or has of the head."""
    if min(_zeros(each) for each in _linears(model)) < 0.4:
        raise RuntimeError("it reports success, and has left a layer without zeros")
    if (share := _zeros(model.get_output_embeddings())) > 0.1:
        raise RuntimeError(f"it has made {share:.0%} of the head zero, which it was told to leave")


def _zeros(layer: nn.Linear) -> float:
    return (layer.weight == 0).float().mean().item()


def _llm_compressor(model: nn.Module, recipe: dict[str, Any], calibration: torch.Tensor) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    kinds = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    kind, options = kinds[recipe["algorithm"]], {"ignore": ["lm_head"], "targets": ["Linear"]}
    if "prune" in recipe:
        # Its name for the head ends in a dot here: the plain one is not found, and what is pruned is the tied table.
        options |= {"sparsity": 0.5, "mask_structure": recipe["prune"], "ignore": ["re:.*lm_head.*"]}
    elif recipe["bits"] == 8:
        options["scheme"] = "W8A8"
    else:
        weights = {"num_bits": recipe["bits"], "type": "int", "symmetric": True}
        weights |= {"strategy": "group", "group_size": recipe["group"]}
        options = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    modifiers = [kind(**options)]
    if recipe.get("smooth"):
        modifiers.insert(0, SmoothQuantModifier(smoothing_strength=recipe["smooth"]))
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    options = {"max_seq_length": calibration.shape[1], "num_calibration_samples": len(calibration)}
    oneshot(model=model, dataset=Dataset.from_dict(rows), recipe=modifiers, **options)


def _torchao(folder: str, recipe: dict[str, Any]) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if recipe["bits"] == 8:
        config = Int8DynamicActivationInt8WeightConfig()
    else:
        kind = {4: torch.int4, 3: torch.int3}[recipe["bits"]]
        config = IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(recipe["group"]))
    wanted = TorchAoConfig(config, modules_to_not_convert=["lm_head"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=wanted)


@torch.no_grad()
def _magnitude(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Four lines of torch: what needs no tool."""
    for layer in _linears(model):
        weight = layer.weight
        if recipe["prune"] == "2:4":
            groups = weight.unflatten(1, (-1, 4))
            drop = groups.abs().topk(2, -1, largest=False).indices
            groups.scatter_(-1, drop, 0)
        else:
            weight[weight.abs() <= weight.abs().flatten().float().kthvalue(weight.numel() // 2).values] = 0


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    made = {"compress": compress, "score": score}[given["do"]](given)
    print("\n" + json.dumps(made))
