"""`fxc bench model`: who is compared, over which cache, with how many threads."""

import torch
from command import fxc, fxc_json


def test_bench_compares_with_the_first(folder):
    found = fxc_json("bench", "model", folder / "qwen2", folder / "qwen2-int8", "--seq", "8", "--new", 2, "--rounds", 2)
    assert [(r["name"], r["how"]) for r in found["results"]] == [("qwen2", "torch eager"), ("qwen2-int8", "fxc eager")]
    assert found["results"][0]["speedup"] == {"prefill": 1.0, "decode": 1.0}
    assert all(len(r["rounds"]["decode"]) == 2 for r in found["results"])
    done = fxc("bench", "model", folder / "vit", folder / "vit-int8", "--batch", "1,2", "--rounds", 1)
    assert done.stdout.count("fxc eager") == 2
    fxc("bench", "model", folder / "vit", "--batch", "1,x", code=2)
    fxc("bench", "model", folder / "vit", folder / "bert", code=2)


def test_bench_over_a_static_cache(folder):
    options = ("--seq", "8", "--new", 3, "--rounds", 1, "--static-cache", "--keep-compressed")
    found = fxc_json("bench", "model", folder / "qwen2", folder / "qwen2-int8", *options)
    assert [each["how"] for each in found["results"]] == ["torch eager", "fxc eager, static cache, kept compressed"]
    refused = fxc("bench", "model", folder / "vit-int8", "--rounds", 1, "--static-cache", code=2)
    assert "only a causal language model has a cache" in refused.output


def test_bench_threads_are_set(folder):
    before = torch.get_num_threads()
    try:
        found = fxc_json("bench", "model", folder / "bert-int8", "--seq", 4, "--rounds", 1, "--threads", 2)
        assert found["threads"] == 2
    finally:
        torch.set_num_threads(before)
