"""Clients drawn unlike the partition's, and every method through the engine with them."""

import numpy as np
import pandas as pd
import pytest
import torch

from iciia_exp import Run
from iciia_exp.config.settings import Evaluation
from iciia_exp.data.client_mix import ClientMix
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.engine.evaluation.drawn_clients import drawn_clients, drawn_clients_table
from iciia_exp.engine.evaluation.history import Setup
from iciia_exp.engine.execute import execute
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.methods.adapt.heads import BackboneOnly
from iciia_exp.methods.base import Facts
from iciia_exp.results.columns import DRAWN_TYPES
from tests.making.cloud import ON_TOKENS, small_cloud
from tests.making.config import methods

pytestmark = pytest.mark.usefixtures("undrawn")

METHODS = methods("adapt", "tune", "cotrain")
OWN_LABELS = ("coda", "finetune", "linear_probe", "mpda", "prompt_tuning", *ON_TOKENS)


def test_drawn_clients_have_their_kinds_of_classes():
    cloud = small_cloud(8, 40, clients=30)
    labels = cloud.batches.labels
    sizes = {}
    for client_type in DRAWN_TYPES:
        drawn = drawn_clients(cloud.clients, labels, 50, 16, client_type)
        assert drawn.types.tolist() == [client_type] * 50
        assert drawn.in_time
        assert set(drawn.test.values) <= set(cloud.clients.test.values)
        assert (drawn.test.lengths == 16).all()
        sizes[client_type] = drawn.classes_per_client(labels, "test")
        again = drawn_clients(cloud.clients, labels, 50, 16, client_type)
        assert (again.test.values == drawn.test.values).all()
    assert sizes["random_classes"].mean() < sizes["drifting"].mean() < sizes["homogeneous"].mean()


def test_there_can_be_many_more_drawn_clients_than_test_chunks():
    cloud = small_cloud(8, 4, clients=2)
    for client_type in DRAWN_TYPES:
        assert len(drawn_clients(cloud.clients, cloud.batches.labels, 5000, 4, client_type)) == 5000


def one_client(labels):
    """Return one client with a test image of each label."""
    empty = Ragged.empty(1)
    test = Ragged.from_rows([np.arange(len(labels))])
    return Clients(np.array(["a"]), np.array(["a"]), empty, empty, test)


@pytest.mark.parametrize("client_type", DRAWN_TYPES)
@pytest.mark.parametrize("of_class", [1, 4, 50])
def test_no_image_is_drawn_twice(client_type, of_class):
    labels = np.repeat(np.arange(40), of_class)
    drawn = drawn_clients(one_client(labels), labels, 200, 16, client_type)
    sizes = drawn.classes_per_client(labels, "test")
    for client in range(200):
        assert len(set(drawn.test[client])) == 16
    if client_type == "random_classes":  # as many classes as it takes
        assert sizes.min() == {1: 16, 4: 4, 50: 2}[of_class]
    if client_type == "drifting" and of_class == 4:  # eight images are all those of two classes
        assert min(len(set(labels[drawn.test[c][:8]])) for c in range(200)) == 2


@pytest.mark.parametrize("client_type", DRAWN_TYPES)
def test_a_drawn_client_ends_where_the_test_images_do(client_type):
    labels = np.array([0, 0, 1, 1, 2])
    drawn = drawn_clients(one_client(labels), labels, 3, 16, client_type)
    assert [sorted(drawn.test[c]) for c in range(3)] == [[0, 1, 2, 3, 4]] * 3


def test_random_classes_are_equally_frequent():
    labels = np.repeat([0, 1], [20, 200])
    drawn = drawn_clients(one_client(labels), labels, 400, 16, "random_classes")
    assert abs((labels[drawn.test.values] == 0).mean() - 0.5) < 0.02


def test_attributes_have_no_sets_of_classes():
    cloud = small_cloud(8, 5, task="multi-label")
    torch.manual_seed(0)
    head, options = torch.nn.Linear(8, 5), Evaluation(drawn_clients=10)
    table = drawn_clients_table(
        Setup(BackboneOnly(Facts.of(head, "multi-label")), head, cloud.batches, cloud.clients), options, 8
    )
    assert set(table["client_type"]) == {"homogeneous"}
    assert (table["decisions"] == 5 * table["targets"]).all()


def test_a_drifting_client_by_images_since_the_change():
    cloud = small_cloud(8, 40, clients=30)
    torch.manual_seed(0)
    head, options = torch.nn.Linear(8, 40), Evaluation(drawn_clients=10)
    table = drawn_clients_table(Setup(BackboneOnly(Facts.of(head)), head, cloud.batches, cloud.clients), options, 16)
    assert table[table["client_type"] == "drifting"]["history"].unique().tolist() == [7, 8, 9, 10, 11, 13, 15, -1]
    assert table[table["client_type"] == "homogeneous"]["history"].unique().tolist() == [0, 1, 2, 3, 5, 10, 15, -1]


def test_kept_back_kinds_are_no_training_clients():
    cloud = small_cloud(8, 5, clients=12)
    mix = ClientMix(unseen_types=0.25)
    known = mix.known(cloud.clients)
    assert (known.train.lengths == 0).sum() == 3
    assert ((known.val.lengths == 0) == (known.train.lengths == 0)).all()
    assert (known.test.lengths == cloud.clients.test.lengths).all()
    assert ClientMix().known(cloud.clients) is cloud.clients


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in OWN_LABELS])
def test_every_method_the_whole_way(stages, method):
    epochs, no_plots = "training.recipe.epochs=1", "evaluation.history_lengths=[0,2]"
    row = execute(p := stages(f"method={method}", epochs, no_plots, "evaluation.drawn_clients=6"))
    assert 0 <= row["ece"] <= 1
    assert 0 <= row["backbone_ece"] <= 1
    assert row["oracle"] == (method == "oracle_classes")
    assert row["state_bytes"] >= 0
    run = Run.load(p.run.folder)
    if run.method.asks:
        assert not (p.evaluation.folder / "drawn_clients.parquet").exists()
        return
    types = pd.read_parquet(p.evaluation.folder / "drawn_clients.parquet")
    assert set(types["client_type"]) == set(DRAWN_TYPES)
    assert types.groupby(["client_type", "history"])["targets"].sum().unique().tolist() == [6]
    # the run answers as it was evaluated
    rows = run.partition.test.values[:5]
    x = np.asarray(run.features.array()[rows], dtype=np.float32)
    arrays = {name: torch.from_numpy(run.features.array(name)[rows]) for name in run.method.reads - {"features"}}
    assert run.predict(torch.from_numpy(x), arrays=arrays).shape == (len(rows), len(run.class_names))


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN_LABELS)
def test_methods_that_need_own_labels(stages, with_tokens, method):
    stages = with_tokens if method in ON_TOKENS else stages
    with pytest.raises(UserError, match="choose a partition that splits within clients"):
        execute(stages(f"method={method}", "training.recipe.epochs=1"))
    row = execute(p := stages(f"method={method}", "training.recipe.epochs=1", "partition.split=within"))
    assert row["test_clients"] > 0
    run = Run.load(p.run.folder)
    arrays = {name: torch.zeros(3, *shape) for name, shape in run.info.get("arrays", {}).items()}
    with pytest.raises(UserError, match="has a state for every client"):
        run.predict(torch.zeros(3, row["dim"]), arrays=arrays)


def test_a_method_names_the_tasks_it_knows(stages, monkeypatch):
    from iciia_exp.methods.adapt.lame import Lame

    monkeypatch.setattr(Lame, "tasks", ("multi-label",))
    with pytest.raises(ConfigError, match="method=lame: knows multi-label tasks; this dataset's is single-label"):
        stages("method=lame")
