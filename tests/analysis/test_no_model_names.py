"""Nothing in the analysis and the passes knows a model by its name."""

import re

import pytest
from families import FAMILIES

# As parts of words where no other word has them, else as whole words.
MODELS = (
    "qwen|llama|mistral|mixtral|gemma|(?<!sparse)gpt(?!q)|bert|resnet|resnext|mobilenet|whisper|deepseek|falcon|starcoder|convnext|densenet"
    "|minilm|pylm|phi-?[1-4]|olmo|mpnet|electra|longformer|efficientnet|squeezenet|alexnet|vgg|hugging_?face transformers"
    r"|\b(?:vit|deit|swin|beit|dino|clip(?!\.default)|t5|bart|opt|phi|yi|mpt|bloom|neox|xlnet|blip|siglip|sam|detr)\b"
)


@pytest.mark.parametrize("folder", ["ir", "analysis", "passes"])
def test_nothing_knows_a_model_by_name(repo, folder):
    files = sorted((repo / "fxc" / folder).rglob("*.py"))
    assert len(files) > 5
    found = [
        f"{file.relative_to(repo)}:{number}: {text.strip()}"
        for file in files
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(MODELS, text, re.IGNORECASE)
    ]
    assert found == []
    for family in FAMILIES:
        if family not in ("mlp", "cnn"):
            assert re.search(MODELS, family.replace("_", " "), re.IGNORECASE), f"{family} would not be found"
