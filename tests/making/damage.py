"""Damage to files of artifacts."""

import json


def unchecked(*folders):
    """Remove the checksums below some folders, as somebody who forges their files would."""
    for folder in folders:
        for path in folder.rglob("checksums.json"):
            path.unlink()


def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def other_json(path):
    """Write valid JSON of another shape, of the same length if there is room."""
    path.write_text(json.dumps([{"a": 1}]).ljust(path.stat().st_size))


DAMAGE = {"flip": flip, "cut": cut, "empty": empty, "json": other_json, "lost": lambda path: path.unlink()}
