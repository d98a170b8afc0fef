"""What captures is tested anew each time."""

import captures
import pytest


@pytest.fixture(autouse=True)
def captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    captures.apart(monkeypatch)
