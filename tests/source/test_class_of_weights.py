"""A checkpoint whose config.json names no class becomes the class that its weights are for; weights left out are reported."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fxc
from fxc.errors import InputRefused

DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {n: v for n, v in DECODER.items() if n != "num_key_value_heads"}
T = transformers
KINDS = {
    "LlamaForCausalLM": lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER)),
    "LlamaForSequenceClassification": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**DECODER)),
    "LlamaModel": lambda: T.LlamaModel(T.LlamaConfig(**DECODER)),
    "BertModel": lambda: T.BertModel(T.BertConfig(**ENCODER)),
    "BertForMaskedLM": lambda: T.BertForMaskedLM(T.BertConfig(**ENCODER)),
    "BertForQuestionAnswering": lambda: T.BertForQuestionAnswering(T.BertConfig(**ENCODER)),
    "BertForSequenceClassification": lambda: T.BertForSequenceClassification(T.BertConfig(**ENCODER)),
}


def without_class(model, folder, keep=False):
    model.save_pretrained(folder)
    if not keep:
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


QUICK = ("LlamaForCausalLM", "LlamaModel", "BertForSequenceClassification")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in KINDS])
def test_the_class_is_found_or_refused(kind, tmp_path):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    try:
        compiled = fxc.optimize(without_class(model, tmp_path / "m"), passes="")
    except InputRefused as error:
        assert "architectures" in error.hint
        assert kind == "LlamaModel", error
        return
    ids = torch.tensor([[5, 6, 7, 8]])
    found, expected = compiled(input_ids=ids), model(input_ids=ids)
    assert found[0].shape == expected[0].shape and torch.allclose(found[0], expected[0], atol=1e-4)
    assert hasattr(compiled, "generate") == (kind == "LlamaForCausalLM")
    assert "unused" not in compiled.report["source"]


def test_weights_that_the_class_does_not_use_are_reported(tmp_path):
    folder = without_class(KINDS["BertModel"](), tmp_path / "m", keep=True)
    file = folder / "model.safetensors"
    before = fxc.optimize(folder, passes="").report["bytes_before"]
    save_file(load_file(file) | {"extra.head.weight": torch.ones(40, 32)}, file, {"format": "pt"})
    report = fxc.optimize(folder, passes="").report
    assert report["source"]["unused"]["bytes"] == 4 * 40 * 32 and "extra.head.weight" in report["source"]["unused"]["tensors"]
    assert abs(report["bytes_before"] - before) < 200  # the header of the file has a line more


def test_weights_that_no_class_uses_are_refused_without_a_class(tmp_path):
    folder = without_class(KINDS["BertModel"](), tmp_path / "m")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"extra.head.weight": torch.ones(40, 32)}, file, {"format": "pt"})
    with pytest.raises(InputRefused, match="which class") as caught:
        fxc.optimize(folder, passes="")
    assert "extra.head.weight" in caught.value.why and "architectures" in caught.value.hint
