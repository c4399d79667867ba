"""Parent categories of classes, from a table on disk.

A table is a CSV file with one row per class: a column that names the class (``wnid``, ``class_name`` or ``class``) and
one that names its parent (``group_name``, ``parent`` or ``group``). That is the form of the tables released with ICIIA
(ACML 2024), so those can be used by path, and of the package's own table for ImageNet's 1,000 classes, which
`scripts/imagenet_parents.py` makes from WordNet 3.0 (copyright 2006 by Princeton University, all rights reserved;
licence beside the table).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iciia_exp.data.readers.files import few, read_csv
from iciia_exp.errors import UserError

__all__ = ["IMAGENET_PARENTS", "PARENTS_FORM", "read_parents"]

#: The package's own table for ImageNet: 85 parents of 4 to 28 classes.
IMAGENET_PARENTS = Path(__file__).parents[1] / "tables" / "imagenet_parents.csv"

#: What a table must be, for messages.
PARENTS_FORM = (
    "a CSV table of parent categories, with a column wnid, class_name or class and a column group_name or parent"
)

# In order of preference: words before numbers, identifiers before words.
_CLASS_COLUMNS = ("wnid", "class_name", "class")
_PARENT_COLUMNS = ("group_name", "parent", "group")


def read_parents(path: str | Path, class_names: Sequence[str], partial: bool = False) -> list[str | None]:
    """Return the parent category of every class, in the order of ``class_names``.

    Classes are looked up in the first class column that holds them all.

    Args:
        path: the table; it may hold other classes too.
        class_names: names of the K classes, as the dataset has them.
        partial: return None for classes that the table lacks, instead of raising.

    Raises:
        UserError: the file is no such table, lacks a class, or gives a class two parents or an empty one.
    """
    path = Path(path)
    table = read_csv(path)
    keys = [c for c in _CLASS_COLUMNS if c in table]
    values = [c for c in _PARENT_COLUMNS if c in table]
    if not keys or not values:
        lacking = f"no column {' or '.join(_PARENT_COLUMNS if keys else _CLASS_COLUMNS)}"
        raise UserError(f"{path}: has {lacking}, only {', '.join(table.columns)}; it must be {PARENTS_FORM}")
    unknown = {key: sorted(set(class_names) - set(table[key])) for key in keys}
    key = min(keys, key=lambda k: len(unknown[k]))  # the first of the best
    if unknown[key] and not partial:
        problem = f"lacks {len(unknown[key])} of the {len(class_names)} classes ({few(unknown[key])})"
        raise UserError(f"{path}: {problem}; its column {key} has {few(table[key])}")
    rows = table[table[key].isin(class_names)].drop_duplicates([key, values[0]])
    if (twice := rows[key].duplicated()).any():
        raise UserError(f"{path}: gives two parents ({values[0]}) to {few(sorted(set(rows[key][twice])))}")
    if (empty := rows[values[0]] == "").any():
        raise UserError(f"{path}: gives no parent ({values[0]}) to {few(rows[key][empty])}")
    parents = dict(zip(rows[key], rows[values[0]], strict=True))
    return [parents.get(name) for name in class_names]
