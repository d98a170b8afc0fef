"""A compiled encoder with its decoder, and Hugging Face's generation loop: the encoder once, then steps of the decoder over a
cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from fxc.compiled.generate import Generating
from fxc.compiled.model import AS_IT_IS, check_is_not_traced
from fxc.errors import UsageError
from fxc.frontend.hf_cache import check_is_dynamic, tensors_of, write
from fxc.ir.binding import bind
from fxc.ir.cache import empty_cache, is_of_encoder, is_past, is_present
from fxc.ir.program import Program
from fxc.ir.structure import unflatten
from fxc.lower.runnable import runnable
from fxc.neutral import one_at_a_time
from fxc.runtime.encoder_once import halves

_MASK, _IDS = "attention_mask", "decoder_input_ids"


class CompiledSeq2SeqLM(Generating):
    """A `CompiledModel` of an encoder with a decoder, with `generate()`: greedy, sampling and beam search, whatever the encoder
    reads. A call with `encoder_outputs`, which `get_encoder()` gives, runs the decoder alone, any other the whole."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        names = [declared.name for declared in self.program.signature.inputs]
        self.main_input_name = next(n for n in names if is_of_encoder(n) and not n.endswith("mask"))
        # Not submodules: they share the weights of the lowered one.
        object.__setattr__(self, "_halves", None)

    @one_at_a_time
    def parts(self) -> dict[str, tuple[Program, nn.Module]]:
        """The programs that generation runs, "encoder" and "decoder", and what runs them; made by the first call."""
        if self._halves is None:
            made = halves(self.lowered)
            with torch.no_grad(), _disable_current_modes():
                parts = {
                    name: (part, runnable(part, self.device, self.backend))
                    for name, part in (("encoder", made.encoder), ("decoder", made.decoder))
                }
            object.__setattr__(self, "_halves", parts)
        return self._halves

    def __deepcopy__(self, memo: dict) -> CompiledSeq2SeqLM:
        memo[id(self._halves)] = self._halves
        return super().__deepcopy__(memo)

    def new_cache(self, rows: int | None = None) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        names = {declared.name for declared in self.program.signature.inputs}
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in names})

    def get_encoder(self, modality: str | None = None) -> Encoder:
        """The encoder alone, whose result is `encoder_outputs` of a call."""
        return Encoder(self)

    @torch.compiler.disable(reason=AS_IT_IS)
    def forward(
        self,
        *args: Any,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Mapping[str, Any] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """What the original takes: for the encoder input_ids [batch, length] or what else it reads, attention_mask
        [batch, length] (1 where there is a token, by default everywhere), for the decoder decoder_input_ids [batch, new] after
        the tokens in past_key_values. Returns the original's output with the cache, which is updated in place when one is
        given."""
        check_is_not_traced()
        if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            raise UsageError(
                "decoder_attention_mask has zeros, and the program was captured without one",
                hint="give the rows of decoder_input_ids the same length",
            )
        given = {_MASK: attention_mask, _IDS: decoder_input_ids} | inputs
        given = {name: value for name, value in given.items() if value is not None}
        if encoder_outputs is None:
            present, output = self._whole(args, given, past_key_values)
        elif args:
            raise UsageError("what the encoder reads is given besides encoder_outputs", hint="leave one of them out")
        else:
            present, output = self._step(given, encoder_outputs, past_key_values)
        if use_cache is not False:
            cache = self.new_cache() if past_key_values is None else past_key_values
            write(cache.self_attention_cache, present)
            output = type(output)(**output, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _whole(self, args: tuple, given: dict[str, Any], cache: Any) -> tuple[list[Tensor], Any]:
        """The new cache, and the output without it, of encoder and decoder."""
        tensors = bind(self.program, args, given)
        names = [declared.name for declared in self.program.signature.inputs]
        rows = [t for t, name in zip(tensors, names, strict=True) if not is_past(name)]
        if cache is not None:
            tensors = [*rows, *self._past(cache, len(rows[0]))]
        outputs = self.run(tensors)
        present = [t for t, name in zip(outputs, self.program.signature.outputs, strict=True) if is_present(name)]
        return present, unflatten(self.program.signature.result, outputs)

    def _step(self, given: dict[str, Any], made: Mapping[str, Any], cache: Any) -> tuple[list[Tensor], Any]:
        """The same of the decoder after what the encoder made."""
        ids = given.pop(_IDS, None)
        mask = given.pop(_MASK, None)
        for name, value in given.items():
            if value is not False:
                raise UsageError(f"{name} is given besides encoder_outputs", hint="leave one of them out")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise UsageError(f"{_IDS} is missing, or no matrix of integers", hint="give [batch, tokens]")
        program, module = self.parts()["decoder"]
        past = self._past(cache, len(ids))
        named = dict(zip((i.name for i in self.program.signature.inputs if is_past(i.name)), past, strict=True)) | {_IDS: ids}
        needed = [declared.name for declared in program.signature.inputs]
        if missing := [name for name in needed if name not in named and name not in made]:
            raise UsageError(
                f"encoder_outputs has no {missing[0]}",
                hint="give what get_encoder() of this model makes, or what the encoder reads and no encoder_outputs",
            )
        is_first = not past or not past[0].shape[2]
        known = made.get(_MASK)
        if mask is not None and is_first and (known is None or not torch.equal(mask.to(known), known)):
            raise UsageError("attention_mask is another than that which encoder_outputs was made with", hint="leave it out")
        outputs = self.run([named[name] if name in named else made[name] for name in needed], module, program.signature.outputs)
        found = dict(zip(program.signature.outputs, outputs, strict=True))
        present = [t for name, t in found.items() if is_present(name)]
        return present, Seq2SeqLMOutput(logits=found["logits"], encoder_last_hidden_state=made["last_hidden_state"])

    def _past(self, cache: Any, batch: int) -> list[Tensor]:
        from transformers import EncoderDecoderCache

        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise UsageError(
                f"a {type(cache).__name__} cannot be the cache of an encoder with a decoder",
                where="past_key_values",
                hint="pass what new_cache() gives, or nothing",
            )
        if cache is not None:
            check_is_dynamic(cache.self_attention_cache)
            if tensors := tensors_of(cache.self_attention_cache):
                if tensors[0].shape[0] != batch:
                    what = f"the cache is of {tensors[0].shape[0]} rows, and the tokens of {batch}"
                    raise UsageError(what, where="past_key_values", hint="pass what new_cache() gives, or nothing")
                return tensors
        return empty_cache(self.program, batch, self.device)


class Encoder:
    """The encoder of a compiled model, as the generation loop calls it."""

    def __init__(self, model: CompiledSeq2SeqLM):
        self.model = model
        self.main_input_name = model.main_input_name

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """Takes what the encoder reads, gives its last hidden state and what the decoder needs of it besides."""
        whole, (program, module) = self.model.program, self.model.parts()["encoder"]
        names = [declared.name for declared in whole.signature.inputs]
        unasked = {"return_dict", "output_attentions", "output_hidden_states"}
        given = {name: value for name, value in kwargs.items() if name not in unasked and value is not None}
        # Its inputs are checked as those of a call of the whole, whose decoder reads one token here.
        values = (*args, *given.values())
        like = next((each for each in values if isinstance(each, Tensor) and each.ndim), None)
        if like is None:
            raise UsageError(f"the input {self.main_input_name} is missing")
        given |= {_IDS: torch.zeros(len(like), 1, dtype=torch.int64)}
        inputs = dict(zip(names, bind(whole, args, given), strict=True))
        tensors = [inputs[declared.name] for declared in program.signature.inputs]
        outputs = self.model.run(tensors, module, program.signature.outputs)
        found = dict(zip(program.signature.outputs, outputs, strict=True))
        made = BaseModelOutput(last_hidden_state=found.pop("encoder_last_hidden_state", next(iter(found.values()))))
        needed = {declared.name for declared in self.model.parts()["decoder"][0].signature.inputs} | {_MASK}
        for name, value in found.items():
            made[name] = value
        for name in names:
            if is_of_encoder(name) and name in needed:
                made[name] = inputs[name]
        return made
