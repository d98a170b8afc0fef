"""A folder to a repository of the Hugging Face hub, with a card."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxc.errors import InputRefused, ResourceError, UsageError, first_line
from fxc.safety import listed

CARD = "README.md"
MARK = "fxc.json"
"""Of a repository that an artifact was pushed to."""
REPLACED = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "program.fxc", "fxc.json", "report.html", "plan.json",
    "model.onnx", "model.onnx.data", "model.pt2", "names.json", "fxc_export.json",
)  # fmt: skip
"""What an earlier push has left, and goes where this one has no such file; what others put there stays."""


@dataclass(frozen=True)
class Pushed:
    """url: of the repository; card: whether the card was written, which is not where there is one already; stays: the weights
    that were there before and that fxc did not put there."""

    url: str
    card: bool
    stays: list[str]


def push(
    folder: Path, files: Sequence[str], repo: str, card: str, *, private: bool | None = None, api: Any = None
) -> Pushed:
    """Upload `files` of `folder`, and nothing else that lies there, to the model repository `repo`, which is made where there
    is none, and `card` as its README.md where it has none. private: of a repository that is made; api: a
    `huggingface_hub.HfApi`.

    Raises `InputRefused` where one of the files is a link, `UsageError` for a name that is none and without the right to write
    there, `ResourceError` where the hub does not answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    if api is None and constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set: nothing is uploaded", where=repo, hint="unset it to push")
    if links := [name for name in files if (folder / name).is_symlink()]:
        raise InputRefused(f"these are links, and may lead anywhere: {listed(links)}", where=folder)
    api = HfApi(library_name="fxc") if api is None else api
    try:
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        there = set(api.list_repo_files(repo))
        has_card, is_ours = CARD in there, MARK in there
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload a model compressed by fxc",
            allow_patterns=[glob.escape(name) for name in files if name != CARD],
            delete_patterns=list(REPLACED) if is_ours else None,
        )  # fmt: skip
        if not has_card:
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo, commit_message="Say what it is")
    except HFValidationError as error:
        raise UsageError("this is no name of a repository", where=repo, why=first_line(error), hint="USER/NAME") from error
    except LocalTokenNotFoundError as error:
        raise UsageError("nobody is logged in", where=repo, why=first_line(error), hint="hf auth login") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            hint = "hf auth login, with a token that may write there"
            raise UsageError("the hub does not let you write there", where=repo, why=first_line(error), hint=hint) from error
        raise ResourceError("the hub refused", where=repo, why=first_line(error), hint="try again later") from error
    except (HTTPError, OSError) as error:  # the network
        raise ResourceError("the hub cannot be reached", where=repo, why=first_line(error), hint="try again later") from error
    found = (name for name in there - set(files) if any(fnmatch.fnmatch(name, each) for each in REPLACED))
    return Pushed(str(url), not has_card, [] if is_ours else sorted(found))
