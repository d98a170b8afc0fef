"""What each code of an error means: for `fxc explain`, and for docs/errors.md, which is this text."""

from __future__ import annotations

from dataclasses import dataclass

from fxc.errors import CaptureFailed, FxcError, InputRefused, ResourceError, UsageError, VerificationFailed


@dataclass(frozen=True)
class Explained:
    """meaning: of the code; cases: (what happened, what to do) of the usual ones."""

    kind: type[FxcError]
    meaning: str
    cases: tuple[tuple[str, str], ...]

    @property
    def code(self) -> str:
        return f"FXC-E{self.kind.exit_code}"


EXPLAINED = (
    Explained(
        FxcError,
        "fxc itself has a fault: something broke off that should have been caught. Nothing was written.",
        (
            ("a pass broke off", "leave it, or the layer that is named, out (--skip), and report the text with the model's "
             "configuration; FXC_DEBUG=1 shows the whole traceback"),
            ("an operator of torch failed", "try the versions of torch and transformers in constraints.txt"),
        ),
    ),
    Explained(
        UsageError,
        "The command line, or the arguments of a function, ask for what does not exist or does not go together. Nothing was "
        "loaded or written.",
        (
            ("a pass, an option or a value does not exist", "fxc passes lists the passes and their options; the error names "
             "what is near it; a pass of another package needs --plugin MODULE"),
            ("a pass changed nothing", "the layers are packed already, too small, or left out by --skip: fxc inspect shows "
             "them; --allow-noop accepts it"),
            ("a pass needs data", "--calib FILE: a text, a .jsonl file, a folder of images or datasets:NAME:SPLIT"),
            ("passes cannot be in this order", "fxc passes --explain SPEC says which fact stands in the way"),
            ("the output exists", "another folder, or --overwrite, which replaces artifacts alone"),
            ("there is no such model", "a folder with config.json, a hub id, package.module:function, an artifact"),
        ),
    ),
    Explained(
        InputRefused,
        "What was read is damaged, unsafe or of a kind that fxc does not take. Nothing in it was executed.",
        (
            ("a file is truncated, or does not match its hash", "copy or download it again; of an artifact, compile again"),
            ("weights are pickles", "take the model's safetensors version: a pickle can run code when it is read"),
            ("configuration and weights do not belong together", "get all files of the model from one place"),
            ("weights hold NaN or infinities", "repair the checkpoint; of one that was cast to float16, use bfloat16"),
            ("the model asks for code of its own", "read it, and allow it with --trust-remote-code if you trust it"),
            ("an artifact was made with passes of a plugin", "install the plugin, or import it first: --plugin MODULE"),
            ("weights are stored quantized", "begin with the original weights in float32, bfloat16 or float16"),
        ),
    ),
    Explained(
        CaptureFailed,
        "The model could not be made a graph that computes what the model computes.",
        (
            ("its control flow depends on values of tensors", "compile the part that does not (--part), or rewrite it"),
            ("example inputs are missing", "example_inputs=(...) in Python, or package.module:function that returns them"),
            ("a dimension cannot vary", "leave it out of dynamic_shapes (--dynamic)"),
            ("the graph and the model differ", "the model is random, or counts calls: make it a function of its inputs"),
            ("text alone leaves out most of its weights", "--part language_model, or example_inputs with all inputs"),
        ),
    ),
    Explained(
        VerificationFailed,
        "A result was checked and is not what it should be: a gate after a pass, a limit that was set, or a file that does not "
        "read back. Nothing was written.",
        (
            ("outputs or a layer differ by more than the budget", "skip the layer that is named (--skip), take a milder pass "
             "(int8 for int4, groups of 32, algorithm=gptq with --calib), or raise --budget or --layer-budget knowingly"),
            ("which change of which pass it was", "fxc bisect, as the error writes it, finds the rewrite, and "
             "--reproduce writes the smallest part that shows it"),
            ("on held-out data it differs by more", "more or nearer calibration data"),
            ("coverage is below --min-coverage", "--report says of each layer why it stayed"),
            ("no search result meets the budget", "the error names what is nearest and what it lacks"),
            ("an artifact became worse than --fail-over", "look at the history's plot; compile again on newer data"),
        ),
    ),
    Explained(
        ResourceError,
        "Memory, disk, a device or a permission is missing. What was there before is unchanged.",
        (
            ("what a pass learns does not fit", "--calib-disk DIR, fewer or shorter samples, or the option that is named"),
            ("the model does not fit", "--stream reads it piece by piece; --plan says what that takes"),
            ("the disk is full or read-only", "another disk with -o; a killed or failed run goes on with --resume"),
            ("another process writes the same output", "wait for it, or name another folder"),
            ("the device is not there", "fxc doctor says what this machine has"),
        ),
    ),
)  # fmt: skip


def explained(code: str) -> Explained:
    """code: FXC-E5, E5 or 5. Raises `UsageError` for one that does not exist."""
    number = code.upper().removeprefix("FXC-").removeprefix("E")
    found = next((each for each in EXPLAINED if str(each.kind.exit_code) == number), None)
    if found is None:
        known = ", ".join(each.code for each in EXPLAINED)
        raise UsageError(f"there is no code {code!r}", where="code", hint=f"one of {known}")
    return found


def as_text(each: Explained) -> str:
    lines = [f"{each.code} {each.kind.__name__}, exit code {each.kind.exit_code}", "", each.meaning, ""]
    return "\n".join(lines + [f"- {what}: {cure}" for what, cure in each.cases])


def page() -> str:
    """docs/errors.md."""
    first = (
        "Every error says what, where, why and what to do next; with `--json` as an object on stdout. The number of its code "
        "is the exit\ncode of the command line (130 where somebody interrupted it). `fxc explain FXC-E5` prints what stands "
        "here."
    )
    lines = ["# Errors", "", first, ""]
    for each in EXPLAINED:
        lines += [f"## {each.code}: {each.kind.__name__}", "", each.meaning, "", "| what happened | what to do |", "|---|---|"]
        lines += [f"| {what} | {cure} |" for what, cure in each.cases] + [""]
    return "\n".join(lines)
