"""Seeds derived from seeds, so that resuming at an epoch repeats what an uninterrupted run would have drawn."""

import numpy as np

__all__ = ["derive_seed", "generator"]


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order.

    >>> derive_seed(0, 1) != derive_seed(1, 0)
    True
    >>> derive_seed("partition", 0) == derive_seed("partition", 0)
    True
    """
    numbers: list[int] = []
    for part in parts:
        numbers += list(part.encode()) if isinstance(part, str) else [part & 0xFFFFFFFF, part >> 32]
        numbers.append(len(numbers))  # keeps ("a", 1) apart from (97, 1)
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*parts: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(*parts))
