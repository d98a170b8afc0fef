"""Several processes compile a streamed model to the bytes of one; where one is gone the others say so, and the run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from repo import REPO
from shards import files, in_shards

import fxc
from fxc.artifact.spill import JOURNAL

# In each of several processes: the compilations of the second argument, one after another, with small parts.
SCRIPT = textwrap.dedent("""
    import json, os, signal, sys, torch
    torch.set_num_threads(1)
    import fxc
    from fxc import ranks
    from fxc.artifact.spill import Spill
    from fxc.ir import store
    from fxc.passes.turns import Turns
    store.PART_BYTES = 20_000
    folder, cases = sys.argv[1], json.loads(sys.argv[2])
    dies = int(sys.argv[3])
    send, sent = Turns.send, []
    def counted(self, parts, error):
        if len(sent) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        sent.append(parts)
        send(self, parts, error)
    Turns.send = counted
    for passes, out in cases:
        first = int(os.environ["RANK"]) == 0
        try:
            made = fxc.optimize(folder, passes=passes, stream=True, resume=f"{out}-saved" if first else None)
            if first:
                made.save(out)
            else:
                made.save(out + "-other")
        except fxc.FxcError as error:
            with open(f"{out}-{os.environ['RANK']}.txt", "w") as file:
                file.write(str(error))
    with open(f"{out}-{os.environ['RANK']}-sent.json", "w") as file:
        json.dump(len(sent), file)
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return in_shards(tmp_path_factory.mktemp("model") / "model")


def in_two(folder, tmp_path, cases, dies=-1):
    script = tmp_path / "compile.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(REPO)])}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    given = json.dumps([[passes, str(out)] for passes, out in cases])
    command = [sys.executable, *launcher, str(folder), given, str(dies)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def in_one(folder, passes, out, monkeypatch):
    monkeypatch.setattr("fxc.ir.store.PART_BYTES", 20_000)
    fxc.optimize(folder, passes=passes, stream=True).save(out)
    return files(out)


def test_two_write_the_bytes_of_one_and_share_the_layers(folder, tmp_path, monkeypatch):
    passes, out = "int4:group=32:only='re:mlp',int8:embeddings=int8", tmp_path / "both"
    cases = [("prune:ffn=0.25,int8", tmp_path / "pruned"), (passes, out)]
    done = in_two(folder, tmp_path, cases)
    assert done.returncode == 0, done.stderr
    assert files(out) == in_one(folder, passes, tmp_path / "one", monkeypatch)
    assert "this is a part of a model" in (tmp_path / "both-1.txt").read_text()
    # 12 layers in the first pass and 17 in the second.
    assert json.loads((tmp_path / "both-1-sent.json").read_text()) == 12 // 2 + 17 // 2
    for number in (0, 1):
        assert "several processes share the layers" in (tmp_path / f"pruned-{number}.txt").read_text()


@pytest.mark.slow
def test_where_one_is_killed_the_others_say_so_and_the_run_goes_on(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    failed = in_two(folder, tmp_path, [("int8", out)], dies=6)
    assert failed.returncode != 0 and not out.exists()
    said = (tmp_path / "out-0.txt").read_text()
    assert ("is gone" in said or "ended from outside" in said) and "--resume" in said
    journal = next((tmp_path / "out-saved").glob(f"*/{JOURNAL}"))
    parts = len(journal.read_text().splitlines()) - 1
    assert parts > 0
    done = in_two(folder, tmp_path, [("int8", out)])
    assert done.returncode == 0, done.stderr
    assert files(out) == in_one(folder, "int8", tmp_path / "one", monkeypatch)
    assert json.loads((tmp_path / "out-1-sent.json").read_text()) < 29 // 2
