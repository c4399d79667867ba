"""iNaturalist 2019 in small, with a mapping of FedScale's form."""

import hashlib

import numpy as np
import pandas as pd

from tests.making.images import write_image

#: Categories by supercategory; numbers run over all of them, as in the real set.
CATEGORIES = {"Amphibians": (2, 10), "Birds": (0, 3), "Plants": (1, 11)}

#: How an image is written in the mapping: from train_val2019 on, from below it, or its name alone.
FORMS = {"prefixed": "train_val2019/{}", "path": "{}", "name": "{}"}


def make_inaturalist(
    root,
    clients=(("train.csv", 6), ("test.csv", 3)),
    per_client=8,
    *,
    categories=CATEGORIES,
    form="prefixed",
    size=32,
    seed=0,
):
    """Write images and mappings below ``root`` and return it. Client ids start at 0 in every file.

    Each client has images of a few categories, in a share of its own.
    """
    rng = np.random.default_rng(seed)
    above = {c: a for a, own in categories.items() for c in own}
    numbers = sorted(above)
    for number, name in above.items():
        (root / "train_val2019" / name / str(number)).mkdir(parents=True)
    folder = root / "client_data_mapping"
    folder.mkdir()
    count = 0
    for file, own in clients:
        rows = []
        for client in range(own):
            chosen = rng.choice(numbers, min(3, len(numbers)), replace=False)
            for category in rng.choice(chosen, per_client, p=[0.6, 0.3, 0.1][: len(chosen)]).tolist():
                path = f"{above[category]}/{category}/{hashlib.md5(str(count).encode()).hexdigest()}.jpg"
                write_image(root / "train_val2019" / path, numbers.index(category), count, size)
                count += 1
                given = path.rsplit("/", 1)[1] if form == "name" else FORMS[form].format(path)
                rows.append((client, given, above[category], category))
        table = pd.DataFrame(rows, columns=["client_id", "sample_path", "label_name", "label_id"])
        table.to_csv(folder / file, index=False)
    return root
