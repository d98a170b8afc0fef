"""Artifacts of every format that an earlier version wrote load, and give what they gave."""

import json

import pytest
import torch
from golden import FOLDER, FORMATS, inputs

import fxc
from fxc.schemes.scheme import SCHEMES

SAID = json.loads((FOLDER / "outputs.json").read_text())


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", sorted(p.name for p in FOLDER.iterdir() if p.is_dir()))
def test_it_loads_and_gives_what_it_gave(name):
    model = fxc.load(FOLDER / name, keep_compressed=True)
    expected = torch.tensor(SAID[name])
    found = model.program.module()(*inputs(name))[0].flatten()
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert (model(*inputs(name)).flatten() - expected).norm() <= 0.05 * expected.norm()


def test_every_format_is_there():
    texts = [(FOLDER / name / "program.fxc").read_text() for name in FORMATS]
    assert SAID.keys() == FORMATS.keys()
    operators = [str(product.operator).removesuffix(".default") for scheme in SCHEMES.values() for product in scheme.products]
    lacking = [name for name in operators if "grouped" not in name and not any(f"{name}(" in text for text in texts)]
    assert lacking == []
