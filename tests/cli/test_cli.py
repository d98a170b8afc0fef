"""Every command, what it prints, and the exit code of each way in which it can fail."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import fxc, fxc_json
from rich.console import Console
from tiny import save
from typer.testing import CliRunner

from fxc.cli.app import app
from fxc.cli.compile import default_out
from fxc.passes.base import parse_passes
from fxc.report.console import Output

TEXT = "def answer(question):\n    return 42 if question else None\n\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with tiny models, a text, and the models compiled."""
    root = tmp_path_factory.mktemp("cli")
    for name in ("qwen2", "bert", "vit"):
        save(name, root / name, tokenizer=name != "vit")
        fxc("compile", root / name, "-o", root / f"{name}-int8")
    (root / "text.txt").write_text(TEXT)
    return root


# -------------------------------------------------------------------------------------------------------------- compile


def test_compile_prints_what_changed(folder, tmp_path):
    options = ("--eval-text", folder / "text.txt", "--skip", "lm_head")
    short = fxc("compile", folder / "qwen2", "-o", tmp_path / "short", *options).stdout
    assert "size on disk" in short and "coverage" in short and "bytes by kind" not in short and "left alone" in short
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "out", *options, "--report")
    for said in ("size on disk", "int8 linear", "perplexity", "7 of 7 ok", "skipped by the pattern lm_head", "coverage"):
        assert said in done.stdout
    assert "\x1b" not in done.output, "there is no terminal here"


def test_compile_json_has_the_promised_keys_and_nothing_else_is_on_stdout(folder, tmp_path):
    made = fxc_json("compile", folder / "qwen2", "-o", tmp_path / "out", "--passes", "int8:mode=weight_only")
    assert set(made) == {
        "bytes_before", "bytes_after", "parameters_before", "parameters_after", "coverage", "passes", "gates", "out",
        "stages",
    }  # fmt: skip
    assert [stage["name"] for stage in made["stages"]] == ["as captured", "canonicalize", "int8:mode=weight_only"]
    assert all(set(stage["milliseconds"]) == {"prefill", "decode"} for stage in made["stages"])
    assert made["out"] == str(tmp_path / "out") and 0.5 < made["coverage"] <= 1
    assert made["bytes_after"] < made["bytes_before"]
    assert [p["name"] for p in made["passes"]] == ["canonicalize", "int8:mode=weight_only"] == list(made["gates"])
    assert {"name", "changed", "seconds", "refusals"} <= set(made["passes"][1])
    assert made["gates"]["int8:mode=weight_only"]["meaning"].startswith("ok")


def test_compile_twice_gives_the_same_bytes(folder, tmp_path):
    fxc("compile", folder / "qwen2", "-o", tmp_path / "again")
    first, again = ({p.name: p.read_bytes() for p in out.iterdir()} for out in (folder / "qwen2-int8", tmp_path / "again"))
    assert first == again


def patterns(made: dict) -> set[str]:
    """Of the layers that the second pass left alone, the reasons that are patterns."""
    return {r["reason"] for r in made["passes"][1]["refusals"] if "pattern" in r["reason"]}


def test_compile_reads_a_recipe_and_options_win(folder, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('passes = ["int8:mode=weight_only"]\nskip = ["*mlp*"]\ndtype = "bfloat16"\n')
    made = fxc_json("compile", folder / "qwen2", "-o", tmp_path / "a", "--recipe", recipe)
    assert made["passes"][1]["name"] == "int8:mode=weight_only"
    assert patterns(made) == {"skipped by the pattern *mlp*"}
    shown = fxc_json("inspect", tmp_path / "a")
    assert "bfloat16" in next(each["dtypes"] for each in shown["layers"] if each["name"] == "model.embed_tokens")
    options = ("--recipe", recipe, "--passes", "int8", "--skip", "*k_proj")
    made = fxc_json("compile", folder / "qwen2", "-o", tmp_path / "b", *options)
    assert made["passes"][1]["name"] == "int8" and patterns(made) == {"skipped by the pattern *k_proj"}


@pytest.mark.parametrize("content", ["passes = 3", "passes = [", "speed = 9", "passes = [1]", "dtype = 8"])
def test_compile_refuses_a_wrong_recipe(folder, tmp_path, content):
    (tmp_path / "r.toml").write_text(content)
    done = fxc("compile", folder / "bert", "-o", tmp_path / "out", "--recipe", tmp_path / "r.toml", code=2)
    assert done.stderr.startswith("error[FXC-E2]")


def test_compile_dumps_and_prints_programs(folder, tmp_path):
    dumps = tmp_path / "dumps"
    done = fxc(
        "compile", folder / "bert", "-o", tmp_path / "out", "--dump-dir", dumps, "--print-after", "canonicalize", "--json"
    )
    assert sorted(p.name for p in dumps.iterdir()) == ["00-capture.fxc", "01-canonicalize.fxc", "02-int8.fxc"]
    assert "fxc program 1" in done.stderr and json.loads(done.stdout)["out"]


def test_compile_says_that_no_pass_uses_calibration_data(folder, tmp_path):
    done = fxc("compile", folder / "bert", "-o", tmp_path / "out", "--calib", folder / "text.txt")
    assert "no pass of this recipe uses calibration data" in done.stderr


def test_compile_warns_of_low_coverage_and_can_fail(folder, tmp_path):
    skip = ("--skip", "*mlp*", "--skip", "lm_head")
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "out", *skip)
    assert "warning: less than half" in done.stderr and "skipped by the pattern" in done.stderr
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "no", *skip, "--min-coverage", "0.5", code=5)
    assert "error[FXC-E5]" in done.stderr and not (tmp_path / "no").exists()


def test_compile_takes_functions_and_artifacts(folder, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nprint('a stray print')\n"
        "def build():\n    return torch.nn.Sequential(torch.nn.Linear(64, 64)), (torch.randn(2, 64),)\n"
    )
    monkeypatch.chdir(tmp_path)
    made = fxc_json("compile", "mine:build", "-o", "out")
    assert made["passes"][1]["changed"] == 1
    done = fxc("compile", "out", "-o", "out2", code=2)
    assert "float_weights" in done.stderr
    again = fxc_json("compile", "out", "-o", "out2", "--passes", "")
    assert again["bytes_after"] == made["bytes_after"] and again["coverage"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{root}/nothing/here"], 2, "no such model"),
        (["{root}/bert", "--passes", "int9"], 2, "did you mean"),
        (["{root}/bert", "--passes", "int8:mode=fast"], 2, "one of dynamic, weight_only"),
        (["{root}/bert", "--dtype", "int8"], 2, "unknown dtype"),
        (["{root}/bert", "--device", "abacus"], 2, "there is no device"),
        (["{root}/bert", "--skip", "*"], 2, "changed nothing"),
        (["{root}/bert", "--eval-text", "{root}/text.txt"], 2, "perplexity"),
        (["{root}/bert", "--eval-text", "{root}/none.txt"], 2, "cannot be read"),
        (["{root}/bert", "--print-after", "prune"], 2, "no pass 'prune'"),
        (["{root}/bert", "--revision", "v1"], 2, "--revision"),
        (["{root}/bert", "--budget", "1e-9"], 5, "budget"),
        (["{root}/empty"], 3, "config.json"),
        (["org/not-in-the-cache"], 3, "cache"),
    ],
)
def test_compile_fails_with_one_clear_error(folder, tmp_path, arguments, code, said):
    (folder / "empty").mkdir(exist_ok=True)
    arguments = [a.format(root=folder) for a in arguments]
    done = fxc("compile", *arguments, "-o", tmp_path / "out", code=code)
    assert f"error[FXC-E{code}]" in done.stderr and said in done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()


def test_compile_does_not_overwrite_unless_told(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    fxc("compile", folder / "bert", "-o", out, code=2)
    fxc("compile", folder / "bert", "-o", out, "--overwrite", code=2)
    fxc("compile", folder / "bert", "-o", folder / "bert", "--overwrite", code=2)
    assert (out / "precious").read_text() == "x"
    (out / "precious").unlink()
    fxc("compile", folder / "bert", "-o", out)
    assert "--overwrite" in fxc("compile", folder / "bert", "-o", out, code=2).stderr
    fxc("compile", folder / "bert", "-o", out, "--overwrite")


# ------------------------------------------------------------------------------------------------------------------ run


def test_run_continues_a_prompt(folder):
    made = fxc_json("run", folder / "qwen2-int8", "--prompt", "def f", "--max-new-tokens", "5")
    assert made["tokens"] == 5 and made["prompt"] == "def f" and sum(made["lowering"].values()) >= 15
    done = fxc("run", folder / "qwen2-int8", "--prompt", "def f", "--max-new-tokens", "5")
    assert done.stdout.startswith("def f") and "backend eager" in done.stderr


def test_run_reads_a_text(folder, minilm_dir, tmp_path):
    made = fxc_json("run", folder / "bert-int8", "--text", "hello")
    assert [row["label"] for row in made["top"]] in (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"])
    assert sum(row["probability"] for row in made["top"]) == pytest.approx(1)
    fxc("compile", minilm_dir, "-o", tmp_path / "out", "--passes", "int8")
    made = fxc_json("run", tmp_path / "out", "--text", "A cat sits on the mat.")
    assert made["kind"] == "embedding" and made["size"] == 384 and len(made["first"]) == 8 and made["norm"] > 0
    assert "norm" in fxc("run", tmp_path / "out", "--text", "A cat").stdout


def test_run_looks_at_an_image(folder, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is optional")
    from transformers import ViTImageProcessor

    image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    assert "image processor" in fxc("run", folder / "vit-int8", "--image", tmp_path / "red.png", code=2).stderr
    shutil.copytree(folder / "vit", tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    fxc("compile", tmp_path / "vit", "-o", tmp_path / "out")
    assert len(fxc_json("run", tmp_path / "out", "--image", tmp_path / "red.png")["top"]) == 2
    (tmp_path / "no.png").write_text("no image")
    assert "not an image" in fxc("run", tmp_path / "out", "--image", tmp_path / "no.png", code=2).stderr


def test_run_says_that_pillow_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in fxc("run", folder / "vit-int8", "--image", "x.png", code=2).stderr


def test_run_says_what_a_model_takes(folder):
    assert "--prompt" in fxc("run", folder / "qwen2-int8", "--text", "x", code=2).stderr
    assert "--text" in fxc("run", folder / "bert-int8", "--prompt", "x", code=2).stderr
    assert "--image" in fxc("run", folder / "vit-int8", "--prompt", "x", code=2).stderr
    fxc("run", folder / "bert-int8", code=2)
    fxc("run", folder / "bert", "--text", "x", code=2)
    fxc("run", folder / "bert-int8", "--text", "x", "--backend", "warp", code=2)


def test_run_refuses_a_damaged_artifact(folder, tmp_path):
    fxc("compile", folder / "bert", "-o", tmp_path / "out")
    text = (tmp_path / "out" / "program.fxc").read_text()
    (tmp_path / "out" / "program.fxc").write_text(text[:-20])
    assert "program.fxc" in fxc("run", tmp_path / "out", "--text", "x", code=3).stderr


# ----------------------------------------------------------------------------------------------------------------- eval


def test_eval_measures_perplexity_of_models_and_artifacts(folder):
    options = ("--text", folder / "text.txt", "--window", 64)
    original, packed = (fxc_json("eval", folder / name, *options) for name in ("qwen2", "qwen2-int8"))
    assert original["tokens"] == packed["tokens"] == len(TEXT) - -(-len(TEXT) // 64)
    assert packed["perplexity"] == pytest.approx(original["perplexity"], rel=0.02)
    assert f"{original['perplexity']:.4f}" in fxc("eval", folder / "qwen2", *options).stdout


def test_eval_measures_agreement(folder):
    options = ("--text", folder / "text.txt", "--window", 64, "--windows", 2)
    found = fxc_json("eval", folder / "qwen2-int8", *options, "--against", folder / "qwen2")
    assert found["outputs"]["next_token"] > 0.8 and found["outputs"]["relative_error"] < 0.05
    assert len(found["layers"]) == 16 and found["layers"][0]["own"] >= found["layers"][-1]["own"]
    assert found["perplexity"] == pytest.approx(found["perplexity_against"], rel=0.02)
    done = fxc("eval", folder / "vit-int8", "--against", folder / "vit")
    assert "cosine_mean" in done.stdout and "made-up inputs" in done.stdout


def test_eval_fails_clearly(folder, tmp_path):
    fxc("eval", folder / "qwen2", code=2)
    assert "--against" in fxc("eval", folder / "bert-int8", "--text", folder / "text.txt", code=2).stderr
    assert "tokens" in fxc("eval", folder / "qwen2", "--text", folder / "text.txt", "--window", 300, code=2).stderr
    assert "tokenizer" in fxc("eval", save("gpt2", tmp_path / "g", False), "--text", folder / "text.txt", code=2).stderr
    fxc("eval", folder / "vit-int8", "--against", folder / "bert", code=2)


# ------------------------------------------------------------------------------------------------- inspect, diff, passes


def test_inspect_shows_bytes_that_add_up_and_the_program(folder):
    shown = fxc_json("inspect", folder / "qwen2-int8")
    assert sum(shown["bytes_by_kind"].values()) == sum(each["nbytes"] for each in shown["layers"]) == shown["bytes"]
    assert shown["operators"]["fxc.int8_linear"] == 15 and shown["bytes_by_kind"]["scales"] > 0
    assert "and 7 smaller ones" in fxc("inspect", folder / "qwen2-int8").stdout
    assert "layers.1.input_layernorm" in fxc("inspect", folder / "qwen2-int8", "--all").stdout
    text = fxc("inspect", folder / "qwen2-int8", "--text").stdout
    assert text == (folder / "qwen2-int8" / "program.fxc").read_text()
    assert "linear" in fxc_json("inspect", folder / "bert")["bytes_by_kind"]


def test_diff_shows_the_rewrite(folder):
    found = fxc_json("diff", folder / "bert", folder / "bert-int8")
    assert not found["same"] and found["bytes_b"] < found["bytes_a"]
    changed = [line for line in found["diff"].splitlines() if line.startswith("+") and "fxc.int8_linear(" in line]
    assert len(changed) == 13
    assert "the programs are the same" in fxc("diff", folder / "bert", folder / "bert").stdout


def test_passes_are_listed_and_explained():
    listed = {each["name"]: each for each in fxc_json("passes")["passes"]}
    assert listed["int8"]["kind"] == "policy" and listed["int8"]["options"][0]["name"] == "mode"
    assert "int8 (policy)" in fxc("passes").stdout
    explained = fxc_json("passes", "--explain", "int8")["order"]
    assert [each["name"] for each in explained] == ["canonicalize", "int8"] and explained[0]["reasons"]
    assert "given twice" in fxc("passes", "--explain", "int8,int8", code=2).stderr
    explained = fxc_json("passes", "--explain", "int8,prune")["order"]
    assert [each["name"] for each in explained] == ["canonicalize", "prune", "dead_structure", "int8"]


# --------------------------------------------------------------------------------------------------- bench and doctor


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


def test_doctor_says_whether_a_gpu_was_measured(monkeypatch):
    from fxc.report import machine
    from fxc_kernels.cuda import dispatch

    about = SimpleNamespace(name="NVIDIA H200", total_memory=141 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: about.name)
    found = [each for each in machine.examine() if each.group == "cuda"]
    assert [each.name for each in found] == ["device 0", "kernels"] and "sm_90" in found[0].value
    monkeypatch.setattr(dispatch, "table", lambda chip: {("int8", 8, 8): {1: None, 16: None}} if chip == "nvidia-h200" else {})
    found = [each for each in machine.examine() if each.name == "kernels"]
    assert found[0].value == "2 measured products in the table" and found[0].ok

    def broken(chip):
        raise ValueError(f"{chip}.json is no table")

    monkeypatch.setattr(dispatch, "table", broken)
    found = [each for each in machine.examine() if each.name == "kernels"]
    assert found[0].ok is False and found[0].note == "nvidia-h200.json is no table"


def test_bench_threads_are_set(folder):
    before = torch.get_num_threads()
    try:
        found = fxc_json("bench", "model", folder / "bert-int8", "--seq", 4, "--rounds", 1, "--threads", 2)
        assert found["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_doctor_says_what_there_is():
    found = {(f["group"], f["name"]): f for f in fxc_json("doctor")["findings"]}
    assert found["software", "torch"]["value"] == torch.__version__
    assert found["cpu", "int8 layers"]["ok"] == torch.cpu._is_vnni_supported()
    assert torch.cuda.is_available() or found["cuda", "device"]["note"]
    assert "int8 layers" in fxc("doctor").stdout


# ------------------------------------------------------------------------------------------------------- how it behaves


def test_help_does_not_wait_for_torch():
    code = "import sys, fxc.cli.app; sys.exit(sum(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fxc", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "compile" in done.stdout
    assert time.perf_counter() - before < 5, "half a second on a machine that does nothing else"


def test_wrong_usage_is_2():
    for arguments in (["melt"], ["compile"], ["run", "x", "--max-new-tokens", "0"], ["bench", "x"]):
        fxc(*arguments, code=2)


def test_a_fault_is_one_line_and_the_trace_is_for_those_who_ask(monkeypatch):
    def broken():
        raise RuntimeError("the \x1b[31mworld ended")

    monkeypatch.setattr("fxc.report.machine.examine", broken)
    done = fxc("doctor", code=1)
    assert "error[FXC-E1]: RuntimeError: the world ended" in done.stderr and "FXC_TRACE=1" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("FXC_TRACE", "1")
    assert "Traceback" in fxc("doctor", code=1).stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 6), (torch.OutOfMemoryError(), 6)])
def test_interruption_and_lack_of_memory_have_their_codes(monkeypatch, error, code):
    def stop():
        raise error

    monkeypatch.setattr("fxc.report.machine.examine", stop)
    fxc("doctor", code=code)


def test_a_terminal_gets_colours_unless_no_color(monkeypatch):
    def shown() -> str:
        output = Output()
        output.out = Console(file=io.StringIO(), force_terminal=True, width=60)
        output.table("title", ["name", ">bytes"], [("[bold]x[/]\x1b[2J", 3)])
        return output.out.file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown()
    assert "[bold]x[/]" in text and "\x1b[2J" not in text and "\x1b[1m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any(f"\x1b[{colour}" in shown() for colour in ("3", "38", "9"))


def test_progress_is_a_bar_with_counts_on_a_terminal_one_line_elsewhere_and_nothing_with_json(monkeypatch):
    def shown(terminal: bool, as_json: bool) -> str:
        output = Output(as_json)
        output.err = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with output.doing("compiling"):
            assert list(output.track(iter("abc"), "reading [x]", 3)) == ["a", "b", "c"]
        return output.err.file.getvalue().replace("compiling", "").replace(" ...\n", "")

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(True, False)
    assert "reading [x]" in text and "3/3" in text and "0:00:00" in text
    assert shown(False, False) == "reading [x]"
    assert shown(True, True).count("reading") == shown(False, True).count("reading") == 0


def test_json_mode_keeps_stdout_for_json(capsys):
    with Output(as_json=True) as output:
        print("a stray print")
        output.line("a line")
        output.table("title", ["x"], [(1,)])
        output.json({"value": float("nan")})
    written = capsys.readouterr()
    assert json.loads(written.out) == {"value": None} and "a stray print" in written.err


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["passes", "--explain", "int9"], 2, {"kind": "UsageError", "what": "there is no pass 'int9'"}),
        (["inspect", "no/such/folder/here"], 2, {"kind": "UsageError"}),
        (["run", "x", "--prompt", "a", "--text", "b"], 2, {"kind": "UsageError"}),
        (["eval", "x"], 2, {"what": "there is nothing to measure"}),
        (["compile"], 2, {"what": "Missing argument 'model'.", "where": "fxc compile"}),
        (["compile", "x", "--nope"], 2, {"kind": "UsageError", "where": "fxc compile"}),
        (["run", "x", "--max-new-tokens", "0"], 2, {"kind": "UsageError", "where": "fxc run"}),
        (["bench", "kernels", "--tune"], 2, {"hint": "add --out FOLDER"}),
        (["bench", "melt"], 2, {"where": "fxc bench"}),
        (["melt"], 2, {"where": "fxc"}),
        ([], 2, {"where": "fxc"}),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout(arguments, code, error):
    done = CliRunner().invoke(app, [*arguments, "--json"], prog_name="fxc")
    assert done.exit_code == code and "error" not in done.stderr
    said = json.loads(done.stdout)
    assert list(said) == ["error"] and set(said["error"]) == {"code", "kind", "what", "where", "why", "hint"}
    assert said["error"] == said["error"] | error | {"code": f"FXC-E{code}"}
    if arguments:
        assert done.exit_code == CliRunner().invoke(app, arguments).exit_code


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError(), 6, "ResourceError"),
        (RuntimeError("the world ended"), 1, "FxcError"),
    ],
)
def test_with_json_interruptions_and_faults_are_objects_too(monkeypatch, error, code, kind):
    def stop():
        print("a stray print")
        raise error

    monkeypatch.setattr("fxc.report.machine.examine", stop)
    assert json.loads(fxc("doctor", "--json", code=code).stdout)["error"]["kind"] == kind


def test_an_argument_after_two_dashes_is_no_option():
    assert "error[FXC-E2]" in fxc("inspect", "--", "--json", code=2).stderr


def test_python_m_fxc_reports_errors_the_same_way(tmp_path):
    command = [sys.executable, "-m", "fxc", "eval", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error[FXC-E2]") and done.stdout == ""


def test_without_an_output_the_folder_is_named_after_model_and_passes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fxc("compile", folder / "bert", "--passes", "int8:mode=weight_only", "--no-measure")
    made = tmp_path / "bert-int8-mode-weight_only"
    assert (made / "fxc.json").is_file()
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"run it: fxc run {made.name} --text TEXT; in Python: import fxc;")
    assert "input_ids=..." in last and "token_type_ids" not in last
    again = fxc("compile", folder / "bert", "--passes", "int8:mode=weight_only", "--no-measure", code=2)
    assert "exists and is not empty" in again.stderr and "--overwrite" in again.stderr and "give another folder" in again.stderr
    fxc("compile", folder / "bert", "--passes", "int8:mode=weight_only", "--no-measure", "--overwrite")


@pytest.mark.parametrize(
    ("model", "passes", "name"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "int8", "all-MiniLM-L6-v2-int8"),
        ("gpt2", "prune,int4", "gpt2-prune-int4"),
        ("torchvision.models:resnet18", "int8,prune", "resnet18-int8-prune"),
        ("org/m", "int8:mode=weight_only,prune:heads=0.25:ffn=0.3", "m-int8-mode-weight_only-prune-heads-0.25-ffn-0.3"),
        ("org/m", "prune:drop=a.b/ffn/1+2;c:criterion=l1,int8", "m-prune-criterion-l1-drop-int8"),
        ("org/m", "", "m-captured"),
        ("examples/../examples/pylm/", "int8", "pylm-int8"),
        (".", "int8", "pylm-int8"),
    ],
)
def test_names_of_outputs(model, passes, name, monkeypatch, pylm_dir):
    monkeypatch.chdir(pylm_dir if model == "." else pylm_dir.parent.parent)
    assert str(default_out(model, parse_passes(passes))) == name


def test_the_last_line_runs(folder, tmp_path, monkeypatch):
    """What is said of a plain module and of a decoder can be pasted."""
    (tmp_path / "plain_linear.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(64, 64)), (torch.randn(2, 64),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    last = fxc("compile", "plain_linear:build", "--no-measure").stdout.splitlines()[-1]
    assert last.startswith("load and run it in Python: import fxc; model = fxc.load('build-int8'); model(")
    name = last.rpartition("model(")[2].rstrip(")")
    exec(last.partition("Python: ")[2], {name: torch.randn(3, 64)})
    last = fxc("compile", folder / "qwen2", "--no-measure").stdout.splitlines()[-1]
    assert "fxc run qwen2-int8 --prompt TEXT;" in last
    exec(last.partition("Python: ")[2], {"input_ids": torch.tensor([[5, 6]])})
    last = fxc("compile", folder / "vit", "-o", "a b", "--no-measure").stdout.splitlines()[-1]
    assert last == "load and run it in Python: import fxc; model = fxc.load('a b'); model(pixel_values=...)"


def test_what_was_not_measured_is_said_and_nothing_is_timed_when_told(folder, tmp_path, monkeypatch):
    def clock(*arguments, **options):
        raise AssertionError("something was timed")

    monkeypatch.setattr("fxc.cli.stages.race", clock)
    monkeypatch.setattr("fxc.lower.choose.measure", clock)
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "a", "--no-measure")
    assert ", ms" not in done.stdout and "quality was not measured: --eval-text FILE" in done.stdout
    assert f"fxc eval {tmp_path / 'a'} --against {folder / 'qwen2'}" in done.stdout
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "b", "--no-measure", "--eval-text", folder / "text.txt")
    assert "perplexity" in done.stdout and ", ms" not in done.stdout and "was not measured" not in done.stdout
    done = fxc("compile", folder / "bert", "-o", tmp_path / "c", "--no-measure")
    assert "--eval-text" not in done.stdout and f"fxc eval {tmp_path / 'c'} --against" in done.stdout
    with pytest.raises(AssertionError, match="something was timed"):
        clock()


# ------------------------------------------------------------------------------------------------------------- pruning


def test_prune_alone_chooses_and_says_how_to_do_it_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fxc("compile", folder / "qwen2", "--passes", "int8,prune:budget=0.3", "--no-measure")
    assert "real data (--calib, calib=) would rank and judge better" in done.stdout
    said = next(line for line in done.stdout.splitlines() if line.startswith("the same again: "))
    words = said.removeprefix("the same again: fxc ").replace("OTHER", "again").split()
    assert "prune:budget" not in said and "amount=auto" not in fxc(*words, "--no-measure").stdout
    out, again = tmp_path / "qwen2-int8-prune-budget-0.3", tmp_path / "again"
    for name in ("program.fxc", *(each.name for each in out.glob("*.safetensors"))):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    made = fxc_json("compile", folder / "qwen2", "-o", "c", "--passes", "prune", "--calib", folder / "text.txt", "--no-measure")
    step = made["passes"][1]
    assert step["name"] == "prune" and "held-out calibration" in step["notes"][0] and step["repeat"].startswith("prune:drop=")


def test_int8_and_prune_run_in_the_right_order_and_each_is_measured(folder, tmp_path):
    made = fxc_json("compile", folder / "qwen2", "-o", tmp_path / "out", "--passes", "int8,prune:heads=0.25:ffn=0.25")
    names = ["canonicalize", "prune:heads=0.25:ffn=0.25", "dead_structure", "int8"]
    assert [p["name"] for p in made["passes"]] == names
    stages = {stage["name"]: stage for stage in made["stages"]}
    assert list(stages) == ["as captured", *names]
    masked, removed, quantized = (stages[name] for name in names[1:])
    assert masked["parameters"] > removed["parameters"] and masked["bytes"] > removed["bytes"] > quantized["bytes"]
    heads = [r for r in made["passes"][2]["removed"] if r["kind"] == "head"]
    assert heads and all(r["before"] == 4 and r["removed"] == 1 for r in heads)
    assert "token" in fxc("run", tmp_path / "out", "--prompt", "a", "--max-new-tokens", "2").stderr


def test_drop_and_plan_apply_the_decisions_of_others(folder, tmp_path):
    source = folder / "qwen2"
    drops = ("--drop", "model.layers.0.self_attn:heads=1", "--drop", "model.layers.1.mlp:ffn=0,7")
    made = fxc_json("compile", source, "-o", tmp_path / "a", "--passes", "", "--no-measure", *drops)
    plan = tmp_path / "plan.json"
    plan.write_text(
        '{"drop": [{"module": "model.layers.0.self_attn", "heads": [1]}, {"module": "model.layers.1.mlp", "ffn": [7, 0]}]}'
    )
    again = fxc_json("compile", source, "-o", tmp_path / "b", "--passes", "", "--no-measure", "--plan", plan)
    assert made["parameters_after"] == again["parameters_after"] < made["parameters_before"]
    left = [p.joinpath("program.fxc").read_text() for p in (tmp_path / "a", tmp_path / "b")]
    assert left[0] == left[1]
    wrong = fxc("compile", source, "-o", tmp_path / "c", "--drop", "model.layers.7:heads=0", code=2)
    assert "model.layers.7" in wrong.stderr and "model.layers.0.self_attn" in wrong.stderr


def test_criteria_that_learn_from_data_ask_for_it(folder, tmp_path):
    passes = "prune:ffn=0.5:criterion=wanda"
    done = fxc("compile", folder / "qwen2", "-o", tmp_path / "out", "--passes", passes, code=2)
    assert "--calib" in done.stderr and not (tmp_path / "out").exists()


def test_inspect_tells_which_weights_share_an_axis(folder):
    shown = fxc("inspect", folder / "qwen2", "--axes").stdout
    for said in ("4 heads", "2 KV heads", "FFN channels", "down_proj.weight[1]", "rows are looked up by number"):
        assert said in shown
    groups = fxc_json("inspect", folder / "qwen2", "--axes")["groups"]
    head = next(g for g in groups if g["kind"] == "head")
    assert head["reads"]["indices"] == [0, 0, 1, 1] and head["pinned"] is None
