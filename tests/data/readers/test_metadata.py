import numpy as np
import pandas as pd
import pytest

from iciia_exp.data.readers.metadata import (
    COLUMNS,
    check_columns,
    check_shares,
    deal_splits,
    image_table,
    number_labels,
    parse_times,
    read_metadata,
    split_names,
)
from iciia_exp.errors import ConfigError, UserError

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def written(folder, text, encoding="utf-8"):
    path = folder / "images.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_reads_text_and_keeps_names_that_look_like_missing_values(tmp_path):
    text = ",Label,owner,Timestamp\n0, NA ,ann,3\n1,null,,4\n2,Zürich,bob,\n"
    table = read_metadata(written(tmp_path, text, "utf-8-sig"))
    assert list(table) == ["label", "owner", "time"]
    assert table["label"].tolist() == ["NA", "null", "Zürich"]
    assert table["owner"].tolist() == ["ann", None, "bob"]
    assert table["time"].tolist() == ["3", "4", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,onwer\na,b\n", "unknown column 'onwer'; did you mean owner"),
        ("class\na\n", "has no column 'label'; the header is 'class'; dataset.columns.label=NAME reads another"),
        ("split\ntrain\n", "has no column 'label'; the header is 'split'"),
        ("label,split\na,train\n,test\n", "label is empty in 1 of 2 rows, first in row 2"),
        ("label,time,timestamp\na,1,1\n", "two columns for time"),
        ("label;onwer\na;train\n", "unknown column 'onwer'; did you mean owner"),
        ("label,split\na,train,extra\n", "cannot be read as a CSV file .rows have more cells than the header"),
        ("label,split\na,train\nlabel,split\nb,test\n", "row 2 repeats the header; remove it"),
        ("label\0\na\n", "it is no text"),
        ("", "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read_metadata(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_wrong_encoding(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read_metadata(tmp_path / "images.csv")
    (tmp_path / "images.csv").mkdir()
    with pytest.raises(UserError, match=r"images\.csv: cannot be read \(Is a directory\)"):
        read_metadata(tmp_path / "images.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_as_programs_write_them(tmp_path, separator, encoding, caplog):
    text = "\r\n".join(separator.join(cells) for cells in (("label", "owner"), ("Zürich", '"a, b; c"'), ("x", "")))
    with caplog.at_level("WARNING"):
        table = read_metadata(written(tmp_path, text, encoding))
    assert table["label"].tolist() == ["Zürich", "x"]
    assert table["owner"].tolist() == ["a, b; c", None]
    assert ["not UTF-8" in r.getMessage() for r in caplog.records] == [True] * (encoding == "latin-1")


def test_columns_of_other_names_and_others_are_left_out(tmp_path, caplog):
    path = written(tmp_path, "image,class,user,caption,width\n1,a,ann,x,3\n")
    with caplog.at_level("INFO"):
        table = read_metadata(path, columns={"label": "class", "owner": "user"})
    assert table.to_dict("list") == {"label": ["a"], "owner": ["ann"]}
    assert caplog.records[-1].getMessage() == f"{path}: leaving out the columns image, caption, width"
    with pytest.raises(ConfigError, match=r"^columns\.owner=usr: is no column of .*'image', 'class'"):
        read_metadata(path, columns={"label": "class", "owner": "usr"})
    with pytest.raises(ConfigError, match=r"columns=foo"):
        check_columns({"foo": "user"}, COLUMNS)
    with pytest.raises(ConfigError, match=r"columns\.owner=3"):
        check_columns({"owner": 3}, COLUMNS)
    assert check_columns({"owner": "owner", "label": "class"}, COLUMNS) == {"label": "class"}


def test_owners_that_may_be_none_are_said(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        read_metadata(written(tmp_path, "label,owner\na,nan\nb,ann\nc,NaN\n"))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "2 images have the owner 'nan', which is one client" in said


def test_a_time_of_the_far_future(tmp_path):
    times = parse_times(pd.Series(["9999-12-31", None, "1970-01-01T00:00:01.5"], dtype=object), "t.csv")
    assert times[0] == 253402214400
    assert np.isnan(times[1])
    assert times[2] == 1.5


def test_labels_by_name_or_by_number():
    label, classes = number_labels(pd.Series(["cat", "ant", "cat"]))
    assert (label.tolist(), classes) == ([1, 0, 1], ("ant", "cat"))
    label, classes = number_labels(pd.Series([str(i) for i in range(12)]))
    assert label.tolist() == list(range(12))
    assert classes[10] == "10"


def test_split_names():
    given = ["Train", "val", "valid", "validation", "selection", "TEST", "backbone"]
    assert split_names(pd.Series(given), "f.csv").tolist() == ["train", *["val"] * 4, "test", "backbone"]
    with pytest.raises(UserError, match=r"f\.csv: unknown split 'tset'; did you mean test\?"):
        split_names(pd.Series(["train", "tset"]), "f.csv")
    with pytest.raises(UserError, match="split is empty in row 2"):
        split_names(pd.Series(["train", None], dtype=object), "f.csv")


def test_times_are_seconds():
    np.testing.assert_array_equal(parse_times(pd.Series(["1.5", None, "-3"], dtype=object), "f"), [1.5, np.nan, -3])
    dates = ["1970-01-02", "1970-01-01T00:00:01.5", None, "1970-01-01T01:00:00+01:00"]
    np.testing.assert_array_equal(parse_times(pd.Series(dates, dtype=object), "f"), [86400, 1.5, np.nan, 0])
    assert np.isnan(parse_times(pd.Series([None, None], dtype=object), "f")).all()
    for wrong in (["1", "yesterday"], ["1970-01-02", "5"], ["inf", "1"]):
        with pytest.raises(UserError, match="time must be numbers"):
            parse_times(pd.Series(wrong), "f")


@pytest.mark.parametrize(
    ("shares", "key"),
    [
        ({"train": 0.6, "test": 0.3}, "shares"),
        ({"train": 1.0}, "shares"),
        ({"train": 1.0, "test": 0}, "shares"),
        ({"train": 0.5, "valid": 0.5}, "shares.valid"),
        ({"train": 1.5, "test": -0.5}, "shares.train"),
    ],
)
def test_bad_shares_name_their_key(shares, key):
    with pytest.raises(ConfigError) as error:
        check_shares(shares)
    assert error.value.key == key


def test_shares_are_in_the_order_of_the_splits():
    assert list(check_shares({"test": 0.5, "backbone": 0, "train": 0.5})) == ["train", "test"]


def test_splits_are_stratified_by_class():
    labels = np.repeat(np.arange(101), np.r_[np.full(100, 3), 50])
    table = pd.DataFrame({"label": labels})
    split = deal_splits(table, SHARES, seed=0)
    assert pd.Series(split).value_counts().to_dict() == {"train": 210, "val": 70, "test": 70}
    by_class = pd.crosstab(labels, split)
    for name, share in SHARES.items():  # the nearest whole number or, where rounding has to be made good, the next
        assert (by_class[name] - share * by_class.sum(axis=1)).abs().max() <= 1.5
    assert by_class.loc[100].to_dict() == {"val": 10, "test": 10, "train": 30}
    np.testing.assert_array_equal(split, deal_splits(table, SHARES, seed=0))
    assert (split != deal_splits(table, SHARES, seed=1)).any()


def test_no_owner_is_in_two_splits():
    rng = np.random.default_rng(0)
    owners = np.array([f"u{i}" for i in rng.integers(0, 20, 500)] + [None] * 10, dtype=object)
    table = pd.DataFrame({"label": rng.integers(0, 5, 510), "owner": owners})
    split = deal_splits(table, SHARES, seed=0)
    assert (pd.Series(split).groupby(owners).nunique() == 1).all()
    owned = pd.Series(split).groupby(owners).first().value_counts()
    assert owned.sum() == 20
    assert set(owned.index) == set(SHARES)
    three = pd.DataFrame({"label": [0] * 9, "owner": np.repeat(["a", "b", "c"], 3)})
    assert set(deal_splits(three, SHARES, 0)) == set(SHARES)
    alone = pd.DataFrame({"label": [0] * 10, "owner": owners[:1].tolist() + [None] * 9})
    assert pd.Series(deal_splits(alone, SHARES, 0)).value_counts().to_dict() == {"train": 6, "val": 2, "test": 2}


def test_image_table():
    given = pd.DataFrame({"label": ["b", "a"], "split": ["train", "test"], "path": ["x", "y"]}, dtype=object)
    table, classes = image_table(given, SHARES, 0, "f.csv")
    assert table.drop(columns=["owner", "parent"]).to_dict("list") == {
        "label": [1, 0],
        "split": ["train", "test"],
        "path": ["x", "y"],
    }
    assert table["owner"].isna().all()
    assert table["parent"].isna().all()
    assert classes == ("a", "b")


def test_splits_without_images_are_refused():
    frame = pd.DataFrame({"label": ["a", "b"], "split": ["train", "val"]}, dtype=object)
    with pytest.raises(UserError, match=r"no test images: the column split has only train, val; val is for"):
        image_table(frame, SHARES, 0, "f.csv")
    with pytest.raises(UserError, match=r"no test images: too few"):
        image_table(frame[["label"]], SHARES, 0, "f.csv")
    with pytest.raises(UserError, match="no rows"):
        image_table(frame[:0], SHARES, 0, "f.csv")
