"""Scheduler: answers the requests of many clients together, and keeps their states.

A request has some images of one client, which come one after the other. A thread takes some images of each waiting
client at a time and serves them by `predict_next`, so that a long request does not hold up the others. When a request's
last image is answered, the client's state is written, and then the answer is given: after a crash, at most what was
not answered is lost.

Legend: C clients, n images of a request, D features, K classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iciia_exp.errors import UserError, first_line
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.serving.features import all_finite
from iciia_exp.serving.run import Run
from iciia_exp.serving.session import ClientSession
from iciia_exp.serving.states import Change, ClientStore, StoreError
from iciia_exp.serving.together import predict_next, takes_many

__all__ = ["Answer", "Busy", "Known", "Scheduler", "UnknownClient"]

log = logging.getLogger(__name__)

_IMAGES = 16  # of a batch of the backbone
_IN_ONE_PASS = 32  # images of a client, where `predict_next` takes several
_LARGE = 256  # vectors of a pass, from which it takes all cores; a smaller one is done before they have started
_EVERY = 5.0  # seconds between two looks for clients whose time is over
_AGAIN = 0.05  # the same after a look that found some: a store forgets only so many at once
_TRIES = 50  # of a request whose client is forgotten, or changed by another process


class UnknownClient(UserError):
    """A client that has no state."""


class Busy(UserError):
    """More images are waiting than may."""


class Answer(NamedTuple):
    """The answer to a request."""

    probabilities_nK: Tensor
    seen: int  # images of the client so far
    kept: int


class Known(NamedTuple):
    """What is known of a client."""

    seen: int
    kept: int
    bytes: int


@dataclass(eq=False)
class _Request:
    client: str
    x_nD: Tensor | None  # features
    images: Sequence[Tensor]  # transformed images, if there are no features yet
    future: asyncio.Future[Answer]
    ended: bool = False  # whether the answer is known
    done: list[Tensor] = field(default_factory=list)  # [n, K] of every pass
    next: int = 0  # image
    tries: int = 0

    @property
    def length(self) -> int:
        return len(self.images) if self.x_nD is None else len(self.x_nD)

    def start_again(self) -> None:
        self.done.clear()
        self.next = 0


class Scheduler:
    """Serves a run's clients; its public methods may be called from any thread, but for `submit`.

    Args:
        run: the run.
        store: of the clients' states.
        history, keep: of `ClientSession`.
        backbone: computes the features of images.
        together: clients whose images are served in one forward pass.
        waiting: images that may wait; of more, `submit` raises `Busy`.
        memory: bytes of the sessions that are kept in memory.
        threads: of PyTorch in a large pass; a small one leaves one to the event loop. None: as many as cores.
    """

    def __init__(
        self,
        run: Run,
        store: ClientStore,
        history: int | None = None,
        keep: str = "recent",
        backbone: Backbone | None = None,
        together: int = 64,
        waiting: int = 100_000,
        memory: int = 1 << 30,
        threads: int | None = None,
    ) -> None:
        self.run, self.store, self.keep, self.backbone = run, store, keep, backbone
        if backbone is not None:  # its fastest layout on a CPU
            backbone.to(memory_format=torch.channels_last)
        self.personal = isinstance(run.method, Personal)
        self.history = new_session(run, "", history, keep).history
        self._together, self._most_waiting, self._threads = together, waiting, threads or os.cpu_count() or 1
        self._sessions: OrderedDict[str, tuple[ClientSession, int, float]] = OrderedDict()  # and version, and when
        self._most_sessions = max(together, memory // max(4096, self._session_bytes()))
        self._new: queue.SimpleQueue[_Request | Callable[[], None] | None] = queue.SimpleQueue()
        self._clients: OrderedDict[str, deque[_Request]] = OrderedDict()
        self._answers: list[tuple[asyncio.Future[Answer], Answer | Exception]] = []
        self._waiting, self._lock = 0, threading.Lock()
        #: Called with the number of clients of every forward pass.
        self.on_batch: Callable[[int], None] = lambda clients: None
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    # ---- for other threads

    def submit(self, client: str, x_nD: Tensor | None = None, images: Sequence[Tensor] = ()) -> asyncio.Future[Answer]:
        """Return the future answer to some images of a client: features [n, D], or transformed images.

        The future is of the running event loop.
        """
        request = _Request(client, x_nD, images, asyncio.get_running_loop().create_future())
        with self._lock:
            if self._waiting + request.length > self._most_waiting:
                raise Busy(f"{self._waiting:,} images are waiting; try again later")
            self._waiting += request.length
        self._new.put(request)
        return request.future

    @property
    def waiting(self) -> int:
        """Number of images that wait."""
        return self._waiting

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Return the future result of a function that runs between forward passes, where the store may be used."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():  # nobody waits for it
                return
            try:
                future.set_result(function())
            except Exception as error:  # is the caller's
                future.set_exception(error)

        self._new.put(run)
        return future

    def look_up(self, client: str) -> Future[Known | None]:
        """Return what is known of a client, in the future; None if there is none."""

        def look_up() -> Known | None:
            if self.personal:
                session = self._of_device(client)
                return Known(session.seen, session.kept, session.state_bytes) if session else None
            stored = self.store.read([client])[0]
            return Known(stored.seen, len(stored.rows), stored.bytes) if stored.version else None

        return self.call(look_up)

    def forget(self, client: str) -> Future[bool]:
        """Forget a client, in the future; whether there was one. What its device has learned stays in the run."""

        def forget() -> bool:
            known = self._of_device(client) is not None if self.personal else self.store.delete(client)
            self._sessions.pop(client, None)
            return known

        return self.call(forget)

    def count(self) -> Future[int | None]:
        """Return the number of clients, in the future; None if it cannot be had quickly."""
        method = self.run.method
        return self.call(lambda: len(method.states or ()) if isinstance(method, Personal) else self.store.count())

    def close(self) -> None:
        """Answer what is waiting, then close the store."""
        self._new.put(None)
        self._thread.join()

    def _session_bytes(self) -> int:
        """Return what a client's session takes in memory with a whole history, about."""
        method = self.run.method
        if isinstance(method, Personal):
            return method.state_bytes()
        assert isinstance(method, Adaptive)
        return 4 * self.history * (2 * method.dim + method.state_width)

    # ---- the thread

    def _work(self) -> None:
        open_, due = True, time.monotonic() + _EVERY
        while open_ or self._clients:
            try:
                while True:
                    item = self._new.get(block=open_ and not self._clients, timeout=1.0)
                    if item is None:
                        open_ = False
                    elif isinstance(item, _Request):
                        self._clients.setdefault(item.client, deque()).append(item)
                    else:
                        item()
                    if open_ and time.monotonic() > due:  # look-ups alone would go on for ever
                        break
            except queue.Empty:
                pass
            if self._clients:
                self._serve()
            if time.monotonic() > due:
                due = time.monotonic() + (_AGAIN if self._expire() else _EVERY)
        self.store.close()

    def _expire(self) -> int:
        """Forget clients whose time is over, also in memory; return how many."""
        try:
            gone = self.store.expire()
        except Exception as error:  # this thread goes on
            log.warning("clients whose time is over are kept (%s)", first_line(error))
            return 0
        for client in gone:
            self._sessions.pop(client, None)
        return len(gone)

    def _serve(self) -> None:
        """Serve the next images of some clients."""
        first = self._first()
        self._serve_together(first)
        self._deliver()
        # round robin: who has been served comes after those who have not
        for request in first:
            if (waiting := self._clients.get(request.client)) is not None:
                if request.ended and waiting and waiting[0] is request:
                    waiting.popleft()
                if waiting:
                    self._clients.move_to_end(request.client)
                else:
                    del self._clients[request.client]

    def _serve_together(self, requests: Sequence[_Request]) -> None:
        both: list[tuple[_Request, ClientSession]] = []
        try:
            self._compute_features([request for request in requests if request.x_nD is None])
            waiting = [request for request in requests if not request.ended]
            both = [(r, s) for r, s in zip(waiting, self._load(waiting), strict=True) if s is not None]
            for request, answer in self._step(both):
                request.done.append(answer)
                request.next += len(answer)
            self._finish([(r, s) for r, s in both if r.next == r.length and not r.ended])
        except Exception as error:
            left = [request for request in requests if not request.ended]
            alone = len(left) > 1 and not isinstance(error, StoreError)  # one of them may be the cause
            for request in left:
                if both or not alone:  # some of its images may have changed it
                    self._sessions.pop(request.client, None)
                    request.start_again()
                if alone:
                    self._serve_together([request])
                else:
                    self._resolve(request, error)
            if not alone and not isinstance(error, UserError):
                log.exception("a request failed")

    def _first(self) -> list[_Request]:
        """Return the first requests of some clients, with images that fill one batch of the backbone.

        While it computes, those of the others are decoded.
        """
        first, images = [], 0
        for waiting in itertools.islice(self._clients.values(), self._together):
            request = waiting[0]
            more = len(request.images) if request.x_nD is None else 0
            if not (images and more and images + more > _IMAGES):
                first.append(request)
                images += more
        return first

    def _resolve(self, request: _Request, answer: Answer | Exception) -> None:
        """Answer a request, with the others of a pass (`_deliver`)."""
        if not request.ended:
            request.ended = True
            self._answers.append((request.future, answer))
            with self._lock:
                self._waiting -= request.length

    def _deliver(self) -> None:
        """Give the answers to the event loop, all in one call: each would wake it."""
        if self._answers:
            answers, self._answers = self._answers, []
            with contextlib.suppress(RuntimeError):  # the loop is closed; nobody waits
                answers[0][0].get_loop().call_soon_threadsafe(_set_all, answers)

    @torch.inference_mode()
    def _compute_features(self, requests: Sequence[_Request]) -> None:
        """Compute the features of requests with images, in batches over all of them."""
        if not requests:
            return
        assert self.backbone is not None
        images = [image for request in requests for image in request.images]
        torch.set_num_threads(self._threads)
        parts = [torch.stack(list(images[at : at + _IMAGES])) for at in range(0, len(images), _IMAGES)]
        laid_out = [p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p for p in parts]
        features = torch.cat([self.backbone.features(part).float() for part in laid_out])
        for request, x_nD in zip(requests, features.split([request.length for request in requests]), strict=True):
            request.x_nD = x_nD
            if not all_finite(x_nD):
                self._resolve(request, UserError("the image gives features that are not finite"))

    def _load(self, requests: Sequence[_Request]) -> list[ClientSession | None]:
        """Return the sessions of requests, as they are stored when a request starts; None where there is an error."""
        for request in requests:
            if request.next and request.client not in self._sessions:  # forgotten since its first images
                request.start_again()
        if self.personal:
            sessions = [self._personal_session(request) for request in requests]
            self._make_room(requests)
            return sessions
        starting = [request for request in requests if not request.next]
        cached = {r.client: self._sessions[r.client][1:] for r in starting if r.client in self._sessions}
        current = dict(zip(cached, self.store.versions(list(cached)), strict=True)) if self.store.shared else {}
        stale = [
            r
            for r in starting
            if r.client not in cached
            or current.get(r.client, cached[r.client][0]) != cached[r.client][0]
            or (self.store.seconds is not None and time.time() - cached[r.client][1] > self.store.seconds)
        ]
        found = self.store.read([request.client for request in stale]) if stale else []
        for request, stored in zip(stale, found, strict=True):
            session = new_session(self.run, request.client, self.history, self.keep)
            try:
                if stored.version:
                    session.restore(stored.seen, stored.random, stored.rows)
                self._sessions[request.client] = session, stored.version, time.time()
            except UserError as error:
                self._resolve(request, error)
        self._make_room(requests)
        return [None if request.ended else self._sessions[request.client][0] for request in requests]

    def _make_room(self, requests: Sequence[_Request]) -> None:
        """Drop the sessions that were not used for longest, and that nobody waits for.

        Where devices learn, the number of images that such a client has sent starts again: nothing depends on it.
        """
        for request in requests:
            if not request.ended:
                self._sessions.move_to_end(request.client)
        busy = {request.client for request in requests} | set(self._clients)
        while len(self._sessions) > self._most_sessions and next(iter(self._sessions)) not in busy:
            self._sessions.popitem(last=False)

    def _personal_session(self, request: _Request) -> ClientSession | None:
        try:
            session = self._of_device(request.client)
        except UserError as error:  # its state is damaged
            self._resolve(request, error)
            return None
        if session is None:
            self._resolve(request, UnknownClient(f"{request.client}: is not a client of the run"))
            return None
        self._sessions[request.client] = session, 0, 0.0
        return session

    def _of_device(self, client: str) -> ClientSession | None:
        """Return the session of a client whose device has learned; None if there is no such client in the run."""
        if client in self._sessions:
            return self._sessions[client][0]
        session = ClientSession(self.run, client)
        return None if session.learned is None else session

    def _step(self, both: Sequence[tuple[_Request, ClientSession]]) -> list[tuple[_Request, Tensor]]:
        """Serve the next images of every request; those that fail are answered with their error."""
        if not both:
            return []
        many = takes_many(both[0][1])
        some = _IN_ONE_PASS if many else 1
        given = [r.x_nD[r.next : r.next + some] for r, _ in both if r.x_nD is not None]
        vectors = sum(map(len, given)) * (1 if many else 1 + self.history)
        torch.set_num_threads(self._threads if vectors >= _LARGE else max(1, self._threads - 1))
        try:
            answers = predict_next([session for _, session in both], given)
            self.on_batch(len(both))
            return [(request, answer) for (request, _), answer in zip(both, answers, strict=True)]
        except UserError as error:
            if len(both) == 1:
                self._sessions.pop(both[0][0].client, None)  # an earlier image of the request may have changed it
                self._resolve(both[0][0], error)
                return []
            return [found for one in both for found in self._step([one])]

    def _finish(self, both: Sequence[tuple[_Request, ClientSession]]) -> None:
        """Write the states of requests whose images are all answered, then give the answers."""
        if not self.personal and both:
            changes = [
                Change(r.client, self._sessions[r.client][1], s.seen, s.random, {p: s.row(p) for p in s.changed})
                for r, s in both
            ]
            versions = self.store.write(changes)
            if failed := [version for version in versions if isinstance(version, StoreError)]:
                log.warning("%d of %d states are not written; %s", len(failed), len(versions), failed[0])
            for (request, session), version in zip(both, versions, strict=True):
                if isinstance(version, StoreError):  # of this client alone
                    self._sessions.pop(request.client)
                    self._resolve(request, version)
                elif version:
                    self._sessions[request.client] = session, version, time.time()
                    session.changed.clear()
                else:
                    self._again(request)
        for request, session in both:
            if request.next == request.length:
                self._resolve(request, Answer(torch.cat(request.done), session.seen, session.kept))

    def _again(self, request: _Request) -> None:
        """Start a request again whose client was forgotten, or changed by another process."""
        del self._sessions[request.client]
        request.start_again()
        request.tries += 1
        if request.tries > _TRIES:
            self._resolve(request, Busy(f"{request.client}: other processes change it all the time; try again"))


def _set_all(answers: Sequence[tuple[asyncio.Future[Answer], Answer | Exception]]) -> None:
    for future, answer in answers:
        if future.done():  # its client has gone
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def new_session(run: Run, client: str, history: int | None, keep: str) -> ClientSession:
    """Return the session of a new client; what a reservoir draws depends on the client's name."""
    from iciia_exp.seeding import derive_seed

    return ClientSession(run, client, history, keep, seed=derive_seed("session", 0, client))


def about(run: Run, history: int, keep: str) -> Mapping[str, Any]:
    """Return what the states of a service have in common."""
    return {"run": run.identity, "history": history, "keep": keep}
