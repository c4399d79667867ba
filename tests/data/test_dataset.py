import pandas as pd
import pytest

from iciia_exp.data.dataset import ImageDataset


class Broken(ImageDataset):
    name = "broken"
    class_names = ("a", "b")

    def __init__(self, **columns):
        self.columns = columns

    def load_table(self):
        return pd.DataFrame(self.columns)

    def __getitem__(self, index):
        return None


GOOD = {"label": [0, 1], "split": ["train", "test"], "owner": [None, None], "parent": [None, None]}


def test_a_good_table_passes():
    assert len(Broken(**GOOD)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"label": [0, 2]}, "outside"), ({"label": [-1, 0]}, "outside"), ({"split": ["train", "valid"]}, "valid")],
)
def test_tables_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Broken(**GOOD | change).table  # noqa: B018


def test_a_table_that_was_filtered_is_not_renumbered():
    class Filtered(Broken):
        def load_table(self):
            return super().load_table().query("label == 1")

    with pytest.raises(ValueError, match=r"Filtered.load_table has an index other than 0, 1, 2.*reset_index"):
        Filtered(**GOOD).table  # noqa: B018
    given = {name: pd.Series(values, index=pd.Index([0, 1], dtype="Int64")) for name, values in GOOD.items()}
    assert len(Broken(**given)) == 2
    paths = Filtered(**GOOD, path=["a.png", "b.png"])  # which are read by their paths
    assert (list(paths.table.index), paths.path(0)) == ([0], "b.png")


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="owner"):
        Broken(label=[0], split=["train"], parent=[None]).table  # noqa: B018
