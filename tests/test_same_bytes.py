"""The same input gives the same bytes: in other processes, with other hash seeds, numbers of threads and folders."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repo import REPO

COMPILE = """
import sys, torch, fxc
from families import build
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
made = torch.Generator().manual_seed(1)
for name, spec in (("qwen2", "prune:ffn=0.3,int4:group=32:algorithm=gptq"), ("mlp", "int8:mode=static")):
    model, inputs = build(name)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if name == "qwen2":
        data = [{"input_ids": torch.randint(0, 300, (1, 12), generator=made)} for _ in range(6)]
    else:
        data = [(torch.randn(1, 40, generator=made),) for _ in range(6)]
    small = fxc.optimize(model, inputs, spec, calib=data, budget=9.0, layer_budget=9.0)
    small.save(sys.argv[1] + "/" + name)
"""


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.fault(30)
def test_other_hash_seeds_threads_and_folders_with_passes_that_learn(tmp_path):
    made = []
    for seed, threads, place in (("0", "1", "a"), ("17", "2", "b/c")):
        (tmp_path / place).mkdir(parents=True)
        path = os.pathsep.join([str(REPO), str(REPO / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", COMPILE, str(tmp_path / place), threads]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path / place)
        assert done.returncode == 0, done.stderr
        made.append(digests(tmp_path / place))
    assert made[0] == made[1] and len(made[0]) >= 8
