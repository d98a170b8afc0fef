"""recover and distill: what is left of a model, or another one, taught by the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fxc.compiled.model import CompiledModel
from fxc.compiler import optimize
from fxc.errors import UsageError
from fxc.passes.base import Pass, options_of
from fxc.passes.prune.prune import Prune
from fxc.passes.recover.recover import Recover


def recover(model: Any, data: Any, teacher: Any = None, example_inputs: Any = None, **options: Any) -> CompiledModel:
    """Train a model that was made smaller until it does again what it did, and return it.

    model: as `fxc.optimize` takes it, above all an artifact or what `fxc.load` and `fxc.optimize` return; it is not changed.
    data: what it is trained on: the path of a text, of a .jsonl file or of a folder of images, or an iterable of what one call
    takes. teacher: the model as it was, or a better one, of the same vocabulary or labels; without one, loss="task" trains on
    the next token or on labels. Inputs and outputs of the two are matched by name, and layers and heads may be gone.
    options: those of the pass `recover` (loss, steps, minutes, batch, rate, ...) and of `fxc.Options`.

    What is packed stays packed, what is zero stays zero, and the better of before and after on samples held out is kept. The
    report lists what the model went through before, and this. Raises `UsageError` where the teacher cannot teach this model.
    """
    own, others = _apart(options)
    step = Recover(**own)
    check_is_taught(step, teacher)
    return optimize(model, example_inputs, [step], teacher=teacher, train=data, **others)


def distill(
    teacher: Any, student: Any = None, data: Any = None, example_inputs: Any = None, *,
    student_layers: Iterable[int] | None = None, **options: Any,
) -> CompiledModel:  # fmt: skip
    """Train another, smaller model to do what `teacher` does (Hinton et al., arXiv 1503.02531), and return it.

    teacher, student: models or sources, as `fxc.optimize` takes them. The student may also be a Hugging Face configuration, or
    a folder that holds a config.json and no weights: its weights begin at random, by `seed`. student_layers: instead of a
    student, the numbers of the teacher's layers that it consists of, from 0 on, with their weights (Sanh et al., arXiv
    1910.01108). data, options: as of `recover`; where the student has no tokenizer, the teacher's goes with it.

    Raises `UsageError` where the vocabularies, labels or widths of the two do not agree, or a layer does not exist.
    """
    if data is None:
        raise UsageError("there is no data to train on", where="data", hint="fxc.distill(teacher, student, data)")
    own, others = _apart(options)
    model, passes, taught_by = student_of(teacher, student, student_layers, Recover(**own))
    return optimize(model, example_inputs, passes, teacher=taught_by, train=data, **others)


def student_of(
    teacher: Any, student: Any, layers: Iterable[int] | None, step: Recover
) -> tuple[Any, list[Pass], Any]:
    """What is compiled, with which passes, and its teacher. Of a student that is made of layers of its teacher that is the
    teacher itself, which teaches what is left of it. Raises UsageError unless there is one student."""
    if (student is None) == (layers is None):
        what = "there is no student" if student is None else "there are two students"
        raise UsageError(what, where="distill", hint="give either a student, or the layers of the teacher that are to be one")
    if layers is None:
        return student, [step], teacher
    keep = ";".join(map(str, layers))
    if not keep:
        raise UsageError("a student of no layers is none", where="student_layers", hint="as in 0,2,4")
    return teacher, [Prune(keep=keep), step], None


def check_is_taught(step: Recover, teacher: Any) -> None:
    """Raises UsageError where nobody says what is right."""
    if teacher is None and step.loss != "task":
        raise UsageError(
            "there is no teacher", where="recover",
            why="what it is compared with is the model as it was before it was compressed",
            hint="give the uncompressed model, or with loss=task nothing but data that has next tokens or labels",
        )  # fmt: skip


def _apart(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the pass, and all others."""
    names = {field.name for field in options_of(Recover)}
    own = {name: value for name, value in options.items() if name in names}
    return own, {name: value for name, value in options.items() if name not in names}
