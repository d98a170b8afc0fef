"""How to compile: the one list of options, for `fxc.optimize`, the command line and recipes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from fxc.artifact.staging import check_writable
from fxc.data.calibration import LIMIT, TRAINING, WINDOW, check_amount, check_data
from fxc.errors import UsageError
from fxc.lower.target import check_target
from fxc.passes.base import Pass, check_data_is_given, parse_passes
from fxc.passes.order import order
from fxc.source.load import as_dtype, check_is_model

LEAST_MEMORY = 500_000_000


@dataclass(frozen=True)
class Options:
    """How to compile.

    passes: "int8,prune:heads=0.25" or a list of such items or `Pass` objects, here afterwards a tuple of `Pass`; "" only
    captures. `prune` alone chooses how much goes: `report["passes"]` says what and how it was judged ("notes"), and which pass
    does it again ("repeat").
    dynamic_shapes: which sizes of the inputs vary, where that is not to be found by trying: see `fxc.capture`.
    part: the module of the model to compile alone, by name; "language_model" of a model that reads images too.
    skip: a pattern of module names to leave alone, with all that is in them, or several: globs or "re:...". One that matches
    nothing is a `UsageError`; the report's "skipped" says what each was applied to.
    calib: data for passes that learn from it: the path of a text, of a .jsonl file or of a folder of images, or an iterable
    of what one call takes (see `fxc.data.calibration.calibration_samples`). calib_samples: at most so many samples are
    read of it; every eighth passes do not see, and gates judge them by it. calib_length: tokens in each, of texts.
    train: data for passes that train, of the same kinds, with labels where the loss is of labels; by default they train on
    `calib`. train_samples, train_length: as of `calib`; every eighth sample, and 16 of many, judge the training.
    calib_disk: a folder in which the samples' hidden states are kept, and not in memory, while layers are compressed one after
    another. resume: a folder in which passes save what they have learned, and from which they go on, to the same bytes, where
    an earlier call with the same model, passes and data was killed; the hidden states are there too. It goes at the end.
    teacher: who `recover` is taught by, in the place of the model as it came: another model or source, of the same vocabulary
    or labels. The model may then be a Hugging Face configuration, or a folder that holds a config.json and no weights: its
    weights begin at random, by `seed`. A model without a tokenizer gets that of its teacher.
    tokenizer: the model's tokenizer or processor, which is saved with it and cuts the texts of `calib`, or a folder that holds
    one; of a folder or hub id its own is taken.
    dtype: "auto" keeps the model's own, else "float32", "bfloat16", "float16". device, backend: where and how the result
    runs, "cpu" and "eager" by default.
    revision: branch, tag or commit of a hub id. trust_remote_code: run the code that comes with the model.
    verify: check the capture, and run the gates after every pass. budget, layer_budget: the largest relative error that a
    policy pass may cause in the outputs, and in one layer alone; by default each pass has its own. allow_noop: let a policy
    pass change nothing. dump_dir: a folder for the text of the program before the first pass and after each.
    seed: of all that passes draw at random.
    limit: end after so many rewrites, as `fxc bisect` numbers them; nothing can be resumed then.
    stream: do not load the model: read its weights from their files when they are needed, write what passes make of them to
    files (in `resume`, else in a temporary folder), and let gates judge layers one by one; by default where a model in a
    folder of safetensors does not fit into memory. max_memory: bytes that compiling may take, by default what there are.

    Raises `UsageError` for passes that do not exist.
    """

    passes: str | Iterable[str | Pass] = "int8"
    dynamic_shapes: Any = None
    skip: str | Iterable[str] = ()
    calib: Any = None
    calib_samples: int = LIMIT
    calib_length: int = WINDOW
    train: Any = None
    train_samples: int = TRAINING
    train_length: int = WINDOW
    calib_disk: str | Path | None = None
    resume: str | Path | None = None
    teacher: Any = None
    tokenizer: Any = None
    dtype: str | torch.dtype = "auto"
    device: str | torch.device | None = None
    backend: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    verify: bool = True
    budget: float | None = None
    layer_budget: float | None = None
    allow_noop: bool = False
    dump_dir: str | Path | None = None
    part: str | None = None
    seed: int = 0
    limit: int | None = None
    stream: bool | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(parse_passes(self.passes)))

    def check(self) -> None:
        """What can be found out before a model is loaded: that the passes have an order, that data, dtype, device, backend and
        folders are there and can be used. Raises `UsageError` or `ResourceError`."""
        order(self.passes)
        for name, what, usual in (("calib", "calibration", LIMIT), ("train", "training", TRAINING)):
            data, amount = getattr(self, name), (getattr(self, f"{name}_samples"), getattr(self, f"{name}_length"))
            check_amount(*amount)
            if data is not None:
                check_data(data, what)
            elif amount != (usual, WINDOW):
                hint = f"--{name} FILE, in Python {name}=..."
                raise UsageError(f"there is no {what} data to take so many samples or tokens of", where=name, hint=hint)
        if self.train is not None and not any(each.uses_training() for each in self.passes):
            hint = "--passes ...,recover; passes that learn read --calib"
            raise UsageError("none of the passes trains", where="train", hint=hint)
        if self.teacher is not None:
            check_is_model(self.teacher)
            if not any(each.name == "recover" for each in self.passes):
                hint = "add recover to the passes, or leave the teacher out"
                raise UsageError("no pass is taught by a teacher", where="teacher", hint=hint)
        as_dtype(self.dtype)
        if self.limit is not None and self.limit < 0:
            raise UsageError(f"{self.limit} is no number of rewrites", where="limit", hint="fxc bisect says how many there are")
        if self.limit is not None and self.resume is not None:
            raise UsageError("a run that is cut off is not resumed", where="limit", hint="leave resume out, or the limit")
        if self.max_memory is not None and self.max_memory < LEAST_MEMORY:
            hint = f"torch and transformers alone take about {LEAST_MEMORY / 1e9:.1f} GB"
            raise UsageError(f"{self.max_memory:,} bytes are too few", where="max_memory", hint=hint)
        check_target(self.device, self.backend)
        check_data_is_given(self.passes, self.calib is not None, self.train is not None)
        for folder in (self.dump_dir, self.calib_disk, self.resume):
            if folder is not None:
                check_writable(Path(folder) / "program")


class Keywords(TypedDict, total=False):
    """The fields of `Options` but passes, as the keyword arguments that editors know."""

    dynamic_shapes: Any
    skip: str | Iterable[str]
    calib: Any
    calib_samples: int
    calib_length: int
    train: Any
    train_samples: int
    train_length: int
    calib_disk: str | Path | None
    resume: str | Path | None
    teacher: Any
    tokenizer: Any
    dtype: str | torch.dtype
    device: str | torch.device | None
    backend: str | None
    revision: str | None
    trust_remote_code: bool
    verify: bool
    budget: float | None
    layer_budget: float | None
    allow_noop: bool
    dump_dir: str | Path | None
    part: str | None
    seed: int
    limit: int | None
    stream: bool | None
    max_memory: int | None
