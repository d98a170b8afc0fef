"""What is around a pass that learns from data: its plan, and that it is refused before it starts."""

from __future__ import annotations

import pytest
from formats import captured, directed

from fxc.calibrate import needs
from fxc.errors import ResourceError
from fxc.options import Options
from fxc.passes import learning
from fxc.passes.base import Context
from fxc.pipeline import run_passes

GPTQ = "int4:group=32:algorithm=gptq"


def untouchable(items, what, count):
    raise AssertionError("it has begun")


def test_what_it_needs_is_said_before_it_begins():
    said: list[str] = []

    def track(items, what, count):
        said.append(what)
        return items

    run_passes(captured(), Context(samples=directed(4), track=track, say=said.append), Options(GPTQ))
    assert said[0].startswith("int4:group=32:algorithm=gptq learns from 4 samples, with ")
    assert "MB of statistics" in said[0] and said[1].startswith("block 1 of ")


@pytest.mark.fault(28)
@pytest.mark.parametrize(("spec", "lighter"), [(GPTQ, "algorithm=grid"), ("sparse24:criterion=sparsegpt", "criterion=wanda")])
def test_what_cannot_fit_is_refused_before_it_begins(spec, lighter, monkeypatch):
    monkeypatch.setattr(needs, "available", lambda: 10_000)
    with pytest.raises(ResourceError, match=r"of memory and 0\.00 GB are left") as caught:
        run_passes(captured(), Context(samples=directed(4), track=untouchable), Options(spec))
    assert caught.value.where.startswith(spec.split(":")[0]) and lighter in caught.value.hint


@pytest.mark.parametrize("spec", ["sparsify:criterion=taylor", "sparse24:criterion=taylor", "prune:ffn=0.25:criterion=taylor"])
def test_gradients_through_the_whole_model_are_said_and_refused_where_they_cannot_fit(spec, monkeypatch):
    said: list[str] = []
    run_passes(captured(), Context(samples=directed(4), say=said.append), Options(spec))
    assert "gradients through the whole model" in said[0]
    monkeypatch.setattr(learning, "available", lambda: 10_000)
    with pytest.raises(ResourceError, match="gradients need") as caught:
        run_passes(captured(), Context(samples=directed(4), track=untouchable), Options(spec))
    assert "--calib-length" in caught.value.hint
