"""A student without weights: a Hugging Face configuration, whose model begins with random numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxc.errors import UsageError
from fxc.source.checkpoint import OTHER_FORMATS, PICKLES, check_config_file
from fxc.source.load import Loaded, quiet_transformers


def is_configuration(model: Any) -> bool:
    """Whether this is a configuration of transformers, or a folder with one and no weights of any format."""
    if isinstance(model, (str, Path)):
        folder = Path(model).expanduser()
        is_described = folder.is_dir() and (folder / "config.json").is_file() and not (folder / "fxc.json").exists()
        return is_described and not any(path.suffix in PICKLES | OTHER_FORMATS for path in folder.iterdir())
    return hasattr(model, "model_type") and hasattr(model, "to_json_string") and not isinstance(model, (type, nn.Module))


def fresh(model: Any, like: str | None, dtype: torch.dtype | None, seed: int, trust_remote_code: bool = False) -> Loaded:
    """The model that a configuration describes, or the folder of one, its weights drawn by `seed`.

    Its class is the one that the configuration names; where it names none, that for the task of the class `like`, as
    ...ForCausalLM. dtype: None for the configuration's. Raises UsageError where transformers makes no such model of it.
    """
    folder = Path(model).expanduser() if isinstance(model, (str, Path)) else None
    if folder is not None:
        check_config_file(folder, trust_remote_code=trust_remote_code)
    with quiet_transformers(), torch.random.fork_rng(devices=()):
        import transformers

        torch.manual_seed(seed)
        try:
            config = model if folder is None else transformers.AutoConfig.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )  # fmt: skip
            named = (getattr(config, "architectures", None) or [like or ""])[0]
            task = re.search(r"For[A-Z]\w*\Z", named)
            auto = getattr(transformers, f"AutoModel{task[0] if task else ''}", transformers.AutoModel)
            own = getattr(transformers, named, None)
            kind = own if own is not None and getattr(own, "config_class", None) is type(config) else None
            wanted = dtype or getattr(config, "dtype", None) or torch.float32
            options = {"dtype": wanted} | ({} if kind else {"trust_remote_code": trust_remote_code})
            made = (kind._from_config if kind else auto.from_config)(config, **options)
        except Exception as error:
            # Any fault of a configuration shows as an error of any kind; this one says which, and is kept as the cause.
            raise UsageError(
                f"transformers {transformers.__version__} makes no model of this configuration", where=folder or "student",
                why=f"{type(error).__name__}: {str(error).strip()[:400]}",
                hint='check its sizes, and that "architectures" names the class of the model',
            ) from error
    name = None if folder is None else str(model)
    described = {"kind": "configuration", "id": name, "class": type(made).__name__, "seed": seed}
    return Loaded(made.eval().requires_grad_(False), None, folder, described)
