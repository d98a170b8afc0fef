"""fxc search: a table, an artifact with its recipe and record beside it, JSON, and plain words where nothing fits."""

import json

from command import fxc, fxc_json

GIVEN = ("--trials", "4", "--formats", "int8:mode=weight_only;int4:group=32", "--calib-samples", "8", "--calib-length", "24")


def test_what_is_found_is_written_and_compiled_again_to_the_same_bytes(folder, tmp_path):
    given = ("search", folder / "qwen2", "--calib", folder / "text.txt", "--eval", folder / "text.txt", *GIVEN)
    out = tmp_path / "small"
    done = fxc(*given, "--budget", "size=0.6x", "-o", out)
    assert "the least loss within size=0.6x" in done.stdout and "predicted loss" in done.stdout and "best" in done.stdout
    assert "trial 1 of at most 4" in done.stderr and f"--recipe {out}.toml" in done.stdout
    record = json.loads((tmp_path / "small.search.json").read_text())
    assert record["untried"] and f"not tried, because {record['ended_by']}: {record['untried'][0]}" in done.stdout
    assert record["best"]["disk_bytes"] <= 0.6 * record["original_bytes"] and len(record["trials"]) <= 4
    fxc("compile", folder / "qwen2", "--recipe", f"{out}.toml", "--calib", folder / "text.txt", "--no-measure",
        "-o", tmp_path / "again")  # fmt: skip
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(files) > 3 and all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    assert "exists" in fxc(*given, "--budget", "size=0.6x", "-o", out, code=2).stderr
    found = fxc_json(*given, "--budget", "size=0.6x", "-o", out, "--overwrite")
    assert found["recipe"] == record["recipe"] and found["out"] == str(out)


def test_a_budget_that_nothing_meets(folder, tmp_path):
    given = ("search", folder / "qwen2", "--calib", folder / "text.txt", *GIVEN, "-o", tmp_path / "none")
    done = fxc(*given, "--budget", "size=0.01x", code=5)
    assert "the smallest is" in done.stderr and not (tmp_path / "none").exists()
    assert "is no budget" in fxc(*given, "--budget", "speed=2x", code=2).stderr
