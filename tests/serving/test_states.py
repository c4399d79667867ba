"""States of a service: clients that are forgotten or damaged, and stores that fail, concern nobody else."""

import asyncio
import contextlib
import sqlite3
import threading
import time

import pytest
import torch
from torch import nn

pytest.importorskip("fastapi", reason="fastapi is not installed")

from iciia_exp.errors import UserError
from iciia_exp.serving import scheduler as module
from iciia_exp.serving.app import make_app
from iciia_exp.serving.scheduler import Scheduler
from iciia_exp.serving.service import open_store
from iciia_exp.serving.states import Change, SqliteStore, StoreError
from tests.serving.test_service import TestClient, alone, ask, redis_server
from tests.serving.test_session import D

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@contextlib.contextmanager
def scheduled(run, store, **more):
    scheduler = Scheduler(run, store, 5, **more)
    try:
        yield scheduler
    finally:
        scheduler.close()


def answers(scheduler, **given):
    """Return the answers, or errors, to requests of several clients that come at the same time."""

    async def wait():
        together = threading.Event()
        scheduler.call(together.wait)
        futures = [
            scheduler.submit(client, **x) if isinstance(x, dict) else scheduler.submit(client, x)
            for client, x in given.items()
        ]
        together.set()
        return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 30)

    return asyncio.run(wait())


def equal(answer, wanted):
    torch.testing.assert_close(answer.probabilities_nK, wanted, atol=1e-6, rtol=1e-5)
    assert answer.seen == len(wanted)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_client_that_was_forgotten_has_no_past(run, tmp_path, in_memory):
    x = torch.randn(12, D)
    store = open_store(str(tmp_path / "s"), run, 5, "recent", most=1)
    with TestClient(make_app(run, store, 5)) as client:
        ask(client, "a", x[:9])
        ask(client, "b", x[:1])
        scheduler = client.app.state.scheduler
        scheduler.call(store.expire if in_memory else scheduler._expire).result()
        assert ("a" in scheduler._sessions) == in_memory
        assert client.get("/clients/a").status_code == 404
        torch.testing.assert_close(ask(client, "a", x[9:10]), alone(run, "a", x[9:10]), atol=1e-6, rtol=1e-5)
        known = client.get("/clients/a").json()
        assert (known["seen"], known["kept"]) == (1, 1)
    with TestClient(make_app(run, open_store(str(tmp_path / "s"), run, 5, "recent"), 5)) as client:
        torch.testing.assert_close(ask(client, "a", x[10:]), alone(run, "a", x[9:])[1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["forget", "expire", "behind"])
def test_a_client_that_is_forgotten_during_a_long_request_starts_again(run, tmp_path, how):
    x = torch.randn(2, 100, D)  # 32 images in a pass
    store, calls = open_store(str(tmp_path / "s"), run, 5, "recent", most=1), []
    with scheduled(run, store) as scheduler:

        def forget(clients):
            if not calls:
                ways = {"forget": lambda: scheduler.forget("a"), "expire": lambda: scheduler.call(scheduler._expire)}
                calls.append(ways.get(how, lambda: scheduler.call(store.expire))())

        answers(scheduler, a=x[1, :3])
        answers(scheduler, other=x[1, :3])
        scheduler.on_batch = forget
        found = answers(scheduler, a=x[0], b=x[1])
        for name, answer, images in zip("ab", found, x, strict=True):
            equal(answer, alone(run, name, images))
        calls[0].result()
        assert [len(stored.rows) for stored in scheduler.call(lambda: store.read(["a", "b"])).result()] == [5, 5]


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_damaged_client_is_its_own_matter(run, tmp_path, kind):
    x = torch.randn(2, 100, D)
    with contextlib.ExitStack() as stack:
        url = str(tmp_path / "s") if kind == "sqlite" else stack.enter_context(redis_server())
        with scheduled(run, open_store(url, run, 5, "recent")) as scheduler:
            answers(scheduler, a=x[0, :3])
        store = open_store(url, run, 5, "recent")
        if kind == "sqlite":
            store._db.execute("DELETE FROM images WHERE place = 1")
        else:
            store._db.hdel(store._key("a"), "seen")
        with scheduled(run, store) as scheduler:
            for _ in range(2):
                damaged, whole = answers(scheduler, a=x[0], b=x[1])
                assert isinstance(damaged, UserError)
                assert str(damaged).startswith("a: what is kept of it is damaged")
                equal(whole, alone(run, "b", x[1]))
                assert scheduler.forget("b").result()
            assert scheduler.forget("a").result()
            equal(answers(scheduler, a=x[0])[0], alone(run, "a", x[0]))


DAMAGED = ("clients SET version = 'x'", "clients SET seen = 'x'", "clients SET seen = NULL", "clients SET random = 'x'")


@pytest.mark.parametrize(
    "change", [*DAMAGED, "images SET row = NULL", "images SET row = 'x'", "images SET place = 'x'"]
)
def test_damage_of_any_kind_concerns_one_client(run, change):
    x = torch.randn(2, 3, D)
    with scheduled(run, SqliteStore(":memory:", {})) as scheduler:
        answers(scheduler, a=x[0])
        one = "" if "place" not in change else " WHERE place = 1"
        scheduler.call(lambda: scheduler.store._db.execute(f"UPDATE {change}{one}")).result()
        scheduler._sessions.clear()
        damaged, whole = answers(scheduler, a=x[0], b=x[1])
        assert isinstance(damaged, UserError)
        assert str(damaged).startswith("a: what is kept of it is damaged")
        if "random" not in change:  # which is not read
            with pytest.raises(UserError, match="a: what is kept of it is damaged"):
                scheduler.look_up("a").result()
        equal(whole, alone(run, "b", x[1]))


class Fragile(nn.Module):
    """A backbone that fails at images of nines, and whose features of sevens are not finite."""

    def features(self, images):
        if (images == 9).any():
            raise RuntimeError("nines")
        return torch.where(images == 7, torch.nan, images)


def test_an_image_that_fails_concerns_one_client(run):
    x = torch.randn(1, D)
    with scheduled(run, SqliteStore(":memory:", {}), backbone=Fragile()) as scheduler:
        nines, sevens = torch.full((D,), 9.0), torch.full((D,), 7.0)
        given = {name: {"images": [image]} for name, image in (("a", nines), ("b", sevens), ("c", x[0]))}
        failed, infinite, good = answers(scheduler, **given)
        assert isinstance(failed, RuntimeError)
        assert "not finite" in str(infinite)
        equal(good, alone(run, "c", x))
        for name in "ab":  # which are answered again
            equal(answers(scheduler, **{name: x})[0], alone(run, name, x))


def test_every_error_of_sqlite_is_one_of_the_store(tmp_path):
    store = SqliteStore(tmp_path / "s", {}, seconds=60, most=1)
    (version,) = store.write([Change("a", 0, 1, "", {0: b"x"})])
    store.write([Change("b", 0, 1, "", {0: b"x"})])
    calls = (
        lambda: store.versions(["a"]),
        lambda: store.read(["a"]),
        lambda: store.write([Change("a", version, 2, "", {1: b"y"})]),
        lambda: store.delete("a"),
        lambda: store.expire(),
        lambda: store.count(),
    )
    store._db.set_progress_handler(lambda: 1, 1)  # every statement fails
    for call in calls:
        with pytest.raises(StoreError, match=f"{tmp_path}/s: cannot be (read|written)"):
            call()
    store._db.set_progress_handler(None, 1)
    store._db.execute("PRAGMA query_only = ON")  # only those that write
    for call in calls[2:5]:
        with pytest.raises(StoreError, match="cannot be written"):
            call()
    assert store.count() == 2
    store._db.execute("PRAGMA query_only = OFF")
    with pytest.raises(OverflowError):  # any other error takes the transaction back as well
        store.write([Change("b", 0, 1, "", {}), Change("c", 0, 1 << 70, "", {})])
    assert store.read(["a"])[0].rows == {0: b"x"}
    assert store.expire() == ["a"]
    store.close()


def test_a_service_outlives_the_errors_of_its_store(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY", 0.0)
    store = open_store(str(tmp_path / "s"), run, 5, "recent", seconds=60)
    x = torch.randn(2, D)
    with TestClient(make_app(run, store, 5)) as client:
        ask(client, "a", x[:1])
        store._db.set_progress_handler(lambda: 1, 1)
        for kind, path in (("GET", "/clients/a"), ("DELETE", "/clients/a"), ("GET", "/health")):
            answer = client.request(kind, path)
            assert (answer.status_code, "cannot be" in answer.json()["error"]) == (503, True)
        assert client.post("/clients/b/predict", json={"features": x.tolist()}).status_code == 503
        store._db.set_progress_handler(None, 1)
        torch.testing.assert_close(ask(client, "a", x[1:]), alone(run, "a", x)[1:], atol=1e-6, rtol=1e-5)
        for error in (sqlite3.OperationalError("full"), RuntimeError("a bug"), StoreError("gone")):
            monkeypatch.setattr(store, "expire", lambda error=error: (_ for _ in ()).throw(error))
            for _ in range(2):
                assert client.get("/health").json()["clients"] == 1


def test_a_call_that_nobody_waits_for_any_more_ends_nothing(run):
    with scheduled(run, SqliteStore(":memory:", {})) as scheduler:
        together = threading.Event()
        scheduler.call(together.wait)
        future = scheduler.look_up("a")
        assert future.cancel()
        together.set()
        assert scheduler.look_up("a").result(30) is None


def test_look_ups_do_not_keep_the_thread_from_forgetting(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY", 0.05)
    store = open_store(str(tmp_path / "s"), run, 5, "recent", seconds=60)
    times = []
    monkeypatch.setattr(store, "expire", lambda: times.append(time.monotonic()) or [])
    with scheduled(run, store) as scheduler:
        end = time.monotonic() + 20
        while len(times) < 3 and time.monotonic() < end:
            scheduler.call(lambda: None)
            time.sleep(0.005)
    assert len(times) >= 3


def test_a_thread_that_forgets_clients_soon_looks_for_more(run, monkeypatch):
    monkeypatch.setattr(module, "_EVERY", 0.05)
    store, found = SqliteStore(":memory:", {}), [["a"], ["b"], []]

    def expire():
        monkeypatch.setattr(module, "_EVERY", 3600.0)
        return found.pop(0)

    monkeypatch.setattr(store, "expire", expire)
    with scheduled(run, store):
        end = time.monotonic() + 20
        while found and time.monotonic() < end:
            time.sleep(0.005)
    assert not found
