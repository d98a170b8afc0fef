"""Texts of programs that fxc did not write: none becomes code, none ends in a traceback."""

import json

import pytest
import torch
from artifacts import NET, constants, net

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import store
from fxc.errors import FxcError, InputRefused
from fxc.ir import Program, check, parse_program


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


@pytest.mark.fault(33)
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


@pytest.mark.fault(33)
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
