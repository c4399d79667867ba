"""The page of a run in a browser: its numbers are Python's, and it needs no server and no network."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from iciia_exp.errors import UserError
from iciia_exp.models.backbones.small_cnn import SmallCNN
from iciia_exp.models.backbones.timm_backbone import TimmBackbone
from iciia_exp.serving import page
from iciia_exp.serving.page import main, make_page
from iciia_exp.serving.run import Run
from iciia_exp.serving.session import ClientSession
from tests.serving.test_session import make_run

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="session")
def runtime(tmp_path_factory):
    """Return the folder of the npm package, or skip."""
    try:
        return page._packed(tmp_path_factory.mktemp("npm"))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def run(finished):
    return Run.load(finished.run.folder)


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"name": "digit.png", "mimeType": "image/png", "buffer": file.getvalue()}


def opened(browser, folder, **size):
    """Return the page when it is ready, and what it asked for."""
    tab, asked = browser.new_page(**size), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: asked.append(f"error: {error}"))
    tab.goto((folder / "index.html").as_uri())
    tab.wait_for_function("document.getElementById('status').textContent === 'Ready.'", timeout=60_000)
    return tab, asked


@pytest.mark.slow
def test_numbers_in_the_browser_are_those_of_python(run, runtime, browser, tmp_path, capsys):
    assert main([str(run.path), "--out", str(tmp_path / "demo"), "--runtime", str(runtime)]) == 0
    assert "index.html" in capsys.readouterr().out
    pictures = np.random.default_rng(0).integers(0, 255, (18, 8, 8), dtype=np.uint8)  # more than are kept
    session = ClientSession(run, backbone=run.load_backbone())
    tab, asked = opened(browser, tmp_path / "demo")
    for number, picture in enumerate(pictures, 1):
        wanted = session.predict(picture).numpy()
        tab.set_input_files("#files", [png(picture)])
        tab.wait_for_function(f"demo.clients[0].seen === {number}")
        np.testing.assert_allclose(tab.evaluate("demo.clients[0].answer.adapted"), wanted, atol=1e-4)
    alone = run.head(session.backbone.features(session.backbone.transform(pictures[-1])[None])).softmax(-1)[0]
    np.testing.assert_allclose(tab.evaluate("demo.clients[0].answer.alone"), alone.numpy(), atol=1e-4)
    # influence: what the answer's log-probability loses without an image
    before = session.history
    influence = tab.evaluate("demo.clients[0].answer.before.map((image) => image.influence)")
    assert len(influence) == before
    other = ClientSession(run, backbone=session.backbone)
    kept = pictures[-1 - before : -1]
    for picture in kept[1:]:
        other.predict(picture)
    without = other.predict(pictures[-1])
    assert influence[0] == pytest.approx(float(np.log(wanted.max()) - without[int(wanted.argmax())].log()), abs=1e-3)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    # the second client is new; reset makes the first one new
    assert tab.evaluate("demo.clients[1].seen") == 0
    tab.get_by_role("button", name="Reset client A").click()
    tab.set_input_files("#files", [png(pictures[0])])
    tab.wait_for_function("demo.clients[0].seen === 1")
    first = ClientSession(run, backbone=session.backbone).predict(pictures[0]).numpy()
    np.testing.assert_allclose(tab.evaluate("demo.clients[0].answer.adapted"), first, atol=1e-4)


@pytest.mark.slow
def test_by_keyboard_on_a_small_screen(run, runtime, browser, tmp_path):
    folder = make_page(run, tmp_path / "demo", run.load_backbone(), runtime)
    tab, asked = opened(browser, folder, viewport={"width": 400, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.focus("[name=client]:checked")
    tab.keyboard.press("ArrowRight")
    tab.focus("#send")
    tab.keyboard.press("Enter")
    tab.wait_for_function("demo.clients[1].seen === 1")
    assert tab.inner_text("#status").startswith("Client B: ")
    assert tab.locator("[role=status]").count() == 1
    tab.set_input_files("#files", [{"name": "broken.png", "mimeType": "image/png", "buffer": b"no image"}])
    tab.wait_for_function("document.getElementById('status').textContent === 'broken.png cannot be read as an image.'")
    assert tab.evaluate("demo.clients[1].seen") == 1
    assert not [url for url in asked if url.startswith("error")]


def test_wrong_arguments(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not the npm package onnxruntime-web"):
        make_page(run, tmp_path / "demo", run.load_backbone(), tmp_path)
    assert not (tmp_path / "demo").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there, and is no page"):
        make_page(run, tmp_path / "mine", run.load_backbone())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm is not installed"):
        make_page(run, tmp_path / "demo", run.load_backbone())
    (tmp_path / "alone").mkdir()
    alone = make_run(tmp_path / "alone", config={"_target_": "iciia_exp.methods.adapt.heads.LinearHead"})
    with pytest.raises(UserError, match="keeps no past images"):
        make_page(alone, tmp_path / "demo", run.load_backbone())


def test_the_page_takes_as_much_of_an_image_as_the_network():
    mobilenet = {"model": "mobilenetv2_100", "num_classes": 3, "image_size": 64}
    timm = TimmBackbone(**mobilenet)
    window = page._window(timm.describe_transform())
    assert window == {"share": 64 / 73, "squash": False}
    # a frame of the image's sides that the network does not see
    picture = np.full((146, 200), 255, dtype=np.uint8)
    seen = int(window["share"] * 146)
    picture[(146 - seen) // 2 + 2 : (146 + seen) // 2 - 2, (200 - seen) // 2 + 2 : (200 + seen) // 2 - 2] = 0
    assert timm.transform(Image.fromarray(picture))[:, 3:-3, 3:-3].max() < 10
    assert timm.transform(Image.fromarray(picture))[:, 0].min() > 100
    assert page._window(TimmBackbone(**mobilenet, crop_pct=1.0).describe_transform())["share"] == 1.0
    vgg = {"resize_size": 256, "crop_size": 224, "mean": [0.5]}
    assert page._window(vgg) == {"share": 0.875, "squash": False}
    assert page._window(SmallCNN(3).describe_transform()) == {"share": 1.0, "squash": True}
