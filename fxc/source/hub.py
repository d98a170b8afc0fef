"""A model of the Hugging Face hub, through its local cache."""

from pathlib import Path

from fxc.errors import InputRefused, first_line
from fxc.source.checkpoint import PICKLE, PICKLE_INDEX, SAFE, SAFE_INDEX, check_config_file, index_files

SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "*.codes", "[1-9]*_*/model.safetensors")


def fetch(
    repo: str, revision: str | None, subfolder: str | None, *, trust_remote_code: bool, allow_pickle: bool
) -> tuple[Path, str]:
    """(folder in the cache, commit). The small files come first; the weights they name only once those are checked."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))

    try:
        snapshot = download(*SMALL, *(["*.py"] if trust_remote_code else []))
        folder = snapshot / (subfolder or "")
        check_config_file(folder, trust_remote_code=trust_remote_code)
        if not constants.HF_HUB_OFFLINE:
            download(*weights_to_download(folder, allow_pickle))
    except LocalEntryNotFoundError as exc:
        offline = constants.HF_HUB_OFFLINE
        raise InputRefused(
            f"not in the local Hugging Face cache{f' at revision {revision}' if revision else ''}",
            where=repo,
            why="HF_HUB_OFFLINE is set: nothing is downloaded" if offline else "the hub does not answer",
            hint=f"where there is network: hf download {repo}; or give a local folder (none here is named {repo})",
        ) from exc
    except (HfHubHTTPError, HFValidationError, OSError) as exc:
        raise InputRefused(
            "cannot get it from the Hugging Face hub",
            where=repo,
            why=first_line(exc),
            hint="check the spelling and --revision; a private or gated model needs `hf auth login` first",
        ) from exc
    return folder, snapshot.name


def weights_to_download(folder: Path, allow_pickle: bool) -> list[str]:
    """Names, not patterns of all there is: many repositories hold their weights several times over."""
    if (folder / SAFE_INDEX).exists():
        return index_files(folder, SAFE_INDEX)
    if not allow_pickle:
        return [SAFE]
    return [SAFE, *(index_files(folder, PICKLE_INDEX) if (folder / PICKLE_INDEX).exists() else [PICKLE])]
