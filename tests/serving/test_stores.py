"""Where the service keeps the states of its clients: SQLite and Redis."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("fastapi", reason="fastapi is not installed")

from iciia_exp.errors import UserError
from iciia_exp.serving.app import make_app
from iciia_exp.serving.run import Run
from iciia_exp.serving.scheduler import about
from iciia_exp.serving.service import open_store
from iciia_exp.serving.states import Change, RedisStore, SqliteStore, StoreError
from tests.serving.test_service import BINARY, TestClient, alone, ask, free_port
from tests.serving.test_session import D, make_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.slow
def test_two_processes_share_clients_in_redis(run, redis_url):
    stores = [RedisStore(redis_url, {"test": "shared"}) for _ in range(2)]
    apps = [make_app(run, store, 400) for store in stores]
    x = torch.randn(1000, D)
    with TestClient(apps[0]) as one, TestClient(apps[1]) as two, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ask((one, two)[i % 2], f"c{i % 3}", x[i : i + 1]), range(1000)))
        for number, count in enumerate((334, 333, 333)):
            known = one.get(f"/clients/c{number}").json()
            assert (known["seen"], known["kept"]) == (count, count), "an update was lost"
            rows = RedisStore(redis_url, {"test": "shared"}).read([f"c{number}"])[0].rows
            ages = sorted(int.from_bytes(row[:8], "little") for row in rows.values())
            assert ages == list(range(1, count + 1)), "every image has a place of its own"


def test_what_redis_does_not_write_of_one_client_is_an_error_of_that_client(run, redis_url):
    store = RedisStore(redis_url, {"test": "one"})
    store._db.set(store._key("bad"), "no hash")
    bad, good = store.write([Change(name, 0, 1, "", {0: b"x"}) for name in ("bad", "good")])
    assert isinstance(bad, StoreError)
    assert store.versions(["good"]) == [good] != [0]
    x, write = torch.randn(2, D), store.write

    def fail(changes):
        versions = zip(changes, write(changes), strict=True)
        return [StoreError("full") if change.client == "b" else version for change, version in versions]

    with TestClient(make_app(run, store, 5)) as client:
        store.write = fail
        for name, status in (("a", 200), ("b", 503)):
            assert client.post(f"/clients/{name}/predict", json={"features": x[:1].tolist()}).status_code == status
        store.write = write
        store.delete("b")  # whose state was written all the same
        torch.testing.assert_close(ask(client, "b", x), alone(run, "b", x), atol=1e-6, rtol=1e-5)


def test_stores(tmp_path, redis_url):
    for store in (SqliteStore(tmp_path / "s", {"a": 1}, 0.5, most=2), RedisStore(redis_url, {"a": 1}, 0.5)):
        assert store.read(["new"])[0].version == 0
        (version,) = store.write([Change("c", 0, 1, "", {0: b"one", 1: b"two"})])
        assert store.versions(["c", "d"]) == [version, 0]
        (later,) = store.write([Change("c", version, 2, "x", {1: b"three"})])
        assert store.read(["c"]) == [(later, 2, "x", {0: b"one", 1: b"three"})]
        stale, new = store.write([Change("c", version, 9, "", {0: b"lost"}), Change("d", 0, 1, "", {})])
        assert (stale, new > 0) == (0, True)
        assert store.read(["c"])[0].seen == 2
        time.sleep(0.6)
        assert store.versions(["c"]) == [0], "its time is over"
        store.write([Change("c", 0, 1, "", {0: b"new"})])
        assert store.read(["c"])[0].rows == {0: b"new"}
        assert store.delete("c")
        assert not store.delete("c")
        assert store.write([Change("c", later, 3, "", {0: b"lost"})]) == [0], "it was forgotten"
        assert store.read(["c"])[0].version == 0
        store.close()


def test_states_that_cannot_be_written(run, tmp_path):
    store = open_store(str(tmp_path / "states"), run, 5, "recent")
    x = torch.randn(2, D)
    with TestClient(make_app(run, store, 5)) as client:
        ask(client, "c", x[:1])
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk
        failed = [client.post(f"/clients/{i}/predict", content=x.numpy().tobytes(), headers=BINARY) for i in range(40)]
        assert {answer.status_code for answer in failed} == {200, 503}
        assert "cannot be written" in failed[-1].json()["error"]
        store._db.execute("PRAGMA max_page_count = 1000000")
        torch.testing.assert_close(ask(client, "39", x), alone(run, "39", x), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ask(client, "c", x[1:]), alone(run, "c", x)[1:], atol=1e-6, rtol=1e-5)


def test_the_oldest_clients_of_too_many_are_forgotten(tmp_path):
    store = SqliteStore(tmp_path / "s", {}, most=2)
    for name in "abc":
        store.write([Change(name, 0, 1, "", {0: b"x"})])
        time.sleep(0.01)
    assert store.expire() == ["a"]
    assert store.versions(["a"]) == [0]
    assert store.count() == 2


def test_clients_whose_time_is_over_do_not_count_among_too_many(tmp_path):
    store = SqliteStore(tmp_path / "s", {}, seconds=60, most=2)
    for name in "abcd":
        store.write([Change(name, 0, 1, "", {0: b"x"})])
        time.sleep(0.01)
    store._db.execute("UPDATE clients SET heard = 0 WHERE client = 'a'")
    assert store.expire() == ["a", "b"]
    assert store.count() == 2


def test_files_and_servers_that_do_not_fit(run, tmp_path):
    open_store(str(tmp_path / "s"), run, 5, "recent").close()
    with pytest.raises(UserError, match="has states of .*choose another file"):
        open_store(str(tmp_path / "s"), run, 6, "recent")
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(UserError, match="is not a file of client states"):
        open_store(str(tmp_path / "text"), run, 5, "recent")
    with pytest.raises(UserError, match="no Redis server answers"):
        open_store(f"redis://127.0.0.1:{free_port()}", run, 5, "recent")
    for url in ("http://x", "Redis://127.0.0.1", "redis:/127.0.0.1", "http://me:secret@x"):
        with pytest.raises(UserError, match="^--states .*is neither an address of Redis") as error:
            open_store(url, run, 5, "recent")
        assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="cannot be opened .*--states"):
        open_store(str(tmp_path), run, 5, "recent")
    with pytest.raises(UserError, match="--max-clients: is of SQLite"):
        open_store("redis://127.0.0.1:1", run, 5, "recent", most=3)
    assert about(run, 5, "recent") == {"run": run.identity, "history": 5, "keep": "recent"}


def test_states_are_of_what_a_run_computes_with(run, states, tmp_path):
    x = torch.randn(3, D)
    with TestClient(make_app(run, open_store(states, run, 5, "recent"), 5)) as client:
        ask(client, "shared", x[:1])
    same = Run.load(run.save_pretrained(tmp_path / "A" / "model"))
    with TestClient(make_app(same, open_store(states, same, 5, "recent"), 5)) as client:
        torch.testing.assert_close(ask(client, "shared", x[1:]), alone(run, "shared", x)[1:], atol=1e-6, rtol=1e-5)
    (tmp_path / "other").mkdir()
    other = Run.load(make_run(tmp_path / "other", seed=1).save_pretrained(tmp_path / "B" / "model"))
    if states.startswith("redis"):
        assert open_store(states, other, 5, "recent").read(["shared"])[0].version == 0
    else:
        with pytest.raises(UserError, match="has states of .*choose another file"):
            open_store(states, other, 5, "recent")


def test_clients_whose_time_is_over_are_not_counted(run, tmp_path):
    store = SqliteStore(tmp_path / "states", about(run, 5, "recent"), seconds=0.2)
    store.write([Change("a", 0, 1, "", {0: b"x"})])
    assert store.count() == 1
    time.sleep(0.3)
    assert store.count() == 0
    store.close()
