"""Export: what a configuration can say becomes a plain folder that gives the same outputs without fxc, and for everything else
there is a reason."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import families
import pytest
import tiny
import torch
from command import fxc as command
from command import fxc_json

import fxc
from fxc.captured import Captured, files_of_module
from fxc.compiled.model import compiled_model
from fxc.compiler import compile_captured
from fxc.errors import InputRefused, UsageError, VerificationFailed
from fxc.export.configuration import describe_config
from fxc.export.hugging_face import export
from fxc.ir import parse_program, print_program
from fxc.ir.edit import constant
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes
from fxc.verify.compare import relative_error


def passed(program: fxc.Program, passes: str) -> fxc.Program:
    return run_passes(program, Context(), Options(passes, verify=False))[0]


def masked(program: fxc.Program, share: float, kinds: tuple[str, ...]) -> None:
    """Zero what reads the last units of each group of `kinds` but the pooler's, whose width no configuration says."""
    from fxc.analysis.groups import groups

    for group in groups(program):
        if group.pinned or group.kind not in kinds or any("pooler" in member.fqn for member in group.members):
            continue
        gone = torch.arange(group.size)[-round(share * group.size) :]
        for site in group.sites:
            fqn, positions = site.weight.fqn, torch.isin(site.weight.units, gone).nonzero().flatten()
            program.constants[fqn] = program.constants[fqn].index_fill(site.weight.dim, positions, 0)


@functools.cache
def canonical(name: str) -> tuple[torch.nn.Module, fxc.Program]:
    model, _ = families.build(name)
    return model, passed(fxc.capture(model, check=False), "canonicalize")


def pruned(name: str, share: float, kinds: tuple[str, ...]) -> tuple[torch.nn.Module, fxc.Program]:
    """The family `name`, and the program of it with less of `kinds`."""
    model, program = canonical(name)
    program = program.copy()
    masked(program, share, kinds)
    return model, passed(program, "dead_structure")


def edited(name: str, edit: Callable[[fxc.Program], Any], passes: str) -> fxc.CompiledModel:
    """The family `name` compiled, after `edit` has changed its constants."""
    model, program = canonical(name)
    program = program.copy()
    program.constants = {fqn: tensor.clone() for fqn, tensor in program.constants.items()}
    edit(program)
    captured = Captured(program, model.config, files_of_module(model), {"kind": "module"}, program.nbytes())
    return compile_captured(captured, Options(passes, verify=False))


def loaded(folder, auto: str = "AutoModel") -> torch.nn.Module:
    import transformers

    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "mismatched_keys"))
    return model.eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return relative_error([found], [expected]) < 1e-5


def check_generates_the_same(plain: torch.nn.Module, compiled: fxc.CompiledModel) -> None:
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(plain.generate(ids, **options), compiled.generate(ids, **options))


BOTH = ("head", "ffn")
DECODERS = {
    ("qwen2", 0.5, ("head",)): {"num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "head_dim": (None, 16)},
    ("qwen3", 0.5, BOTH): {
        "num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "intermediate_size": (160, 80),
    },
    ("mistral", 0.5, BOTH): {
        "num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "intermediate_size": (160, 80),
    },
    ("gpt2", 0.25, ("ffn",)): {"n_inner": (None, 192)},
    ("mixtral", 0.25, ("ffn",)): {"intermediate_size": (160, 120)},
}  # fmt: skip
OTHERS = {
    ("bert", "AutoModelForSequenceClassification", 0.25, ("ffn",)): {"intermediate_size": (128, 96)},
    ("distilbert", "AutoModel", 0.5, ("ffn",)): {"hidden_dim": (128, 64)},
    ("vit", "AutoModelForImageClassification", 0.25, BOTH): {
        "num_attention_heads": (4, 3), "head_dim": (None, 16), "intermediate_size": (128, 96),
    },
    ("t5", "AutoModelForSeq2SeqLM", 0.25, BOTH): {"num_heads": (4, 3), "d_ff": (128, 96)},
    ("clip", "AutoModel", 0.25, ("ffn",)): {
        "text_config.intermediate_size": (128, 96), "vision_config.intermediate_size": (128, 96),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "share", "kinds"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each[0] in ("qwen3", "mistral"))) for each in DECODERS],
)
def test_a_decoder_becomes_a_plain_folder(tmp_path, name, share, kinds):
    model, program = pruned(name, share, kinds)
    before = model.config.to_dict()
    made = export(program, model.config, {}, tmp_path / "out")
    assert made.changes == DECODERS[name, share, kinds] and not made.zeros and model.config.to_dict() == before
    plain = loaded(tmp_path / "out", "AutoModelForCausalLM")
    assert type(plain) is type(model) and plain.num_parameters() < model.num_parameters()
    compiled = compiled_model(program, {}, config=made.config)
    ids = torch.randint(3, 300, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        assert close(plain(ids, attention_mask=mask).logits[1:], compiled(ids, attention_mask=mask).logits[1:])
    check_generates_the_same(plain, compiled)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize(("name", "auto", "share", "kinds"), OTHERS)
def test_other_models_become_plain_folders(tmp_path, name, auto, share, kinds):
    model, program = pruned(name, share, kinds)
    made = export(program, model.config, {}, tmp_path / "out")
    assert made.changes == OTHERS[name, auto, share, kinds] and not made.zeros
    plain = loaded(tmp_path / "out", auto)
    inputs = {}
    if name in ("vit", "clip"):
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32)
    if name != "vit":
        inputs["input_ids"] = torch.randint(3, 300, (2, 9))
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 300, (2, 4))
    with torch.no_grad():
        found, expected = plain(**inputs), compiled_model(program, {}, config=made.config)(**inputs)
    for key in {"logits", "last_hidden_state", "logits_per_image"} & found.keys():
        assert close(found[key], expected[key])


HEADS = {
    # Whole KV groups are pruned where half of the heads go, and not where a quarter does.
    ("qwen2", 0.25): r"layers\.0\.self_attn: its query heads do not share keys and values evenly",
    # A width of heads that is always hidden_size / heads: transformers refuses 3 of 64, and 2 would be twice as wide.
    ("gpt2", 0.25): r"makes transformer\.h\.0\.attn\.c_attn\.weight \[64, 192\], .*transformers refuses n_head=3.*divisible",
    ("gpt2", 0.5): r"makes transformer\.h\.0\.attn\.c_attn\.weight \[64, 192\], and here it is \[64, 96\]",
    ("distilbert", 0.25): r"transformers refuses n_heads=3, head_dim=16: config.n_heads 3 must divide config.dim 64 evenly",
    ("bert", 0.25): r"refuses num_attention_heads=3, head_dim=16: .*hidden size \(64\) is not a multiple .* heads \(3\)",
    ("bert", 0.5): r"query\.weight \[64, 64\], and here it is \[32, 64\]",
}  # fmt: skip


@pytest.mark.fault(14)
@pytest.mark.parametrize(("name", "share"), HEADS)
def test_heads_that_a_configuration_cannot_say_are_refused(tmp_path, name, share):
    model, program = pruned(name, share, ("head",))
    with pytest.raises(UsageError) as caught:
        export(program, model.config, {}, tmp_path / "out")
    assert re.search(HEADS[name, share], str(caught.value).replace("\n", " "))
    assert "fxc.load" in caught.value.hint and not any(tmp_path.iterdir())
    config, reason = describe_config(program, model.config)
    assert config is None and caught.value.what in reason


@pytest.mark.fault(16)
def test_layers_that_differ_are_refused(tmp_path):
    def mask(program: fxc.Program) -> None:
        for layer, count in enumerate((32, 16)):
            program.constants[f"model.layers.{layer}.mlp.down_proj.weight"][:, :count] = 0

    compiled = edited("mistral", mask, "dead_structure")
    differ = r"layers differ: model\.layers\.0\.mlp\.\w+\.weight is .*128.* and model\.layers\.1\.mlp\.\w+\.weight is .*144"
    with pytest.raises(UsageError, match=differ):
        compiled.save_pretrained(tmp_path / "out")
    assert re.search(differ, compiled.report["configuration"]["not_exportable"])
    compiled.save(tmp_path / "artifact")
    again = fxc.load(tmp_path / "artifact")
    assert again.config.intermediate_size == 160 and again(torch.randint(3, 300, (1, 5))).logits.shape == (1, 5, 320)
    assert "layers differ" in command("export", tmp_path / "artifact", "-o", tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_branch_of_one_layer_that_is_gone_is_refused(tmp_path):
    compiled = edited("qwen2", lambda p: p.constants["model.layers.1.self_attn.o_proj.weight"].zero_(), "dead_structure")
    with pytest.raises(UsageError, match=r"layers differ: .*layers\.1\.self_attn.* are gone, and others stay"):
        compiled.save_pretrained(tmp_path / "out")


def test_what_is_no_plain_model_is_refused(tmp_path):
    quantized = edited("qwen2", lambda program: None, "int8")
    with pytest.raises(UsageError, match=r"quantized model has no plain.*\n.*qweight.*\n.*without int8"):
        quantized.export_hugging_face(tmp_path / "out")
    mlp, inputs = families.build("mlp")
    with pytest.raises(UsageError, match="Mlp: it is no Hugging Face model"):
        export(fxc.capture(mlp, inputs, check=False), None, {}, tmp_path / "out")
    whisper, _ = families.build("whisper_encoder")
    program = fxc.capture(whisper, check=False)
    with pytest.raises(UsageError, match="WhisperEncoder: transformers has no model class of this name"):
        export(program, whisper.config, {}, tmp_path / "out")
    # A program may come from a stranger: what it names is a model class of transformers with this configuration, or nothing.
    for name in ("AutoModel", "pipeline", "os.system", "PreTrainedModel", "GPT2LMHeadModel", 3, None):
        program.metadata["class"] = name
        assert describe_config(program, whisper.config)[0] is None
    program.metadata |= {"class": "WhisperModel", "transposed": 3}
    with pytest.raises(InputRefused, match="no list"):
        export(program, whisper.config, {}, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------- layers


def test_layers_that_are_gone_are_counted_anew(tmp_path):
    model, _ = families.build("gemma2")
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "source")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "source")
    out, artifact, source = tmp_path / "out", tmp_path / "artifact", tmp_path / "source"
    command("compile", source, "-o", artifact, "--passes", "dead_structure", "--no-verify")
    config = json.loads((artifact / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["layer_types"] == ["full_attention"]
    made = fxc_json("export", artifact, "-o", out)
    assert made["out"] == str(out) and made["class"] == "Gemma2ForCausalLM" and made["zeros"] == []
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    plain = loaded(out, "AutoModelForCausalLM")
    assert plain.config.num_hidden_layers == 1 and "lm_head.weight" in plain.state_dict()
    again = fxc.load(artifact)
    check_generates_the_same(plain, again)
    with torch.no_grad():
        ids = torch.randint(3, 300, (2, 9))
        assert close(plain(ids).logits, model(ids).logits)
    for kept in (source, artifact):
        with pytest.raises(UsageError, match="the output is the source"):
            again.save_pretrained(kept, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "artifact", "out"}


@pytest.mark.fault(25)
def test_only_an_export_is_replaced_and_only_when_told(tmp_path):
    model, program = canonical("qwen2")
    out = tmp_path / "out"
    files = {"config.json": b"not this one", "tokenizer.json": b"{}"}
    export(program, model.config, files, out)
    assert (out / "tokenizer.json").read_bytes() == b"{}" and b"Qwen2" in (out / "config.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        export(program, model.config, files, out)
    export(program, model.config, files, out, overwrite=True)
    for source in (out, out / "inside", tmp_path):
        with pytest.raises(UsageError, match="the source"):
            export(program, model.config, files, out, overwrite=True, sources=[tmp_path / "other", source])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        export(program, model.config, files, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(InputRefused, match="leads out"):
        export(program, model.config, {"../x": b""}, tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_pruned_quantized_artifact_knows_its_structure():
    def mask(program: fxc.Program) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            program.constants[f"model.layers.0.{name}.weight"].zero_()

    compiled = edited("qwen2", mask, "dead_structure,int8")
    assert compiled.config.num_hidden_layers == 1 and canonical("qwen2")[0].config.num_hidden_layers == 2
    assert json.loads(compiled.files["config.json"])["num_hidden_layers"] == 1


# ----------------------------------------------------------------------------------------------------------------- details


@pytest.mark.fault(11)
def test_transposed_constants_are_turned_back(tmp_path):
    model, _ = canonical("gpt2")
    compiled = edited("gpt2", lambda program: None, "canonicalize")
    turned = compiled.program.metadata["transposed"]
    assert len(turned) == 8 and "transformer.h.0.attn.c_proj.weight" in turned
    assert parse_program(print_program(compiled.program)).metadata["transposed"] == turned
    compiled.save(tmp_path / "artifact")
    again = fxc.load(tmp_path / "artifact")
    again.save_pretrained(tmp_path / "out")
    plain = loaded(tmp_path / "out", "AutoModelForCausalLM")
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in model.state_dict().items())
    # A square one that is not turned back gives other outputs: the folder is gone before anyone sees it.
    again.program.metadata["transposed"] = [name for name in turned if "h.0.attn.c_proj" not in name]
    with pytest.raises(VerificationFailed, match="other outputs than the program"):
        again.save_pretrained(tmp_path / "wrong")
    assert {p.name for p in tmp_path.iterdir()} == {"artifact", "out"}


def with_bias(program: fxc.Program, layer: str) -> fxc.Program:
    """Give the linear `layer` a bias."""
    node = next(n for n in program.graph.nodes if n.op == "call_function" and n.meta["fqn"] == layer and len(n.args) == 2)
    bias = constant(program, f"{layer}.bias", torch.randn(len(program.constants[f"{layer}.weight"])), before=node)
    node.args = (*node.args, bias)
    return program


def test_biases_that_a_flag_switches_on_are_written_and_others_are_zero(tmp_path):
    model, program = canonical("qwen3")
    program = program.copy()
    made = export(with_bias(program, "model.layers.1.self_attn.o_proj"), model.config, {}, tmp_path / "out")
    assert made.changes == {"attention_bias": (False, True)} and len(made.zeros) == 7
    assert "model.layers.0.self_attn.q_proj.bias" in made.zeros
    plain = loaded(tmp_path / "out", "AutoModelForCausalLM")
    check_generates_the_same(plain, compiled_model(program, {}, config=made.config))


def test_biases_that_nothing_switches_on_are_refused(tmp_path):
    model, program = canonical("qwen2")
    program = with_bias(program.copy(), "model.layers.1.mlp.down_proj")
    with pytest.raises(UsageError, match=r"no place for what removal added: model\.layers\.1\.mlp\.down_proj\.bias"):
        export(program, model.config, {}, tmp_path / "out")


def test_the_example_pruned(pylm_dir, tmp_path):
    compiled = fxc.optimize(pylm_dir, passes="prune:heads=0.5:ffn=0.5:uniform=true", verify=False)
    compiled.save_pretrained(tmp_path / "out")
    plain = loaded(tmp_path / "out", "AutoModelForCausalLM")
    assert plain.dtype == torch.bfloat16 and plain.get_input_embeddings().weight is plain.lm_head.weight
    config = plain.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert config.intermediate_size == 384 and config.num_hidden_layers == 5
    assert plain.num_parameters() == sum(t.numel() for name, t in compiled.program.constants.items() if "inv_freq" not in name)
    check_generates_the_same(plain, compiled)
    assert "tokenizer.json" in {p.name for p in (tmp_path / "out").iterdir()}
