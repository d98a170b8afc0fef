"""An artifact that is whole. What reads it reads it anew each time."""

from pathlib import Path

import parsed
import pytest
from artifacts import net

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import store


@pytest.fixture(autouse=True)
def parsed_anew(monkeypatch) -> None:
    parsed.apart(monkeypatch)


@pytest.fixture
def saved(tmp_path) -> Path:
    out = tmp_path / "out"
    store.save(net(), out, manifest={"report": {"passes": ["int8"]}}, extra_files={"config.json": b'{"a": 1}\n'})
    return out
