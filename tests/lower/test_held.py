"""What a lowered program holds, by form, and that the head of a language model that is tied to its table counts."""

import pytest
import torch
from command import fxc_json
from torch import nn

import fxc
from fxc.lower.cpu import lower_cpu
from fxc.lower.held import cache_bytes, held
from fxc.report.lowering import describe_held
from fxc_kernels.cpu import native_int4


class Tied(nn.Module):
    """A table, two layers, and a head over the table's weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(512, 64)
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.LayerNorm(64))

    def forward(self, ids):
        return nn.functional.linear(self.layers(self.table(ids)), self.table.weight)


ORIGINAL = 2 * (512 * 64 + 2 * 64 * 128 + 128 + 3 * 64)


def compressed(spec):
    torch.manual_seed(0)
    return fxc.optimize(Tied().bfloat16(), (torch.arange(6)[None],), spec, verify=False).program


def in_floats(forms, *layer):
    return {rows: (*[9.0] * (len(forms) - 1), 1.0) for rows in forms[0].rows}


def as_packed(forms, *layer):
    return {rows: (*[0.1] * (len(forms) - 1), 1.0) for rows in forms[0].rows}


@pytest.mark.parametrize("spec", ["int8", "int8:embeddings=int8", "int4:group=32:embeddings=int4", "fp8"])
@pytest.mark.parametrize("measure", [in_floats, as_packed])
def test_no_form_holds_more_than_the_original_and_all_bytes_are_told(spec, measure):
    program = compressed(spec)
    for keep_float in (0, 0.5, 1):
        lowered, _ = lower_cpu(program, measure=measure, keep_float=keep_float)
        parts = held(lowered)
        assert sum(parts.values()) == sum(each.numel() * each.element_size() for each in lowered.constants.values())
        assert sum(parts.values()) <= ORIGINAL + 16 * (128 + 64 + 512), parts


@pytest.mark.parametrize(
    ("spec", "forms"),
    [
        ("int8", {"int8 packed": 16384, "float tables": 65536}),
        ("int8:embeddings=int8", {"int8 packed": 16384 + 32768, "int8 tables": 32768}),
        ("int4:group=32:embeddings=int4", {"int4 packed": 8192 + 16384, "int4 tables": 16384}),
    ],
)
def test_forms_have_the_names_that_they_are_reported_by(spec, forms, monkeypatch):
    if "int4" in spec:
        monkeypatch.delenv("FXC_CPU_LEVEL")
        if why := native_int4.why_not():
            pytest.skip(f"int4 stays four bits in the kernels in C++ alone: {why}")
    lowered, _ = lower_cpu(compressed(spec), measure=as_packed, keep_float=0)
    parts = held(lowered)
    assert parts.pop("scales, norms and biases") < 16384 and parts == forms
    line = describe_held(lowered)
    assert line.startswith("in memory: ") and all(form in line for form in forms) and "cache" not in line


def test_a_program_that_is_not_compressed_packs_what_it_likes():
    plain, _ = lower_cpu(compressed("canonicalize"), keep_float=0)
    assert held(plain)["float weights"] >= 2 * 2 * 64 * 128


def test_a_decoder_has_a_cache_and_commands_say_what_is_held(pylm_dir, tmp_path):
    model = fxc.optimize(str(pylm_dir), passes="int8", verify=False)
    assert cache_bytes(model.program) == 2 * 5 * 2 * 64 * 2 == cache_bytes(model.lowered)
    model.save(tmp_path / "a")
    ran = fxc_json("run", tmp_path / "a", "--prompt", "import", "--max-new-tokens", 1, "--keep-float", 0)
    shown = fxc_json("inspect", tmp_path / "a", "--lowered")
    assert shown["cache_bytes_per_token"] == ran["cache_bytes_per_token"] == cache_bytes(model.program)
    assert sum(ran["held"].values()) < sum(shown["held"].values()) and model.held == held(model.lowered)
    assert "float copies" not in ran["held"] and "bf16 packed" not in ran["lowering"]
