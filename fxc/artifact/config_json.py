"""The config.json of an artifact: that of its model, which transformers reads and must make no model from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxc.errors import InputRefused

_WEIGHTS_KEY = "transformers_weights"  # in a config.json: the file that transformers takes the weights from
_NOT_A_CHECKPOINT = "this is a model compiled by fxc, not a checkpoint of transformers: open it with fxc.load(directory)"


def encode(config: Any, architecture: str) -> bytes:
    """What a folder of a model of the class `architecture` says."""
    content = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def marked(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """`files` with a config.json that transformers reads, and from which it makes no model: it would find other weights
    than its own in the artifact, and come up with random ones. It quotes in its error what stands here."""
    if "config.json" not in files:
        return dict(files)
    content = files["config.json"]
    config = json.loads(content if isinstance(content, bytes) else content.read_bytes()) | {_WEIGHTS_KEY: _NOT_A_CHECKPOINT}
    return files | {"config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def read(path: Path) -> Any:
    """The configuration in the artifact `path`, or None. Raises `InputRefused` where transformers cannot read it."""
    if not (path / "config.json").exists():
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever transformers objects to
        raise InputRefused(f"transformers cannot read it: {error}", where=str(path / "config.json")) from None
    if getattr(config, _WEIGHTS_KEY, None) == _NOT_A_CHECKPOINT:
        delattr(config, _WEIGHTS_KEY)
    return config
