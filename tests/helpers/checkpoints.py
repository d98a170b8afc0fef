"""Checkpoints to be changed, and the refusal that follows."""

import json

import pytest

from fxc.errors import InputRefused
from fxc.source.load import load_source

INDEX = "model.safetensors.index.json"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(source, *parts, error=InputRefused, **options):
    """The text of the refusal, which has every part and the three lines."""
    with pytest.raises(error) as caught:
        load_source(str(source), **options)
    text = str(caught.value)
    assert text.startswith(f"error[FXC-E{error.exit_code}]: ")
    assert "\ntry: " in text, text
    for part in parts:
        assert str(part) in text, text
    return text
