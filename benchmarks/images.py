"""Networks of images in static int8: milliseconds beside torch in float32 and bfloat16, and what the digits models lose.

    python -m benchmarks.images --threads 1

The networks of ImageNet's size have random weights and say nothing of accuracy; the digits models of examples/ do. Activations
are channels last in torch and fxc. Where openvino and nncf are installed, OpenVINO's static int8 is measured beside. A full run
writes benchmarks/results/images-<cpu>.json and .md; one with --quick is only printed.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import util

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


class Logits(nn.Module):
    """A classifier of transformers, or any model, that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return getattr(out, "logits", out)


def has_openvino() -> bool:
    return all(map(util.find_spec, ("openvino", "nncf")))


def openvino_int8(model: nn.Module, images: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """`model` as OpenVINO runs it with activations and weights in int8 by NNCF, calibrated on `images`, each [B, C, H, W]."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    shape = openvino.PartialShape([-1, *images[0].shape[1:]])
    converted = openvino.convert_model(Logits(model).eval(), example_input=images[0], input=shape)
    quantized = nncf.quantize(converted, nncf.Dataset([each.numpy() for each in images]))
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(quantized, "CPU", options).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.contiguous().numpy()], share_inputs=True, share_outputs=False)[0])


def timed(name: str, make: Callable[[], nn.Module], batches: tuple[int, ...], rounds: int) -> list[dict]:
    """A row for each batch size: the milliseconds of a call of float32, of bfloat16, of static int8, and of OpenVINO's."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, SIDE, SIDE)
    model = settled(make().eval(), images)
    note(f"compiling {name}")
    calib = [{"pixel_values": each} for each in images.split(2)]
    # Random weights amplify every rounding: the gates would judge that.
    made = fxc.optimize(model, (images[:2],), PASSES, calib=calib, dtype="float32", verify=False)
    lowered, report = lower_cpu(made.program)
    run = runnable(lowered, "cpu", "eager")
    peer = openvino_int8(model, images.split(2)) if has_openvino() else None
    plain = model.to(memory_format=torch.channels_last)
    half = copy.deepcopy(plain).bfloat16()
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        forms = {"float32": (plain, x), "bfloat16": (half, x.bfloat16()), "int8": (run, x)}
        forms |= {"openvino": (peer, x.contiguous())} if peer else {}
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
        row = {"name": name, "float32": digits.accuracy(model), "int8": digits.accuracy(made)}
        if has_openvino():
            row["openvino"] = digits.accuracy(openvino_int8(model, digits.calibration()))
        rows.append(row)
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
        "| network | batch | torch float32, ms | torch bfloat16, ms | OpenVINO int8, ms | fxc int8, ms | over float32 "
        "| over bfloat16 | over OpenVINO | layers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["timed"]:
        ms = row["ms"]
        faster = (f"{ms[form] / ms['int8']:.2f}x" if form in ms else "-" for form in ("float32", "bfloat16", "openvino"))
        forms = ", ".join(f"{count} {form}" for form, count in row["layers"].items())
        cells = (f"{ms[form]:.2f}" if form in ms else "-" for form in ("float32", "bfloat16", "openvino", "int8"))
        said = f"{forms}; {row['stay_int8']} give int8 on"
        lines.append(f"| {row['name']} | {row['batch']} | {' | '.join((*cells, *faster, said))} |")
    lines += ["", "| digits model | float32 | fxc int8 | OpenVINO int8 |", "|---|---|---|---|"]
    for row in report["accuracy"]:
        cells = (f"{row[form]:.1%}" if form in row else "-" for form in ("float32", "int8", "openvino"))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
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
