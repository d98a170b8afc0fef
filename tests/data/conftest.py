"""Programs, and a folder with a tokenizer, a text, rows and pictures."""

import numpy as np
import pytest
from calibrated import TEXT
from families import build
from tiny import byte_tokenizer

import fxc
from fxc.frontend.capture import capture
from fxc.source.load import load_source


@pytest.fixture(scope="session")
def programs():
    """Family -> its program, captured once."""
    made: dict[str, fxc.Program] = {}

    def program(name: str) -> fxc.Program:
        if name not in made:
            made[name] = capture(*build(name), check=False)
        return made[name]

    return program


@pytest.fixture(scope="session")
def pylm(pylm_dir):
    return capture(load_source(str(pylm_dir)).model, check=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A byte tokenizer (token = byte's place + 3), a text, rows, and pictures."""
    root = tmp_path_factory.mktemp("calibration")
    byte_tokenizer().save_pretrained(root)
    (root / "text.txt").write_text(TEXT)
    (root / "rows.jsonl").write_text('{"text": "hello", "id": 7}\n\n{"text": " "}\n{"input_ids": [3, 4, 5]}\n')
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    image = pytest.importorskip("PIL.Image", reason="Pillow is optional")
    root = tmp_path_factory.mktemp("pictures")
    (root / "cats").mkdir()
    numbers = np.random.default_rng(0)
    for name, mode in (("b.png", "RGB"), ("cats/a.jpg", "RGB"), ("c.webp", "RGBA"), ("d.PNG", "L")):
        shape = (40, 56) if mode == "L" else (40, 56, len(mode))
        image.fromarray(numbers.integers(0, 255, shape, dtype=np.uint8)).save(root / name)
    (root / "notes.txt").write_text("not a picture")
    return root
