"""fxc push."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fxc
from fxc.artifact import store
from fxc.cli.export import FORMATS, exported
from fxc.errors import UsageError
from fxc.publish import exported as exports
from fxc.publish.card import LOADING, card
from fxc.publish.push import CARD, push
from fxc.report.console import Output, size
from fxc.safety import listed


def push_model(output: Output, artifact: Path, repo: str, kind: str, private: bool | None, dry_run: bool) -> None:
    """Upload an artifact, what an export makes of it, or a folder that `fxc export` wrote, in the format that it has. dry_run:
    print the card and upload nothing."""
    if kind not in LOADING:
        raise UsageError(f"there is no format {kind!r}", where="--format", hint=f"one of {', '.join(LOADING)}")
    written = None if (artifact / store.MANIFEST).exists() else exports.kind_of(artifact)
    if written is not None:
        if kind not in ("artifact", written):
            raise UsageError(
                f"this is an export in the format {written}", where=artifact, why=f"--format is {kind}",
                hint="leave --format out, or give the artifact that it was made of",
            )  # fmt: skip
        files, metadata = exports.files_of(artifact, written), exports.metadata_of(artifact)
        _upload(output, artifact, files, repo, written, {}, metadata, private, dry_run)
        return
    with output.doing(f"reading {artifact}"):
        found = store.read(artifact)
    with tempfile.TemporaryDirectory() as temporary:
        folder, files = artifact, [*found.manifest["files"], store.MANIFEST, store.PAGE]
        if kind in FORMATS:
            folder = Path(temporary) / "export"
            exported(output, fxc.load(artifact), folder, kind)
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        _upload(output, folder, files, repo, kind, found.manifest, found.program.metadata, private, dry_run)


def _upload(
    output: Output, folder: Path, files: list[str], repo: str, kind: str, manifest: Mapping[str, Any],
    metadata: Mapping[str, Any], private: bool | None, dry_run: bool,
) -> None:  # fmt: skip
    files = sorted(name for name in files if (folder / name).is_file())
    nbytes = sum((folder / name).stat().st_size for name in files)
    text = card(manifest, metadata, repo, kind, nbytes)
    if dry_run:
        output.block(text)
        output.json({"repo": repo, "format": kind, "bytes": nbytes, "card": text, "pushed": False})
        return
    with output.doing(f"uploading {size(nbytes)} to {repo}"):
        made = push(folder, files, repo, text, private=private)
    if not made.card:
        output.line(f"its {CARD} stays as it is there; --dry-run prints what fxc would say")
    if made.stays:
        output.line(f"what was there before stays: {listed(made.stays)}")
    output.line(f"pushed to {made.url}")
    output.json({"repo": repo, "format": kind, "bytes": nbytes, "card": text, "pushed": True, "url": made.url,
                 "card_written": made.card})  # fmt: skip
