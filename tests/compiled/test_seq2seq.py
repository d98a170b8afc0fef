"""Encoders with decoders generate: the encoder once, then steps of the decoder over a cache."""

import pytest
import torch
import transformers
from seq2seq import CLASSES, CONFIGS, built, greedy, inputs_of

import fxc
from fxc.errors import CaptureFailed, FxcError
from fxc.frontend import calls
from fxc.ir.binding import bind

NAMES = list(CLASSES)


@pytest.fixture(scope="module")
def compiled():
    made = {}

    def get(name, passes=""):
        if (name, passes) not in made:
            made[name, passes] = fxc.optimize(built(name), passes=passes, verify=bool(passes))
        return made[name, passes]

    return get


def are_likeliest(ids, model, name):
    """Whether each token of `ids` is the likeliest after those before it, or as good as that, by the program itself: by the
    definitions of its operators, and without a cache."""
    whole = bind(model.program, (), inputs_of(name) | {"decoder_input_ids": ids[:, :-1]})
    with torch.no_grad():
        logits = model.program.module()(*whole)[model.program.signature.outputs.index("logits")]
    scale = 0.02 * logits.abs().amax()
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # by min_new_tokens
    return bool((logits.amax(-1) - logits.gather(-1, ids[:, 1:, None])[..., 0] < scale).all())


@pytest.mark.parametrize("name", NAMES)
def test_generates_the_tokens_of_the_original(compiled, name):
    model = compiled(name)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        found = greedy(model, name, **options)
        assert torch.equal(found, greedy(built(name), name, **options)), options
    assert len(found.unique()) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_int8_generates_as_its_program_without_a_cache_also_when_loaded(compiled, name, tmp_path):
    model = compiled(name, "int8")
    model.save(tmp_path / "out")
    options = {"max_new_tokens": 9, "min_new_tokens": 9}
    found = greedy(model, name, **options)
    assert found.shape == (2, 10) and are_likeliest(found, model, name)
    assert not are_likeliest(found.roll(1, 0), model, name)
    assert torch.equal(greedy(fxc.load(tmp_path / "out"), name, **options), found)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_runs_once_and_the_decoder_has_none_of_its_weights(compiled, name):
    model = compiled(name)
    ran = {part: 0 for part in model.parts()}
    hooks = []
    for part, (_, module) in model.parts().items():
        hooks.append(module.register_forward_hook(lambda *_, part=part: ran.update({part: ran[part] + 1})))
    hooks.append(model.lower().register_forward_hook(lambda *_: ran.update(whole=1)))
    model.generate(**inputs_of(name), max_new_tokens=7, min_new_tokens=7, do_sample=False)
    for hook in hooks:
        hook.remove()
    assert ran == {"encoder": 1, "decoder": 7}
    of_encoder, of_decoder = (set(program.constants) for program, _ in model.parts().values())
    assert of_encoder | of_decoder == set(model.lowered.constants)
    assert len(of_encoder & of_decoder) <= 1  # the table of tokens
    assert all(".decoder." in f".{each}" for each in of_decoder - of_encoder - {"final_logits_bias"})


@pytest.mark.parametrize("name", NAMES)
def test_called_as_the_original_whole_and_step_by_step(compiled, name):
    model, original = compiled(name), built(name)
    inputs, ids = inputs_of(name), torch.randint(4, 96, (2, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = original(**inputs, decoder_input_ids=ids)
    found = model(**inputs, decoder_input_ids=ids)
    assert type(found) is type(expected) and list(found) == list(expected)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    made = model.get_encoder()(**inputs)
    torch.testing.assert_close(made.last_hidden_state, expected.encoder_last_hidden_state, rtol=1e-4, atol=1e-4)
    for given in ({"encoder_outputs": made}, inputs):
        cache, logits = None, []
        for part in ids.split((3, 1, 4), 1):
            output = model(**given, decoder_input_ids=part, past_key_values=cache)
            cache = output.past_key_values
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected.logits, rtol=1e-4, atol=1e-4)
    assert "past_key_values" not in model(**inputs, decoder_input_ids=ids, use_cache=False)


def test_a_pruned_one_generates_with_fewer_heads():
    model = fxc.optimize(built("t5"), passes="prune:heads=0.25:uniform=true,int8")
    assert model.new_cache() is not None
    widths = {tuple(n.meta["val"].shape[1::2]) for n in model.program.placeholders if n.meta["val"].ndim == 4}
    assert widths == {(3, 8)}
    found = model.generate(**inputs_of("t5"), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert are_likeliest(found, model, "t5")


def test_what_it_does_not_take(compiled):
    model, inputs = compiled("t5"), inputs_of("t5")
    ids = torch.ones(2, 3, dtype=torch.int64)
    made = model.get_encoder()(**inputs)
    mask = torch.ones_like(ids)
    mask[0, 2] = 0
    refused = {
        "decoder_attention_mask has zeros": inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask},
        "decoder_input_ids is missing": inputs,
        "decoder_input_ids is missing, or no matrix": {"encoder_outputs": made},
        "besides encoder_outputs": inputs | {"decoder_input_ids": ids, "encoder_outputs": made},
        "encoder_outputs has no": {
            "encoder_outputs": transformers.modeling_outputs.BaseModelOutput(made.last_hidden_state), "decoder_input_ids": ids
        },
        "attention_mask is another": {
            "encoder_outputs": made, "decoder_input_ids": ids, "attention_mask": torch.ones_like(inputs["attention_mask"])
        },
        "cannot be the cache": inputs | {"decoder_input_ids": ids, "past_key_values": transformers.DynamicCache()},
    }  # fmt: skip
    for match, given in refused.items():
        with pytest.raises(FxcError, match=match):
            model(**given)


def test_one_that_was_captured_by_examples_does_not_generate():
    ids = torch.ones(2, 5, dtype=torch.int64)
    model = fxc.optimize(built("t5"), {"input_ids": ids, "decoder_input_ids": ids[:, :3]}, passes="", verify=False)
    assert not hasattr(model, "generate")


def test_where_no_cache_can_be_captured_generate_says_why(monkeypatch):
    def fails(*_):
        raise CaptureFailed("the cache is a snake")

    monkeypatch.setattr(calls, "_shapes_written", fails)
    model = fxc.optimize(CLASSES["t5"](CONFIGS["t5"]()), passes="", verify=False)
    assert not hasattr(model, "generate")
    with pytest.raises(AttributeError, match="the cache is a snake"):
        model.generate(**inputs_of("t5"))
    assert model(**inputs_of("t5"), decoder_input_ids=torch.ones(2, 3, dtype=torch.int64)).logits.shape == (2, 3, 96)
