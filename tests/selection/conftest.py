"""A small model, captured, and what there is to choose for it."""

from __future__ import annotations

import pytest
import torch
from choosable import FORMATS, Small

from fxc.captured import capture_source
from fxc.options import Options
from fxc.selection.formats import parse_formats
from fxc.selection.groups import space_of


@pytest.fixture(scope="session")
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (4, 12), generator=generator) for _ in range(8)]


@pytest.fixture(scope="session")
def captured(data):
    return capture_source(Small().eval(), (data[0],), Options(""))


@pytest.fixture(scope="session")
def space(captured):
    return space_of(captured.program, parse_formats(FORMATS))
