"""Where what was measured on this machine, or built for it, is kept between processes."""

import os
from pathlib import Path


def folder() -> Path | None:
    """$FXC_CACHE, by default $XDG_CACHE_HOME/fxc or ~/.cache/fxc; None for FXC_CACHE=off, where nothing is kept."""
    given = os.environ.get("FXC_CACHE")
    if given == "off":
        return None
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxc"
