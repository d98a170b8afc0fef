"""The page: what it says, that nothing of it comes from elsewhere, and what hostile names and reports do to it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re

import pytest
import torch
from torch import nn

import fxc
from fxc.artifact.manifest import PAGE
from fxc.ir.parse import parse_program
from fxc.measure.layers import Measured
from fxc.page import graph, plots
from fxc.page import page as pages
from fxc.page.page import page

HOSTILE = "<script>alert(1)</script>\"'`&--></style></pre><img src=x onerror=alert(2)>"
needs_plots = pytest.mark.skipif(not plots.is_there(), reason="matplotlib is not installed here")


def test_the_page_says_what_was_done_and_is_well_formed(saved, outline, dom):
    html = (saved / PAGE).read_text()
    made = dom(html)
    assert made.wrong == [] and made.open == []
    (body,) = re.findall(r'<table id="layers">.*?<tbody>(.*?)</tbody>', html, re.S)
    rows = [dom(f"<table>{row}</table>") for row in re.findall(r"<tr .*?</tr>", body, re.S)]
    cells = {row.texts("td")[0]: row.texts("td") for row in rows}
    assert list(cells) == ["0", "2", "4"]
    assert cells["0"][1:5] == ["packed", "96 × 64", "96 × 64", "linear → int8 linear"]
    assert cells["0"][5:7] == ["24.96 kB", "6.91 kB"] and "int8: rewrote it" in cells["0"]
    assert float(cells["0"][7]) == pytest.approx(outline.manifest["report"]["passes"][-1]["layer_errors"]["0"], rel=0.01)
    assert cells["4"][1] == "as it was" and "skip" in cells["4"][-1]
    assert made.texts("pre", id="command") == ["fxc compile MODEL --recipe recipe.toml -o OTHER"]
    assert 'skip = ["4"]' in made.texts("pre", id="recipe")[0]
    assert len(made.all("details")) == 3 and "fxc.int8_linear" in html and 'class="p0"' in html


def test_the_recipe_is_one_that_fxc_reads(outline, dom, tmp_path):
    from fxc.recipe import read_recipe

    (text,) = dom(page(outline.program, outline.manifest).decode()).texts("pre", id="recipe")
    (tmp_path / "recipe.toml").write_text(text)
    assert read_recipe(tmp_path / "recipe.toml") == {"passes": ["canonicalize", "int8"], "skip": ["4"]}


def test_nothing_comes_from_elsewhere(saved, dom):
    html = (saved / PAGE).read_text()
    made = dom(html)
    (policy,) = [a["content"] for _, a, _ in made.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy and "http" not in policy
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html.replace("://", "")), "something names another place"
    references = [v for _, attributes, _ in made.elements for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
    assert all(v.startswith("#") for v in references)
    assert "prefers-color-scheme: dark" in html and any(a.get("name") == "viewport" for _, a, _ in made.all("meta"))


def hostile_report(depth: int = 0) -> dict:
    layer = {"kind": HOSTILE, "dtypes": HOSTILE, "shape": [3, HOSTILE, True], "parameters": "x", "bytes": 40}
    step = {
        "name": f"int8{HOSTILE}", "changed": HOSTILE, "bytes_before": 4, "bytes_after": None, "notes": [HOSTILE, 7],
        "gates": {"meaning": f"ok: outputs differ by 1e-2 {HOSTILE}", HOSTILE: "ok"}, "layer_errors": {"up": 0.5, "$x^2$": 0.1},
        "refusals": [{"fqn": HOSTILE, "reason": HOSTILE, "bytes": 1}, {"fqn": "up", "reason": HOSTILE}, "no"],
        "removed": [{"scope": "up", "kind": HOSTILE, "before": 4, "removed": 2}], "repeat": None,
        "training": {"before": 2.0, "curve": [{"step": 1, "held_out": 1.0}, {"step": HOSTILE, "held_out": []}]},
    }  # fmt: skip
    quality = [{"name": HOSTILE, "perplexity": 3.0}, {"name": "$x$", "perplexity": 4.0}]
    return {
        "source": {"kind": HOSTILE, "id": HOSTILE}, "passes": [step, 3, None], "quality": quality, "skip": [HOSTILE, 1],
        "skipped": {HOSTILE: ["up"]}, "layers": {"up": layer, f"gone{HOSTILE}": layer, "x": 3}, "dtype": HOSTILE,
        "calibration": {"samples": 3, "sha256": HOSTILE}, "perplexity": {"before": "x", "after": 3, "change": 10**400},
        "bytes_before": HOSTILE, "coverage": float("nan"), "teacher": {"id": HOSTILE},
    }  # fmt: skip


@pytest.fixture(scope="module")
def hostile_program():
    name = json.dumps(HOSTILE)
    program = parse_program(
        "fxc program 1\n"
        f'metadata {{"class": "Net", "kind": "module", "parameters": ["x"]}}\n'
        'call {"args": [0], "kwargs": {}}\nresult 0\nconstant @up.weight: f32[4, 3]\n'
        f'%0: f32[2, 3] = input "x"\n%1: f32[2, 4] = aten.linear(%0, @up.weight)  # {name} (int8)\nreturn "out" %1\n'
    )
    program.metadata["class"] = HOSTILE
    return program


@pytest.mark.fault(33)
def test_names_are_text_and_nothing_else(hostile_program, dom):
    html = page(hostile_program, {"report": hostile_report(), "versions": {"fxc": HOSTILE}, "files": {HOSTILE: 3}}).decode()
    made = dom(html)
    assert made.wrong == [] and made.open == [] and len(made.all("script")) == 1 and made.all("img") == []
    assert "<script>alert" not in html and not any("onerror" in attributes for _, attributes, _ in made.elements)
    assert html.count("</pre>") == len(made.all("pre")) and html.count("</style>") == 1
    assert any("<script>alert(1)</script>" in text for text in made.texts("h1")), "the name itself is shown"


@pytest.mark.parametrize("report", [None, 3, [], {}, {"passes": 3}, {"passes": [{}]}, {"layers": [1], "skipped": [2]}])
def test_a_report_of_any_form_makes_a_page_that_says_what_it_lacks(report, hostile_program, dom):
    html = page(hostile_program, {"report": report}).decode()
    assert dom(html).wrong == [] and "what each layer was before" in html and "errors of single layers" in html


def test_every_value_may_be_of_any_kind(hostile_program, dom):
    """Each value of a report in turn is something else."""

    def places(value, path=()):
        yield path
        for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from places(each, (*path, key))

    original = hostile_report()
    original.pop("training", None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "is_there", lambda: False)
        for path in places(original):
            for other in (None, [HOSTILE], -1.5):
                report = copy.deepcopy(original)
                at = report
                for key in path[:-1]:
                    at = at[key]
                if path:
                    at[path[-1]] = other
                assert dom(page(hostile_program, {"report": report}).decode()).wrong == []


def test_equal_artifacts_have_equal_pages(saved, outline, tmp_path):
    html = (saved / PAGE).read_bytes()
    assert page(outline.program, outline.manifest) == html, "weights on meta give the same page"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8))
    fxc.optimize(net, (torch.randn(4, 64),), passes="int8", skip=["4"]).save(tmp_path / "again")
    assert (tmp_path / "again" / PAGE).read_bytes() == html


def test_what_was_measured_has_a_column(outline, dom):
    measured = Measured({"0": 12.5, "nobody": 3.0}, "on a machine", None)
    html = page(outline.program, outline.manifest, measured).decode()
    assert "µs" in html and "12.5" in html and "on a machine" in html
    assert "µs" not in page(outline.program, outline.manifest).decode()


def test_a_large_program_is_cut_and_says_so(outline, monkeypatch, dom):
    monkeypatch.setattr(graph, "MOST", 1)
    monkeypatch.setattr(graph, "_FEWEST_LINES", 1)
    monkeypatch.setattr(pages, "MOST_ROWS", 2)
    html = page(outline.program, outline.manifest).decode()
    assert "more lines: fxc inspect OUT --text" in html and "1 smaller layers are not listed" in html
    assert len(re.findall(r'<tr data-status="', html)) == 2


@needs_plots
def test_plots_stand_in_the_page_in_its_colours(outline, hostile_program, dom):
    report = outline.manifest["report"]
    made = plots.plots_of(report, pages.rows_of(outline.program, report)[0], None)
    assert [title.partition(",")[0] for title, _ in made][:2] == ["bytes by part", "relative error of single layers"]
    roof = {"points": [(2.0, 3e9), (4.0, 5e9)], "bandwidth": 1e10, "operations": 2e10}
    hostile = hostile_report()
    drawn = plots.plots_of(hostile, pages.rows_of(hostile_program, hostile)[0], roof)
    assert len(drawn) == 5
    for _, svg in [*made, *drawn]:
        assert dom(svg).wrong == [] and svg.startswith("<svg") and "var(--" in svg and "#01010" not in svg
        assert not re.search(r"<metadata|<style|<!--|http|<script|mathdefault", svg)
    ids = re.findall(r' id="([^"]+)"', "".join(svg for _, svg in drawn))
    assert len(ids) == len(set(ids))


def test_without_matplotlib_the_page_says_so(outline, monkeypatch):
    monkeypatch.setattr(plots, "is_there", lambda: False)
    html = page(outline.program, outline.manifest).decode()
    assert "matplotlib was not installed" in html and "<svg" not in html
