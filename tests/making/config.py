"""Configurations as the tests take them apart."""


def targets(node):
    """Yield every node with a target, nested ones too."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
