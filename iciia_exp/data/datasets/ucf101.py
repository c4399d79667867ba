"""UCF101: 13,320 clips of 101 human actions, with the official splits.

Source: K. Soomro et al., "UCF101: A Dataset of 101 Human Actions Classes From Videos in The Wild", arXiv:1212.0402,
https://www.crcv.ucf.edu/data/UCF101.php. Needs PyAV: ``pip install iciia_exp[video]``.

Legend: F frames of a clip.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageFiles, check_layout, existing_root
from iciia_exp.data.readers.files import check_distinct
from iciia_exp.data.readers.parents import UCF101_PARENTS, parents_file, read_parents
from iciia_exp.errors import UserError, check_choice, check_int

__all__ = ["Ucf101", "read_clip"]

WHAT = (
    "UCF101 (https://www.crcv.ucf.edu/data/UCF101.php: the videos, UCF101.rar, and the splits for action recognition, "
    "UCF101TrainTestSplits-RecognitionTask.zip)"
)

TREE = """UCF-101/<Class>/v_<Class>_g<group>_c<clip>.avi
ucfTrainTestlist/classInd.txt
ucfTrainTestlist/trainlist01.txt
ucfTrainTestlist/testlist01.txt"""

VIDEOS = "UCF-101"
LISTS = "ucfTrainTestlist"

# A line of a list. The file name may spell the class another way: HandstandPushups/v_HandStandPushups_g01_c01.avi.
_LINE = re.compile(r"(?P<path>(?P<cls>\w+)/v_\w+_(?P<group>g\d\d)_c\d\d\.avi)(?: +(?P<number>\d+))?")


class Ucf101(ImageFiles):
    """Clips of 16 frames from the middle of the videos; the owner is the video group, the parent the type of action.

    The clips of one class and group come from one long video. Groups of two classes with the same number are unrelated.

    Args:
        root: folder with UCF-101 and ucfTrainTestlist; see `TREE`.
        split: number of the official split, 1 to 3.
        frames: F, frames of a clip; a shorter video's last frame is repeated.
        parents: CSV table of parent categories by class (`iciia_exp.data.readers.parents`); None: the five types of
            actions.
    """

    name = "ucf101"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "split", "parents"})  # their content is in the table

    def __init__(
        self, root: str | Path | None, split: int = 1, frames: int = 16, parents: str | Path | None = None
    ) -> None:
        self.root = existing_root(root, WHAT, TREE)
        self.split = check_choice("split", split, (1, 2, 3))
        self._lists = {part: f"{part}list{split:02d}.txt" for part in ("train", "test")}
        self.frames = check_int("frames", frames, 1)
        self.parents = parents_file(parents)
        check_layout(self.root, TREE, f"{VIDEOS}/", f"{LISTS}/")
        check_layout(self.root / LISTS, TREE, "classInd.txt", *self._lists.values())

    @cached_property
    def class_names(self) -> Sequence[str]:
        """The K classes, in the order of classInd.txt."""
        path = self.root / LISTS / "classInd.txt"
        names: list[str] = []
        for number, line in _lines(path):
            parts = line.split()
            if len(parts) != 2 or parts[0] != str(len(names) + 1):
                raise UserError(f"{path}: line {number} is {line!r}, expected {len(names) + 1} and a class")
            names.append(parts[1])
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"{path}: has {len(set(names))} different classes in {len(names)} lines, expected 101")
        return tuple(names)

    def load_table(self) -> pd.DataFrame:
        """Return the clips of the train list, then of the test list; missing videos are not noticed."""
        label = {name: i for i, name in enumerate(self.class_names)}
        rows = []
        for split, file in self._lists.items():
            path = self.root / LISTS / file
            for number, line in _lines(path):
                match = _LINE.fullmatch(line)
                if match is None:
                    form = "<Class>/v_<Class>_g<group>_c<clip>.avi, in train lists with the class's number"
                    raise UserError(f"{path}: line {number} is {line!r}, expected {form}")
                name = match["cls"]
                if name not in label:
                    raise UserError(f"{path}: line {number}: class {name} is not in classInd.txt")
                if match["number"] is not None and int(match["number"]) != label[name] + 1:
                    problem = f"gives {name} the number {match['number']}, classInd.txt says {label[name] + 1}"
                    raise UserError(f"{path}: line {number} {problem}; both must be of the same release")
                rows.append((label[name], split, match["group"], f"{VIDEOS}/{match['path']}"))
        table = pd.DataFrame(rows, columns=["label", "split", "owner", "path"], dtype=object)
        table["label"] = table["label"].astype(np.int64)
        check_distinct(self.root / LISTS, table["path"], "videos", f" in {' and '.join(self._lists.values())}")
        parents = read_parents(self.parents or UCF101_PARENTS, self.class_names, partial=self.parents is None)
        table["parent"] = np.array(parents, dtype=object)[table["label"]]
        return table

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one clip as RGB, uint8 [F, height, width, 3]; raises what PyAV raises for a damaged video."""
        return read_clip(self.root / self.path(index), self.frames)


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_clip(path: Path, frames: int) -> np.ndarray:
    """Return consecutive frames from the middle of a video, uint8 [F, height, width, 3].

    The first of n frames is (n - F) // 2; if n is less than F, the last frame is repeated. All packets are read, which
    is cheap and gives n, but decoding starts at the last key frame before the first frame. A missing, damaged or empty
    video raises `OSError` or `ValueError`, as PyAV does; without PyAV, `UserError`.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos needs PyAV, which is not installed: pip install iciia_exp[video]") from error
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1  # the workers decode in parallel
        packets = [packet for packet in container.demux(stream) if packet.size]
        first = max(0, (len(packets) - frames) // 2)
        start = 0
        if not stream.codec_context.has_b_frames:  # with them, frames and packets have different orders
            start = max((i for i in range(first + 1) if packets[i].is_keyframe), default=0)
        clip: list[np.ndarray] = []
        count = start  # number of the next frame
        for packet in [*packets[start:], None]:  # None flushes the decoder
            for frame in stream.codec_context.decode(packet):
                if count >= first and len(clip) < frames:
                    clip.append(frame.to_ndarray(format="rgb24"))
                count += 1
            if len(clip) == frames:
                break
    if not clip:
        raise ValueError(f"{path}: has no frame that can be decoded")
    return np.stack(clip + clip[-1:] * (frames - len(clip)))
