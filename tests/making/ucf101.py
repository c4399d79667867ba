"""UCF101 in small: videos of a few real classes and groups, and the official lists' form (with its line ends)."""

import numpy as np

#: Two of each of three types; the last has the real set's odd spelling in its files' names.
CLASSES = ("ApplyLipstick", "Archery", "BabyCrawling", "Biking", "YoYo", "HandstandPushups")

#: In official split 1, groups 1 to 7 are for testing.
GROUPS = (1, 2, 8, 9, 10)


def clip_name(name, group, clip):
    spelt = name.replace("HandstandPushups", "HandStandPushups")
    return f"{name}/v_{spelt}_g{group:02d}_c{clip:02d}.avi"


def make_frames(label, group, frames, size=(80, 60)):
    """Return uint8 [F, height, width, 3]: a bar of the class's colour and speed; the top row's light is the time."""
    rng = np.random.default_rng([label, group])
    width, height = size
    colour = 55 + 200 * np.array([label % 2, label // 2 % 2, label // 4 % 2])
    background = rng.integers(30, 90, 3)
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for t in range(frames):
        video[t] = background
        left = (group * 11 + t * (1 + label % 3)) % width
        video[t, height // 2 :, left : left + 16] = colour
        video[t, : height // 3] = 16 + 8 * (t % 28)
    return video


def write_video(path, frames, **options):
    """Write frames as MPEG-4 in AVI, the real set's form; ``options`` go to the codec context (``gop_size``, ...)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.codec_context.gop_size = 12
        for key, value in options.items():
            setattr(stream.codec_context, key, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def make_ucf101(root, classes=CLASSES, groups=GROUPS, clips=2, frames=24, size=(80, 60), splits=(1,)):
    """Write videos and lists below ``root`` and return it. In split s, the groups for testing are those below 8 of
    the first, and others, s steps on, of the further splits."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    _write(lists / "classInd.txt", [f"{i} {name}" for i, name in enumerate(classes, start=1)])
    names = {(c, g): [clip_name(c, g, n) for n in range(1, clips + 1)] for c in classes for g in groups}
    for (name, group), own in names.items():
        video = make_frames(classes.index(name), group, frames, size)
        for path in own:
            write_video(root / "UCF-101" / path, video)
    few = sum(g < 8 for g in groups)
    for split in splits:
        test = set(np.roll(groups, (1 - split) * few)[:few].tolist())
        number = {c: i for i, c in enumerate(classes, start=1)}
        _write(lists / f"testlist{split:02d}.txt", [p for (_, g), own in names.items() if g in test for p in own])
        train = [f"{p} {number[c]}" for (c, g), own in names.items() if g not in test for p in own]
        _write(lists / f"trainlist{split:02d}.txt", train)
    return root


def _write(path, lines):
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
