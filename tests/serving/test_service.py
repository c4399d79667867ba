"""The service: answers equal those of sessions, whatever happens in between; bad requests change nothing."""

import asyncio
import base64
import contextlib
import io
import shutil
import socket
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

with warnings.catch_warnings():  # of names in its own dependencies
    warnings.simplefilter("ignore", DeprecationWarning)
    from fastapi.testclient import TestClient

from iciia_exp.engine.execute import execute
from iciia_exp.serving.app import Limits, make_app
from iciia_exp.serving.run import Run
from iciia_exp.serving.scheduler import Scheduler, new_session
from iciia_exp.serving.service import main, open_store
from iciia_exp.serving.session import ClientSession
from iciia_exp.serving.states import SqliteStore
from tests.serving.test_session import D, K

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BINARY = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}


@contextlib.contextmanager
def redis_server():
    """Start a Redis server of the tests' own on loopback."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture
def service(run, tmp_path):
    """Serve a run in this process; states are in SQLite."""
    with TestClient(make_app(run, open_store(str(tmp_path / "states"), run, 5, "recent"), 5)) as client:
        yield client


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(port)


def ask(client, name, x, **more):
    """Return the probabilities of features, [n, K]."""
    answer = client.post(f"/clients/{name}/predict", content=np.asarray(x, "<f4").tobytes(), headers=BINARY, **more)
    assert answer.status_code == 200, answer.text
    return torch.from_numpy(np.frombuffer(answer.content, "<f4").reshape(-1, K).copy())


def alone(run, name, x, history=5, keep="recent"):
    """Return the probabilities of a session of its own, [n, K]."""
    session = new_session(run, name, history, keep)
    return torch.stack([session.predict(row) for row in x])


@pytest.mark.parametrize("keep", ["recent", "reservoir", "diverse"])
def test_requests_of_many_clients_equal_sessions(run, states, keep):
    x = torch.randn(8, 12, D)
    with TestClient(make_app(run, open_store(states, run, 5, keep), 5, keep)) as client:

        def talk(number):
            parts = x[number].split([1, 3, 1, 5, 2])  # requests of some images each
            return torch.cat([ask(client, f"{keep} {number}", part) for part in parts])

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(talk, range(8)))
        for number, answer in enumerate(answers):
            wanted = alone(run, f"{keep} {number}", x[number], 5, keep)
            torch.testing.assert_close(answer, wanted, atol=1e-6, rtol=1e-5)
        known = client.get(f"/clients/{keep} 3").json()
        assert (known["seen"], known["kept"]) == (12, 5)
        assert client.delete(f"/clients/{keep} 3").status_code == 204
        assert client.get(f"/clients/{keep} 3").status_code == 404
        torch.testing.assert_close(ask(client, f"{keep} 3", x[3, :1]), alone(run, f"{keep} 3", x[3, :1], 5, keep))


def test_states_outlive_the_process_and_the_cache(run, states):
    x = torch.randn(9, D)
    answers = []
    for part in x.split(3):
        with TestClient(make_app(run, open_store(states, run, 5, "recent"), 5)) as client:
            answers.append(ask(client, "outlives", part))
    torch.testing.assert_close(torch.cat(answers), alone(run, "outlives", x), atol=1e-6, rtol=1e-5)


def test_json_and_what_is_described(service, run):
    x = torch.randn(2, D)
    answer = service.post("/clients/a b/predict?top=2", json={"features": x.tolist()}).json()
    wanted = alone(run, "a b", x)
    assert (answer["client"], answer["seen"], answer["kept"]) == ("a b", 2, 2)
    for row, p in zip(answer["answers"], wanted, strict=True):
        assert [one["class"] for one in row] == [run.class_names[k] for k in p.argsort(descending=True)[:2]]
        assert row[0]["probability"] == pytest.approx(float(p.max()), abs=1e-5)
    assert service.get("/").json()["classes"] == list("abcd")
    assert service.get("/health").json() == {"status": "ok", "clients": 1, "waiting": 0}
    metrics = service.get("/metrics").text
    assert 'iciia_requests_total{status="200"} 2.0' in metrics
    assert "iciia_images_total 2.0" in metrics
    body = service.get("/openapi.json").json()["paths"]["/clients/{client}/predict"]["post"]["requestBody"]
    assert "application/octet-stream" in body["content"]


GOOD = [0.5] * D


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"json": {"features": GOOD[1:]}}, 422, f"expected {D} numbers, or lists of them, got"),
        ({"json": {"features": [GOOD, GOOD[1:]]}}, 422, f"expected {D} numbers"),
        ({"json": {"features": []}}, 422, f"expected {D} numbers"),
        ({"json": {"features": ["x"] * D}}, 422, f"expected {D} numbers"),
        ({"content": b'{"features": [NaN' + b", 1" * (D - 1) + b"]}"}, 422, "are not finite"),
        ({"content": b'{"features": [1e999' + b", 1" * (D - 1) + b"]}"}, 422, "are not finite"),
        ({"json": {"features": [1e38] * D}}, 422, "not finite"),
        ({"content": b"{"}, 400, "the body is not JSON"),
        ({"content": b"[" * 8000}, 400, "the body is not JSON"),
        ({"json": {"vectors": GOOD}}, 422, "expected an object"),
        ({"json": [GOOD]}, 422, "expected an object"),
        ({"json": {"features": ["1"] * D}}, 422, f"expected {D} numbers"),
        ({"json": {"features": [True] * D}}, 422, f"expected {D} numbers"),
        ({"json": {"features": [10**30] * D}}, 422, f"expected {D} numbers"),
        ({"json": {"features": [1e39] * D}}, 422, "are not finite"),
        ({"content": b"123", "headers": BINARY}, 422, f"a multiple of {4 * D} bytes, got 3"),
        ({"content": b"", "headers": BINARY}, 422, "got 0"),
        ({"content": np.full(D, np.inf, "<f4").tobytes(), "headers": BINARY}, 422, "are not finite"),
        ({"content": bytes(9000), "headers": BINARY}, 413, "the body is larger than 8,192 bytes"),
        ({"content": (bytes(4096) for _ in range(3)), "headers": BINARY}, 413, "the body is larger"),
        ({"content": bytes(4 * D * 4), "headers": BINARY}, 413, "4 images; at most 3"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "Content-Type is text/plain"),
        ({"content": b"x", "headers": {"content-type": "image/png"}}, 415, "this service takes features"),
        ({"json": {"features": GOOD}, "params": {"top": 0}}, 422, "top=0"),
        ({"json": {"features": GOOD}, "params": {"top": "x"}}, 422, "top: "),
    ],
)
def test_a_bad_request_is_one_sentence_and_changes_nothing(run, tmp_path, given, status, message):
    app = make_app(run, SqliteStore(":memory:", {}), 5, limits=Limits(8192, 3))
    if "content" in given and "headers" not in given:
        given = given | {"headers": {"content-type": "application/json"}}
    with TestClient(app) as client:
        ask(client, "c", torch.ones(1, D))
        answer = client.post("/clients/c/predict", **given)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]
        assert "Traceback" not in answer.text
        assert client.get("/clients/c").json()["seen"] == 1
        x = torch.randn(1, D)
        assert torch.allclose(ask(client, "c", x), alone(run, "c", torch.cat([torch.ones(1, D), x]))[1:], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("PUT", "/clients/c/predict", 405), ("GET", "/nowhere", 404), ("POST", "/health", 405)],
)
def test_paths_that_are_not_there_have_the_form_of_all_errors(service, method, path, status):
    answer = service.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(f"{method} {path}: ")
    assert (status == 405) == ("allow" in answer.headers)


def test_an_image_that_fails_takes_back_the_others_of_its_request(service, run):
    x = torch.randn(2, D)
    ask(service, "c", x[:1])
    broken = torch.cat([x[1:], torch.full((1, D), 3e38)])
    answer = service.post("/clients/c/predict", content=broken.numpy().tobytes(), headers=BINARY)
    assert answer.status_code == 422
    assert "not finite" in answer.json()["error"]
    assert service.get("/clients/c").json()["seen"] == 1
    torch.testing.assert_close(ask(service, "c", x[1:]), alone(run, "c", x)[1:], atol=1e-6, rtol=1e-5)


def test_names_and_tokens(run, tmp_path):
    with TestClient(make_app(run, SqliteStore(":memory:", {}), 5, token="secret")) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            answer = client.post("/clients/c/predict", json={"features": GOOD}, headers=headers)
            assert answer.status_code == 401
            assert client.delete("/clients/c", headers=headers).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert client.post("/clients/c/predict", json={"features": GOOD}, headers=right).status_code == 200
        for name in ("%00", "%20", "x" * 201):
            answer = client.post(f"/clients/{name}/predict", json={"features": GOOD}, headers=right)
            assert answer.status_code == 422, name
            assert "a client's name has 1 to 200 printable characters" in answer.json()["error"]
        for name in ("..%2f..%2fetc%2fpasswd", "ключ 🔑", "a/predict", "%EF%BF%BD"):
            assert client.post(f"/clients/{name}/predict", json={"features": GOOD}, headers=right).status_code == 200
        for name in ("%E9", "%E8", "a%FFb"):  # all are read as "\ufffd"
            for query in ("", "?top=2"):
                answer = client.post(f"/clients/{name}/predict{query}", json={"features": GOOD}, headers=right)
                assert (answer.status_code, "is not UTF-8" in answer.json()["error"]) == (400, True)
            assert client.get(f"/clients/{name}", headers=right).status_code == 400
            assert client.delete(f"/clients/{name}", headers=right).status_code == 400


def status(app, method, path, **headers):
    """Return the status of a request whose client hangs up before a body, with headers in bytes."""
    found = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        found.append(message.get("status"))

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope["headers"] = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    asyncio.run(app(scope, receive, send))
    return found[0]


@pytest.mark.parametrize("token", ["pässwort-ключ", "caf\udce9"])  # the latter is in the environment in Latin-1
def test_a_token_is_compared_as_bytes(run, token):
    sent = f"Bearer {token}".encode(errors="surrogateescape")
    app = make_app(run, SqliteStore(":memory:", {}), 5, token=token)
    assert status(app, "GET", "/", authorization=sent) == 200
    for wrong in (b"Bearer ", sent[:-1], sent + b"\xe9", b"Bearer p\xe4sswort"):
        assert status(app, "GET", "/", authorization=wrong) == 401
    app.state.scheduler.close()


def test_requests_are_counted_by_their_status(run, monkeypatch):
    app = make_app(run, SqliteStore(":memory:", {}), 5)
    with TestClient(app, raise_server_exceptions=False) as client:
        ask(client, "c", torch.ones(1, D))
        assert client.delete("/clients/c").status_code == 204
        assert client.post("/clients/c/predict?top=x", json={"features": GOOD}).status_code == 422
        assert status(app, "POST", "/clients/c/predict", content_type=b"application/json") == 499
        monkeypatch.setattr(app.state.scheduler, "submit", lambda *_, **__: 1 / 0)
        assert client.post("/clients/c/predict", json={"features": GOOD}).status_code == 500
        metrics = client.get("/metrics").text
        for code in (200, 204, 422, 499, 500):
            assert f'iciia_requests_total{{status="{code}"}} 1.0' in metrics


def test_images_are_those_of_the_backbone(finished):
    run = Run.load(finished.run.folder)
    backbone = run.load_backbone()
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8), dtype=np.uint8)
    files = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    session = new_session(run, "c", 5, "recent")
    session.backbone = backbone
    wanted = torch.stack([session.predict(picture) for picture in pixels])
    with TestClient(make_app(run, SqliteStore(":memory:", {}), 5, backbone=backbone)) as client:
        headers = {"content-type": "image/png", "accept": BINARY["accept"]}
        answers = [client.post("/clients/c/predict", content=files[0], headers=headers)]
        encoded = {"images": [base64.b64encode(file).decode() for file in files[1:]]}
        answers.append(client.post("/clients/c/predict", json=encoded, headers={"accept": BINARY["accept"]}))
        got = np.concatenate([np.frombuffer(answer.content, "<f4").reshape(-1, 10) for answer in answers])
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)
        for content, message in (
            (files[0][:40], "cannot be read"),
            (b"GIF89a", "cannot be read"),
            (b"", "the body is empty"),
        ):
            answer = client.post("/clients/c/predict", content=content, headers=headers)
            assert answer.status_code == 422
            assert message in answer.json()["error"]
        for text in ("!", "é"):
            answer = client.post("/clients/c/predict", json={"images": [text]})
            assert (answer.status_code, "base64" in answer.json()["error"]) == (422, True)
        assert client.get("/clients/c").json()["seen"] == 4


def test_methods_whose_devices_learn_know_the_clients_of_the_run(stages, undrawn, tmp_path, capsys):
    made = stages("method=finetune", "partition.split=within", "evaluation.history_lengths=[]", "method.epochs=1")
    execute(made)
    run = Run.load(made.run.folder)
    x = torch.from_numpy(run.features.array()[:2].astype(np.float32))
    with TestClient(make_app(run, SqliteStore(":memory:", {}))) as client:
        name = run.partition.ids[0]
        answer = client.post(f"/clients/{name}/predict", json={"features": x.tolist()}).json()
        wanted = run.predict(x, clients=name)
        assert [row[0]["class"] for row in answer["answers"]] == [run.class_names[k] for k in wanted.argmax(1)]
        answer = client.post("/clients/nobody/predict", json={"features": x.tolist()})
        assert (answer.status_code, answer.json()["error"]) == (404, "nobody: is not a client of the run")
        size = 4 * sum(np.prod(shape) for shape in run.method.state_shapes.values())
        assert client.get(f"/clients/{name}").json() == {"client": name, "seen": 2, "kept": 0, "bytes": size}
        assert client.delete(f"/clients/{name}").status_code == 204
        assert client.get(f"/clients/{name}").json()["seen"] == 0, "what it has learned is the run's"
        assert [client.request(kind, "/clients/nobody").status_code for kind in ("GET", "DELETE")] == [404, 404]
        assert client.get("/health").json()["clients"] == len(run.method.states)
    scheduler = Scheduler(run, SqliteStore(":memory:", {}), together=1, memory=1)

    async def ask_each():
        return [(await scheduler.submit(name, x)).seen for name in run.partition.ids[:3]]

    assert asyncio.run(ask_each()) == [2, 2, 2]
    scheduler.close()
    assert list(scheduler._sessions) == [run.partition.ids[2]], "those that are not used are dropped"
    folder, states = run.save_pretrained(tmp_path / "model"), tmp_path / "states.sqlite"
    for path, more, message in (
        (run.path, ["--history", "7"], "history and keep do not apply"),
        (run.path, ["--keep", "reservoir"], "history and keep do not apply"),
        (folder, [], "a repository has no states of its clients"),
    ):
        assert main([str(path), "--states", str(states), *more]) == 1
        assert message in capsys.readouterr().err
    assert not states.exists()
    assert ClientSession(Run.load(folder), "new").learned is None, "a session that can learn"


def test_a_service_without_its_states_is_not_healthy(run):
    with contextlib.ExitStack() as stack:
        with redis_server() as url:
            client = stack.enter_context(TestClient(make_app(run, open_store(url, run, 5, "recent"), 5)))
            assert client.get("/health").json() == {"status": "ok", "clients": None, "waiting": 0}
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        assert client.get("/clients").status_code == 404
