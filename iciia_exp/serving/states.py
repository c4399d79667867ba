"""Stores of client states: what a service keeps of its clients between requests.

Of a client is kept how many images it has seen, the state of the reservoir's random numbers, and a row for every kept
image: its position in the stream, its state and, where sessions keep them, its features. One more image changes one
row. `SqliteStore` is one file for one process, `RedisStore` a server for many; there, a client that another process has
changed in the meantime is not written (`ClientStore.write`).
"""

from __future__ import annotations

import json
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from iciia_exp.errors import UserError, first_line

__all__ = ["Change", "ClientStore", "RedisStore", "SqliteStore", "StoreError", "Stored"]


class StoreError(UserError):
    """States cannot be read or written now."""


class Stored(NamedTuple):
    """What is stored of a client; with version 0 and no rows, it is new."""

    version: int
    seen: int
    random: str  # as JSON; empty where nothing is drawn
    rows: dict[int, bytes]  # by place

    @property
    def bytes(self) -> int:
        """Size of the rows."""
        return sum(map(len, self.rows.values()))


NOTHING = Stored(0, 0, "", {})


def next_version(version: int) -> int:
    """Return the version after one; a client that was forgotten never has an old version again."""
    return version + 1 if version else time.time_ns() // 1000


class Change(NamedTuple):
    """What a request changes of a client."""

    client: str
    version: int  # that the change starts from
    seen: int
    random: str
    rows: dict[int, bytes]  # changed ones, by place


class ClientStore(ABC):
    """States of clients by name.

    Args:
        about: what states must have in common, as plain values: run, history, sizes.
        seconds: time to live after a client's last request; None: for ever.
    """

    #: Whether other processes may change clients, so that what is in memory can be out of date.
    shared: bool

    def __init__(self, about: Mapping[str, Any], seconds: float | None = None) -> None:
        self.about, self.seconds = json.dumps(dict(about), sort_keys=True), seconds

    @abstractmethod
    def versions(self, clients: Sequence[str]) -> list[int]:
        """Return the current version of each client; 0 of a new one."""

    @abstractmethod
    def read(self, clients: Sequence[str]) -> list[Stored]:
        """Return what is stored of each client."""

    @abstractmethod
    def write(self, changes: Sequence[Change]) -> list[int]:
        """Write changes of different clients, each whole or not at all.

        Returns the new versions; 0 where another process has changed the client since.
        """

    @abstractmethod
    def delete(self, client: str) -> bool:
        """Forget a client; return whether there was one."""

    @abstractmethod
    def count(self) -> int | None:
        """Return the number of clients; None if it cannot be had quickly."""

    def expire(self) -> int:
        """Forget clients whose time is over, if the store does not by itself; return how many."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Release the store."""


class SqliteStore(ClientStore):
    """One file (SQLite with a write-ahead log), which one process has open.

    What is written survives the end of the process at any point.

    Args:
        path: of the file, which is made; ``:memory:`` keeps nothing.
        about, seconds: as of `ClientStore`.
        most: number of clients; of more, those are forgotten that were not heard of for longest.
    """

    shared = False

    def __init__(
        self,
        path: str | Path,
        about: Mapping[str, Any],
        seconds: float | None = None,
        most: int | None = None,
    ) -> None:
        super().__init__(about, seconds)
        self.path, self.most = str(path), most
        try:
            if self.path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=0.5)
            self._db.execute("PRAGMA page_size=16384")  # a row of some KiB on few pages
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint=256")  # 4 MiB
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("CREATE TABLE IF NOT EXISTS about (text TEXT)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS clients (client TEXT PRIMARY KEY, version INTEGER, seen INTEGER, "
                "random TEXT, heard REAL) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS by_heard ON clients (heard)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS images (client TEXT, place INTEGER, row BLOB, "
                "PRIMARY KEY (client, place))"  # with rowid: rows are too large for the nodes of an index
            )
            found = self._db.execute("SELECT text FROM about").fetchone()
            if found is None:
                self._db.execute("INSERT INTO about VALUES (?)", [self.about])
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise UserError(f"{path}: another process has it open; use Redis for several") from error
            raise UserError(f"{path}: cannot be opened ({first_line(error)})") from error
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"{path}: is not a file of client states ({first_line(error)})") from error
        if found is not None and found[0] != self.about:
            self.close()
            raise UserError(f"{path}: has states of {found[0]}, this service has {self.about}; choose another file")

    def versions(self, clients: Sequence[str]) -> list[int]:
        """Return the current version of each client."""
        return [0 if (row := self._known(client)) is None else row[0] for client in clients]

    def _known(self, client: str) -> tuple[int, int, str] | None:
        """Return version, number of images and random state, unless the client's time is over."""
        query = "SELECT version, seen, random, heard FROM clients WHERE client = ?"
        row = self._db.execute(query, [client]).fetchone()
        if row is None or (self.seconds is not None and row[3] < time.time() - self.seconds):
            return None
        return row[:3]

    def read(self, clients: Sequence[str]) -> list[Stored]:
        """Return what is stored of each client."""
        found = []
        for client in clients:
            known = self._known(client)
            if known is None:
                found.append(NOTHING)
                continue
            rows = self._db.execute("SELECT place, row FROM images WHERE client = ?", [client]).fetchall()
            found.append(Stored(known[0], known[1], known[2], dict(rows)))
        return found

    def write(self, changes: Sequence[Change]) -> list[int]:
        """Write all changes in one transaction."""
        now = time.time()
        self._db.execute("BEGIN")
        try:
            for new in [change.client for change in changes if change.version == 0]:  # or one whose time is over
                self._db.execute("DELETE FROM images WHERE client = ?", [new])
            versions = [next_version(change.version) for change in changes]
            self._db.executemany(
                "INSERT OR REPLACE INTO clients VALUES (?, ?, ?, ?, ?)",
                [(c.client, v, c.seen, c.random, now) for c, v in zip(changes, versions, strict=True)],
            )
            self._db.executemany(
                "INSERT INTO images VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET row = excluded.row",
                [(c.client, place, row) for c in changes for place, row in c.rows.items()],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):  # where SQLite has taken it back itself
                self._db.execute("ROLLBACK")
            raise StoreError(f"{self.path}: cannot be written ({first_line(error)})") from error
        return versions

    def delete(self, client: str) -> bool:
        """Forget a client."""
        self._db.execute("BEGIN")
        gone = self._db.execute("DELETE FROM clients WHERE client = ?", [client]).rowcount
        self._db.execute("DELETE FROM images WHERE client = ?", [client])
        self._db.execute("COMMIT")
        return bool(gone)

    def count(self) -> int | None:
        """Return the number of clients whose time is not over."""
        since = 0.0 if self.seconds is None else time.time() - self.seconds
        return self._db.execute("SELECT count(*) FROM clients WHERE heard >= ?", [since]).fetchone()[0]

    def expire(self) -> int:
        """Forget clients whose time is over, and the oldest ones of too many."""
        where: list[tuple[str, list[float]]] = []
        if self.seconds is not None:
            where.append(("SELECT client FROM clients WHERE heard < ? LIMIT 1000", [time.time() - self.seconds]))
        if self.most is not None and (many := (self.count() or 0) - self.most) > 0:
            where.append(("SELECT client FROM clients ORDER BY heard LIMIT ?", [many]))
        gone = [client for query, values in where for (client,) in self._db.execute(query, values).fetchall()]
        for client in gone:
            self.delete(client)
        return len(gone)

    def close(self) -> None:
        """Close the file."""
        with suppress(sqlite3.Error):
            self._db.close()


# Writes a client if its version is the expected one: ARGV = version, time to live in ms (0: none), field, value, ...
_WRITE = """
local now = redis.call('HGET', KEYS[1], 'version')
if (now or '0') ~= ARGV[1] then return 0 end
for i = 3, #ARGV, 1000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
if ARGV[2] ~= '0' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""


class RedisStore(ClientStore):
    """A Redis server, for several processes and machines. A client is one hash.

    Args:
        url: ``redis://host:port/number``.
        about, seconds: as of `ClientStore`; states of another ``about`` have other keys.
    """

    shared = True

    def __init__(self, url: str, about: Mapping[str, Any], seconds: float | None = None) -> None:
        super().__init__(about, seconds)
        try:
            import redis
        except ImportError as error:
            raise UserError("redis is not installed; pip install 'iciia_exp[serve]'") from error
        from iciia_exp.digest import digest

        self._prefix = f"iciia_exp:{digest(self.about)}:"
        self._error = redis.RedisError
        try:
            self._db: Any = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
            self._db.ping()
        except (redis.RedisError, ValueError) as error:
            raise UserError(f"{url}: no Redis server answers ({first_line(error)})") from error
        self._write = self._db.register_script(_WRITE)

    def _key(self, client: str) -> str:
        return f"{self._prefix}{client}"

    def _all(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands together; raises a `StoreError` if the server is gone."""
        pipe = self._db.pipeline(transaction=False)
        for call in calls:
            pipe.execute_command(*call)
        try:
            return pipe.execute()
        except self._error as error:
            raise StoreError(f"the Redis server does not answer ({first_line(error)})") from error

    def versions(self, clients: Sequence[str]) -> list[int]:
        """Return the current version of each client."""
        return [int(found or 0) for found in self._all([("HGET", self._key(c), "version") for c in clients])]

    def read(self, clients: Sequence[str]) -> list[Stored]:
        """Return what is stored of each client."""
        found = []
        for raw in self._all([("HGETALL", self._key(client)) for client in clients]):
            fields = raw if isinstance(raw, dict) else dict(zip(raw[::2], raw[1::2], strict=True))
            if not fields:
                found.append(NOTHING)
                continue
            rows = {int(name): row for name, row in fields.items() if name.isdigit()}
            version, seen, random = (fields[name] for name in (b"version", b"seen", b"random"))
            found.append(Stored(int(version), int(seen), random.decode(), rows))
        return found

    def write(self, changes: Sequence[Change]) -> list[int]:
        """Write each change by a script, atomically."""
        lives = "0" if self.seconds is None else str(max(1, int(1000 * self.seconds)))
        pipe = self._db.pipeline(transaction=False)
        versions = [next_version(change.version) for change in changes]
        for c, version in zip(changes, versions, strict=True):
            fields: list[Any] = ["version", version, "seen", c.seen, "random", c.random]
            fields += [part for place, row in c.rows.items() for part in (place, row)]
            self._write(keys=[self._key(c.client)], args=[c.version, lives, *fields], client=pipe)
        try:
            return [version * int(done) for version, done in zip(versions, pipe.execute(), strict=True)]
        except self._error as error:
            raise StoreError(f"the Redis server does not answer ({first_line(error)})") from error

    def delete(self, client: str) -> bool:
        """Forget a client."""
        return bool(self._all([("DEL", self._key(client))])[0])

    def count(self) -> int | None:
        """Return None, if the server answers: keys of several services share it."""
        self._all([("PING",)])
        return None

    def close(self) -> None:
        """Close the connections."""
        self._db.close()
