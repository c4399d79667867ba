"""Parent categories of classes, from CSV tables.

A table has one row per class: a column with the class (``wnid``, ``class_name`` or ``class``) and a column with its
parent (``group_name``, ``parent`` or ``group``), as in the tables released with ICIIA (ACML 2024).
`scripts/imagenet_parents.py` makes the package's table for ImageNet from WordNet 3.0 (copyright 2006 by Princeton
University, all rights reserved; licence beside the table). The table for UCF101 has the five types of actions of
https://www.crcv.ucf.edu/data/UCF101.php and of figure 2 of arXiv:1212.0402.
"""

from collections.abc import Sequence
from pathlib import Path

from iciia_exp.data.readers.files import existing_file, few, read_csv
from iciia_exp.errors import UserError

__all__ = ["IMAGENET_PARENTS", "UCF101_PARENTS", "parents_file", "read_parents"]

_TABLES = Path(__file__).parents[1] / "tables"

#: Parents of ImageNet's 1,000 classes: 85 parents of 4 to 28 classes.
IMAGENET_PARENTS = _TABLES / "imagenet_parents.csv"

#: Parents of UCF101's 101 classes: 5 types of actions of 5 to 50 classes.
UCF101_PARENTS = _TABLES / "ucf101_parents.csv"

_FORM = "a CSV table of parent categories, with a column wnid, class_name or class and a column group_name or parent"

# In order of preference: words before numbers, identifiers before words.
_CLASS_COLUMNS = ("wnid", "class_name", "class")
_PARENT_COLUMNS = ("group_name", "parent", "group")


def parents_file(path: str | Path | None) -> Path | None:
    """Return the existing table of the constructor argument ``parents``, or None."""
    return None if path is None else existing_file("parents", path, _FORM)


def read_parents(path: str | Path, class_names: Sequence[str], partial: bool = False) -> list[str | None]:
    """Return the parent category of every class, in the order of ``class_names``.

    Args:
        path: the table; other classes in it are ignored.
        class_names: names of the K classes; they are looked up in the first class column that has them all.
        partial: return None for a missing class, instead of raising.

    Raises:
        UserError: the file is no such table, or a class is missing, has two parents or an empty parent.
    """
    table = read_csv(path := Path(path))
    keys = [c for c in _CLASS_COLUMNS if c in table]
    values = [c for c in _PARENT_COLUMNS if c in table]
    if not keys or not values:
        lacking = f"no column {' or '.join(_PARENT_COLUMNS if keys else _CLASS_COLUMNS)}"
        raise UserError(f"{path}: has {lacking}, only {', '.join(table.columns)}; it must be {_FORM}")
    missing = {key: sorted(set(class_names) - set(table[key])) for key in keys}
    key = min(keys, key=lambda k: len(missing[k]))
    if missing[key] and not partial:
        problem = f"lacks {len(missing[key])} of the {len(class_names)} classes ({few(missing[key])})"
        raise UserError(f"{path}: {problem}; its column {key} has {few(table[key])}")
    rows = table[table[key].isin(class_names)].drop_duplicates([key, values[0]])
    if (twice := rows[key].duplicated()).any():
        raise UserError(f"{path}: gives two parents ({values[0]}) to {few(sorted(set(rows[key][twice])))}")
    if (empty := rows[values[0]] == "").any():
        raise UserError(f"{path}: gives no parent ({values[0]}) to {few(rows[key][empty])}")
    parents = dict(zip(rows[key], rows[values[0]], strict=True))
    return [parents.get(name) for name in class_names]
