"""Compiled models are called as their originals, with clear errors where they cannot be."""

from __future__ import annotations

import shutil
from collections import OrderedDict, namedtuple

import pytest
import torch
from families import Mlp, build
from torch import nn

import fxc
from fxc.compiled.model import compiled_model
from fxc.errors import CaptureFailed, InputRefused, UsageError
from fxc.ir import parse_program, print_program


class Nested(nn.Module):
    """Takes and returns nested structures."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 32)

    def forward(self, x, pair, scale=None, options=None):
        y = self.linear(x) + pair[0]
        if options is not None:
            y = y * options["gain"]
        return {"y": y, "both": (y.sum(-1), [pair[1] * 2]), "none": None, "flag": True}


def nested_inputs(batch: int) -> dict:
    return {
        "x": torch.randn(batch, 16),
        "pair": (torch.randn(batch, 32), torch.randn(batch, 3)),
        "options": {"gain": torch.randn(batch, 1)},
    }


def test_nested_structures_go_in_and_come_out():
    model = Nested().eval()
    compiled = fxc.optimize(model, nested_inputs(4), passes="")
    inputs = nested_inputs(5)
    found, expected = compiled(**inputs), model(**inputs)
    assert list(found) == list(expected) and found["none"] is None
    torch.testing.assert_close(found["y"], expected["y"])
    torch.testing.assert_close(found["both"], expected["both"])
    assert found["flag"] is True
    torch.testing.assert_close(compiled(inputs["x"], **{k: inputs[k] for k in ("pair", "options")})["y"], expected["y"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": None}, "the input x is missing"),
        ({"x": [1.0]}, "x is a list and must be a tensor"),
        ({"x": torch.zeros(2, 17)}, "size 17 in dimension 1"),
        ({"x": torch.zeros(2, 2, 16)}, "has 3 dimensions"),
        ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "is torch.int64"),
        ({"pair": (torch.zeros(2, 32),)}, "a list or tuple of 2"),
        ({"options": {"loss": torch.zeros(2, 1)}}, "a dict with the keys gain"),
        ({"scale": 2.0}, "captured without the argument 'scale'"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, says):
    compiled = fxc.optimize(Nested(), nested_inputs(4), passes="")
    with pytest.raises(UsageError) as caught:
        compiled(**{**nested_inputs(2), **change})
    assert says in str(caught.value)


def test_the_model_is_not_changed():
    model = Mlp().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = fxc.optimize(model, (torch.randn(2, 40),), dtype="bfloat16")
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert compiled(torch.randn(7, 40)).dtype == torch.bfloat16


def test_inputs_are_needed_where_they_cannot_be_known():
    with pytest.raises(UsageError, match="give example_inputs"):
        fxc.optimize(Mlp())


def test_example_inputs_that_the_model_does_not_take():
    with pytest.raises(CaptureFailed, match="the model itself fails on the example inputs"):
        fxc.optimize(Mlp(), (torch.randn(2, 41),))


@pytest.mark.fault(18)
def test_control_flow_on_data_is_refused_in_one_message():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureFailed, match="compile the part that does not"):
        fxc.optimize(Branches(), (torch.randn(2, 3),))


def test_writing_to_a_buffer_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(CaptureFailed, match="writes to its buffer count"):
        fxc.optimize(Counts(), (torch.randn(2, 3),))


def test_in_place_operations_become_functional_ones():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            y.add_(1)
            z = y.view(-1)
            return torch.relu_(y - 3), z

    model = InPlace()
    compiled = fxc.optimize(model, (torch.randn(2, 3),), passes="")
    x = torch.randn(4, 3)
    for a, b in zip(compiled(x), model(x), strict=True):
        assert torch.equal(a, b)


def test_a_view_sees_a_later_write():
    class Aliased(nn.Module):
        def forward(self, x):
            y = x * 2
            z = y.view(-1)
            y.add_(1)
            return z + 1

    x = torch.randn(4, 3)
    assert torch.equal(fxc.optimize(Aliased(), (torch.randn(2, 3),), passes="")(x), Aliased()(x))


def test_a_language_model_is_called_as_the_original():
    model, _ = build("qwen2")
    compiled = fxc.optimize(model, passes="")
    ids = torch.randint(3, 300, (2, 8))
    expected = model(input_ids=ids, labels=ids)
    found = compiled(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    step = compiled(ids[:, :1], past_key_values=found.past_key_values)
    assert step.past_key_values.get_seq_length() == 9 and found.past_key_values is step.past_key_values
    with pytest.raises(UsageError, match="must be \\[2, 8\\]"):
        compiled(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(UsageError, match="inputs_embeds"):
        compiled(ids, inputs_embeds=torch.ones(2, 7, 64))
    from transformers import StaticCache

    with pytest.raises(UsageError, match="a StaticCache cannot be"):
        compiled(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_unknown_backends_and_devices_are_refused():
    with pytest.raises(UsageError, match="no backend 'fast'"):
        fxc.optimize(Mlp(), (torch.randn(2, 40),), backend="fast")(torch.randn(2, 40))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            fxc.optimize(Mlp(), (torch.randn(2, 40),), device="cuda")(torch.randn(2, 40))


def test_positions_come_from_the_mask_where_the_original_takes_them_from_it():
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(5)
    options = {"vocab_size": 320, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(**options, max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=1, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    program = fxc.capture(model)
    program.metadata["positions"] = "mask"
    compiled = compiled_model(program, {}, config=model.config)
    ids = torch.randint(3, 300, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    found = compiled(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1])
    first = compiled(ids[:, :6], attention_mask=mask[:, :6].bool())
    later = compiled(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(later.logits, expected[:, 6:])
    program.metadata["positions"] = "alibi"
    with pytest.raises(InputRefused, match="counts positions by 'alibi'"):
        compiled_model(program, {}, config=model.config)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
BACKENDS = ["eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_ordinary_tensors(backend):
    compiled = fxc.optimize(Mlp(), (torch.randn(2, 40),), backend=backend)
    x = torch.randn(3, 40, requires_grad=True)
    with torch.inference_mode():
        expected = compiled(x).clone()  # also when the first call, which prepares the program, is made in inference mode
    found = compiled(x)
    assert not found.requires_grad and torch.equal(found, expected)
    head = nn.Linear(10, 2)
    head(found).sum().backward()
    assert head.weight.grad.abs().sum() > 0
    found[:, 0] = 0
    assert torch.equal(compiled(x), expected)


def test_logits_to_keep_as_a_number_or_as_indices():
    model, _ = build("qwen2")
    compiled = fxc.optimize(model, passes="", verify=False)
    ids = torch.randint(3, 300, (2, 8))
    for keep in (0, 3, torch.tensor([0, 3]), torch.arange(8) % 2 == 0):
        torch.testing.assert_close(compiled(ids, logits_to_keep=keep).logits, model(ids, logits_to_keep=keep).logits)


class Returns(nn.Module):
    """Returns what `make` makes of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x, extra=None):
        return self.make(x * 2 if extra is None or extra["bias"] is None else x + extra["bias"])


Pair = namedtuple("Pair", "left right")


class OwnDict(dict):
    """A class that an artifact could not name safely."""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda y: Pair(y, y), "a Pair stands where a tensor is expected"),
        (lambda y: {"inner": y.max(-1)}, "inner: a max stands where"),
        (lambda y: {0: y}, "the key 0, which is not a string"),
        (lambda y: OwnDict(y=y), "a OwnDict stands where"),
    ],
)
def test_results_that_would_come_back_as_something_else_are_refused(make, says):
    with pytest.raises(UsageError, match=says):
        fxc.optimize(Returns(make), (torch.randn(2, 3),), passes="")


def test_dicts_come_back_as_they_were():
    model = Returns(lambda y: OrderedDict(z=y, none=None, a={"none": None, "y": (y, [])}))
    inputs = {"x": torch.randn(2, 3), "extra": {"bias": None}}
    compiled = fxc.optimize(model, inputs, passes="")
    x = torch.randn(5, 3)
    for program in (compiled.program, parse_program(print_program(compiled.program), compiled.program.constants)):
        found, expected = compiled_model(program, {})(x, extra={"bias": None}), model(x)
        assert type(found) is OrderedDict and found["none"] is None and found["a"].keys() == {"none", "y"}
        torch.testing.assert_close(found["a"]["y"], expected["a"]["y"])
    assert list(compiled(x, extra={"bias": None})) == ["z", "none", "a"]
    with pytest.raises(UsageError, match="bias is a Tensor; the program was captured with None"):
        compiled(x, extra={"bias": x})


def test_a_compiled_model_does_not_pretend_to_move():
    compiled = fxc.optimize(Mlp(), (torch.randn(2, 40),))
    for same in (compiled.eval, compiled.cpu, compiled.float, lambda: compiled.to("cpu", torch.float32)):
        assert same() is compiled
    assert compiled.train(False) is compiled and not compiled.training
    moves = [compiled.half, compiled.bfloat16, compiled.cuda, nn.Sequential(compiled, nn.Linear(10, 2)).double]
    for move in [*moves, *(lambda to=to: compiled.to(to) for to in (torch.bfloat16, "cuda", "meta"))]:
        with pytest.raises(UsageError, match=r"fxc.load\(directory, device=...\)"):
            move()
    with pytest.raises(UsageError, match="cannot be put into training mode"):
        compiled.train()
    assert not compiled.training and compiled(torch.randn(2, 40)).dtype == torch.float32
    half = fxc.optimize(Mlp(), (torch.randn(2, 40),), dtype="bfloat16")
    assert half.to(torch.bfloat16) is half


class Scaled(Mlp):
    """Has every kind of constant: parameters, one expanded and one shared by two names, a buffer, a plain attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(10))
        self.gain = nn.Parameter(torch.randn(1).expand(10), requires_grad=False)
        self.again = nn.Parameter(self.head.weight.data, requires_grad=False)
        self.plain = torch.randn(10)

    def forward(self, x):
        return torch.nn.functional.linear(super().forward(x) * self.gain + self.shift + self.plain, self.again.t())


@pytest.mark.parametrize("passes", ["", "int8"])
def test_editing_the_model_afterwards_leaves_the_compiled_one_as_it_is(passes):
    model = Scaled().eval()
    compiled = fxc.optimize(model, (torch.randn(2, 40),), passes)
    x = torch.randn(3, 40)
    before = compiled(x).clone()
    edited = [*model.parameters(), *model.buffers(), model.plain]
    pointers = {t.untyped_storage().data_ptr() for t in edited}
    assert not [n for n, t in compiled.program.constants.items() if t.untyped_storage().data_ptr() in pointers]
    with torch.no_grad():
        for tensor in edited:
            tensor.untyped_storage().fill_(0)
    compiled = compiled_model(compiled.program, {})
    assert torch.equal(compiled(x), before)
    assert compiled.program.constants["gain"].stride() == (0,)
    if not passes:
        assert compiled.program.constants["head.weight"].data_ptr() == compiled.program.constants["again"].data_ptr()
