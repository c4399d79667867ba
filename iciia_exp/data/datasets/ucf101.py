"""UCF101: 13,320 clips of 101 human actions, with the official splits.

Source: K. Soomro et al., "UCF101: A Dataset of 101 Human Actions Classes From Videos in The Wild", arXiv:1212.0402,
https://www.crcv.ucf.edu/data/UCF101.php. The five types of actions are those of that page and of the paper's figure 2.
Needs PyAV: ``pip install iciia_exp[video]``.

Legend: F frames of a clip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from iciia_exp.data.dataset import ImageDataset, existing_root, table_digest, wrong_folder
from iciia_exp.data.readers.files import existing_file, few
from iciia_exp.data.readers.parents import PARENTS_FORM, read_parents
from iciia_exp.errors import UserError, check_choice, check_int

__all__ = ["TYPES", "Ucf101", "read_clip"]

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

# A line of a list. The name may spell the class another way: HandstandPushups/v_HandStandPushups_g01_c01.avi.
_LINE = re.compile(r"(?P<path>(?P<cls>\w+)/v_\w+_(?P<group>g\d\d)_c\d\d\.avi)(?: +(?P<number>\d+))?")

#: The classes of every type of action.
# fmt: off
TYPES = {
    "Human-Object Interaction": [
        "ApplyEyeMakeup", "ApplyLipstick", "BlowDryHair", "BrushingTeeth", "CuttingInKitchen", "Hammering",
        "HulaHoop", "JugglingBalls", "JumpRope", "Knitting", "Mixing", "MoppingFloor", "Nunchucks", "PizzaTossing",
        "ShavingBeard", "SkateBoarding", "SoccerJuggling", "Typing", "WritingOnBoard", "YoYo",
    ],
    "Body-Motion Only": [
        "BabyCrawling", "BlowingCandles", "BodyWeightSquats", "HandstandPushups", "HandstandWalking", "JumpingJack",
        "Lunges", "PullUps", "PushUps", "RockClimbingIndoor", "RopeClimbing", "Swing", "TaiChi", "TrampolineJumping",
        "WalkingWithDog", "WallPushups",
    ],
    "Human-Human Interaction": [
        "BandMarching", "Haircut", "HeadMassage", "MilitaryParade", "SalsaSpin",
    ],
    "Playing Musical Instruments": [
        "Drumming", "PlayingCello", "PlayingDaf", "PlayingDhol", "PlayingFlute", "PlayingGuitar", "PlayingPiano",
        "PlayingSitar", "PlayingTabla", "PlayingViolin",
    ],
    "Sports": [
        "Archery", "BalanceBeam", "BaseballPitch", "Basketball", "BasketballDunk", "BenchPress", "Biking",
        "Billiards", "Bowling", "BoxingPunchingBag", "BoxingSpeedBag", "BreastStroke", "CleanAndJerk", "CliffDiving",
        "CricketBowling", "CricketShot", "Diving", "Fencing", "FieldHockeyPenalty", "FloorGymnastics", "FrisbeeCatch",
        "FrontCrawl", "GolfSwing", "HammerThrow", "HighJump", "HorseRace", "HorseRiding", "IceDancing",
        "JavelinThrow", "Kayaking", "LongJump", "ParallelBars", "PoleVault", "PommelHorse", "Punch", "Rafting",
        "Rowing", "Shotput", "Skiing", "Skijet", "SkyDiving", "SoccerPenalty", "StillRings", "SumoWrestling",
        "Surfing", "TableTennisShot", "TennisSwing", "ThrowDiscus", "UnevenBars", "VolleyballSpiking",
    ],
}
# fmt: on

_TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names}


class Ucf101(ImageDataset):
    """Clips of 16 frames from the middle of the videos; the owner is the video group, the parent the type of action.

    Clips of one class and one group come from one long video. A group's number means nothing across classes.

    Args:
        root: folder with UCF-101 and ucfTrainTestlist; see `TREE`.
        split: which of the three official splits, 1 to 3.
        frames: F, frames of a clip; a shorter video's last frame is repeated.
        parents: CSV table of parent categories by class (`iciia_exp.data.readers.parents`); None is the five types of
            actions.
    """

    name = "ucf101"
    cosmetic: ClassVar[frozenset[str]] = frozenset({"root", "split", "parents"})  # the table holds what they say

    def __init__(
        self, root: str | Path | None, split: int = 1, frames: int = 16, parents: str | Path | None = None
    ) -> None:
        self.root = existing_root(root, WHAT, TREE)
        self.split = check_choice("split", split, (1, 2, 3))
        self.frames = check_int("frames", frames, 1)
        self.parents = None if parents is None else existing_file("parents", parents, PARENTS_FORM)
        for folder in (VIDEOS, LISTS):
            if not (self.root / folder).is_dir():
                raise wrong_folder(self.root, f"has no folder {folder}", TREE)
        for file in ("classInd.txt", *self._list_names):
            if not (self.root / LISTS / file).is_file():
                raise wrong_folder(self.root / LISTS, f"has no file {file}", TREE)

    @cached_property
    def class_names(self) -> Sequence[str]:
        """The classes, in the order of classInd.txt, which numbers them from 1."""
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
        """Return the clips of the train list, then of the test list; whether the videos are there is not looked up."""
        label = {name: i for i, name in enumerate(self.class_names)}
        rows = []
        for split, file in zip(("train", "test"), self._list_names, strict=True):
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
        table = pd.DataFrame(rows, columns=["label", "split", "owner", "path"])
        table = table.astype({"split": object, "owner": object, "path": object})
        if (twice := table["path"].duplicated()).any():
            problem = f"{twice.sum()} videos are listed twice ({few(table['path'][twice])})"
            raise UserError(f"{self.root / LISTS}: {problem} in {' and '.join(self._list_names)}")
        if self.parents is None:
            parents = [_TYPE_OF.get(name) for name in self.class_names]
        else:
            parents = read_parents(self.parents, self.class_names)
        table["parent"] = np.array(parents, dtype=object)[table["label"].to_numpy(dtype=np.int64)]
        return table

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one clip as RGB, uint8 [F, height, width, 3]; raises what PyAV raises for a damaged video."""
        return read_clip(self.root / self.path(index), self.frames)

    def fingerprint(self) -> list[str]:
        """Return a digest of the table, the videos with class, group, parent and split, and the classes."""
        return [table_digest(self.table), *self.class_names]

    @property
    def _list_names(self) -> tuple[str, str]:
        return f"trainlist{self.split:02d}.txt", f"testlist{self.split:02d}.txt"


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their numbers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_clip(path: Path, frames: int) -> np.ndarray:
    """Return consecutive frames from the middle of a video, uint8 [F, height, width, 3].

    Of n frames, the first taken is (n - F) // 2; where n is less than F, the last is repeated. Only what these frames
    need is decoded: all packets are read, which is cheap and gives n, but decoding starts at the last key frame before.

    Args:
        path: the video.
        frames: F.

    Raises:
        UserError: PyAV is not installed.
        OSError, ValueError: the video is missing, damaged or empty; PyAV's errors are among these.
    """
    av = _pyav()
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1  # workers decode side by side already
        packets = [packet for packet in container.demux(stream) if packet.size]
        first = max(0, (len(packets) - frames) // 2)
        start = 0
        if not stream.codec_context.has_b_frames:  # those make frames come out in another order than packets go in
            start = max((i for i in range(first + 1) if packets[i].is_keyframe), default=0)
        clip: list[np.ndarray] = []
        count = start  # the number of the next frame
        for packet in [*packets[start:], None]:  # None makes the decoder give what it still holds
            for frame in stream.codec_context.decode(packet):
                if count >= first and len(clip) < frames:
                    clip.append(frame.to_ndarray(format="rgb24"))
                count += 1
            if len(clip) == frames:
                break
    if not clip:
        raise ValueError(f"{path}: has no frame that can be decoded")
    return np.stack(clip + clip[-1:] * (frames - len(clip)))


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("reading videos needs PyAV, which is not installed: pip install iciia_exp[video]") from error
    return av
