"""Labels: which settings a table shows."""

from iciia_exp.results.labels import base_of, label_of, varying


def row(method, **more):
    return {"method": method, "name": "x", "backbone": "b", **{key.replace("__", "."): v for key, v in more.items()}}


def test_heads_are_shown_where_a_network_has_layers_and_else_where_they_differ():
    rows = [
        row("iciia", num_layers=1, heads=4, groups=2, config__method__heads=4, config__method__groups=2),
        row("iciia", num_layers=1, heads=2, groups=2, config__method__heads=2, config__method__groups=2),
        row("miet", heads=None, config__method__heads=1, config__method__rank=8),
        row("miet", heads=None, config__method__heads=2, config__method__rank=8),
    ]
    keys = varying(rows)
    assert [label_of(r, keys) for r in rows] == [
        "iciia N=1 H=4 G=2",
        "iciia N=1 H=2 G=2",
        "miet heads=1",
        "miet heads=2",
    ]


def test_levels_of_tokens_are_settings_of_one_table():
    rows = [row("miet", config__backbone__model__gather_last=k, config__backbone__model__size=8) for k in (3, 6)]
    assert base_of(rows[0]) == base_of(rows[1])
    assert label_of(rows[0], varying(rows)) == "miet gather_last=3"
    assert base_of(rows[0]) != base_of(rows[0] | {"config.backbone.model.size": 9})


def test_close_values_have_labels_of_their_own():
    rows = [row("a", config__optimizer__lr=lr) for lr in (0.000123456, 0.000123457, 0.1, 1 / 3)]
    labels = [label_of(r, varying(rows)) for r in rows]
    assert labels == ["a lr=0.000123456", "a lr=0.000123457", "a lr=0.1", "a lr=0.3333333"]
