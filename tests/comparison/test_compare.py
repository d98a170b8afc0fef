"""fxc.compare: every strategy a row or a reason, nothing made twice, artifacts as fxc.optimize makes them."""

import json
import sys

import pytest
import torch
from torch import nn

import fxc
from fxc.comparison import compare as module
from fxc.comparison import making
from fxc.comparison.folder import STATE
from fxc.errors import UsageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(128, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.head(torch.relu(self.down(torch.relu(self.up(x)))))


@pytest.fixture(scope="module")
def net():
    return Net().eval(), (torch.zeros(4, 32),)


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    x = torch.randn(48, 32)
    return list(x[:24].split(4)), list(x[24:].split(4))


STRATEGIES = ["none", "int8", "int8:mode=static", "prune:heads=0.5", "prune:ffn=0.25:round_to=16,int8"]


@pytest.fixture(scope="module")
def compared(net, data, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("compared") / "out", []
    calib, evaluated = data
    found = fxc.compare(*net, STRATEGIES, out=out, data=evaluated, calib=calib, sizes="1,4", rounds=2, say=said.append)
    return found, out, said


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_strategy_is_a_row_or_says_why(compared):
    found, _, said = compared
    assert [row.strategy for row in found.rows] == ["original", *STRATEGIES]
    assert [row.strategy for row in found.rows if row.measured is None] == ["prune:heads=0.5"]
    assert "head" in json.dumps(found.rows[4].why_not) and found.rows[4].why_not["kind"] == "UsageError"
    assert found.columns == [("1", "forward"), ("4", "forward")]
    sizes = {row.strategy: row.measured.disk_bytes for row in found.measured}
    assert sizes["int8"] < 0.6 * sizes["none"] and sizes[STRATEGIES[-1]] < sizes["int8"]
    values = {row.strategy: row.measured.quality.value for row in found.measured}
    assert found.rows[0].measured.quality.kind == "cosine" and values["original"] == pytest.approx(1) == values["none"]
    assert 0.9 < values["int8"] < 1 and found.rows[2].loss[0] == pytest.approx(1 - values["int8"], abs=1e-6)
    assert any(line.startswith("2 of 5: int8, ") and "left ..." in line for line in said)


def test_the_files_say_what_the_rows_do_and_on_what_machine(compared):
    found, out, _ = compared
    written = json.loads((out / "compare.json").read_text())
    assert written == json.loads(json.dumps(found.as_json()))
    assert {"machine", "versions", "threads", "seed", "backend", "load_before"} <= written.keys()
    assert written["pareto"]["size"] == [row.strategy for row in found.by_size()]
    assert len(written["rows"][1]["latencies"][0]["rounds_ms"]) == 2
    text = (out / "compare.md").read_text()
    assert text.count("| `int8") == 2 and "| `prune:heads=0.5` | - |" in text


def test_artifacts_are_those_of_optimize(compared, net, data, tmp_path):
    found, out, _ = compared
    for row, options in ((found.rows[2], {}), (found.rows[3], {"calib": data[0]})):
        fxc.optimize(*net, row.strategy, **options).save(tmp_path / row.folder)
        assert files(tmp_path / row.folder) == files(out / row.folder)
    assert fxc.load(out / "int8-mode-static")(torch.zeros(3, 32)).shape == (3, 32)


def test_what_is_done_is_not_done_again(compared, net, data, monkeypatch):
    found, out, _ = compared
    calib, evaluated = data
    made, measured = [], []
    true, evaluate = making.compile_captured, making.Maker._measured
    monkeypatch.setattr(making, "compile_captured", lambda *a, **k: made.append(1) or true(*a, **k))
    monkeypatch.setattr(making.Maker, "_measured", lambda *a: measured.append(1) or evaluate(*a))
    options = {"out": out, "sizes": "1", "rounds": 1}
    again = fxc.compare(*net, [*STRATEGIES, "int4:group=32"], data=evaluated, calib=calib, **options)
    assert (len(made), len(measured)) == (1, 1)
    assert [row.reused for row in again.rows] == [False, True, True, True, True, True, False]
    assert [row.loss for row in again.rows[:4]] == [row.loss for row in found.rows[:4]]
    # Other data: artifacts stay, and what learned from it is made again.
    fxc.compare(*net, STRATEGIES, data=evaluated[:3], calib=calib, **options)
    assert (len(made), len(measured)) == (1, 5)
    fxc.compare(*net, STRATEGIES, data=evaluated[:3], calib=calib[:3], **options)
    assert (len(made), len(measured)) == (2, 6)
    # One that was damaged or taken away is made again.
    (out / "int8" / "fxc.json").write_text("{")
    for path in (out / "none").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="will not be replaced"):
        fxc.compare(*net, "int8", data=evaluated[:3], **options)
    fxc.compare(*net, "none", data=evaluated[:3], **options)
    assert (len(made), len(measured)) == (3, 7)


def test_another_model_is_refused_before_anything_is_made(compared, data, tmp_path):
    _, out, _ = compared
    with pytest.raises(UsageError, match="of another model"):
        fxc.compare(nn.Linear(32, 32), (torch.zeros(4, 32),), "int8", out=out, data=data[1])


def test_what_a_strategy_lacks_is_in_its_row(net, data, tmp_path):
    found = fxc.compare(*net, ["int8:mode=static", "recover"], out=tmp_path / "out", rounds=1, sizes="1")
    assert [row.measured is None for row in found.rows] == [False, True, True]
    assert all("--calib" in row.why_not["hint"] for row in found.rows[1:])
    assert found.data.endswith("made-up samples") and not found.found


def test_a_recipe_brings_its_skips_and_its_dtype_has_to_be_the_models(net, tmp_path):
    (tmp_path / "a.toml").write_text('passes = ["int8"]\nskip = ["up"]\n')
    (tmp_path / "b.toml").write_text('passes = ["int8"]\ndtype = "bfloat16"\n')
    found = fxc.compare(*net, [tmp_path / "a.toml", tmp_path / "b.toml"], out=tmp_path / "out", rounds=1, sizes="1")
    folder = tmp_path / "out" / found.rows[1].folder
    assert "up.qweight" not in fxc.load(folder).program.constants and "down.qweight" in fxc.load(folder).program.constants
    assert "for bfloat16" in found.rows[2].why_not["what"] and "--dtype bfloat16" in found.rows[2].why_not["hint"]


def test_a_function_that_makes_a_model_is_called_once(tmp_path, monkeypatch):
    """Two calls would give other weights."""
    (tmp_path / "makes_a_net.py").write_text(
        "import torch\nfrom torch import nn\ncalls = []\n"
        "def net():\n    calls.append(1)\n    return nn.Linear(32, 32), (torch.zeros(4, 32),)\n"
    )
    monkeypatch.chdir(tmp_path)
    found = fxc.compare("makes_a_net:net", None, "none", out="out", sizes="1", rounds=1)
    assert len(sys.modules["makes_a_net"].calls) == 1 and found.rows[0].measured.quality.value == pytest.approx(1)
    assert found.rows[0].measured.disk_bytes == 4 * (32 * 32 + 32)


def test_an_artifact_has_no_row_of_its_own_code(net, tmp_path):
    fxc.optimize(*net, "").save(tmp_path / "plain")
    found = fxc.compare(tmp_path / "plain", None, "none;int8", out=tmp_path / "out", sizes="1", rounds=1)
    assert [row.strategy for row in found.rows] == ["none", "int8"] and found.rows[0].loss[0] == 0


def test_labels_make_it_accuracy(net, data, tmp_path):
    x = torch.cat(data[1])
    labels = net[0](x).argmax(-1)
    found = fxc.compare(*net, "int8", out=tmp_path / "out", data=list(zip(x.split(1), labels.split(1))), rounds=1, sizes="1")
    assert found.rows[0].measured.quality.as_json()["kind"] == "accuracy"
    assert found.rows[0].measured.quality.value == 1 and found.rows[0].measured.quality.count == 24


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rounds": 0}, "rounds"),
        ({"threads": 0}, "0 threads"),
        ({"sizes": "1x128"}, "no size of this model"),
        ({"eval_length": 64}, "no data to take"),
        ({"calib": [torch.zeros(1, 32)]}, "none of the strategies reads calibration data"),
        ({"train": [torch.zeros(1, 32)]}, "none of the strategies reads training data"),
        ({"calib_samples": 3}, "no calibration data"),
        ({"data": [torch.zeros(1, 5)]}, "size 5 in dimension 1"),
        ({"data": "nowhere.txt"}, "no such evaluation data"),
        ({"resume": "x"}, "takes no resume"),
        ({"device": "mars"}, "no device"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(options, what, net, tmp_path):
    with pytest.raises(UsageError, match=what):
        fxc.compare(*net, "int8", out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_many_for_memory_is_said_and_what_is_made_stays(net, tmp_path, monkeypatch):
    monkeypatch.setattr(module.memory, "available", lambda: 1000)
    with pytest.raises(fxc.FxcError, match="do not fit into memory together"):
        fxc.compare(*net, "int8", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / STATE / "int8.json").read_text())["quality"]
