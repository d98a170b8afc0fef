"""A compiled causal language model, with Hugging Face's generation loop around one program for prefill and decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fxc.compiled.model import AS_IT_IS, CompiledModel, check_is_not_traced
from fxc.errors import InputRefused, UsageError, first_line
from fxc.frontend.hf_cache import cache_of, check_is_dynamic, tensors_of, write
from fxc.ir.cache import default_positions, empty_cache
from fxc.ir.next_token import losses_of
from fxc.lower.runnable import runnable
from fxc.neutral import one_at_a_time
from fxc.runtime.last_logits import last_logits
from fxc.runtime.static_cache import CAPACITY, SlotCache, StaticDecoder, static_decoder

# For fewer new tokens than this no decode step is made: that takes as long as some of them.
WORTH_A_STEP = 16
_ONE_SEQUENCE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

# What the generation loop hands to a model besides its inputs, and models leave alone.
_PASSED_ON = frozenset({"cache_position", "token_type_ids", "tokenizer", "assistant_tokenizer"})


class Generating(CompiledModel, GenerationMixin):
    """A `CompiledModel` with `generate()`, and what the generation loop asks of a model besides calling it."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.config is None:
            raise UsageError("a model that generates needs its Hugging Face configuration")
        self.generation_config = generation_config_of(self.config, self.files)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Changes nothing: a tied weight is one constant of the program."""

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def new_cache(self, rows: int | None = None) -> Any:
        """An empty cache, for `past_key_values`: of the kind that `generate()` uses for so many rows; without `rows` one that
        can be cut and handed to any method."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, generation_mode: GenerationMode, batch_size: int,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise UsageError(
                f"the cache implementation {generation_config.cache_implementation!r} is not supported",
                hint="leave cache_implementation out",
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            positions = model_kwargs.get("position_ids")
            new = generation_config.max_length - (0 if positions is None else positions.shape[-1])
            may = (
                generation_mode in _ONE_SEQUENCE and generation_config.num_return_sequences == 1
                and not generation_config.return_dict_in_generate and new >= WORTH_A_STEP
            )  # fmt: skip
            model_kwargs["past_key_values"] = self.new_cache(batch_size if may else None)


class CompiledCausalLM(Generating):
    """A `CompiledModel` with `generate()`: greedy, sampling and beam search, batches padded on the left.

    static_cache: whether `generate()` decodes over buffers of a fixed size: True always (`use_static_cache`), False never
    (`use_growing_cache`), None by default, where that gives the same bits and is not slower: one sequence, on a CPU without
    Inductor, whose cache is not handed out. why_growing: what was found to speak against it in this model, or None.
    """

    def __init__(self, *args: Any, static_cache: bool | None = None, capacity: int = CAPACITY, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if (positions := self.program.metadata.get("positions", "arange")) not in ("arange", "mask"):
            raise InputRefused(
                f"the program counts positions by {positions!r}, which this version of fxc does not know",
                hint="compile the model again",
            )
        self._decoder: StaticDecoder | None = None
        self._capacity = capacity
        self.static_cache = static_cache
        self.why_growing: str | None = None
        # Not a submodule: it shares the weights of the lowered one.
        object.__setattr__(self, "_prompt", None)

    def use_static_cache(self, capacity: int = CAPACITY) -> CompiledCausalLM:
        """Let `generate()` decode over buffers of a fixed size, on CUDA as a recorded CUDA graph. Returns the model.

        capacity: slots of the first buffers; a sequence that outgrows them moves to ones of twice the size, and each size
        and batch is recorded once. Prompts, caches that a caller brings and plain calls go through the program as before.
        Raises `UsageError` where this model cannot decode that way.
        """
        self.check_is_whole()
        self._decoder = static_decoder(self.lowered, self.device, self.backend, capacity)
        self.static_cache, self._capacity = True, capacity
        return self

    def use_growing_cache(self) -> CompiledCausalLM:
        """Let `generate()` decode over a cache that grows with each token, whatever the call. Returns the model."""
        self.static_cache, self._decoder = False, None
        return self

    def _pickled_options(self) -> dict[str, Any]:
        return {**super()._pickled_options(), "static_cache": self.static_cache, "capacity": self._capacity}

    def _pays_over_buffers(self, rows: int) -> bool:
        """Whether to decode over buffers where nobody has said so. Makes the step, once, or finds that it is not exact."""
        if rows != 1 or self.device.type != "cpu" or self.backend != "eager" or self.division is not None:
            return False
        if self._decoder is None and self.why_growing is None:
            self._make_exact_decoder()
        return self._decoder is not None

    @one_at_a_time
    def _make_decoder(self) -> None:
        """Set `_decoder`, which a pickle does not hold, if another thread has not done so meanwhile."""
        if self._decoder is None:
            with torch.no_grad(), _disable_current_modes():
                self.use_static_cache(self._capacity)

    @one_at_a_time
    def _make_exact_decoder(self) -> None:
        """Set `_decoder` or `why_growing`, if another thread has not done so meanwhile."""
        if self._decoder is not None or self.why_growing is not None:
            return
        try:
            with torch.no_grad(), _disable_current_modes():
                self._decoder = static_decoder(self.lowered, self.device, self.backend, self._capacity, is_exact=True)
        except UsageError as error:
            self.why_growing = f"{error.what} ({error.why})" if error.why else error.what
        except (IndexError, RuntimeError) as error:  # as of a table of positions that is shorter than what is tried
            self.why_growing = first_line(error)

    @one_at_a_time
    def _prompt_module(self) -> nn.Module:
        """What runs a prompt of which only the last logits are asked for."""
        if self._prompt is None:
            program = last_logits(self.lowered)
            with torch.no_grad(), _disable_current_modes():
                made = self.lower() if program is None else runnable(program, self.device, self.backend)
            object.__setattr__(self, "_prompt", made)
        return self._prompt

    def prepare(self) -> None:
        super().prepare()
        self._prompt_module()

    def __deepcopy__(self, memo: dict) -> CompiledCausalLM:
        memo[id(self._prompt)] = self._prompt
        return super().__deepcopy__(memo)

    def new_cache(self, rows: int | None = None) -> Any:
        """An empty cache, for `past_key_values`: of the kind that `generate()` uses for so many rows; without `rows` one that
        can be cut and handed to any method, unless `static_cache` is True."""
        from transformers import DynamicCache

        over_buffers = self.static_cache
        if over_buffers is None:
            over_buffers = rows is not None and self._pays_over_buffers(rows)
        elif over_buffers:
            self._make_decoder()
        return SlotCache(self._decoder) if over_buffers else DynamicCache()

    def _supports_logits_to_keep(self) -> bool:
        return True

    @torch.compiler.disable(reason=AS_IT_IS)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids [batch, new], attention_mask [batch, past + new] (1 where there is a token), position_ids [batch, new],
        by default what the original takes: counted from the first column, or from the first token of each row;
        logits_to_keep: how many of the last positions to return logits for (0: all), or which, as a tensor of indices.
        Returns logits [batch, new, vocabulary] and the cache, which is updated in place when one is given."""
        check_is_not_traced()
        for name, value in unused.items():
            if value is not None and value is not False and name not in _PASSED_ON:
                raise UsageError(
                    f"the program was captured without the argument {name!r}",
                    hint="leave it out: it takes tokens, mask, positions and a cache, and gives logits and a cache",
                )
        if input_ids is None:
            raise UsageError("the input input_ids is missing")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
            is_tensor = isinstance(input_ids, Tensor)
            what = f"{input_ids.dtype} {list(input_ids.shape)}" if is_tensor else f"a {type(input_ids).__name__}"
            raise UsageError(f"input_ids is {what}, and must be integers, [batch, tokens]", hint="a tensor, as ids[None]")
        batch, new = input_ids.shape
        if not input_ids.numel():
            what = f"input_ids is {[batch, new]}: there is no token in it"
            raise UsageError(what, hint="leave empty batches and prompts out")
        past = self._past(past_key_values, batch)
        length = past[0].shape[2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, length + new, dtype=torch.int64, device=input_ids.device)
        if tuple(attention_mask.shape) != (batch, length + new):
            raise UsageError(
                f"attention_mask is {list(attention_mask.shape)} and must be [{batch}, {length + new}]",
                hint="one column for each token of the past and of input_ids",
            )
        attention_mask = attention_mask.to(torch.int64)
        if position_ids is None:
            position_ids = default_positions(self.program, attention_mask, new)
        position_ids = position_ids.expand(batch, -1)
        decodes = isinstance(past_key_values, SlotCache) and new == 1 and length > 0
        if decodes:
            logits = past_key_values.decode(input_ids, attention_mask, position_ids)
        else:
            is_last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and new > 1 and labels is None
            module = self._prompt_module() if is_last else None
            logits, *present = self.run([input_ids, attention_mask, position_ids, *past], module)
        loss = None if labels is None else losses_of(logits, labels.to(logits.device), "mean")
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep.to(logits.device)]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        if use_cache is False:
            cache = None
        elif past_key_values is None:
            cache = cache_of(present)
        elif isinstance(past_key_values, SlotCache):
            cache = past_key_values
            if not decodes:
                cache.keep(present)
        else:
            cache = past_key_values
            write(cache, present)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _past(self, cache: Any, batch: int) -> list[Tensor]:
        if isinstance(cache, SlotCache):
            if cache.decoder is not self._decoder or cache.batch_size not in (-1, batch):
                raise UsageError(
                    f"the cache is of {cache.batch_size} rows, or of another model",
                    where="past_key_values",
                    hint="let generate() make the cache",
                )
            if cache.length:
                return cache.tensors()
        elif cache is not None:
            check_is_dynamic(cache)
            if tensors := tensors_of(cache):
                return tensors
        return empty_cache(self.program, batch, self.device)


# transformers.pipeline knows models by the names of their classes, and complains of others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("fxc", CompiledCausalLM.__name__)


def generation_config_of(config: Any, files: dict[str, Any]) -> GenerationConfig:
    """The original's generation configuration if it is among `files`, else what its model configuration says."""
    import json
    from pathlib import Path

    if "generation_config.json" in files:
        content = files["generation_config.json"]
        text = content if isinstance(content, bytes) else Path(content).read_bytes()
        try:
            said = json.loads(text)
            made = GenerationConfig.from_dict(said)
            # As a model's own languages, which are left out of one that began as a model's configuration.
            for name, value in said.items():
                if not hasattr(made, name):
                    setattr(made, name, value)
            return made
        except Exception as error:  # whatever transformers objects to
            what = f"transformers cannot read it: {first_line(error)}"
            raise InputRefused(what, where="generation_config.json", hint="mend it, or leave it out") from None
    return GenerationConfig.from_model_config(config)
