"""Capturing without reading: the same program as a capture that reads, tried on the first layers alone."""

import pytest
import torch
import transformers
from families import _DECODER, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxc.frontend import larger
from fxc.frontend.capture import capture
from fxc.frontend.larger import LAYERS, capture_larger, shortened


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER | {"num_hidden_layers": 4})).eval()


def layers_of(program):
    return {name.split(".layers.")[1].split(".")[0] for name in program.constants if ".layers." in name}


def test_the_program_is_that_of_an_ordinary_capture(model):
    whole = capture(model)
    program, small = capture_larger(model, None, None, True)
    assert str(program) == str(whole)
    assert all(tensor is not None and torch.equal(tensor, whole.constants[n]) for n, tensor in program.constants.items())
    assert layers_of(small) == {str(at) for at in range(LAYERS)} and layers_of(program) == set("0123")


@pytest.mark.parametrize("is_tied", [False, True])
def test_of_a_large_vocabulary_the_first_words_are_tried(is_tied, monkeypatch):
    config = transformers.Qwen2Config(**_DECODER | {"num_hidden_layers": 3, "tie_word_embeddings": is_tied})
    model = transformers.Qwen2ForCausalLM(config).eval()
    count, whole = config.vocab_size, capture(model)
    monkeypatch.setattr(larger, "LARGE", 1000)
    monkeypatch.setattr(larger, "WORDS", 16)
    program, small = capture_larger(model, None, None, True)
    assert str(program) == str(whole) and program.metadata == whole.metadata
    tables = {name: len(each) for name, each in small.constants.items() if "embed_tokens" in name or "lm_head" in name}
    assert set(tables.values()) == {16} and len(tables) == 2 - is_tied
    assert model.lm_head.out_features == len(model.lm_head.weight) == config.vocab_size == count
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


def words_kept(model, example_inputs, monkeypatch):
    """Words in the tables of the small model that is tried, of a model with a vocabulary of 6000."""
    monkeypatch.setattr(larger, "LARGE", 1)
    whole = capture(model, example_inputs)
    program, small = capture_larger(model, example_inputs, None, True)
    assert str(program) == str(whole)
    return max(len(each) for name, each in small.constants.items() if name.endswith("weight"))


_LARGE = {"vocab_size": 6000, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}


def test_the_callers_own_words_are_there(monkeypatch):
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER | _LARGE | {"pad_token_id": None})).eval()
    assert words_kept(model, {"input_ids": torch.tensor([[5, 5999, 7]])}, monkeypatch) == 6000


def test_a_decoder_is_given_no_words_that_its_configuration_names(monkeypatch):
    ends = {"bos_token_id": 5997, "eos_token_id": [5998, 5999], "pad_token_id": None}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER | _LARGE | ends)).eval()
    assert words_kept(model, None, monkeypatch) == larger.WORDS


@pytest.mark.parametrize(("end", "words"), [(5999, 6000), (2, larger.WORDS)])
def test_an_encoder_is_given_the_end_that_its_configuration_names(end, words, monkeypatch):
    config = transformers.BertConfig(**_LARGE | {"num_attention_heads": 2, "eos_token_id": end, "max_position_embeddings": 64})
    assert words_kept(transformers.BertForMaskedLM(config).eval(), None, monkeypatch) == words


class Computed(TorchDispatchMode):
    """The operators that compute with a weight. Where torch is in its fake mode they see its shape alone."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.found = {each.data_ptr() for each in model.parameters()}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        is_fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if not is_fake and not function.is_view and any(each.data_ptr() in self.weights for each in given):
            self.found.append(str(function))
        return function(*args, **kwargs or {})


def test_no_weight_is_read(model):
    with Computed(model) as computed:
        program, small = capture_larger(model, None, None, False)
    assert computed.found == []
    assert small is None and "positions" not in program.metadata and layers_of(program) == set("0123")
    with Computed(model) as computed:
        model(torch.ones(1, 2, dtype=torch.long))
    assert computed.found


def test_lists_within_layers_stay_whole():
    def layer():
        return nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

    model = nn.ModuleDict({"blocks": nn.ModuleList(layer() for _ in range(7)), "few": nn.ModuleList([nn.ReLU()])})
    with shortened(model):
        assert [len(each) for each in model["blocks"]] == [5] * LAYERS and len(model["few"]) == 1
    assert len(model["blocks"]) == 7


def test_a_short_model_is_tried_as_a_whole():
    model = build("bert")[0]
    program, small = capture_larger(model, None, None, True)
    assert small.constants.keys() == program.constants.keys()


def test_the_model_is_whole_again_afterwards(model):
    count = model.config.num_hidden_layers
    with pytest.raises(ZeroDivisionError), shortened(model):
        assert len(model.model.layers) == LAYERS == model.config.num_hidden_layers
        raise ZeroDivisionError
    assert len(model.model.layers) == count == model.config.num_hidden_layers == 4
