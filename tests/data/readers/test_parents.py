import runpy
from pathlib import Path

import pandas as pd
import pytest
from timm.data import ImageNetInfo

from iciia_exp.data.readers.parents import IMAGENET_PARENTS, read_parents
from iciia_exp.errors import UserError

WORDNET = Path("/usr/share/wordnet/data.noun")
SCRIPT = Path(__file__).parents[3] / "scripts" / "imagenet_parents.py"


def test_the_package_s_table_covers_imagenet():
    table = pd.read_csv(IMAGENET_PARENTS)
    assert list(table.columns) == ["class_index", "wnid", "class_name", "group", "group_name"]
    assert table["wnid"].tolist() == ImageNetInfo("imagenet-1k").label_names()
    assert table["class_index"].tolist() == list(range(1000))
    sizes = table.groupby("group_name").size()
    assert len(sizes) == 85
    assert sizes.between(4, 30).all()
    assert sorted(set(table["group"])) == list(range(85))
    assert (table.groupby("group")["group_name"].nunique() == 1).all()
    assert not table["group_name"].str.contains(r"[^a-z .'\-]").any()
    parent = dict(zip(table["wnid"], table["group_name"], strict=True))
    assert parent["n02093256"] == "terrier"  # Staffordshire bullterrier
    assert parent["n02804610"] == "wind instrument"  # bassoon


@pytest.mark.skipif(not WORDNET.is_file(), reason="WordNet 3.0 (Debian: wordnet-base) is not on this machine")
def test_the_script_makes_the_table_again(tmp_path):
    output = tmp_path / "table.csv"
    runpy.run_path(str(SCRIPT))["main"](["--wordnet", str(WORDNET), "--output", str(output)])
    assert output.read_bytes() == IMAGENET_PARENTS.read_bytes()


def test_the_script_says_what_it_needs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"](["--wordnet", str(tmp_path / "none"), "--output", str(tmp_path / "table")])
    assert "WordNet 3.0's data.noun" in capsys.readouterr().err


def test_the_licence_lies_beside_the_table():
    assert (
        "WordNet 3.0 Copyright 2006 by Princeton University"
        in (IMAGENET_PARENTS.parent / "WORDNET_LICENSE").read_text()
    )


def test_the_package_s_table_resembles_the_published_one(reference):
    from sklearn.metrics import adjusted_rand_score

    wnids = ImageNetInfo("imagenet-1k").label_names()
    published = read_parents(reference / "imagenet_class_groups.csv", wnids)
    assert len(set(published)) == 85
    assert adjusted_rand_score(published, read_parents(IMAGENET_PARENTS, wnids)) > 0.7


def write(folder, text):
    path = folder / "parents.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "class,parent\na,x\nb,y\nc,x\n",
        "parent,class,more\nx,a,1\ny,b,2\nx,c,3\nz,d,4\n",  # other columns and classes are no harm
        "class_name,group,group_name\na,0,x\nb,1,y\nc,0,x\n",  # words before numbers
        "wnid,class_name,parent\nn1,a,x\nn2,b,y\nn3,c,x\n",  # the column that holds the classes
        "\ufeffclass, parent\n a, x\nb,y \nc,x\na,x\n",  # as spreadsheets write it; a repeated row
    ],
)
def test_tables_are_read_in_the_order_of_the_classes(tmp_path, text):
    assert read_parents(write(tmp_path, text), ["c", "a", "b"]) == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,parent\na,x\n", r"lacks 2 of the 3 classes \(b, c\); its column class has a"),
        ("name,parent\na,x\n", "no column wnid or class_name or class, only name, parent"),
        ("class,kind\na,x\n", "no column group_name or parent or group, only class, kind"),
        ("class,parent\na,x\nb,y\nc,\n", r"no parent \(parent\) to c"),
        ("class,parent\na,x\nb,y\nc,x\na,y\n", r"two parents \(parent\) to a"),
        ("", "cannot be read as a CSV file"),
        ("class,parent\na,x,y,z\nb\n", "more cells than the header; put texts with the separator in quotes"),
        ("class,parent\na,x\nb,y,z\n", "cannot be read as a CSV file"),
        ("class,parent\n", "has a header and no rows"),
    ],
)
def test_bad_tables_are_named_with_what_is_wrong(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read_parents(path, ["a", "b", "c"])
    assert str(path) in str(error.value)


def test_a_partial_reading_leaves_gaps(tmp_path):
    path = write(tmp_path, "class,parent\na,x\n")
    assert read_parents(path, ["b", "a"], partial=True) == [None, "x"]
