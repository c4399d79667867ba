from iciia_exp.seeding import derive_seed, generator


def test_every_part_and_the_order_count():
    seeds = {
        derive_seed(*parts) for parts in [(0,), (0, 0), (0, 1), (1, 0), ("a", 0), ("a", 1), (2**40,), (2**40 + 1,)]
    }
    assert len(seeds) == 8
    assert all(0 <= s < 2**63 for s in seeds)


def test_generator_repeats():
    assert generator("x", 3).random() == generator("x", 3).random()


def test_stays_the_same_between_versions():
    assert derive_seed("partition", 0) == 8374437153978599730
