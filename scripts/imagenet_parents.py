"""Make `iciia_exp/data/tables/imagenet_parents.csv`: the parent categories of ImageNet's 1,000 classes, from WordNet.

Every class is a noun of WordNet 3.0 (its wnid is the byte offset in `data.noun`), and every noun has more general
ones above it. A parent category is one of those nouns: "terrier", "vessel", "fungus". Which nouns are chosen is an
optimisation with one trade-off. A class in the category of a noun that stands above N classes costs log2 N bits, what
it takes to tell which of the N is meant, so specific nouns are better; every category costs `PRICE` bits, so few are
better. Categories hold `SMALLEST` to `LARGEST` classes. Classes that no specific noun takes go to a more general
one, as "other bird". The optimum is exact (dynamic programming over the tree), in whole thousandths of a bit, so that
every machine finds the same one.

Needs WordNet 3.0's `data.noun` (Debian: package `wordnet-base`); the wnids come from timm. No network.

    python scripts/imagenet_parents.py --output iciia_exp/data/tables/imagenet_parents.csv

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Its licence, which allows use, modification
and distribution with that notice, is in `iciia_exp/data/tables/WORDNET_LICENSE`.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SMALLEST, LARGEST = 4, 30
PRICE = 15.0  # bits; gives 85 categories, as many as the published table has

COLUMNS = ("class_index", "wnid", "class_name", "group", "group_name")


@dataclass
class Noun:
    """A synset: a set of nouns of the same meaning."""

    words: list[str]
    domain: str  # number of the lexicographers' file: animals, artifacts, food, ...
    above: list[str]  # offsets of the more general synsets


def read_nouns(path: Path) -> dict[str, Noun]:
    """Read WordNet's `data.noun` (format: wndb(5WN)): synsets by offset."""
    nouns = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence, at the top
            continue
        # offset, domain, "n", number of words in hex, (word, id) per word, number of pointers, then per pointer
        # its symbol, offset, part of speech and source; "@" and "@i" lead to more general nouns
        fields = line.split(" | ")[0].split()
        start = 4 + 2 * int(fields[3], 16)
        pointers = fields[start + 1 : start + 1 + 4 * int(fields[start])]
        above = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")]
        words = [word.replace("_", " ") for word in fields[4:start:2]]
        nouns[fields[0]] = Noun(words, fields[1], above)
    return nouns


@dataclass
class Tree:
    """The classes and everything above them, with one way up from each."""

    root: str
    below: dict[str, list[str]]  # offsets under each offset
    size: dict[str, int]  # classes under each offset
    classes: frozenset[str]


def grow_tree(nouns: dict[str, Noun], classes: Iterable[str]) -> Tree:
    """Return the tree above ``classes``.

    Of several more general nouns the one of the same domain counts, then the one farthest from the root, then the
    first: a dog is a canine rather than a domestic animal.
    """
    depths: dict[str, int] = {}

    def depth(offset: str) -> int:
        if offset not in depths:
            depths[offset] = 1 + max((depth(a) for a in nouns[offset].above), default=-1)
        return depths[offset]

    below: dict[str, set[str]] = defaultdict(set)
    size: dict[str, int] = defaultdict(int)
    root = ""
    for leaf in classes:
        offset = leaf
        size[offset] += 1
        while above := nouns[offset].above:
            domain = nouns[offset].domain
            up = max(above, key=lambda a: (nouns[a].domain == domain, depth(a)))
            below[up].add(offset)
            offset = up
            size[offset] += 1
        root = offset
    return Tree(root, {k: sorted(v) for k, v in below.items()}, dict(size), frozenset(classes))


@dataclass
class _Solved:
    """Of a synset: cheapest cost by the number of classes that it leaves to those above, and the choices made."""

    cost: list[float]  # thousandths of a bit; [open classes]
    splits: list[tuple[str, list[int]]] = field(default_factory=list)  # (child, its open classes by the running sum)
    closed: int = 0  # classes of the category made here when none is left open; 0: none is made


def _solve(tree: Tree, offset: str, solved: dict[str, _Solved], price: float) -> _Solved:
    leaf = offset in tree.classes
    cost = [math.inf] * (LARGEST + 1)
    cost[1 if leaf else 0] = 0
    here = _Solved(cost)
    for child in tree.below.get(offset, []):
        lower = _solve(tree, child, solved, price).cost
        total, taken = [math.inf] * (LARGEST + 1), [0] * (LARGEST + 1)
        for mine in range(LARGEST + 1):
            for its in range(LARGEST + 1 - mine):
                if here.cost[mine] + lower[its] < total[mine + its]:
                    total[mine + its], taken[mine + its] = here.cost[mine] + lower[its], its
        here.cost = total
        here.splits.append((child, taken))
    bits = round(1000 * math.log2(tree.size[offset]))
    for number in range(SMALLEST, LARGEST + 1):
        closing = here.cost[number] + number * bits + round(1000 * price)
        if closing < here.cost[0]:
            here.cost[0], here.closed = closing, number
    solved[offset] = here
    return here


def cut(tree: Tree, price: float = PRICE) -> dict[str, list[str]]:
    """Return the cheapest categories: offsets of classes by the offset of the noun that holds them."""
    solved: dict[str, _Solved] = {}
    _solve(tree, tree.root, solved, price)
    groups: dict[str, list[str]] = defaultdict(list)

    def walk(offset: str, left_open: int, holder: str) -> None:
        here = solved[offset]
        if left_open == 0 and here.closed:
            left_open, holder = here.closed, offset
        for child, taken in reversed(here.splits):
            its = taken[left_open]
            walk(child, its, holder)
            left_open -= its
        if offset in tree.classes:
            groups[holder].append(offset)

    walk(tree.root, 0, "")
    return dict(groups)


def name_groups(nouns: dict[str, Noun], tree: Tree, groups: dict[str, list[str]]) -> dict[str, str]:
    """Name every category by its noun's first word; with "other" in front where more specific ones took classes."""
    names: dict[str, str] = {}
    for offset, classes in groups.items():
        word = nouns[offset].words[0]
        name = word if len(classes) == tree.size[offset] else f"other {word}"
        if name in names.values():
            raise ValueError(f"two categories are called {name!r}")
        names[offset] = name
    return names


def make_rows(wordnet: Path) -> list[tuple[int, str, str, int, str]]:
    """Return the table's rows, in the order of ImageNet's class numbers."""
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo("imagenet-1k").label_names()
    nouns = read_nouns(wordnet)
    if lacking := [w for w in wnids if w[1:] not in nouns]:
        raise SystemExit(
            f"{wordnet}: lacks {len(lacking)} classes, first {lacking[0]}; it must be WordNet 3.0's data.noun"
        )
    tree = grow_tree(nouns, [w[1:] for w in wnids])
    groups = cut(tree)
    names = name_groups(nouns, tree, groups)
    number = {name: i for i, name in enumerate(sorted(names.values()))}
    of_class = {c: names[offset] for offset, classes in groups.items() for c in classes}
    rows = []
    for index, wnid in enumerate(wnids):
        group = of_class[wnid[1:]]
        rows.append((index, wnid, ", ".join(nouns[wnid[1:]].words), number[group], group))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Write the table and say what it holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"), help="WordNet 3.0's data.noun"
    )
    parser.add_argument("--output", type=Path, required=True, help="the CSV file to write")
    options = parser.parse_args(arguments)
    if not options.wordnet.is_file():
        parser.error(f"{options.wordnet}: there is no such file; give --wordnet, WordNet 3.0's data.noun")
    rows = make_rows(options.wordnet)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    sizes = [sum(row[3] == group for row in rows) for group in sorted({row[3] for row in rows})]
    print(f"{options.output}: {len(rows)} classes in {len(sizes)} parents of {min(sizes)} to {max(sizes)}")


if __name__ == "__main__":
    main()
