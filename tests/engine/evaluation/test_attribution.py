"""Attribution examples: which images count, against computing the same by hand."""

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from iciia_exp.config.settings import Evaluation
from iciia_exp.data.batches import ClientBatch
from iciia_exp.data.clients import Clients, Ragged
from iciia_exp.engine.evaluation.attribution import CASES, _without_each, attribution_table, thumbnail
from iciia_exp.engine.evaluation.history import Setup
from iciia_exp.methods.adapt.client_types import ClientTypesMethod
from iciia_exp.methods.adapt.encoder import ConvAcrossImages
from iciia_exp.methods.adapt.heads import LinearHead
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.methods.adapt.prior_em import PriorEM
from iciia_exp.methods.base import Facts
from iciia_exp.models.iciia import ICIIA
from iciia_exp.results.pictures import draw_examples
from iciia_exp.tasks import MULTI_LABEL, SINGLE_LABEL
from tests.making.cloud import no_fit, small_cloud

NAMES = ["cat", "dog", "owl", "fox"]


def made(method_class=IciiaMethod, task=SINGLE_LABEL, options=None, image=None, clients=None, **config):
    cloud = small_cloud(8, 4, task=task)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 4)
    method = method_class(Facts.of(head, task), **config).eval()
    method.learn(cloud.view, no_fit)
    clients = clients or cloud.clients
    setup = Setup(method, head, cloud.batches, clients)
    options = options or Evaluation(examples=6, neighbours=3)
    return attribution_table(setup, options, 8, NAMES, image), method, head, cloud


def test_attention_maps_are_pytorchs():
    torch.manual_seed(0)
    net = ICIIA(8, 4, 1, 2, 1).eval()
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    own = net.layers[0].attention
    attention.load_state_dict(
        {
            "in_proj_weight": own.qkv.weight,
            "in_proj_bias": own.qkv.bias,
            "out_proj.weight": own.out.weight,
            "out_proj.bias": own.out.bias,
        }
    )
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    _, wanted = attention(x, x, x, key_padding_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(net.attention_maps(x, mask)[0], wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_weights_are_shares_of_real_images_and_of_the_past_alone(causal, layers):
    torch.manual_seed(0)
    attention = "causal" if causal else "full"
    method = IciiaMethod(Facts.of(torch.nn.Linear(8, 4)), layers, 2, 4, attention=attention).eval()
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    weights = method.attention_weights(x, mask)
    torch.testing.assert_close(weights[mask].sum(-1), torch.ones(10))
    assert (weights[1, :4, 4:] == 0).all()
    if causal:
        assert (weights.triu(1) == 0).all()
    if layers == 1:  # half the image itself, half what it attends to
        maps = method.model.attention_maps(x, mask)[0].mean(1)
        torch.testing.assert_close(weights, 0.5 * maps + 0.5 * torch.eye(6))


@pytest.mark.parametrize("method_class", [IciiaMethod, PriorEM, ClientTypesMethod])
def test_influence_is_that_of_leaving_the_image_out(method_class):
    table, method, _, cloud = made(method_class, options=Evaluation(examples=6, neighbours=20))
    assert len(table[table["rank"] == 0]) == 6
    for _, rows in table.groupby("example"):
        target, others = rows[rows["rank"] == 0].iloc[0], rows[rows["rank"] > 0]
        numbers = others["image"].to_list()
        features = cloud.batches.features

        @torch.inference_mode()
        def log_p(images, target=target, features=features):
            x = torch.from_numpy(features[[*images, target["image"]]])[None]
            return method(x)[0, -1].double().log_softmax(-1)

        full = log_p(numbers)
        answer = int(full.argmax())
        assert NAMES[answer] == target["method_prediction"]
        assert target["method_confidence"] == pytest.approx(float(full.exp()[answer]), abs=1e-5)
        for number, influence in zip(numbers, others["influence"], strict=True):
            without = log_p([n for n in numbers if n != number])
            assert influence == pytest.approx(float(full[answer] - without[answer]), abs=1e-4)
        assert (others["client"] == target["client"]).all()
        assert target["image"] not in numbers
        if method_class is IciiaMethod:
            assert others["weight"].sum() == pytest.approx(1)
            assert others["weight"].is_monotonic_decreasing
        else:
            assert others["weight"].isna().all()
            assert others["influence"].abs().is_monotonic_decreasing


def test_no_hole_is_left_where_an_image_was():
    """A convolution reads neighbours: those of the image that is left out become neighbours."""
    torch.manual_seed(0)
    method = ConvAcrossImages(Facts.of(torch.nn.Linear(8, 4)), num_layers=2).eval()
    x_1SD, padded = torch.randn(1, 6, 8), torch.zeros(1, 2, 8)
    mask = torch.arange(8)[None] < 6
    batch = ClientBatch(torch.cat([x_1SD, padded], 1), torch.zeros(1, 8, dtype=torch.int64), mask, torch.tensor([3]))
    got = method.logits(_without_each(batch, 5))[:, -1]
    for number in range(5):
        left = [i for i in range(6) if i != number]
        torch.testing.assert_close(got[number], method(x_1SD[:, left])[0, -1])


def test_cases_say_what_became_of_the_answer():
    table, *_ = made()
    targets = table[table["rank"] == 0]
    before, after = (targets[f"{who}_prediction"] == targets["truth"] for who in ("backbone", "method"))
    assert ((after & ~before) == (targets["case"] == "corrected")).all()
    assert ((before & ~after) == (targets["case"] == "spoiled")).all()
    assert set(targets["case"]) <= set(CASES)
    counted = targets.drop_duplicates("case")
    assert counted["cases"].sum() <= targets["drawn"].iloc[0] == 96  # all test images of 12 clients
    again, *_ = made()
    pd.testing.assert_frame_equal(table, again)


def test_attributes_say_how_many_are_right():
    table, *_ = made(task=MULTI_LABEL)
    target = table[table["rank"] == 0].iloc[0]
    assert target["method_prediction"].endswith(" of 4 right")
    assert set(target["truth"].split(", ")) <= set(NAMES)


def test_in_time_the_past_comes_before():
    cloud = small_cloud(8, 4)
    clients = dataclasses.replace(cloud.clients, in_time=True)
    table, *_ = made(clients=clients, options=Evaluation(examples=12, neighbours=20))
    for _, rows in table.groupby("example"):
        assert (rows["image"][rows["rank"] > 0] < rows["image"].iloc[0]).all()


def test_nothing_to_show():
    assert made(LinearHead)[0].empty  # it looks at no other image
    assert made(options=Evaluation(examples=0))[0].empty
    cloud = small_cloud(8, 4)
    parts = (IciiaMethod(Facts.of(torch.nn.Linear(8, 4))).eval(), torch.nn.Linear(8, 4), cloud.batches, cloud.clients)
    assert attribution_table(Setup(*parts), Evaluation(), 1, NAMES).empty  # chunks of one image
    ids = cloud.clients.ids
    one = Ragged(np.arange(len(ids) + 1), cloud.clients.test.values[: len(ids)])
    nobody = Ragged(np.zeros(len(ids) + 1, np.int64), np.empty(0, np.int64))
    assert made(clients=Clients(ids, ids, nobody, nobody, one))[0].empty  # nobody has a second image


def test_pictures_that_cannot_be_read_cost_nothing_else(caplog, tmp_path):
    def image(number):
        raise OSError("the folder is gone")

    table, *_ = made(image=image)
    assert table["thumbnail"].isna().all()
    assert [r.getMessage() for r in caplog.records if "without pictures" in r.getMessage()] != []
    assert len([r for r in caplog.records if "without pictures" in r.getMessage()]) == 1
    assert draw_examples(table, {"method": "m", "dataset": "d"}, tmp_path / "a.png") is None


@pytest.mark.parametrize(
    ("image", "form", "size", "mode"),
    [
        (np.full((1, 8, 8), 0.5, np.float32), "PNG", (8, 8), "L"),
        (np.full((3, 100, 50), 2.0, np.float32), "JPEG", (48, 96), "RGB"),
        (np.zeros((5, 30, 60, 3), np.uint8), "JPEG", (60, 30), "RGB"),
        (Image.new("RGB", (400, 200)), "JPEG", (96, 48), "RGB"),
        (Image.new("P", (20, 10)), "PNG", (20, 10), "RGB"),
        (Image.new("RGBA", (20, 10)), "PNG", (20, 10), "RGB"),
    ],
)
def test_thumbnails(image, form, size, mode):
    with Image.open(io.BytesIO(thumbnail(image))) as picture:
        assert (picture.format, picture.size, picture.mode) == (form, size, mode)


def test_a_vector_has_no_picture(tmp_path):
    assert thumbnail(np.zeros(8, np.float32)) is None


def test_the_plot(tmp_path):
    table, *_ = made(image=lambda number: np.full((1, 8, 8), number % 10 / 10, np.float32))
    path = draw_examples(table, {"method": "iciia", "dataset": "made"}, tmp_path / "plots" / "attribution.png")
    with Image.open(path) as picture:
        assert picture.size[0] > 500
