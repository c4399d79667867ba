"""What the tests of a trained run share."""

import shutil

import pytest

from iciia_exp.engine.execute import execute


@pytest.fixture
def finished(stages, undrawn):
    """Return the stages of a small run of ICIIA on digits, which is trained and evaluated."""
    made = stages("groups=4")
    execute(made)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return an untrained causal run, as a service has one; modules that need another define their own."""
    from tests.serving.test_session import make_run

    folder = tmp_path_factory.mktemp("runs") / "iciia-1"
    folder.mkdir()
    return make_run(folder, num_layers=2, attention="causal")


@pytest.fixture(scope="module")
def redis_url():
    """Start a Redis server; return its address."""
    from tests.serving.test_service import redis_server

    with redis_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "redis"])
def states(request, tmp_path):
    """Return where states are kept."""
    return str(tmp_path / "states.sqlite") if request.param == "sqlite" else request.getfixturevalue("redis_url")


@pytest.fixture
def browser():
    """Start Chromium, or skip."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
