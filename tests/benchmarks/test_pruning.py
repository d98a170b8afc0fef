"""The benchmark of pruning: its models, its oracle, what it counts and writes, on small pieces and toys."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from families import build
from repo import REPO

import fxc
from benchmarks.pruning import __main__ as pruning
from benchmarks.pruning import models, oracle, peer
from benchmarks.pruning.models import EVERY, MODELS, RATIOS, Model
from benchmarks.pruning.oracle import exactness
from benchmarks.pruning.ours import SHARE, Unit, counted, ours, removals
from benchmarks.pruning.outcome import first, generated, same
from benchmarks.pruning.peer import HANDS
from benchmarks.pruning.report import markdown, our_cells, summary, works
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes

SMALL = [each for each in MODELS if each.build is not models.minilm]


@cache
def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return EVERY[name].build()


@pytest.mark.parametrize("model", SMALL, ids=lambda m: m.name)
def test_models_have_the_parameters_that_were_measured_before(model):
    assert sum(p.numel() for p in on_meta(model.name).parameters()) == model.parameters


def test_there_are_21_models_and_seven_ratios_twice():
    assert len(MODELS) == 21 and len({m.name for m in MODELS}) == 21
    assert [query / kv for query, kv in models.PAIRS] == [1, 2, 3, 4, 5, 7, 8]
    assert len(RATIOS) == 14
    config = on_meta("qwen3_14_2").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (14, 2, 16)


@pytest.mark.parametrize("model", [*SMALL, *RATIOS], ids=lambda m: m.name)
def test_what_is_written_by_hand_names_layers_that_are_there(model):
    hand, names = HANDS[model.name], [name for name, _ in on_meta(model.name).named_modules()]
    for end in (*hand.heads, *hand.frozen, *hand.repair):
        assert any(name.endswith(end) for name in names), end


def test_a_model_is_the_same_each_time_and_has_no_plain_norms():
    one, other = (models.built(EVERY["resnet"]) for _ in range(2))
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    vectors = [t for n, t in one.state_dict().items() if n.endswith(("weight", "bias", "mean", "var")) and t.ndim == 1]
    assert vectors and all(v.unique().numel() > 1 for v in vectors)


@pytest.mark.parametrize("name", ["llama_gqa", "bert", "t5", "plain_cnn"])
def test_inputs_are_of_two_sizes_that_the_original_takes(name):
    model = EVERY[name]
    module = models.built(model)
    given = models.inputs(module, model.example() if model.example else None)
    with torch.no_grad():
        shapes = [first(module(**each)).shape for each in given]
    assert len(shapes) == 2 and shapes[0] != shapes[1]


def test_a_model_that_does_not_write_generates_nothing():
    module = models.built(EVERY["plain_cnn"])
    assert generated(module, {"x": torch.ones(2, 3, 32, 32)}) is None
    assert same(None, None) is None
    assert same(torch.ones(2), torch.zeros(2)) == "wrong: other tokens"


def unit(kind: str, size: int, *members: str, pinned: str | None = None, sums: int = 1) -> Unit:
    return Unit(kind, "layer", size, pinned, sums, frozenset((m, 0) for m in members))


def test_groups_are_found_again_and_counted():
    before = [
        unit("head", 8, "q", "k", "o", sums=2),
        unit("head", 8, "q2", "o2"),
        unit("ffn", 320, "up", "down"),
        unit("channel", 16, "conv", "next"),
        unit("channel", 16, "conv", "other"),
        unit("channel", 64, "stem", pinned="it is normalised over"),
        unit("head_dim", 16, "q"),
    ]
    after = [
        unit("head", 6, "q", "k", "o", "bias"),
        unit("head", 7, "q2", "o2"),
        unit("ffn", 224, "up", "down"),
        unit("channel", 11, "conv", "other"),
        unit("channel", 64, "stem"),
    ]
    records = removals(before, after)
    # Both have the constant `conv`; what is left has `other` too.
    assert [r["units"] for r in records] == [[8, 6], [8, 7], [320, 224], [16, 0], [16, 11], [64, 64]]
    assert [r["asked"] for r in records] == [2, 2, 96, 4, 4, 0]
    assert counted(records, Model("toy", lambda: None, 0, heads=3, widths=3)) == {"heads": [2, 3], "widths": [3, 3]}
    # A width that the analysis pins or does not see at all is missing where the model has it.
    assert counted(records, Model("toy", lambda: None, 0, heads=4, widths=4)) == {"heads": [2, 4], "widths": [3, 4]}


def test_heads_of_a_cache_are_known_by_their_numbers():
    before = torch.randn(2, 4, 7, 16, dtype=torch.float64)
    kept = [2, 0, 3]
    assert oracle.survivors(before, before[:, kept] * (1 + 1e-12)).tolist() == kept
    with pytest.raises(ValueError, match="none of the masked model's"):
        oracle.survivors(before, torch.randn(2, 1, 7, 16, dtype=torch.float64))


@cache
def decoder() -> tuple[fxc.ir.Program, fxc.ir.Program]:
    """A decoder of 4 query and 2 KV heads in which both query heads of one KV head are masked, and the same one sliced."""
    masked, _ = run_passes(fxc.capture(build("qwen2")[0]), Context(), Options("canonicalize", verify=False))
    name = "model.layers.1.self_attn.o_proj.weight"
    weight = masked.constants[name].clone()
    weight[:, : weight.shape[1] // 2] = 0
    masked.constants[name] = weight
    sliced, _ = run_passes(masked, Context(), Options("dead_structure", verify=False))
    return masked, sliced


def test_the_oracle_follows_a_cache_that_lost_heads():
    masked, sliced = decoder()
    heads = [n.meta["val"].shape[1] for n in sliced.placeholders[3:]]
    assert heads == [2, 2, 1, 1]
    worst, sizes = exactness(masked, sliced)
    assert worst < oracle.EXACT and sizes == 3


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.bias", "lm_head.weight"]
)
def test_the_oracle_sees_one_wrong_number(name):
    masked, sliced = decoder()
    wrong = sliced.copy()
    name = wrong.aliases.get(name, name)
    wrong.constants[name] = wrong.constants[name].clone()
    wrong.constants[name].view(-1)[3] += 1e-3
    try:
        assert exactness(masked, wrong)[0] > oracle.EXACT
    except ValueError as error:
        assert "none of the masked model's" in str(error)


def test_the_oracle_misses_no_output():
    _, sliced = decoder()
    short = sliced.copy()
    short.graph.output_node().args = (tuple(short.results[1:]),)
    del short.signature.outputs[0]
    with pytest.raises(ValueError, match="lost the outputs logits"):
        exactness(sliced, short)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_cnn", "qwen2_6_2"])
def test_fxc_takes_a_model_through_every_stage(name):
    with torch.no_grad():
        record = ours(EVERY[name])
    assert works(record), record
    before, after = record["parameters"]
    assert after < 0.85 * before
    assert record["moved"] > 0.01
    # What the compiler says that it removed is what the groups of the two programs differ by.
    lost = sum(g["units"][0] - g["units"][1] for g in record["groups"])
    assert lost == sum(r["removed"] for r in record["removed"]["dead_structure"] if r["kind"] in SHARE)
    assert ("generate" in record) == (name != "plain_cnn")


def completed(returncode: int = 0, stderr: str = "", record: dict | None = None):
    def run(command, **options):
        assert command[1:4] == ["-m", "benchmarks.pruning", "--peer"] and Path(options["cwd"]) == REPO
        if record is not None:
            Path(command[-1]).write_text(json.dumps(record))
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_a_peer_that_hangs_or_dies_costs_its_own_row_alone(monkeypatch):
    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert peer.theirs("bert", 7) == {"failed": "no result in 7 s"}
    monkeypatch.setattr(subprocess, "run", completed(-9, "warning\nkilled\n"))
    assert peer.theirs("bert", 7) == {"failed": "ended with status -9: killed"}
    monkeypatch.setattr(subprocess, "run", completed(record={"heads": [2, 2]}))
    assert peer.theirs("bert", 7) == {"heads": [2, 2]}


GOOD = {
    "parameters": [1000, 700], "heads": [2, 2], "widths": [2, 2], "difference": [3e-16, 3], "moved": 0.41, "forward": "ok",
    "generate": "ok", "reload": "ok", "int8": {"layers": 4, "bytes": [2800, 900], "difference": 0.012},
    "refusals": [], "groups": [], "seconds": {"all": 1.5, "passes": 0.25},
}  # fmt: skip
PEER = {
    "parameters": [1000, 800], "heads": [0, 2], "widths": [2, 2], "forward": "failed: RuntimeError: a|b", "repaired": "ok",
    "reload": "ok", "seconds": {"graph": 0.1, "prune": 0.2},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"heads": [1, 2]},
        {"difference": [1e-6, 3]},
        {"difference": "failed: ValueError"},
        {"forward": "wrong: differs by 1.0e-01"},
        {"generate": "wrong: other tokens"},
        {"reload": "failed: x"},
        {"int8": "failed: x"},
    ],
)
def test_one_stage_that_fails_is_enough(change):
    assert works(GOOD) and not works(GOOD | change)
    assert not works({"failed": "x"})


def test_a_model_without_a_layer_for_int8_does_not_count_as_quantized():
    entry = {"name": "toy", "fxc": GOOD | {"int8": {"layers": 0, "bytes": [9, 9], "difference": 0.0}}}
    assert our_cells(entry)[9] == "no layer to quantize"
    assert "int8 on top: 0, with no layer for it: 1;" in summary([entry])[0]


def run_main(monkeypatch, *arguments: str, ours=lambda model: dict(GOOD), version: str | None = "1.6.1") -> int:
    monkeypatch.setattr(sys, "argv", ["pruning", *arguments])
    monkeypatch.setattr(pruning, "quiet", lambda: None)
    monkeypatch.setattr(pruning, "ours", ours)
    monkeypatch.setattr(
        pruning, "theirs", lambda name, seconds: {"failed": "no result in 7 s"} if "8_4" in name else dict(PEER)
    )
    monkeypatch.setattr(pruning, "peer_version", lambda: version)
    return pruning.main()


def test_a_full_run_writes_json_and_markdown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pruning, "RESULTS", tmp_path / "results")
    assert run_main(monkeypatch, "--ratios", "--peer-seconds", "7") == 0
    [path] = (tmp_path / "results").glob("pruning-*.json")
    report = json.loads(path.read_text())
    assert len(report["models"]) == 21 and len(report["ratios"]) == 14
    assert report["versions"]["torch-pruning"] == "1.6.1" and report["versions"]["torch"] == torch.__version__
    shown = path.with_suffix(".md").read_text()
    assert shown == markdown(report)
    assert (
        "| bert | 1,000 -> 700 | 2 of 2 | 2 of 2 | 3.0e-16, 3 sizes | 41.0% | ok | ok | ok | 2,800 -> 900 bytes, 1.2% |"
        in shown
    )
    assert "| bert | 1,000 -> 800 | 0 of 2 | 2 of 2 | failed: RuntimeError: a/b | ok | - | ok | 0.1 + 0.2 |" in shown
    assert "| qwen2_8_4 | failed: no result in 7 s |" in shown
    assert (
        "fxc: all that was asked removed on 21 of 21" in shown
        and "torch-pruning: all that was asked removed on 0 of 21" in shown
    )
    assert "no result: 2." in shown
    assert "21 of 21" in capsys.readouterr().out


def test_a_partial_run_leaves_the_results_alone_and_names_an_absent_peer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pruning, "RESULTS", tmp_path / "results")
    assert run_main(monkeypatch, "--models", "bert, vit", version=None) == 0
    assert not (tmp_path / "results").exists()
    assert "torch-pruning is absent: pip install torch-pruning" in capsys.readouterr().out
    assert run_main(monkeypatch, "--models", "bert", "--out", str(tmp_path / "out"), version=None) == 0
    [path] = (tmp_path / "out").glob("*.json")
    report = json.loads(path.read_text())
    assert [list(entry) for entry in report["models"]] == [["name", "fxc"]]
    assert "torch-pruning is absent" in path.with_suffix(".md").read_text()


def test_a_fault_of_fxc_is_a_row_and_the_exit_status(monkeypatch, tmp_path):
    def broken(model):
        raise RuntimeError("it broke\nand more")

    assert run_main(monkeypatch, "--models", "bert", "--out", str(tmp_path), ours=broken) == 1
    [path] = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["models"][0]["fxc"] == {"failed": "RuntimeError: it broke"}
    assert "| bert | failed: RuntimeError: it broke | - |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("arguments", [["--models", "bart"], ["--threads", "0"], ["--peer-seconds", "0"]])
def test_bad_options_are_refused(monkeypatch, arguments):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert exit.value.code == 2
