"""CUDA graphs of a step, as far as they can be known without a GPU."""

from __future__ import annotations

import pytest
import torch

from fxc.errors import UsageError
from fxc.runtime.static_cache import CudaGraphs


# CudaGraphs, as far as it can be known without a GPU.
class _Context:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def wait_stream(self, other):
        pass


def _cuda(monkeypatch, capture=_Context):
    """torch.cuda with a capture that replays a tape."""
    log, streams = [], set()

    class Graph:
        def replay(self):
            log.append("replay")

    def graph(graph, pool, stream, capture_error_mode):
        log.append(("capture", pool))
        streams.add(stream)
        assert capture_error_mode == "thread_local", "other threads allocate meanwhile"
        return capture()

    for name, value in {
        "device": lambda device: _Context(),
        "graph_pool_handle": lambda: "pool",
        "Stream": _Context,
        "current_stream": _Context,
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log, streams


def test_a_step_is_warmed_up_captured_and_replayed(monkeypatch):
    log, streams = _cuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda"))
    result = torch.zeros(1)
    replay = graphs(lambda: (log.append("run"), result)[1])
    assert log == ["run", "run", "run", ("capture", "pool"), "run"]
    assert replay() is result and replay() is result and log[-2:] == ["replay", "replay"]
    graphs(lambda: result)
    assert log[-1] == ("capture", "pool") and len(streams) == 1, "graphs share one pool, which needs one stream"
    assert streams == {graphs.stream}, "torch's own stream for captures is on the device of the first capture"


def test_a_capture_that_fails_is_an_error_in_plain_words(monkeypatch):
    class Fails(_Context):
        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    _cuda(monkeypatch, Fails)
    with pytest.raises(UsageError) as caught:
        CudaGraphs(torch.device("cuda"))(lambda: torch.zeros(1))
    assert "cannot be captured in a CUDA graph" in str(caught.value) and "more" not in str(caught.value)
    assert "operation not permitted" in caught.value.why and "without static_cache" in caught.value.hint
