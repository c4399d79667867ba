"""Service: a run behind HTTP, with the state of every client kept between requests.

    python -m iciia_exp.serving.service RUN --states states.sqlite

``POST /clients/NAME/predict`` takes the next images of a client and answers in JSON:

- features: ``application/json``, ``{"features": [...]}`` with D numbers or lists of D numbers, or
  ``application/octet-stream``, little-endian float32, n x D;
- images, with ``--with-backbone``: the bytes of a JPEG or PNG file as ``image/jpeg``, ``image/png``, or in JSON
  ``{"images": ["<base64>", ...]}``.

``?top=5`` says how many classes are answered; with ``Accept: application/octet-stream`` the answer is float32, n x K.
``GET`` and ``DELETE /clients/NAME`` look at a client and forget it, ``/health`` and ``/metrics`` (Prometheus) are for
operators, ``/docs`` and ``/openapi.json`` describe all this.
"""

import argparse
import asyncio
import base64
import binascii
import contextlib
import hmac
import io
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iciia_exp import __version__
from iciia_exp.data.readers.images import open_stream, upright_rgb
from iciia_exp.errors import UserError, check_int, first_line
from iciia_exp.methods.adapt.base import Adaptive
from iciia_exp.methods.tune.base import Personal
from iciia_exp.models.backbones.base import Backbone
from iciia_exp.output import exit_status
from iciia_exp.serving.run import Run
from iciia_exp.serving.scheduler import Answer, Busy, Scheduler, UnknownClient, about
from iciia_exp.serving.session import KEEP, ClientSession
from iciia_exp.serving.states import ClientStore, RedisStore, SqliteStore, StoreError

__all__ = ["Limits", "main", "make_app", "open_store"]

_FEATURES = "application/octet-stream"


class Limits:
    """What a request may have.

    Args:
        body: bytes.
        images: of a request.
        name: characters of a client's name.
    """

    def __init__(self, body: int = 8 << 20, images: int = 4096, name: int = 200) -> None:
        self.body, self.images = check_int("body", body, 1), check_int("images", images, 1)
        self.name = check_int("name", name, 1)


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


def make_app(
    run: Run,
    store: ClientStore,
    history: int | None = None,
    keep: str = "recent",
    backbone: Backbone | None = None,
    token: str | None = None,
    limits: Limits | None = None,
) -> Any:
    """Return the application (FastAPI), with its `Scheduler` as ``app.state.scheduler``.

    Args:
        run: of an adaptive method, or of one whose devices learn, whose clients are those of the run.
        store: of the clients' states.
        history, keep: of `ClientSession`.
        backbone: for images.
        token: that requests must give, as ``Authorization: Bearer TOKEN``; None: none.
        limits: of requests.
    """
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.responses import JSONResponse
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    except ImportError as error:
        raise UserError("fastapi is not installed; pip install 'iciia_exp[serve]'") from error
    if not isinstance(run.method, Adaptive | Personal) or run.method.reads - {"features"}:
        raise UserError(f"{run.method.name}: cannot be served; methods that adapt on features can, or tune on them")
    limits, names, dim = limits or Limits(), run.class_names, run.method.dim
    scheduler = Scheduler(run, store, history, keep, backbone)
    decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
    registry = CollectorRegistry()
    requests = Counter("iciia_requests", "Requests by status", ["status"], registry=registry)
    images = Counter("iciia_images", "Images that were answered", registry=registry)
    seconds = Histogram("iciia_request_seconds", "Time of a request for answers", registry=registry)
    batches = Histogram("iciia_batch_clients", "Clients of a pass", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64))
    waiting = Gauge("iciia_waiting_images", "Images that wait", registry=registry)
    waiting.set_function(lambda: scheduler.waiting)
    scheduler.on_batch = batches.observe

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)
        decoders.shutdown()

    app = FastAPI(title=f"iciia_exp: {run.method.name}", version=__version__, lifespan=lifespan)
    app.state.scheduler = scheduler

    async def answered(request: Request, work: Any) -> Any:
        """Return the response of ``work(request)``, or its error as one sentence."""
        status = 200
        try:
            if token is not None:
                given = request.headers.get("authorization", "")
                if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                    raise _Refused(401, "give the service's token: Authorization: Bearer TOKEN")
            return await work()
        except _Refused as error:
            status = error.status
            return JSONResponse({"error": str(error)}, status)
        except UnknownClient as error:
            status = 404
            return JSONResponse({"error": str(error)}, status)
        except (Busy, StoreError) as error:
            status = 503
            return JSONResponse({"error": str(error)}, status, {"Retry-After": "1"})
        except UserError as error:
            status = 422
            return JSONResponse({"error": str(error)}, status)
        finally:
            requests.labels(status).inc()

    def checked_name(client: str) -> str:
        if not client.strip() or not client.isprintable() or len(client) > limits.name:
            raise _Refused(422, f"a client's name has 1 to {limits.name} printable characters")
        return client

    async def body_of(request: Request) -> bytes:
        """Return the body; refused before it is read if it says that it is too large."""
        largest = f"the body is larger than {limits.body:,} bytes"
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limits.body:
            raise _Refused(413, largest)
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limits.body:
                raise _Refused(413, largest)
            parts.append(part)
        return b"".join(parts)

    @app.post("/clients/{client:path}/predict", openapi_extra=_body_schema(dim, backbone is not None))
    async def predict(client: str, request: Request, top: int = 5) -> Response:
        """Answer the next images of a client, which join its past."""

        async def work() -> Response:
            start, name = time.perf_counter(), checked_name(client)
            most = min(check_int("top", top, 1), len(names))
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            body = await body_of(request)
            if kind in ("application/json", _FEATURES):
                given = _features(body, kind, dim)
            elif kind.startswith("image/"):
                given = [body]
            else:
                some = f"application/json, {_FEATURES}, image/jpeg or image/png"
                raise _Refused(415, f"Content-Type is {kind or 'missing'}; expected {some}")
            if len(given) > limits.images:
                raise _Refused(413, f"{len(given):,} images; at most {limits.images:,} in a request")
            if isinstance(given, Tensor):
                future = scheduler.submit(name, given)
            elif backbone is None:
                raise _Refused(415, "this service takes features; start it --with-backbone for images")
            else:
                loop = asyncio.get_running_loop()
                decode = [loop.run_in_executor(decoders, _decoded, backbone, image) for image in given]
                future = scheduler.submit(name, images=await asyncio.gather(*decode))
            answer = await asyncio.wrap_future(future)
            images.inc(len(answer.probabilities_nK))
            seconds.observe(time.perf_counter() - start)
            if request.headers.get("accept", "").startswith(_FEATURES):
                headers = {"X-Seen": str(answer.seen), "X-Kept": str(answer.kept)}
                return Response(answer.probabilities_nK.numpy().tobytes(), 200, headers, _FEATURES)
            return Response(_as_json(name, answer, names, most), 200, media_type="application/json")

        return await answered(request, work)

    @app.get("/clients/{client:path}")
    async def look(client: str, request: Request) -> Response:
        """Return how many images of a client were seen, and the bytes that are kept of it."""

        async def work() -> Response:
            stored = await asyncio.wrap_future(scheduler.look_up(checked_name(client)))
            if not stored.version:
                raise _Refused(404, f"{client}: no such client")
            return JSONResponse(
                {"client": client, "seen": stored.seen, "kept": len(stored.rows), "bytes": stored.bytes}
            )

        return await answered(request, work)

    @app.delete("/clients/{client:path}")
    async def forget(client: str, request: Request) -> Response:
        """Forget a client."""

        async def work() -> Response:
            if not await asyncio.wrap_future(scheduler.forget(checked_name(client))):
                raise _Refused(404, f"{client}: no such client")
            return Response(status_code=204)

        return await answered(request, work)

    @app.get("/")
    async def describe(request: Request) -> Response:
        """Return what is served."""

        async def work() -> Response:
            facts = {"run": run.path.resolve().name, "method": run.method.name, "features": dim, "classes": names}
            return JSONResponse({**facts, "history": scheduler.history, "images": backbone is not None})

        return await answered(request, work)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return that the service answers, and how many clients it knows."""
        clients = await asyncio.wrap_future(scheduler.call(store.count))
        return {"status": "ok", "clients": clients, "waiting": scheduler.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in Prometheus' form."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    from fastapi.exceptions import RequestValidationError

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 422)

    return app


def _body_schema(dim: int, images: bool) -> dict[str, Any]:
    """Return the description of the body for OpenAPI."""
    vector = {"type": "array", "items": {"type": "number"}, "minItems": dim, "maxItems": dim}
    features = {"oneOf": [vector, {"type": "array", "items": vector}]}
    content: dict[str, Any] = {
        "application/json": {"schema": {"type": "object", "properties": {"features": features}}},
        _FEATURES: {"schema": {"type": "string", "format": "binary", "description": f"float32, n x {dim}"}},
    }
    if images:
        encoded = {"type": "array", "items": {"type": "string", "format": "byte"}}
        content["application/json"]["schema"]["properties"]["images"] = encoded
        content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/jpeg", "image/png")}
    return {"requestBody": {"required": True, "content": content}}


def _features(body: bytes, kind: str, dim: int) -> Tensor | list[bytes]:
    """Return the features of a body, [n, D], or the bytes of its images."""
    if kind == _FEATURES:
        if not body or len(body) % (4 * dim):
            raise _Refused(422, f"expected float32 numbers, n x {dim}: a multiple of {4 * dim} bytes, got {len(body)}")
        values = np.frombuffer(body, dtype="<f4").astype(np.float32).reshape(-1, dim)
    else:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is not JSON ({first_line(error)})") from error
        keys = set(given) if isinstance(given, Mapping) else set()
        if keys == {"images"}:
            return _from_base64(given["images"])
        if keys != {"features"}:
            raise _Refused(422, 'expected an object {"features": ...} or {"images": [...]}')
        try:
            values = np.asarray(given["features"], dtype=np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise _Refused(422, f"features: expected {dim} numbers, or lists of them") from error
        if values.ndim not in (1, 2) or values.shape[-1] != dim or not len(values):
            raise _Refused(422, f"features: expected {dim} numbers, or lists of them, got {list(values.shape)}")
        values = values.reshape(-1, dim)
    if not np.isfinite(values).all():  # NumPy's calls do not wait for PyTorch's threads
        raise _Refused(422, "features: are not finite numbers")
    return torch.from_numpy(values)


def _from_base64(values: Any) -> list[bytes]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise _Refused(422, "images: expected a list of texts, images in base64")
    try:
        return [base64.b64decode(value, validate=True) for value in values]
    except binascii.Error as error:
        raise _Refused(422, f"images: is not base64 ({first_line(error)})") from error


def _decoded(backbone: Backbone, image: bytes) -> Tensor:
    """Return the network's input of an image file."""
    try:
        with open_stream(io.BytesIO(image)) as opened:
            return backbone.transform(upright_rgb(opened))
    except Exception as error:  # Pillow raises many kinds
        raise _Refused(422, f"the image cannot be read ({first_line(error)})") from error


def _as_json(client: str, answer: Answer, names: list[str], top: int) -> bytes:
    """Return the most probable classes of every image."""
    p_nK = answer.probabilities_nK.numpy()
    some = np.argpartition(p_nK, -top, axis=1)[:, -top:]
    rows = []
    for p_K, some_k in zip(p_nK, some, strict=True):
        best = sorted(some_k.tolist(), key=p_K.__getitem__, reverse=True)
        rows.append([{"class": names[k], "probability": round(float(p_K[k]), 6)} for k in best])
    return json.dumps({"client": client, "seen": answer.seen, "kept": answer.kept, "answers": rows}).encode()


def open_store(
    states: str, run: Run, history: int | None, keep: str, seconds: float | None = None, most: int | None = None
) -> ClientStore:
    """Return the store of a service: ``redis://...``, or the path of an SQLite file.

    Args:
        states: URL or path.
        run, history, keep: what states must be of.
        seconds: time to live after a client's last request; None: for ever.
        most: clients of an SQLite file.
    """
    length = 0 if isinstance(run.method, Personal) else ClientSession(run, "client", history, keep).history
    facts = about(run, length, keep)
    if states.startswith(("redis://", "rediss://", "unix://")):
        if most is not None:
            raise UserError("--max-clients: is of SQLite; limit Redis by its maxmemory and maxmemory-policy")
        return RedisStore(states, facts, seconds)
    return SqliteStore(states, facts, seconds, most)


def main(arguments: list[str] | None = None) -> int:
    """Serve a run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.serving.service", description="a run behind HTTP")
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--states", metavar="FILE|URL", help="SQLite file, or redis://HOST; default: states.sqlite in RUN"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--history", type=int, metavar="N", help="images kept of a client; default: as in training")
    parser.add_argument("--keep", choices=KEEP, default="recent", help="which images; default: recent")
    parser.add_argument("--ttl", type=float, metavar="SECONDS", help="forget clients that send nothing for so long")
    parser.add_argument("--max-clients", type=int, metavar="N", help="forget the oldest of more (SQLite)")
    parser.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="of a request; default: 8 MiB")
    parser.add_argument("--with-backbone", action="store_true", help="take images, not features alone")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the backbone, if it was loaded from a file")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="a token that requests must give")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: one less than there are cores")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _serve(options), failed=1)


def _serve(options: argparse.Namespace) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("uvicorn is not installed; pip install 'iciia_exp[serve]'") from error
    token = os.environ.get("ICIIA_EXP_TOKEN")
    if options.token_file is not None:
        try:
            token = options.token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{options.token_file}: cannot be read ({first_line(error)})") from error
    if token == "":
        raise UserError("the token is empty")
    run = Run.load(options.run)
    backbone = run.load_backbone(options.weights) if options.with_backbone or options.weights else None
    states = options.states or str(run.path / "states.sqlite")
    store = open_store(states, run, options.history, options.keep, options.ttl, options.max_clients)
    app = make_app(run, store, options.history, options.keep, backbone, token, Limits(options.max_body))
    print(f"http://{options.host}:{options.port}: {run.method.name}, states in {states}", flush=True)
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) - 1))
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
