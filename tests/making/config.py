"""Configurations as the tests take them apart."""

import re

from iciia_exp.config.paths import CONF_DIR


def methods(*rooms):
    """Return the names of the methods in some rooms of `iciia_exp.methods`."""
    files, pattern = (CONF_DIR / "method").glob("*.yaml"), rf"iciia_exp\.methods\.({'|'.join(rooms)})\."
    return sorted(path.stem for path in files if re.search(pattern, path.read_text()))


def targets(node):
    """Yield every node with a target, nested ones too."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
