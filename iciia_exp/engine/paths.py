"""Where things lie on disk."""

from __future__ import annotations

from pathlib import Path

import platformdirs

__all__ = ["CONF_DIR", "resolve_cache_dir"]

_PACKAGE = Path(__file__).resolve().parents[1]

#: The configuration: inside the package in a wheel, beside it in a checkout.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Return the absolute cache folder; None is the user's cache directory for this package."""
    if cache_dir is None:
        return Path(platformdirs.user_cache_dir("iciia_exp", appauthor=False))
    return Path(cache_dir).expanduser().resolve()
