"""Paths: where the configuration lies on disk."""

from pathlib import Path

__all__ = ["CONF_DIR"]

_PACKAGE = Path(__file__).resolve().parents[1]

#: The configuration: inside the package in a wheel, beside it in a checkout.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
