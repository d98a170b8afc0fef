"""A run that breaks off anywhere goes on where it was, and ends as one that was not disturbed."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from families import build
from torch import nn
from torch.nn import functional

from fxc.calibrate import runner
from fxc.calibrate.hessian import Hessian
from fxc.calibrate.journal import Saves, remove, saving
from fxc.data.decoder import decoder_sample
from fxc.errors import ResourceError
from fxc.frontend.capture import capture
from fxc.ir.edit import call, constant, free_name, sweep
from fxc.passes.base import Context
from fxc.passes.canonicalize import Canonicalize
from fxc.schemes.ops import GROUPED_LINEAR
from fxc.schemes.scheme import LINEAR


class Residual(nn.Module):
    """Blocks of two layers; the weight of one of them is also read at the very end, and another's result is kept until then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.ModuleList([nn.Linear(40, 24), nn.Linear(24, 40)]) for _ in range(3))
        self.first = nn.Linear(40, 40)
        self.last = nn.Linear(40, 40)
        self.last.weight = self.parts[0][0].weight = nn.Parameter(torch.randn(24, 40) / 6)
        self.last.bias = self.parts[0][0].bias

    def forward(self, x):
        first = x = self.first(x)
        for up, down in self.parts:
            x = x + down(functional.gelu(up(x)))
        x = self.first(x + first)
        return self.last(x * x.shape[0] + first)


def residual():
    made = torch.Generator().manual_seed(0)
    return (Residual(), (torch.randn(3, 40),)), [[torch.randn(n, 40, generator=made)] for n in (2, 5, 3)]


def family(name):
    def made():
        model, example = build(name)
        program = capture(model, example, check=False)
        samples = [decoder_sample(program, 1, length, 0) for length in (9, 7)]
        return (model, example), samples

    return made


MODELS = {"residual": residual, "qwen2": family("qwen2"), "mixtral": family("mixtral")}


class Run:
    """Rounds weights by how much each channel is read, and breaks off after some stages where it is told to."""

    def __init__(self, name: str, saves: Saves | None, breaks_after: int = 10**9, streams: int = 1) -> None:
        (model, example), self.samples = MODELS[name]()
        self.program = capture(model, example, check=False)
        Canonicalize().run(self.program, Context())
        self.layers = [node for node in self.program.graph.nodes if node.target in (LINEAR, GROUPED_LINEAR)]
        self.left, self.counted, self.compressed = breaks_after, 0, 0
        journal = saves.journal({"name": name, "streams": streams}) if saves else None
        self.began = journal.began if journal else 0
        cross = {"statistic": lambda width: Hessian(width, cross=True)} if streams == 2 else {}
        arguments = (self.program, self.layers, self.samples, self.compress)
        runner.run(*arguments, journal=journal, restore=self.restore, track=self.track, **cross)
        sweep(self.program)

    def track(self, items, what, count):
        self.counted += 1
        return items

    def compress(self, layers, statistics):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left, self.compressed = self.left - 1, self.compressed + 1
        sizes = torch.stack([each.mean.diagonal() + (0 if each.cross is None else each.cross[0]) for each in statistics])
        made = {}
        for name in dict.fromkeys(layer.args[1].target for layer in layers):
            weight = self.program.constants[name]
            step = (1e-3 + sizes.abs().sqrt() / 8).reshape(*weight.shape[:-2], 1, weight.shape[-1])
            made[name] = ((weight / step).round() * step).to(weight.dtype)
        self.restore(layers, made)
        return made

    def restore(self, layers, made):
        small = {}
        for layer in layers:
            name = layer.args[1].target
            if name not in small:
                small[name] = constant(self.program, free_name(self.program, "small"), made[name], layer)
            args = tuple(small[name] if i == 1 else each for i, each in enumerate(layer.args))
            call(self.program, layer.target, args, replacing=layer, by="test")


def same(a: Run, b: Run) -> bool:
    constants = a.program.constants, b.program.constants
    return str(a.program) == str(b.program) and all(torch.equal(t, constants[1][name]) for name, t in constants[0].items())


@pytest.mark.parametrize(
    ("name", "streams", "in_memory"),
    [
        ("residual", 1, True),
        ("residual", 2, False),
        ("mixtral", 1, False),
        pytest.param("qwen2", 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_breaks_off_goes_on_and_ends_as_if_it_had_not(name, streams, in_memory, tmp_path):
    whole = Run(name, None, streams=streams)
    stages, compressed = whole.counted, whole.compressed
    began = []
    for breaks_after in (0, compressed // 2, compressed - 1):
        with saving(tmp_path / "saved", in_memory=in_memory) as saves:
            with pytest.raises(KeyboardInterrupt):
                Run(name, saves, breaks_after, streams)
            again = Run(name, saves, streams=streams)
        assert again.counted == stages - again.began and same(again, whole)
        began.append(again.began)
        remove(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    assert began == sorted(began) and began[-1] == stages - 1


def test_nothing_that_was_done_is_computed_again(tmp_path, monkeypatch):
    with saving(tmp_path / "saved") as saves:
        with pytest.raises(KeyboardInterrupt):
            Run("residual", saves, 5)
        flows = []
        monkeypatch.setattr(runner.Stream, "flow_to_disk", lambda self, after, *_: flows.append(after) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Run("residual", saves)
    # The first that is computed is one that no process has.
    [journal] = (tmp_path / "saved").glob("*/journal.jsonl")
    blocks = [line["block"] for text in journal.read_text().splitlines() if "block" in (line := json.loads(text))]
    assert blocks == list(range(1, len(blocks) + 1)) and len(flows) == 1
    states = sorted(path.name for path in journal.parent.glob("states-*.bin"))
    assert states == [f"states-{blocks[-1]}-0.bin"]


def test_on_disk_no_hidden_state_but_that_of_two_samples_is_in_memory(tmp_path):
    import gc

    def alive(in_memory):
        counts = []

        class Watched(Run):
            def compress(self, layers, statistics):
                gc.collect()
                tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
                counts.append(sum(each.shape in ((5, 40), (3, 40)) and each.grad_fn is None for each in tensors))
                return super().compress(layers, statistics)

        with saving(tmp_path / str(in_memory), in_memory=in_memory) as saves:
            Watched("residual", saves)
        return counts[-1]

    assert alive(False) < alive(True)


def damaged_stage(folder):
    (folder / "stage-1.pt").write_bytes((folder / "stage-1.pt").read_bytes()[:-1] + b"?")


def damaged_states(folder):
    [path] = folder.glob("states-*.bin")
    path.write_bytes(path.read_bytes()[:-9])


def lost_stage(folder):
    (folder / "stage-0.pt").unlink()


def line_from_elsewhere(folder):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    (folder / "journal.jsonl").write_text("\n".join([lines[0], *lines[2:]]) + "\n")


@pytest.mark.fault(27)
@pytest.mark.parametrize("damage", [damaged_stage, damaged_states, lost_stage, line_from_elsewhere])
def test_what_is_damaged_is_not_used(damage, tmp_path):
    whole = Run("residual", None)
    with saving(tmp_path) as saves:
        with pytest.raises(KeyboardInterrupt):
            Run("residual", saves, 6)
        [journal] = tmp_path.glob("*/journal.jsonl")
        damage(journal.parent)
        again = Run("residual", saves)
    assert again.began == 0 and same(again, whole)


def test_a_line_that_was_being_written_is_left_out_and_leftovers_go(tmp_path):
    whole = Run("residual", None)
    with saving(tmp_path) as saves:
        with pytest.raises(KeyboardInterrupt):
            Run("residual", saves, 4)
        [journal] = tmp_path.glob("*/journal.jsonl")
        journal.write_text(journal.read_text() + '{"after": "')
        (journal.parent / "stage-99.pt.tmp").write_text("half")
        again = Run("residual", saves)
    assert again.began > 0 and same(again, whole)
    assert not (journal.parent / "stage-99.pt.tmp").exists()


def test_another_run_does_not_go_on_from_it(tmp_path):
    with saving(tmp_path) as saves:
        with pytest.raises(KeyboardInterrupt):
            Run("residual", saves, 4, streams=1)
        assert Run("residual", saves, streams=2).began == 0
        assert Run("residual", saves, streams=1).began > 0


def _hold(folder, ready, done):
    with saving(folder):
        ready.set()
        done.wait(30)


@pytest.mark.fault(29)
def test_two_processes_do_not_save_in_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "a", ready, done))
    other.start()
    assert ready.wait(60)
    try:
        with pytest.raises(ResourceError, match="another process"), saving(tmp_path / "a"):
            pass
    finally:
        done.set()
        other.join()
    assert not (tmp_path / "a").exists()


@pytest.mark.fault(26)
def test_a_disk_that_is_full_is_an_error_with_a_next_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with saving(tmp_path) as saves:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(ResourceError, match="No space") as caught:
            Run("residual", saves)
    assert "free some space" in caught.value.hint
