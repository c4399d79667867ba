"""Where the files that runs share lie on disk."""

from __future__ import annotations

from pathlib import Path

import platformdirs

__all__ = ["resolve_cache_dir"]


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Return the absolute cache folder; None is the user's cache directory for this package."""
    if cache_dir is None:
        return Path(platformdirs.user_cache_dir("iciia_exp", appauthor=False))
    return Path(cache_dir).expanduser().resolve()
