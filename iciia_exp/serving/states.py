"""Stores of client states: what a service keeps of its clients between requests.

Of a client is kept how many images it has seen, the state of the reservoir's random numbers, and a row for every kept
image: its position in the stream, its state and, where sessions keep them, its features. One more image changes one
row. `SqliteStore` is one file for one process, `RedisStore` a server for many. A client that was forgotten in the
meantime, or that another process has changed, is not written (`ClientStore.write`).
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from iciia_exp.digest import digest
from iciia_exp.errors import UserError, first_line

__all__ = ["Change", "ClientStore", "RedisStore", "SqliteStore", "StoreError", "Stored", "without_password"]


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
    def write(self, changes: Sequence[Change]) -> Sequence[int | StoreError]:
        """Write changes of different clients, each whole or not at all.

        Returns the new versions; 0 where the client was forgotten since, or changed by another process; an error in
        place of one that could not be written while others were.
        """

    @abstractmethod
    def delete(self, client: str) -> bool:
        """Forget a client; return whether there was one."""

    @abstractmethod
    def count(self) -> int | None:
        """Return the number of clients; None if it cannot be had quickly."""

    def expire(self) -> list[str]:
        """Forget clients whose time is over, if the store does not by itself; return them."""
        return []

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
            problem = f"cannot be opened ({first_line(error)}); choose another file with --states"
            raise UserError(f"{path}: {problem}") from error
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"{path}: is not a file of client states ({first_line(error)})") from error
        if found is not None and found[0] != self.about:
            self.close()
            raise UserError(f"{path}: has states of {found[0]}, this service has {self.about}; choose another file")

    @contextmanager
    def _transaction(self, work: str) -> Iterator[None]:
        """Do all of a block or nothing; an error of SQLite, of a full disk say, becomes a `StoreError`."""
        try:
            if self._db.in_transaction:  # one that could not be taken back
                self._db.execute("ROLLBACK")
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):  # where SQLite has taken it back itself
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"{self.path}: cannot be {work} ({first_line(error)})") from error
            raise

    def versions(self, clients: Sequence[str]) -> list[int]:
        """Return the current version of each client."""
        with self._transaction("read"):
            return [self._version(client) for client in clients]

    def _version(self, client: str) -> int:
        return 0 if (known := self._known(client)) is None else known[0]

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
        with self._transaction("read"):
            for client in clients:
                known = self._known(client)
                if known is None:
                    found.append(NOTHING)
                    continue
                rows = self._db.execute("SELECT place, row FROM images WHERE client = ?", [client]).fetchall()
                kinds = [*zip(known, (int, int, str), strict=True)]
                kinds += [pair for place, row in rows for pair in ((place, int), (row, bytes))]
                if wrong := [value for value, kind in kinds if not isinstance(value, kind)]:
                    raise UserError(f"{client}: what is kept of it is damaged ({type(wrong[0]).__name__} in a column)")
                found.append(Stored(*known, dict(rows)))
        return found

    def write(self, changes: Sequence[Change]) -> list[int]:
        """Write all changes in one transaction."""
        now = time.time()
        with self._transaction("written"):
            current = [self._version(change.client) == change.version for change in changes]
            versions = [next_version(c.version) if same else 0 for c, same in zip(changes, current, strict=True)]
            written = [(c, version) for c, version in zip(changes, versions, strict=True) if version]
            for new in [c.client for c, _ in written if c.version == 0]:  # or one whose time is over
                self._db.execute("DELETE FROM images WHERE client = ?", [new])
            self._db.executemany(
                "INSERT OR REPLACE INTO clients VALUES (?, ?, ?, ?, ?)",
                [(c.client, version, c.seen, c.random, now) for c, version in written],
            )
            self._db.executemany(
                "INSERT INTO images VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET row = excluded.row",
                [(c.client, place, row) for c, _ in written for place, row in c.rows.items()],
            )
        return versions

    def delete(self, client: str) -> bool:
        """Forget a client."""
        with self._transaction("written"):
            return self._delete(client)

    def _delete(self, client: str) -> bool:
        self._db.execute("DELETE FROM images WHERE client = ?", [client])
        return bool(self._db.execute("DELETE FROM clients WHERE client = ?", [client]).rowcount)

    def count(self) -> int | None:
        """Return the number of clients whose time is not over."""
        with self._transaction("read"):
            return self._count()

    def _count(self) -> int:
        since = 0.0 if self.seconds is None else time.time() - self.seconds
        return self._db.execute("SELECT count(*) FROM clients WHERE heard >= ?", [since]).fetchone()[0]

    def expire(self) -> list[str]:
        """Forget clients whose time is over, and the oldest ones of too many."""
        gone: list[str] = []
        with self._transaction("written"):
            since = 0.0 if self.seconds is None else time.time() - self.seconds
            over = "SELECT client FROM clients WHERE heard < ? LIMIT 1000"
            oldest = "SELECT client FROM clients WHERE heard >= ? ORDER BY heard LIMIT ?"
            if self.seconds is not None:
                gone += [client for (client,) in self._db.execute(over, [since])]
            if self.most is not None and (many := self._count() - self.most) > 0:
                gone += [client for (client,) in self._db.execute(oldest, [since, many])]
            for client in gone:
                self._delete(client)
        return gone

    def close(self) -> None:
        """Close the file."""
        with suppress(sqlite3.Error):
            self._db.close()


#: How the address of a Redis server begins.
REDIS = ("redis://", "rediss://", "unix://")

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
        self._prefix = f"iciia_exp:{digest(self.about)}:"
        self._error = redis.RedisError
        try:
            self._db: Any = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
            self._db.ping()
        except (ValueError, TypeError):  # which may have a part of a password in its text
            scheme = url.partition("://")[0]
            raise UserError(f"--states: not an address of the form {scheme}://:PASSWORD@HOST:PORT/NUMBER") from None
        except redis.RedisError as error:
            raise UserError(f"{without_password(url)}: no Redis server answers ({first_line(error)})") from error
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
        for client, raw in zip(clients, self._all([("HGETALL", self._key(c)) for c in clients]), strict=True):
            fields = raw if isinstance(raw, dict) else dict(zip(raw[::2], raw[1::2], strict=True))
            if not fields:
                found.append(NOTHING)
                continue
            try:
                rows = {int(name): row for name, row in fields.items() if name.isdigit()}
                version, seen, random = (fields[name] for name in (b"version", b"seen", b"random"))
                found.append(Stored(int(version), int(seen), random.decode(), rows))
            except (KeyError, ValueError) as error:
                raise UserError(f"{client}: what is kept of it is damaged ({first_line(error)})") from error
        return found

    def write(self, changes: Sequence[Change]) -> list[int | StoreError]:
        """Write each change by a script, atomically."""
        lives = "0" if self.seconds is None else str(max(1, int(1000 * self.seconds)))
        pipe = self._db.pipeline(transaction=False)
        versions = [next_version(change.version) for change in changes]
        for c, version in zip(changes, versions, strict=True):
            fields: list[Any] = ["version", version, "seen", c.seen, "random", c.random]
            fields += [part for place, row in c.rows.items() for part in (place, row)]
            self._write(keys=[self._key(c.client)], args=[c.version, lives, *fields], client=pipe)
        try:
            answers = pipe.execute(raise_on_error=False)
        except self._error as error:
            raise StoreError(f"the Redis server does not answer ({first_line(error)})") from error
        return [
            StoreError(f"{change.client}: the Redis server has not written it ({first_line(done)})")
            if isinstance(done, Exception)
            else version * int(done)
            for change, version, done in zip(changes, versions, answers, strict=True)
        ]

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


def without_password(states: str) -> str:
    """Return where states are kept as it may be shown.

    >>> without_password("redis://me:s3cret@host:6379/0?password=s3cret")
    'redis://***@host:6379/0?password=***'
    """
    if "://" not in states:
        return states
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", states))
