"""LEAF's CelebA in small: the attribute file, aligned pictures in their real size, and LEAF's JSON by person."""

import json

import numpy as np
from PIL import Image

#: CelebA's attributes in the order of its file.
# fmt: off
ATTRIBUTES = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
    "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks",
    "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
    "Wearing_Necklace", "Wearing_Necktie", "Young",
]
# fmt: on


def make_face(attributes, rng, size=(178, 218)):
    """Return a picture in which each attribute lights or leaves dark a field of its own (bool [40])."""
    fields = np.asarray(attributes, dtype=float).reshape(8, 5)
    rows = (np.arange(size[1]) * 8 // size[1]).clip(0, 7)
    columns = (np.arange(size[0]) * 5 // size[0]).clip(0, 4)
    light = 70 + 100 * fields[np.ix_(rows, columns)]
    pixels = light[..., None] * rng.uniform(0.7, 1.3, 3) + rng.normal(0, 20, (*light.shape, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_celeba(
    root, images=(8, 6, 5, 7, 3, 6), test=(3, 4), *, size=(178, 218), data="data", files_per_split=1, seed=0
):
    """Write ``data/{train,test}/*.json`` and ``data/raw`` below ``root``; return bool [M, 40], the attributes.

    ``images`` is the number of each person's images, ``test`` the numbers of the people for testing. Pictures of a
    person are spread over the file names, as the real ones are.
    """
    rng = np.random.default_rng(seed)
    owners = rng.permutation(np.repeat(np.arange(len(images)), images))
    habits = rng.choice([0.1, 0.9], (len(images), len(ATTRIBUTES)))
    attributes = rng.random((len(owners), len(ATTRIBUTES))) < habits[owners]
    names = [f"{i + 1:06d}.jpg" for i in range(len(owners))]
    folder = root / data / "raw"
    (folder / "img_align_celeba").mkdir(parents=True)
    for name, row in zip(names, attributes, strict=True):
        make_face(row, rng, size).save(folder / "img_align_celeba" / name)
    signs = [" ".join(f"{'1' if a else '-1':>2}" for a in row) for row in attributes]
    lines = [str(len(names)), " ".join(ATTRIBUTES) + " ", *(f"{n} {s}" for n, s in zip(names, signs, strict=True))]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    identities = [f"{name} {2880 + owner}" for name, owner in zip(names, owners, strict=True)]
    (folder / "identity_CelebA.txt").write_text("\n".join(identities) + "\n")
    smiling = ATTRIBUTES.index("Smiling")
    for split in ("train", "test"):
        people = [p for p in range(len(images)) if (p in test) == (split == "test")]
        (root / data / split).mkdir(parents=True)
        for number in range(files_per_split):
            own = {str(2880 + p): np.flatnonzero(owners == p) for p in people[number::files_per_split]}
            content = {
                "users": list(own),
                "num_samples": [len(rows) for rows in own.values()],
                "user_data": {
                    u: {"x": [names[i] for i in r], "y": [float(attributes[i, smiling]) for i in r]}
                    for u, r in own.items()
                },
            }
            file = root / data / split / f"all_data_niid_1_keep_5_{split}_9{number or ''}.json"
            file.write_text(json.dumps(content))
    return attributes
