"""Artifacts: what is saved is what is read, equal inputs give equal bytes, and whatever is wrong with a file or with
the machine gives one error of fxc and leaves what was there before."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import manifest, staging, store
from fxc.errors import FxcError, InputRefused, ResourceError, UsageError, VerificationFailed
from fxc.frontend.capture import capture
from fxc.ir import Program, check, parse_program, print_program

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
NET = """\
fxc program 1
metadata {"class": "Net", "kind": "module"}
call {"args": [0], "kwargs": {}}
result 0
symbol s0 = 2
constant @down.weight: f32[4, 6]
constant @mask: f32[4]
constant @up.qweight: i8[6, 4]
constant @up.scale: f32[6]
alias @head.weight = @down.weight
%0: f32[s0, 4] = input "x"
%1: f32[s0, 6] = fxc.int8_linear(%0, @up.qweight, @up.scale, None)  # up (int8)
%2: f32[s0, 4] = aten.linear(%1, @down.weight)  # down
%3: f32[s0, 4] = aten.maximum(%2, @mask)
return "out" %3
"""


def constants() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "up.qweight": torch.randint(-127, 128, (6, 4), generator=generator, dtype=torch.int8),
        "up.scale": torch.rand(6, generator=generator) + 0.1,
        "down.weight": torch.randn(4, 6, generator=generator),
        "mask": torch.tensor([0.0, -torch.inf, 1.0, -torch.inf]),
    }


def net() -> Program:
    return parse_program(NET, constants())


@pytest.fixture
def saved(tmp_path) -> Path:
    out = tmp_path / "out"
    store.save(net(), out, manifest={"report": {"passes": ["int8"]}}, extra_files={"config.json": b'{"a": 1}\n'})
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rehash(folder: Path) -> None:
    """What somebody who changes an artifact on purpose does: hashes that fit what he made of it."""
    path = folder / "fxc.json"
    content = json.loads(path.read_bytes())
    path.unlink()
    content["files"] = manifest.describe(folder)
    path.write_bytes(manifest.encode(content))


def refusal(path: Path, *words: str) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        store.read(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("family", ["mlp", "cnn", "vit", "gemma"])
def test_a_model_comes_back_as_it_was(family, tmp_path):
    model, example = families.build(family)
    program = capture(model, example, check=False)
    store.save(program, tmp_path / "a", manifest={})
    again = store.read(tmp_path / "a").program
    assert print_program(again) == print_program(program)
    assert again.constants.keys() == program.constants.keys()
    assert (again.signature, again.aliases, again.metadata) == (program.signature, program.aliases, program.metadata)
    inputs = [example_of(node.meta["val"]) for node in program.placeholders]
    for found, expected in zip(again.module()(*inputs), program.module()(*inputs), strict=True):
        assert torch.equal(found, expected)
    store.save(again, tmp_path / "b", manifest={})
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "a")


def example_of(fake: torch.Tensor) -> torch.Tensor:
    shape = [s if isinstance(s, int) else s.node.hint for s in fake.shape]
    if fake.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(fake.dtype)
    return torch.ones(shape, dtype=fake.dtype)


def test_equal_inputs_give_equal_bytes(tmp_path, saved):
    again = tmp_path / "again"
    shuffled = Program(**{**vars(net()), "constants": dict(reversed(constants().items()))})
    report, extra = {"report": {"passes": ["int8"]}}, {"config.json": b'{"a": 1}\n'}
    store.save(shuffled, again, manifest=report, extra_files=extra)
    assert bytes_of(again) == bytes_of(saved)
    assert sorted(bytes_of(saved)) == ["config.json", "fxc.json", SHARD, INDEX, "program.fxc"]
    assert not (tmp_path / "out.lock").exists()


def test_the_manifest_says_versions_hashes_and_what_the_caller_says(saved):
    found = store.read(saved)
    content = found.manifest
    assert found.path == saved and store.is_artifact(saved) and not store.is_artifact(saved.parent)
    assert content["format_version"] == 1 and content["report"] == {"passes": ["int8"]}
    assert content["versions"]["torch"] == torch.__version__
    data = (saved / "program.fxc").read_bytes()
    assert content["files"]["program.fxc"] == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert content["files"].keys() == bytes_of(saved).keys() - {"fxc.json"}


def test_constants_are_sharded_and_mapped(tmp_path):
    program = net()
    store.save(program, tmp_path / "out", manifest={}, max_shard_bytes=100)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert list(load_file(tmp_path / "out" / names[0])) == ["down.weight"]
    assert sorted(k for k, v in weight_map.items() if v == names[1]) == ["mask", "up.qweight", "up.scale"]
    again = store.read(tmp_path / "out").program
    for fqn, tensor in program.constants.items():
        assert torch.equal(again.constants[fqn], tensor)
    before = bytes_of(tmp_path / "out")
    again.constants["down.weight"].zero_()
    assert bytes_of(tmp_path / "out") == before, "writing to a constant must not write to the file"


def test_constants_that_are_views_of_one_tensor_or_not_contiguous(tmp_path):
    whole = torch.randn(6, 8)
    given = {**constants(), "down.weight": whole[:, :4].t(), "mask": whole[0, 4:]}
    store.save(parse_program(NET, given), tmp_path / "out", manifest={})
    again = store.read(tmp_path / "out").program.constants
    assert torch.equal(again["down.weight"], given["down.weight"]) and torch.equal(again["mask"], given["mask"])


def test_a_program_without_constants(tmp_path):
    program = capture(torch.nn.ReLU(), (torch.randn(2, 3),))
    store.save(program, tmp_path / "out", manifest={})
    assert sorted(bytes_of(tmp_path / "out")) == ["fxc.json", "program.fxc"]
    assert store.read(tmp_path / "out").program.constants == {}


def test_extra_files_are_copied_into_folders_too(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    extra = {"tokenizer.json": tmp_path / "tokenizer.json", "additional_chat_templates/a.jinja": b"hello"}
    store.save(net(), tmp_path / "out", manifest={}, extra_files=extra)
    assert (tmp_path / "out/additional_chat_templates/a.jinja").read_bytes() == b"hello"
    assert store.read(tmp_path / "out").manifest["files"].keys() >= extra.keys()
    (tmp_path / "out/additional_chat_templates/a.jinja").write_bytes(b"hullo")
    refusal(tmp_path / "out", "a.jinja", "does not match its hash")


# --------------------------------------------------------------------------------------------------------------- damage

FILES = ["program.fxc", "fxc.json", SHARD, INDEX, "config.json"]


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found_wherever_it_is(name, flip, saved):
    data = (saved / name).read_bytes()
    for position in {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}:
        changed = bytearray(data)
        changed[position] ^= flip
        (saved / name).write_bytes(changed)
        refusal(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_missing_or_longer_file_is_named(name, saved):
    data = (saved / name).read_bytes()
    for left in (0, 1, len(data) // 2, len(data) - 1):
        (saved / name).write_bytes(data[:left])
        refusal(saved, name)
    (saved / name).write_bytes(data + b" ")
    refusal(saved, name)
    (saved / name).unlink()
    refusal(saved, *([] if name == "fxc.json" else [name, "missing"]))


def test_white_space_in_the_manifest_is_a_change_as_well(saved):
    data = (saved / "fxc.json").read_bytes()
    (saved / "fxc.json").write_bytes(data.replace(b": ", b":\t", 1))
    refusal(saved, "fxc.json", "its own hash")


def test_a_newer_format_is_refused_with_the_version(saved):
    content = json.loads((saved / "fxc.json").read_bytes())
    content["format_version"], content["versions"]["fxc"] = 2, "9.9"
    (saved / "fxc.json").write_bytes(manifest.encode(content))
    refusal(saved, "format 2", "9.9", "upgrade")


# ------------------------------------------------------------------------------------------- hostile, with right hashes


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/hostname", "C:\\x", "\\\\host\\x", "a/../../b", "x\x1b[31m"])
def test_a_manifest_cannot_name_files_outside(name, saved):
    content = json.loads((saved / "fxc.json").read_bytes())
    content["files"][name] = {"sha256": "0" * 64, "size": 0}
    (saved / "fxc.json").write_bytes(manifest.encode(content))
    error = refusal(saved, "leads out of")
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("name", ["../out/" + SHARD, "/x.safetensors", "model.bin", "other.safetensors", 3, None, []])
def test_an_index_cannot_name_other_files(name, saved):
    index = json.loads((saved / INDEX).read_bytes())
    index["weight_map"]["mask"] = name
    (saved / INDEX).write_text(json.dumps(index))
    rehash(saved)
    refusal(saved, INDEX)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"", b'{"weight_map": {}, "metadata": {}}', b"[" * 100_000, b"\xff"])
def test_an_index_that_is_none(content, saved):
    (saved / INDEX).write_bytes(content)
    rehash(saved)
    refusal(saved, INDEX)


@pytest.mark.parametrize("files", [None, [], {}, {"program.fxc": None}, {"program.fxc": {"sha256": 1, "size": 1}},
                                   {"program.fxc": {"sha256": "0" * 64, "size": "1"}}])  # fmt: skip
def test_a_manifest_without_its_list(files, saved):
    content = {**json.loads((saved / "fxc.json").read_bytes()), "files": files}
    (saved / "fxc.json").write_bytes(manifest.encode(content))
    refusal(saved)


@pytest.mark.parametrize("name", ["program.fxc", "fxc.json", SHARD, "config.json"])
def test_a_link_out_of_the_artifact_is_not_followed(name, saved, tmp_path):
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    refusal(saved, name, "link")


def test_the_links_of_the_hugging_face_cache_are_followed(saved, tmp_path):
    repo = tmp_path / "models--me--net"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in bytes_of(saved):
        (saved / name).rename(repo / "blobs" / name)
        (snapshot / name).symlink_to(repo / "blobs" / name)
    store.read(snapshot)


def test_files_that_a_loader_would_read_have_to_be_listed(saved):
    (saved / "README.md").write_text("what this is")
    store.read(saved)
    (saved / "tokenizer.json").write_text("{}")
    refusal(saved, "tokenizer.json", "does not list")


def test_huge_files_are_refused_before_they_are_read(saved, monkeypatch):
    monkeypatch.setattr("fxc.safety.JSON_LIMIT", 600)
    refusal(saved, "bytes", "program.fxc" if (saved / "fxc.json").stat().st_size <= 600 else "fxc.json")


def change_weights(folder: Path, **changes: object) -> None:
    tensors = load_file(folder / SHARD)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors.get(name)) if callable(value) else value
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(tensors, SHARD)
    (folder / INDEX).write_text(json.dumps(index))
    rehash(folder)


def first(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"up__scale": first(torch.nan)}, ["up.scale", "NaN"]),
        ({"up__scale": first(torch.inf)}, ["up.scale", "Inf"]),
        ({"up__scale": first(0.0)}, ["up.scale", "not positive"]),
        ({"up__scale": first(-1.0)}, ["up.scale", "not positive"]),
        ({"down__weight": first(torch.nan)}, ["down.weight", "NaN"]),
        ({"down__weight": first(-torch.inf)}, ["down.weight", "Inf"]),
        ({"mask": first(torch.nan)}, ["mask", "NaN"]),
        ({"up__qweight": torch.zeros(4, 6, dtype=torch.int8)}, ["up.qweight", "i8[6, 4]", "i8[4, 6]", "line 8"]),
        ({"up__qweight": torch.zeros(6, 4)}, ["up.qweight", "f32[6, 4]"]),
        ({"up__qweight": torch.zeros(6, 4, dtype=torch.uint16)}, ["up.qweight", "uint16"]),
        ({"up__scale": None}, ["up.scale", "do not have it"]),
        ({"other": torch.zeros(1)}, ["other", "does not declare it"]),
    ],
)  # fmt: skip
def test_constants_that_do_not_fit_or_are_no_numbers(changes, words, saved):
    change_weights(saved, **changes)
    refusal(saved, *words)


def test_a_scale_is_known_by_its_operator_not_by_its_name(tmp_path):
    text = NET.replace("up.scale", "up.other")
    given = {("up.other" if k == "up.scale" else k): v for k, v in constants().items()}
    store.save(parse_program(text, given), tmp_path / "a", manifest={})
    with pytest.raises(VerificationFailed, match=r"up\.other"):
        store.save(parse_program(text, {**given, "up.other": -given["up.other"]}), tmp_path / "b", manifest={})
    assert not (tmp_path / "b").exists()


def test_shard_and_index_that_disagree(saved):
    index = json.loads((saved / INDEX).read_text())
    del index["weight_map"]["mask"]
    (saved / INDEX).write_text(json.dumps(index))
    rehash(saved)
    refusal(saved, SHARD, "mask")


def test_no_changed_header_of_weights_gets_through_or_ends_in_a_traceback(saved):
    data = (saved / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    expected = {k: (v.shape, v.dtype) for k, v in constants().items()}
    for position in range(8 + length):
        changed = bytearray(data)
        changed[position] ^= 0x02 if position % 2 else 0x11
        (saved / SHARD).write_bytes(changed)
        rehash(saved)
        try:
            found = store.read(saved).program.constants
        except InputRefused:
            continue
        # White space for white space, or the same tensors' bytes under their own names.
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == expected


def change_text(folder: Path, old: str, new: str) -> None:
    text = (folder / "program.fxc").read_text()
    assert old in text
    (folder / "program.fxc").write_bytes(text.replace(old, new).encode("utf-8", "surrogatepass"))
    rehash(folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("aten.maximum", "aten.from_file", ["line 14", "from_file"]),
        ("aten.maximum", "os.system", ["line 14", "os.system"]),
        ('return "out" %3\n', "", ["ends before"]),
        ("f32[s0, 4] = aten.linear", "f32[s0, 5] = aten.linear", ["line 13", "f32[s0, 5]", "f32[s0, 4]"]),
        ("  # down", "", []),  # nothing changes but a comment: only the hash of the file can tell
        ("%3: f32", "%3:  f32", ["line 14"]),
        ("@mask)", "@mask )", ["line 14"]),
        ('"Net"', '"Nét"', ["characters"]),
        ("symbol s0 = 2", "symbol s0 = 3\nsymbol s1 = 4", ["line 6"]),
        ("\n", "\r\n", ["line 1"]),
    ],
)  # fmt: skip
def test_texts_that_fxc_did_not_write(old, new, words, saved):
    change_text(saved, old, new)
    if words:
        refusal(saved, "program.fxc", *words)
    else:
        store.read(saved)


# --------------------------------------------------------------------------------------------------- the text by itself


def parsed_or_refused(text: str) -> Program | None:
    try:
        program = parse_program(text, constants())
        check(program)
        return program
    except InputRefused:
        return None


def with_line(line: str, result: str = "f32[s0, 4]") -> str:
    """NET with the call of its last value replaced."""
    return NET.replace("%3: f32[s0, 4] = aten.maximum(%2, @mask)", f"%3: {result} = {line}")


EVIL_CALLS = [
    'os.system("id")', 'builtins.eval("1")', 'operator.attrgetter("x")(%2)', 'operator.attrgetter("__class__")',
    'operator.methodcaller("x")', "operator.setitem(%2, 0, 1)", 'operator.mul("ab", 10000000000)',
    "operator.mul([0], 9)", "aten.resize(%2, [99])",
    "operator.pow(9, 999999999)", "operator.pow(s0, 3)", "operator.add(%2, %2)", "operator.getitem(%2, 0)",
    'operator.getitem("abc", 0)', 'aten.from_file("/etc/passwd", None, 4)', "aten.as_strided(%2, [4], [1], 99)",
    "aten.add_.Tensor(%2, %2)", "aten.set_(%2)", "aten._print(\"x\")", "aten.nothing(%2)", "aten.linear.nothing(%2)",
    "aten.__class__(%2)", "aten.__init__.x(%2)", "aten.linear.__class__(%2)", "aten..x(%2)", "fxc.nothing(%2)",
    "aten(%2)", "c10d.send(%2)", "prim.device(%2)", "profiler._record_function_enter(%2)", "torch.load(%2)",
    "torch.sym_int(%2)", "math.sqrt(4)", "math.ceil(None)", "aten.nonzero(%2)", "aten.item(%2)", "aten.to_sparse(%2)",
    "aten.maximum(%2, %9)", "aten.maximum(%2, %99999999999999999999999999)", "aten.maximum(%2, @nothing)",
    "aten.maximum(%2)", "aten.maximum(%2, 3)", "aten.maximum(%2, @mask",
    "aten.maximum(%2, 1" + "0" * 5000 + ")", "aten.mul.Scalar(%2, 99999999999999999999)",
    "aten.maximum(%2, @mask))", "aten.maximum(%2, @mask)  # \"\\q\"", "aten.maximum(%2, @mask)  # x (y) z",
    "aten.maximum(%2, other=@mask, other=@mask)", "aten.maximum(other=@mask, %2)",
    "aten.random.from(%2, from=1, to=None)",
    "aten.maximum(%2, " + "[" * 100_000, "aten.maximum(%2, \"\\ud800\\x\")", "aten.maximum(%2, \"", "aten.maximum %2",
    'aten.to.dtype_layout(%2, dtype=f32, device=device("cuda"))', 'aten.zeros([4], device=device("meta"))', "input",
    'input "x"', 'input "\\q"', "aten.sym_size.int(%2, 0)", "aten.size.int(%2, 0)", "()", "", "%2", "=",
]  # fmt: skip


@pytest.mark.parametrize("call", EVIL_CALLS, ids=range(len(EVIL_CALLS)))
def test_calls_that_no_program_may_make(call):
    assert parsed_or_refused(with_line(call)) is None
    # Whatever type the line claims, what is no number and no plain tensor has no place.
    for result in ("number(s0)", "number(81)", "f32[4]", "()", "number(s1)", "i64[s1, 2]"):
        program = parsed_or_refused(with_line(call, result))
        if program is not None:
            assert "sym_size" in call or call in ("math.ceil(4)",)


def test_numbers_do_not_grow_without_bound():
    lines = ["%3: number(s0) = aten.sym_size.int(%2, 0)"]
    lines += [f"%{i}: number(s0**{2 ** (i - 3)}) = operator.mul(%{i - 1}, %{i - 1})" for i in range(4, 60)]
    text = NET.replace("%3: f32[s0, 4] = aten.maximum(%2, @mask)", "\n".join(lines))
    with pytest.raises(InputRefused, match="64 bits"):
        parse_program(text, None)


EVIL_NAMES = [
    'x" if eval("__import__(\'os\')\\x2emkdir(\'pwned\')") else "x', "a\nimport os", "a..b", "", ".a", "a.", "forward",
    "_parameters.x", "__class__", "a.__dict__", "training", "a._buffers", "a'b", 'a"b', "a\\b", "a{b}", "a\u2028b", "été",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL_NAMES, ids=range(len(EVIL_NAMES)))
def test_names_of_constants_cannot_become_code(name, tmp_path, monkeypatch):
    """torch.fx writes these names into the source that it runs."""
    monkeypatch.chdir(tmp_path)
    given = {(name if k == "mask" else k): v for k, v in constants().items()}
    for written in (name, json.dumps(name)):
        with pytest.raises(InputRefused):
            parse_program(NET.replace("@mask", f"@{written}"), given)
    program = net()
    program.graph.find_nodes(op="get_attr")[-1].target = name
    program.constants[name] = program.constants.pop("mask")
    with pytest.raises(FxcError):
        store.save(program, tmp_path / "out", manifest={})
    assert not list(tmp_path.iterdir())


def test_unusual_names_that_models_do_have_are_kept(tmp_path):
    name = "blocks.0.a-b.graph.code"
    given = {(name if k == "mask" else k): v for k, v in constants().items()}
    program = parse_program(NET.replace("@mask", f"@{name}"), given)
    store.save(program, tmp_path / "out", manifest={})
    x = torch.randn(3, 4)
    assert torch.equal(store.read(tmp_path / "out").program.module()(x)[0], net().module()(x)[0])


MALFORMED = {
    'call {"args": [0], "kwargs": {}}': [
        f"call {call}" for call in (
            "null", "[]", "{}", '{"args": [1], "kwargs": {}}', '{"args": [-1], "kwargs": {}}',
            '{"args": 0, "kwargs": {}}', '{"args": [true], "kwargs": {}}', '{"args": [{"list": 3}], "kwargs": {}}',
            '{"args": [{}], "kwargs": []}',
            '{"args": [{"value": [1]}], "kwargs": {}}', "1" * 5000, "[" * 200_000,
            '{"args": [' + '{"list": [' * 90 + "]}" * 90 + '], "kwargs": {}}',
        )
    ],
    "result 0": [f"result {r}" for r in ("1", '{"class": 3, "dict": {}}', '{"class": "a:b"}', '"x"', "null", "")],
    'metadata {"class": "Net", "kind": "module"}': [
        f"metadata {m}" for m in (
            "3", "[]", '{"class": 3}', '{"class": "a b"}', '{"class": "a\\u0000"}', "{", '{"class": "Net"}\nmetadata {}',
        )
    ],
    "symbol s0 = 2": [f"symbol {s}" for s in ("s0 = 1", "s1 = 2", "s0 = ²", "s0 = -3", "s0", "s0 = " + "9" * 5000)],
    "f32[4]\n": [
        f"{t}\n" for t in (
            "f32[4", "f32[5]", "f32[-4]", "f99[4]", "f32[٤]", "f32[s0]", "[4]", "f32[99999999999, 99999999999]", "",
            "f32[" + "9" * 5000 + "]",
        )
    ],
    'f32[s0, 4] = input "x"': [
        'f32[s0//0, 4] = input "x"', 'f32[s1, 4] = input "x"', 'f32[-1, 4] = input "x"', 'f32[s0, x.y] = input "x"',
        'f32[__import__("os")] = input "x"', "f32[" + "-" * 100_000 + '1] = input "x"', 'f32[\x00] = input "x"',
        "f32[" + "(" * 100_000 + '1] = input "x"', "f32[9" + "9" * 30 + '] = input "x"', "f32[s0, 4] = input x",
        'f32[s0, 4] = input "x" default "x"', 'f32[s0, 4] = input "x" default "ones:y"', 'f32[s0, 4 = input "x"',
        'f32[s0, 4] = input "x" default ""', 'f32[s0, 4] = input "x"\n%1: f32[s0, 4] = input "x"',
    ],
    'return "out" %3': [
        "return", 'return "out"', 'return "out" %4', 'return "out" %3,', 'return "out" %3 x', "return %3",
        'return "o\\q" %3', 'return "out" None', 'return "out" %3\n%4: f32[] = x()',
    ],
    "alias @head.weight = @down.weight": [
        "alias @head.weight", "alias @x = @nothing", "alias @mask = @down.weight", "alias", 'alias @"x\\q" = @mask',
        "alias @a = @mask\nalias @a = @mask", 'alias @"a\'b" = @mask',
    ],
    "fxc program 1": ["fxc program 2", "", "fxc", "program", "\x00"],
    "constant @mask: f32[4]": ["constant @mask: f32[4]\n" * 2, "constant @mask: f32[4]\nconstant @spare: f32[4]"],
    NET: ["", "\n\n", "\x1b[31m"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(old, new, id=f"{i}-{j}")
        for i, (old, changes) in enumerate(MALFORMED.items())
        for j, new in enumerate(changes)
    ],
)
def test_malformed_texts_are_refused(old, new):
    assert old in NET
    with pytest.raises(InputRefused) as caught:
        parse_program(NET.replace(old, new, 1), constants())
    assert "line" in caught.value.where and "\x1b" not in str(caught.value)


def test_a_constant_cannot_lie_inside_of_another():
    text = NET.replace("@mask", "@down.weight.mask")
    with pytest.raises(InputRefused, match=r"down\.weight"):
        parse_program(text, {("down.weight.mask" if k == "mask" else k): v for k, v in constants().items()})


def test_the_line_that_is_wrong_is_the_line_named():
    with pytest.raises(InputRefused, match="line 12") as caught:
        parse_program(NET.replace("%1: f32[s0, 6]", "%1: f32[s0, 7]"))
    assert caught.value.why.startswith("%1: f32[s0, 7]")


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_one_character_ends_in_a_traceback(seed):
    generator = torch.Generator().manual_seed(seed)
    letters = "0129-+.,:=%@#()[]{}\"\\ \nas_ef\x00\x7fé"
    for _ in range(80):
        position, kind, letter = (int(torch.randint(n, (), generator=generator)) for n in (len(NET), 3, len(letters)))
        new = (letters[letter], "", NET[position] + letters[letter])[kind]
        program = parsed_or_refused(NET[:position] + new + NET[position + 1 :])
        if program is not None:
            program.module()


def test_every_cut_of_the_text_is_refused():
    for length in range(0, len(NET) - 1, 7):
        assert parsed_or_refused(NET[:length]) is None


# -------------------------------------------------------------------------------------------------------------- writing


def test_an_existing_output_is_replaced_only_when_asked_and_only_if_it_is_an_artifact(saved, tmp_path):
    with pytest.raises(UsageError, match="not empty"):
        store.save(net(), saved, manifest={})
    store.save(net(), saved, manifest={"new": True}, overwrite=True)
    assert store.read(saved).manifest["new"] is True and not (saved / "config.json").exists()

    (saved / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        store.save(net(), saved, manifest={}, overwrite=True)
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    (home / "letters" / "one").write_text("dear")
    for content in (None, "{}"):
        if content:
            (home / "fxc.json").write_text(content)
        with pytest.raises(UsageError, match="will not be replaced"):
            store.save(net(), home, manifest={}, overwrite=True)
    assert (home / "letters" / "one").read_text() == "dear"

    (tmp_path / "empty").mkdir()
    store.save(net(), tmp_path / "empty", manifest={})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        store.save(net(), tmp_path / "file", manifest={}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "home", "out"]


def test_the_output_cannot_touch_the_source(saved, tmp_path, monkeypatch):
    before = bytes_of(saved)
    (tmp_path / "link").symlink_to(saved)
    for out in (saved, tmp_path / "link", saved / "inside", tmp_path):
        with pytest.raises(UsageError, match="source"):
            store.save(net(), out, manifest={}, source=saved, overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="current folder"):
        store.save(net(), ".", manifest={})
    assert bytes_of(saved) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "no"),
                                   KeyboardInterrupt(), MemoryError()])  # fmt: skip
@pytest.mark.parametrize("where", ["store.save_file", "store.describe", "store.read", "staging._sync_one",
                                   "staging._put_in_place"])  # fmt: skip
def test_whatever_fails_leaves_the_old_output_as_it_was(error, where, saved, tmp_path, monkeypatch):
    before = bytes_of(saved)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"fxc.artifact.{where}", fail)
        with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)) as caught:
            store.save(net(), saved, manifest={"new": True}, overwrite=True)
        with pytest.raises((ResourceError, type(error))):
            store.save(net(), tmp_path / "fresh", manifest={})
    if isinstance(error, OSError):
        assert str(saved) in str(caught.value) and "try: " in str(caught.value)
    assert bytes_of(saved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    store.read(saved)


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_is_undone(call, saved, tmp_path, monkeypatch):
    before, rename, calls = bytes_of(saved), Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="Input/output"):
        store.save(net(), saved, manifest={"new": True}, overwrite=True)
    assert bytes_of(saved) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_real_limit_on_file_size(saved, tmp_path):
    big = parse_program(NET.replace("f32[4]", "f32[50000, 4]").replace("%3: f32[s0, 4]", "%3: f32[50000, 4]")
                        .replace("aten.maximum(%2, @mask)", "aten.maximum(@mask, @mask)").replace("(%1, @", "(%1, @"),
                        {**constants(), "mask": torch.zeros(50_000, 4)})  # fmt: skip
    before, limits = bytes_of(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="could not be written"):
            store.save(big, saved, manifest={}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_of(saved) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(store, "save_file", None)
    with pytest.raises(ResourceError, match="not enough space"):
        store.save(net(), tmp_path / "out", manifest={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("fsync", 4), ("rename", 1), ("rename", 2), ("rmtree", 1)])
def test_a_killed_run_leaves_the_old_output_or_none_and_the_next_one_cleans_up(name, call, saved, tmp_path):
    child = os.fork()
    if child == 0:
        owner = {"fsync": os, "rename": Path, "rmtree": shutil}[name]
        original, calls = getattr(owner, name), []

        def killing(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killing)
        try:
            store.save(net(), saved, manifest={"new": True}, overwrite=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if (name, call) != ("rename", 2):
        assert ("new" in store.read(saved).manifest) == (name == "rmtree")
    else:
        assert not saved.exists()
    with pytest.raises(UsageError, match="not empty"):  # what was moved aside is back
        store.save(net(), saved, manifest={})
    store.read(saved)
    store.save(net(), saved, manifest={"newer": True}, overwrite=True)
    assert store.read(saved).manifest["newer"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_writers_exclude_each_other(tmp_path):
    out = tmp_path / "out"
    with staging.staged(out, nbytes=0) as folder:
        (folder / "x").write_text("first")
        with pytest.raises(ResourceError, match="another process is writing"):
            store.save(net(), out, manifest={})
        store.save(net(), tmp_path / "other", manifest={})
    assert (out / "x").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_file_that_happens_to_be_named_like_the_lock_stays(tmp_path):
    (tmp_path / "out.lock").write_text("versions of packages")
    store.save(net(), tmp_path / "out", manifest={})
    assert (tmp_path / "out.lock").read_text() == "versions of packages"
    with (tmp_path / "out.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process"):
            store.save(net(), tmp_path / "out", manifest={}, overwrite=True)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    for wrong in ({"x": torch.float32}, {"x": float("nan")}, {"sha256": "x"}, {"files": {}}):
        with pytest.raises(UsageError, match="manifest"):
            store.save(net(), out, manifest=wrong)
    for name in ("fxc.json", "program.fxc", "x.safetensors", INDEX, "a/./b", "a//b"):
        with pytest.raises(UsageError):
            store.save(net(), out, manifest={}, extra_files={name: b""})
    for name in ("../x", "/x", ""):
        with pytest.raises(InputRefused):
            store.save(net(), out, manifest={}, extra_files={name: b""})
    with pytest.raises(ResourceError, match="No such file"):
        store.save(net(), out, manifest={}, extra_files={"x": tmp_path / "nothing"})
    with pytest.raises(UsageError, match="no values"):
        store.save(parse_program(NET), out, manifest={})
    given = constants()
    given["up.scale"][0] = torch.nan
    with pytest.raises(VerificationFailed, match=r"up\.scale"):
        store.save(parse_program(NET, given), out, manifest={})
    orphan = net()
    orphan.constants["orphan"] = torch.zeros(1)
    with pytest.raises(VerificationFailed, match="orphan"):
        store.save(orphan, out, manifest={})
    assert not list(tmp_path.iterdir())
