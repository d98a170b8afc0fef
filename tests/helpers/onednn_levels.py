"""int8 layers at the extremes of their range, in processes whose oneDNN may use only a part of the CPU's instructions.

python onednn_levels.py FOLDER LEVEL...: each level in a fork of this process, because oneDNN reads ONEDNN_MAX_CPU_ISA once,
when it is first used, and importing takes most of the time. It compares every form of an int8 layer with its definition and
prints whether products of int8 are made "at once" or "in two"; what it says goes to LEVEL.out and LEVEL.err in the folder. The
level "force" is AVX2, and the probes are told that products are exact. Prints the exit status of each as JSON.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ["FXC_CACHE"] = "off"

import torch
from int8_programs import int8_wins, program_of
from lowered import on_cpu

from fxc_kernels import int8_linear as op
from fxc_kernels.cpu import int8_linear, int8_product, ops

torch.set_num_threads(1)


def extremes(rows: int, columns: int):
    """Activations that quantize to 255 and 0 steps without rounding, and weights of 127 and -127 in runs and in turns."""
    x = torch.ones(rows, columns)
    x[1::2, ::2] = 0
    weight = torch.full((24, columns), 127.0)
    weight[1], weight[2, ::2], weight[3, columns // 2 :] = -127, -127, -127
    return x, weight


def compiled_forms(name: str, x, qweight, scale, bias):
    """What Inductor is given, run as it stands."""
    zero = torch.zeros(len(qweight), dtype=torch.int64)
    if name == "int8_linear":
        term = int8_linear.zero_point_term(qweight, scale)
        return [ops.INT8_LINEAR(x, qweight, scale, zero, term, bias)]
    return [ops.SPLIT_LINEAR(x, qweight, scale, zero, bias)]


def check() -> None:
    for name in ("int8_linear", "int8_weight_only_linear"):
        for rows in (1, 2, 5, 64):
            x, weight = extremes(rows, 2048)
            model = torch.nn.Sequential(torch.nn.Linear(2048, 24))
            with torch.no_grad():
                model[0].weight.copy_(weight), model[0].bias.fill_(1.0)
            program = program_of(model, x[:, None].expand(-1, 3, -1).contiguous(), name)
            reference = getattr(op, f"{name}_reference")
            expected = reference(x, *(program.constants[f"0.{part}"] for part in ("qweight", "scale", "bias")))
            assert abs(expected.abs().max() - 127 * 2048) < 2
            operator = program.module()(x[:, None])[0][:, 0]
            lowered, report = on_cpu(program, "eager", measure=int8_wins)
            forms = [operator, lowered(x[:, None])[0][:, 0]]
            forms += compiled_forms(name, x, *(program.constants[f"0.{part}"] for part in ("qweight", "scale", "bias")))
            for found in forms:
                error = (found - expected).abs().max() / expected.abs().max()
                assert error < 1e-5, f"{name}, {rows} rows, {report[0].op}: {error:.2e}"
            assert report[0].op == "int8", report[0].reason
    print("in two" if int8_product.products_saturate() else "at once")


def in_a_fork(folder: Path, level: str) -> int:
    if not (child := os.fork()):
        code = 1
        try:
            for number, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{level}.{kind}", os.O_WRONLY | os.O_CREAT), number)
            if level == "force":
                int8_product.int8_is_exact = op.int_mm_is_exact = lambda: True
                int8_product.products_saturate = lambda: False
            if level != "all":
                os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2" if level == "force" else level
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    print(json.dumps({level: in_a_fork(Path(sys.argv[1]), level) for level in sys.argv[2:]}))
