"""Networks of images in static int8: milliseconds beside torch in float32 and bfloat16, and what the digits models lose.

    python -m benchmarks.images --threads 1

The networks of ImageNet's size have random weights and say nothing of accuracy; the digits models of examples/ do. Activations
are channels last everywhere. A full run writes benchmarks/results/images-<cpu>.json and .md; one with --quick is only printed.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fxc
from benchmarks import table
from benchmarks.output import RESULTS, note, quiet, write
from benchmarks.timing import Call, interleave
from examples import digits
from fxc.kernel_bench.files import slug, versions_text
from fxc.lower.cpu import lower_cpu
from fxc.lower.runnable import runnable

SIDE = 224
PASSES = "int8:mode=static"


def resnet18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "num_labels": 1000}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))


def regnet_x() -> nn.Module:
    from transformers import RegNetConfig, RegNetForImageClassification

    sizes = {"depths": [2, 6, 12, 2], "hidden_sizes": [64, 128, 288, 672], "groups_width": 16, "num_labels": 1000}
    return RegNetForImageClassification(RegNetConfig(layer_type="x", **sizes))


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` with the statistics of `images` in its batch norms, as after training."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


def timed(name: str, make: Callable[[], nn.Module], batches: tuple[int, ...], rounds: int) -> list[dict]:
    """A row for each batch size: the milliseconds of a call of float32, of bfloat16, and of static int8."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, SIDE, SIDE)
    model = settled(make().eval(), images)
    note(f"compiling {name}")
    calib = [{"pixel_values": each} for each in images.split(2)]
    # Random weights amplify every rounding: the gates would judge that.
    made = fxc.optimize(model, (images[:2],), PASSES, calib=calib, dtype="float32", verify=False)
    lowered, report = lower_cpu(made.program)
    run = runnable(lowered, "cpu", "eager")
    plain = model.to(memory_format=torch.channels_last)
    half = copy.deepcopy(plain).bfloat16()
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        forms = {"float32": (plain, x), "bfloat16": (half, x.bfloat16()), "int8": (run, x)}
        with torch.no_grad():
            times = interleave({form: Call(lambda _, f=f, x=x: f(x)) for form, (f, x) in forms.items()}, rounds)
        rows.append({
            "name": name, "batch": batch, "ms": {form: round(each.median, 3) for form, each in times.items()},
            "rounds": {form: each.rounds for form, each in times.items()},
            "layers": dict(Counter(each.op for each in report)),
            "stay_int8": sum("stays int8" in each.reason for each in report),
        })  # fmt: skip
    return rows


def accuracies() -> list[dict]:
    """Of the digits models, the share of held-out images that is read right, before and after."""
    rows = []
    for name in digits.MODELS:
        model, example = getattr(digits, name)()
        made = fxc.optimize(model, example, PASSES, calib=digits.calibration())
        rows.append({"name": name, "float32": digits.accuracy(model), "int8": digits.accuracy(made)})
    return rows


def markdown(report: dict) -> str:
    machine = report["hardware"]
    lines = [
        f"# Networks of images in static int8, {machine['cpu']}",
        "",
        f"{machine['cores']} cores ({', '.join(machine['flags'])}), threads: {report['threads']}, load before: "
        f"{report['load_before']}, median of {report['rounds']} interleaved rounds; torch is eager and channels last, fxc is "
        f"`{PASSES}`, eager. Weights are random. {versions_text(report['versions'])}.",
        "",
        "| network | batch | torch float32, ms | torch bfloat16, ms | fxc int8, ms | over float32 | over bfloat16 | layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["timed"]:
        ms = row["ms"]
        faster = " | ".join(f"{ms[form] / ms['int8']:.2f}x" for form in ("float32", "bfloat16"))
        forms = ", ".join(f"{count} {form}" for form, count in row["layers"].items())
        cells = " | ".join(f"{ms[form]:.2f}" for form in ("float32", "bfloat16", "int8"))
        lines.append(
            f"| {row['name']} | {row['batch']} | {cells} | {faster} | {forms}; {row['stay_int8']} give int8 on |"
        )
    lines += ["", "| digits model | float32 | int8 |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['float32']:.1%} | {row['int8']:.1%} |" for row in report["accuracy"]]
    return "\n".join(lines) + "\n"


NETWORKS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2, "RegNetX": regnet_x}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one network, few rounds, nothing written")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    quiet()
    load, rounds = round(os.getloadavg()[0], 2), 2 if given.quick else 7
    networks = dict(list(NETWORKS.items())[:1]) if given.quick else NETWORKS
    found = [row for name, make in networks.items() for row in timed(name, make, (1,) if given.quick else (1, 8), rounds)]
    report = {
        "hardware": table.hardware(), "versions": table.versions(), "threads": given.threads, "load_before": load,
        "rounds": rounds, "timed": found, "accuracy": accuracies(),
    }  # fmt: skip
    if not given.quick:
        write(RESULTS / f"images-{slug(report['hardware']['cpu'])}.json", report, md=markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
