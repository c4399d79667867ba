"""The service's HTTP interface; see `iciia_exp.serving.service`."""

import asyncio
import base64
import contextlib
import hmac
import io
import json
import os
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from iciia_exp.serving.run import Run
from iciia_exp.serving.scheduler import Answer, Busy, Scheduler, UnknownClient
from iciia_exp.serving.states import ClientStore, StoreError

__all__ = ["Limits", "check_served", "make_app"]

_FEATURES = "application/octet-stream"
_START, _END = "/clients/", "/predict"


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


def check_served(run: Run, history: int | None, keep: str) -> None:
    """Raise a `UserError` if a run cannot be served, or not with these options of `ClientSession`."""
    method = run.method
    if not isinstance(method, Adaptive | Personal) or method.reads - {"features"}:
        raise UserError(f"{method.name}: cannot be served; methods that adapt on features can, or tune on them")
    if isinstance(method, Personal):
        if history is not None or keep != "recent":
            raise UserError(f"{method.name}: history and keep do not apply; each image is classified alone")
        if method.states is None:
            hint = "serve the run itself; a repository has no states of its clients"
            raise UserError(f"{run.path}: has nothing that the devices of {method.name} have learned; {hint}")


def make_app(
    run: Run,
    store: ClientStore,
    history: int | None = None,
    keep: str = "recent",
    backbone: Backbone | None = None,
    token: str | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
) -> Any:
    """Return the application (FastAPI), with its `Scheduler` as ``app.state.scheduler``.

    Args:
        run: of an adaptive method, or of one whose devices learn, whose clients are those of the run.
        store: of the clients' states.
        history, keep: of `ClientSession`.
        backbone: for images.
        token: that requests must give, as ``Authorization: Bearer TOKEN``; None: none.
        limits: of requests.
        threads: of `Scheduler`.
    """
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.responses import JSONResponse
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
        from starlette.requests import ClientDisconnect
    except ImportError as error:
        raise UserError("fastapi is not installed; pip install 'iciia_exp[serve]'") from error
    check_served(run, history, keep)
    wanted = None if token is None else f"Bearer {token}".encode(errors="surrogateescape")  # as the variable had it
    limits, names, dim = limits or Limits(), run.class_names, run.method.dim
    scheduler = Scheduler(run, store, history, keep, backbone, threads=threads)
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

    app = FastAPI(title=f"iciia_exp: {run.method.name}", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.scheduler = scheduler

    async def answered(request: Request, work: Any) -> Any:
        """Return the response of ``work(request)``, or its error as one sentence."""
        status = 500
        try:
            if wanted is not None:
                given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
                if not hmac.compare_digest(given, wanted):
                    raise _Refused(401, "give the service's token: Authorization: Bearer TOKEN")
            response = await work()
            status = response.status_code
            return response
        except _Refused as error:
            status = error.status
            return JSONResponse({"error": str(error)}, status)
        except UnknownClient as error:
            status = 404
            return JSONResponse({"error": str(error)}, status)
        except ClientDisconnect:  # nobody reads the answer
            status = 499
            return Response(status_code=status)
        except (Busy, StoreError) as error:
            status = 503
            return JSONResponse({"error": str(error)}, status, {"Retry-After": "1"})
        except UserError as error:
            status = 422
            return JSONResponse({"error": str(error)}, status)
        finally:
            requests.labels(status).inc()

    def checked_name(client: str, request: Request) -> str:
        try:
            urllib.parse.unquote_to_bytes(request.scope.get("raw_path") or b"").decode()
        except UnicodeDecodeError as error:  # the names of two clients would be read as one
            raise _Refused(400, "the client's name is not UTF-8 (percent-encoded)") from error
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
            start, name = time.perf_counter(), checked_name(client, request)
            most = min(check_int("top", top, 1), len(names))
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            body = await body_of(request)
            if kind in ("application/json", _FEATURES):
                given = _features(body, kind, dim)
            elif kind.startswith("image/") and not body:
                raise _Refused(422, "the body is empty")
            elif kind.startswith("image/"):
                given = [body]
            else:
                some = f"application/json, {_FEATURES}, image/jpeg, image/png or another image"
                raise _Refused(415, f"Content-Type is {kind or 'missing'}; expected {some}")
            if len(given) > limits.images:
                raise _Refused(413, f"{len(given):,} images; at most {limits.images:,} in a request")
            if isinstance(given, Tensor):
                future = scheduler.submit(name, given)
            elif backbone is None:
                raise _Refused(415, "this service takes features; start it --with-backbone for images")
            else:
                loop = asyncio.get_running_loop()
                several = [f"image {number}" for number in range(1, len(given) + 1)]
                which = several if len(given) > 1 else ["the image"]
                decoded = partial(_decoded, backbone)
                calls = [loop.run_in_executor(decoders, decoded, *both) for both in zip(given, which, strict=True)]
                future = scheduler.submit(name, images=await asyncio.gather(*calls))
            answer = await future
            images.inc(len(answer.probabilities_nK))
            seconds.observe(time.perf_counter() - start)
            if request.headers.get("accept", "").startswith(_FEATURES):
                headers = {"X-Seen": str(answer.seen), "X-Kept": str(answer.kept)}
                return Response(answer.probabilities_nK.numpy().tobytes(), 200, headers, _FEATURES)
            return Response(_as_json(name, answer, names, most), 200, media_type="application/json")

        return await answered(request, work)

    app.add_middleware(_Shortcut, predict=predict, request=Request)

    @app.get("/clients/{client:path}")
    async def look(client: str, request: Request) -> Response:
        """Return how many images of a client were seen, and the bytes that are kept of it."""

        async def work() -> Response:
            known = await asyncio.wrap_future(scheduler.look_up(checked_name(client, request)))
            if known is None:
                raise _Refused(404, f"{client}: no such client")
            return JSONResponse({"client": client, **known._asdict()})

        return await answered(request, work)

    @app.delete("/clients/{client:path}")
    async def forget(client: str, request: Request) -> Response:
        """Forget a client."""

        async def work() -> Response:
            if not await asyncio.wrap_future(scheduler.forget(checked_name(client, request))):
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
    async def health() -> Response:
        """Return that the service answers, and how many clients it knows; 503 if the states cannot be reached."""
        try:
            clients = await asyncio.wrap_future(scheduler.count())
        except StoreError as error:
            return JSONResponse({"status": "unavailable", "error": str(error)}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ok", "clients": clients, "waiting": scheduler.waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in Prometheus' form."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """Answer a path or a method that is not there in the form of all errors."""
        requests.labels(error.status_code).inc()
        text = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        return JSONResponse({"error": text}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        requests.labels(422).inc()
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 422)

    return app


class _Shortcut:
    """Takes requests for answers past the framework's own routing, which takes longer than to answer them.

    Those with parameters, for which the framework has error messages, go on.
    """

    def __init__(self, app: Any, predict: Callable[[str, Any], Awaitable[Any]], request: type) -> None:
        self.app, self._predict, self._request = app, predict, request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        ours = path.startswith(_START) and path.endswith(_END) and len(path) > len(_START) + len(_END)
        if ours and scope["type"] == "http" and scope["method"] == "POST" and not scope["query_string"]:
            response = await self._predict(path[len(_START) : -len(_END)], self._request(scope, receive))
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)


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
            values = np.asarray(given["features"])
            if values.dtype.kind not in "iuf":  # texts and booleans would become numbers, too
                raise TypeError
        except (ValueError, TypeError, OverflowError) as error:
            raise _Refused(422, f"features: expected {dim} numbers, or lists of them") from error
        if values.ndim not in (1, 2) or values.shape[-1] != dim or not len(values):
            raise _Refused(422, f"features: expected {dim} numbers, or lists of them, got {list(values.shape)}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            values = values.astype(np.float32).reshape(-1, dim)
    if not np.isfinite(values).all():  # NumPy's calls do not wait for PyTorch's threads
        raise _Refused(422, "features: are not finite numbers")
    return torch.from_numpy(values)


def _from_base64(values: Any) -> list[bytes]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise _Refused(422, "images: expected a list of texts, images in base64")
    try:
        return [base64.b64decode(value, validate=True) for value in values]
    except ValueError as error:
        raise _Refused(422, f"images: is not base64 ({first_line(error)})") from error


def _decoded(backbone: Backbone, image: bytes, what: str = "the image") -> Tensor:
    """Return the network's input of an image file."""
    try:
        with open_stream(io.BytesIO(image)) as opened:
            return backbone.transform(upright_rgb(opened))
    except Exception as error:  # Pillow raises many kinds
        raise _Refused(422, f"{what} cannot be read ({first_line(error)})") from error


def _as_json(client: str, answer: Answer, names: list[str], top: int) -> bytes:
    """Return the most probable classes of every image."""
    p_nK = answer.probabilities_nK.numpy()
    some = np.argpartition(p_nK, -top, axis=1)[:, -top:]
    rows = []
    for p_K, some_k in zip(p_nK, some, strict=True):
        best = sorted(some_k.tolist(), key=p_K.__getitem__, reverse=True)
        rows.append([{"class": names[k], "probability": round(float(p_K[k]), 6)} for k in best])
    return json.dumps({"client": client, "seen": answer.seen, "kept": answer.kept, "answers": rows}).encode()
