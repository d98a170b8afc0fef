"""Tiny models, and those compiled, for every test of the command line."""

from pathlib import Path

import pytest
from command import fxc
from tiny import save

TEXT = "def answer(question):\n    return 42 if question else None\n\n" * 12


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with tiny models, a text, and the models compiled."""
    root = tmp_path_factory.mktemp("cli")
    for name in ("qwen2", "bert", "vit"):
        save(name, root / name, tokenizer=name != "vit")
        fxc("compile", root / name, "-o", root / f"{name}-int8", "--no-measure")
    (root / "text.txt").write_text(TEXT)
    return root
