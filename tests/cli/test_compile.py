"""`fxc compile`: what it prints and writes, the recipe and options, pruning, and what it refuses."""

import json

import pytest
import torch
from command import fxc, fxc_json

from fxc.cli.compile import default_out
from fxc.passes.base import parse_passes


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
        "disk_before", "disk_after", "stages",
    }  # fmt: skip
    assert [stage["name"] for stage in made["stages"]] == ["as captured", "canonicalize", "int8:mode=weight_only"]
    assert all(set(stage["milliseconds"]) == {"prefill", "decode"} for stage in made["stages"])
    assert made["out"] == str(tmp_path / "out") and 0.5 < made["coverage"] <= 1
    assert made["bytes_after"] < made["bytes_before"]
    assert [p["name"] for p in made["passes"]] == ["canonicalize", "int8:mode=weight_only"] == list(made["gates"])
    assert {"name", "changed", "seconds", "refusals"} <= set(made["passes"][1])
    assert made["gates"]["int8:mode=weight_only"]["meaning"].startswith("ok")


@pytest.mark.fault(30)
def test_compile_twice_gives_the_same_bytes(folder, tmp_path):
    fxc("compile", folder / "qwen2", "-o", tmp_path / "again", "--no-measure")
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
    done = fxc("compile", folder / "bert", "-o", tmp_path / "out", "--calib", folder / "text.txt", "--no-measure")
    assert "no pass of this recipe uses calibration data" in done.stderr


@pytest.mark.fault(4)
def test_compile_warns_of_low_coverage_and_can_fail(folder, tmp_path):
    skip = ("--skip", "*mlp*", "--skip", "lm_head", "--no-measure")
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
    fxc("compile", folder / "bert", "-o", out, "--no-measure")
    assert "--overwrite" in fxc("compile", folder / "bert", "-o", out, code=2).stderr
    fxc("compile", folder / "bert", "-o", out, "--overwrite", "--no-measure")


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
    how = "load and run it in Python: import fxc; model = fxc.load('build-int8'); model("
    assert last.startswith(f"written to build-int8; {how}")
    name = last.rpartition("model(")[2].rstrip(")")
    exec(last.partition("Python: ")[2], {name: torch.randn(3, 64)})
    last = fxc("compile", folder / "qwen2", "--no-measure").stdout.splitlines()[-1]
    assert "fxc run qwen2-int8 --prompt TEXT;" in last
    exec(last.partition("Python: ")[2], {"input_ids": torch.tensor([[5, 6]])})
    last = fxc("compile", folder / "vit", "-o", "a b", "--no-measure").stdout.splitlines()[-1]
    assert last == "written to a b; load and run it in Python: import fxc; model = fxc.load('a b'); model(pixel_values=...)"


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
