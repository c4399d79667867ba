import csv
import pickle
import shutil
import sys
from collections import Counter

import numpy as np
import pytest

from iciia_exp.data.datasets.ucf101 import Ucf101, read_clip
from iciia_exp.data.readers.parents import UCF101_PARENTS, read_parents
from iciia_exp.errors import ConfigError, UserError
from tests.conftest import SHARED
from tests.making.ucf101 import CLASSES, make_frames, make_ucf101, write_video

pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Written once: videos take most of the time."""
    return make_ucf101(tmp_path_factory.mktemp("ucf101"), splits=(1, 2))


@pytest.fixture
def root(made, tmp_path):
    """A copy, to change."""
    return shutil.copytree(made, tmp_path / "copy")


def test_classes_groups_types_and_splits(made):
    data = Ucf101(made)
    assert data.class_names == CLASSES
    table = data.table
    assert len(table) == 6 * 5 * 2
    assert table.groupby("split")["owner"].unique().map(list).to_dict() == {
        "test": ["g01", "g02"],
        "train": ["g08", "g09", "g10"],
    }
    assert table.groupby("label")["parent"].first().tolist() == [
        *("Human-Object Interaction", "Sports", "Body-Motion Only"),
        *("Sports", "Human-Object Interaction", "Body-Motion Only"),
    ]
    assert table["path"].map(lambda p: (made / p).is_file()).all()
    assert data.describe(0) == "UCF-101/ApplyLipstick/v_ApplyLipstick_g08_c01.avi"
    assert table["path"].str.contains("/HandstandPushups/v_HandStandPushups_").sum() == 10
    other = Ucf101(made, split=2).table
    assert (
        other.groupby("split")["owner"].unique().map(list).to_dict()
        != table.groupby("split")["owner"].unique().map(list).to_dict()
    )
    assert set(other["path"]) == set(table["path"])


def times(clip):
    """Return the number of each frame, which `make_frames` writes into the light of its upper rows."""
    return np.rint((clip[:, 2:10].mean((1, 2, 3)) - 16) / 8).astype(int).tolist()


def test_a_clip_is_the_middle_of_the_video(made):
    data = Ucf101(made)
    clip = data[0]
    assert clip.shape == (16, 60, 80, 3)
    assert clip.dtype == np.uint8
    assert times(clip) == list(range(4, 20))
    np.testing.assert_allclose(clip, make_frames(0, 8, 24)[4:20], atol=70)  # as far as the codec is true
    assert np.abs(clip.astype(int) - make_frames(0, 8, 24)[4:20]).mean() < 8
    assert times(Ucf101(made, frames=7)[0]) == list(range(8, 15))


@pytest.mark.parametrize("options", [{"gop_size": 1}, {"gop_size": 5}, {"gop_size": 100}, {"max_b_frames": 2}])
@pytest.mark.parametrize("length", [1, 9, 16, 27])
def test_the_middle_is_exact_wherever_the_key_frames_are(tmp_path, options, length):
    video = make_frames(3, 1, length)
    path = write_video(tmp_path / "video.avi", video, **options)
    first = max(0, (length - 16) // 2)
    assert times(read_clip(path, 16)) == [min(first + i, length - 1) for i in range(16)]


def test_decoding_starts_at_a_key_frame(tmp_path):
    """Garbage before it does no harm."""
    path = write_video(tmp_path / "video.avi", make_frames(3, 1, 28), gop_size=4)
    before = read_clip(path, 4)
    import av

    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[1:8]:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_clip(path, 4), before)


def test_a_missing_or_damaged_video_raises_what_its_reader_raises(root):
    data = Ucf101(root)
    first, second, third = (root / data.table["path"][i] for i in range(3))
    first.unlink()
    with pytest.raises(FileNotFoundError):
        data[0]
    second.write_bytes(b"not a video" * 100)
    with pytest.raises(ValueError, match="Invalid data"):
        data[1]
    third.write_bytes(third.read_bytes()[:2000])
    with pytest.raises((ValueError, OSError)):
        data[2]


def test_without_pyav_it_says_what_to_install(made, monkeypatch):
    data = Ucf101(made)
    assert len(data) == 60
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install iciia_exp\[video\]"):
        data[0]


def test_parents_from_a_table_by_path(root, tmp_path):
    path = tmp_path / "parents.csv"
    path.write_text(
        "class_name,group_name\n" + "".join(f"{c},{'even' if i % 2 == 0 else 'odd'}\n" for i, c in enumerate(CLASSES))
    )
    assert Ucf101(root, parents=path).table.groupby("label")["parent"].first().tolist() == ["even", "odd"] * 3
    with pytest.raises(ConfigError, match="there is no such file") as error:
        Ucf101(root, parents="nowhere.csv")
    assert error.value.key == "parents"


def test_the_types_are_the_published_ones(reference):
    with open(reference / "ucf101_class_groups.csv", newline="") as file:
        names = [row["class_name"] for row in csv.DictReader(file)]
    published = dict(zip(names, read_parents(reference / "ucf101_class_groups.csv", names), strict=True))
    assert dict(zip(names, read_parents(UCF101_PARENTS, names), strict=True)) == published
    assert sorted(Counter(published.values()).values()) == [5, 10, 16, 20, 50]


def test_the_official_lists(tmp_path):
    """Without a single video: those are missed when features are extracted."""
    lists = SHARED / "data" / "ucf101_splits"
    if not lists.is_dir():
        pytest.skip("the official lists of UCF101 are not on this machine")
    shutil.copytree(lists, tmp_path / "ucfTrainTestlist")
    (tmp_path / "UCF-101").mkdir()
    data = Ucf101(tmp_path)
    assert data.num_classes == 101
    assert data.table["split"].value_counts().to_dict() == {"train": 9537, "test": 3783}
    assert data.table.groupby("split")["owner"].nunique().to_dict() == {"test": 7, "train": 18}
    assert data.table["parent"].nunique() == 5
    assert data.table["parent"].notna().all()


def test_fingerprint_follows_the_lists_and_not_their_place(root, tmp_path):
    data = Ucf101(root)
    before = data.fingerprint()
    assert pickle.loads(pickle.dumps(data)).fingerprint() == before
    assert Ucf101(root, split=2).fingerprint() != before
    shutil.move(root, tmp_path / "moved")
    assert Ucf101(tmp_path / "moved").fingerprint() == before


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        ({"root": None}, "root", "(?s)crcv.ucf.edu/data/UCF101.php.*UCF-101/<Class>/v_<Class>_g<group>_c<clip>.avi"),
        ({"root": "nowhere"}, "root", "there is no such folder"),
        ({"split": 4}, "split", "must be one of 1, 2, 3"),
        ({"frames": 0}, "frames", "at least 1"),
    ],
)
def test_bad_arguments_name_their_key(made, arguments, key, message):
    with pytest.raises(ConfigError, match=message) as error:
        Ucf101(**{"root": made} | arguments)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: shutil.rmtree(r / "UCF-101"), "(?s)has no folder UCF-101;.*ucfTrainTestlist/classInd.txt"),
        (lambda r: shutil.rmtree(r / "ucfTrainTestlist"), "has no folder ucfTrainTestlist"),
        (lambda r: (r / "ucfTrainTestlist/classInd.txt").unlink(), "has no file classInd.txt"),
        (lambda r: (r / "ucfTrainTestlist/testlist01.txt").unlink(), "has no file testlist01.txt"),
        (
            lambda r: _edit(r, "classInd.txt", "2 Archery", "3 Archery"),
            "classInd.txt: line 2 is '3 Archery', expected 2 and a class",
        ),
        (lambda r: _edit(r, "classInd.txt", "2 Archery", "2 Biking"), "has 5 different classes in 6 lines"),
        (
            lambda r: _edit(r, "classInd.txt", "4 Biking", "4 Diving"),
            "trainlist01.txt: line 19: class Biking is not in classInd.txt",
        ),
        (
            lambda r: _edit(r, "trainlist01.txt", "g08_c01.avi 1", "g08_c01.avi 2"),
            "line 1 gives ApplyLipstick the number 2, classInd.txt says 1",
        ),
        (
            lambda r: _edit(r, "trainlist01.txt", "g08_c01.avi 1", "g08.avi 1"),
            "trainlist01.txt: line 1 is 'Apply.* expected <Class>/v_",
        ),
        (
            lambda r: _edit(r, "testlist01.txt", "g01_c01.avi", "g01_c02.avi"),
            "1 videos are listed twice .* in trainlist01.txt and testlist01.txt",
        ),
    ],
)
def test_wrong_files_are_named(root, change, message):
    change(root)
    with pytest.raises(UserError, match=message):
        Ucf101(root).table  # noqa: B018


def _edit(root, file, old, new):
    path = root / "ucfTrainTestlist" / file
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
