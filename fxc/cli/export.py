"""fxc export."""

from __future__ import annotations

from pathlib import Path

import fxc
from fxc.analysis.sizes import on_disk
from fxc.report.console import Output, size
from fxc.safety import listed


def export_model(output: Output, artifact: Path, out: Path, overwrite: bool) -> None:
    with output.doing(f"loading {artifact}"):
        model = fxc.load(artifact)
    with output.doing(f"writing {out}, loading it back and comparing"):
        made = model.save_pretrained(out, overwrite=overwrite)
    if made.zeros:
        output.warn(f"{len(made.zeros)} weights that the program does not have are zero: {listed(made.zeros)}")
    nbytes = on_disk(out)
    fields = made.config.to_dict()
    output.line(f"{fields['architectures'][0]} ({fields['model_type']}), {size(nbytes)}")
    output.line(f"written to {out}: AutoModel.from_pretrained loads it without fxc")
    output.json({"out": str(out), "class": fields["architectures"][0], "bytes": nbytes, "zeros": made.zeros})
