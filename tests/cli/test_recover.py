"""`fxc recover`, and the pass in `fxc compile`: what was pruned and packed is trained, and what cannot be is refused."""

import json
import subprocess
import sys

import pytest
import torch
from command import fxc, fxc_json
from repo import REPO

import fxc as package


@pytest.fixture(scope="module")
def pruned(folder):
    out = folder / "qwen2-pruned"
    fxc("compile", folder / "qwen2", "--passes", "int8,prune:heads=0.25:ffn=0.3", "-o", out, "--no-measure")
    return out


def test_one_line_trains_an_artifact_that_is_then_loaded_in_one(folder, pruned, tmp_path):
    out = tmp_path / "out"
    done = fxc(
        "recover", pruned, "--data", folder / "text.txt", "--teacher", folder / "qwen2", "-o", out, "--steps", "6",
        "--schedule=linear", "--method", "all", "--data-length", "32", "--eval-text", folder / "text.txt",
    )  # fmt: skip
    assert "held-out samples" in done.stdout and "perplexity" in done.stdout and f"taught by {folder / 'qwen2'}" in done.stdout
    report = json.loads((out / "fxc.json").read_text())["report"]
    names = [each["name"] for each in report["passes"]]
    assert names[:4] == ["canonicalize", "prune:heads=0.25:ffn=0.3", "dead_structure", "int8"]
    assert names[-1].startswith("recover:") and "schedule=linear" in names[-1] and "steps=6" in names[-1]
    assert report["teacher"]["id"] == str(folder / "qwen2") and report["training"]["length"] == 32
    assert package.load(out).program.nbytes() == package.load(pruned).program.nbytes()
    assert "2 tokens" in fxc("run", out, "--prompt", "def", "--max-new-tokens", "2").stderr


def test_one_command_prunes_packs_and_recovers_and_reports_each_step(folder, tmp_path):
    made = fxc_json(
        "compile", folder / "qwen2", "--passes", "int8,prune:heads=0.25:ffn=0.3,recover:steps=4:block_steps=4",
        "--calib", folder / "text.txt", "-o", tmp_path / "out", "--no-measure",
    )  # fmt: skip
    assert {each["name"].partition(":")[0] for each in made["passes"]} == {
        "canonicalize", "prune", "dead_structure", "int8", "recover"
    }  # fmt: skip
    notes = next(each["notes"] for each in made["passes"] if each["name"].startswith("recover"))
    assert any("the loss on" in note for note in notes)


def test_without_a_teacher_the_task_teaches(folder, tmp_path):
    made = fxc_json(
        "recover", folder / "qwen2", "--data", folder / "text.txt", "--loss", "task", "--steps", "4", "--method", "all",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert made["passes"][-1]["changed"] and "teacher" not in json.loads((tmp_path / "out" / "fxc.json").read_text())["report"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing option"),
        (("--data", "text.txt"), "there is no teacher"),
        (("--data", "nothing.txt", "--teacher", "qwen2"), "there is no such training data"),
        (("--data", "text.txt", "--teacher", "qwen2", "--lorra", "4"), "there is no option --lorra"),
        (("--data", "text.txt", "--teacher", "qwen2", "again"), "one argument too many"),
        (("--data", "text.txt", "--teacher", "qwen2", "--temperature"), "lacks its value"),
        (("--data", "text.txt", "--teacher", "qwen2", "--steps", "many"), "is not a int"),
        (("--data", "text.txt", "--teacher", "qwen2", "--loss", "l3"), "is no loss"),
        (("--data", "text.txt", "--teacher", "qwen2", "-o", "bert"), "bert"),
        (("--data", "text.txt", "--teacher", "vit"), "the teacher takes pixel_values"),
        (("--data", "text.txt", "--teacher", "bert"), "tells 2 tokens or labels apart"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(folder, pruned, monkeypatch, words, said):
    monkeypatch.chdir(folder)
    out = () if "-o" in words else ("-o", "never")
    done = fxc("recover", pruned, *words, *out, code=2)
    assert said in done.output and not (folder / "never").exists()


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_writes(folder, pruned, tmp_path):
    words = [
        "recover", pruned, "--data", folder / "text.txt", "--teacher", folder / "qwen2", "--steps", "4", "--method", "all",
        "--precision", "float32", "--data-length", "32", "--data-samples", "40", "-o",
    ]  # fmt: skip
    fxc(*words, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fxc"]
    command = list(map(str, [*launcher, *words, tmp_path / "two"]))
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    one, two = (package.load(tmp_path / name).program for name in ("one", "two"))
    assert str(one) == str(two)
    for name, tensor in one.constants.items():
        # Gradients are added up in another order, which may move a number across half a level.
        assert (tensor.float() - two.constants[name].float()).abs().max() <= (1 if tensor.dtype == torch.int8 else 1e-4), name
    before = package.load(pruned).program.constants
    assert any(not torch.equal(tensor, before[name]) for name, tensor in one.constants.items())
