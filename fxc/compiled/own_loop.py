"""Encoders with decoders whose original has a generation loop of its own around that of all models: Whisper's, for language,
task, timestamps and audio longer than a window."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from fxc.compiled.seq2seq import CompiledSeq2SeqLM, Encoder
from fxc.errors import UsageError
from fxc.ir.program import Program


class CompiledWhisper(CompiledSeq2SeqLM, WhisperGenerationMixin):
    """A `CompiledSeq2SeqLM` that generates by Whisper's loop: as there, what is returned is without the tokens that began it
    and the one that ended it."""

    @property
    def model(self) -> Any:
        """What the loop asks of the original's inner model: how many frames the encoder makes one position of."""
        at = [declared.name for declared in self.program.signature.inputs].index(self.main_input_name)
        frames = self.program.placeholders[at].meta["val"].shape[-1]
        strides = SimpleNamespace(stride=(frames // self.config.max_source_positions,)), SimpleNamespace(stride=(1,))
        return SimpleNamespace(encoder=SimpleNamespace(conv1=strides[0], conv2=strides[1]), config=self.config)

    def generate(self, *args: Any, return_token_timestamps: bool | None = None, **kwargs: Any) -> Any:
        """As the original's. Raises `UsageError` for timestamps of single tokens, which are read from attention."""
        if return_token_timestamps:
            raise UsageError(
                "timestamps of tokens and words are read from the decoder's attention, which a program does not give",
                where="return_token_timestamps", hint="ask for return_timestamps, which are those of segments",
            )  # fmt: skip
        return super().generate(*args, **kwargs)

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As of every `CompiledSeq2SeqLM`. attention_mask: which frames are of audio; the loop reads it, the model does not."""
        return super().forward(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """The mask of tokens before this window is a call's to refuse, which it does where it hides some."""
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k != "decoder_attention_mask"})

    def get_encoder(self, modality: str | None = None) -> Encoder:
        return _WithoutMask(self)

    def _postprocess_outputs(self, seek_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Without the cache, whose half for the encoder is not where the loop would cut it into rows."""
        if isinstance(seek_outputs, Mapping):
            seek_outputs = type(seek_outputs)(**{k: v for k, v in seek_outputs.items() if k != "past_key_values"})
        return super()._postprocess_outputs(seek_outputs, *args, **kwargs)


class _WithoutMask(Encoder):
    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class CompiledWithoutLoop(CompiledSeq2SeqLM):
    """A `CompiledSeq2SeqLM` that is called, step by step too, and does not generate: the loop of all models would write
    something else than the original."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            f"{self.program.metadata.get('class')} generates by a loop of its own, which cannot go around a compiled model",
            hint="call the model and its get_encoder(); or generate with the original",
        )


# transformers.pipeline knows models by the names of their classes, and complains of others.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.setdefault("fxc", CompiledWhisper.__name__)


def class_for(program: Program) -> type[CompiledSeq2SeqLM]:
    """The class of a compiled model that generates as the original did."""
    original = getattr(transformers, str(program.metadata.get("class")), None)
    loop = getattr(original, "generate", GenerationMixin.generate)
    if loop is WhisperGenerationMixin.generate:
        return CompiledWhisper
    return CompiledSeq2SeqLM if loop is GenerationMixin.generate else CompiledWithoutLoop
