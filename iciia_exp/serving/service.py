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
import os
import re
import socket
import sys
from pathlib import Path

from iciia_exp.errors import UserError, check_float, check_int, first_line
from iciia_exp.methods.tune.base import Personal
from iciia_exp.output import exit_status
from iciia_exp.serving.app import Limits, check_served, make_app
from iciia_exp.serving.options import add_backbone, add_run, chosen_backbone, chosen_run
from iciia_exp.serving.run import Run
from iciia_exp.serving.scheduler import about
from iciia_exp.serving.session import KEEP, ClientSession
from iciia_exp.serving.states import REDIS, ClientStore, RedisStore, SqliteStore, without_password

__all__ = ["main", "open_store"]


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
    if states.startswith(REDIS):
        if most is not None:
            raise UserError("--max-clients: is of SQLite; limit Redis by its maxmemory and maxmemory-policy")
        return RedisStore(states, facts, seconds)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", states):  # a drive has one letter
        problem = "is neither an address of Redis, redis://HOST, nor the path of an SQLite file"
        raise UserError(f"--states {without_password(states)}: {problem}")
    return SqliteStore(states, facts, seconds, most)


def main(arguments: list[str] | None = None) -> int:
    """Serve a run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m iciia_exp.serving.service", description="a run behind HTTP")
    add_run(parser)
    parser.add_argument(
        "--states", metavar="FILE|URL", help="SQLite file, or redis://HOST; default: states.sqlite in the run"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--history", type=int, metavar="N", help="images kept of a client; default: as in training")
    parser.add_argument("--keep", choices=KEEP, default="recent", help="which images; default: recent")
    parser.add_argument("--ttl", type=float, metavar="SECONDS", help="forget clients that send nothing for so long")
    parser.add_argument("--max-clients", type=int, metavar="N", help="forget the oldest of more (SQLite)")
    parser.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="of a request; default: 8 MiB")
    add_backbone(parser, "take images, not features alone")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="a token that requests must give")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as cores")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _serve(options), failed=1)


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise a `UserError` that names the first option whose number is out of its range."""
    check_int("--port", options.port, 1, 65535)
    check_int("--max-body", options.max_body, 1)
    for flag, value, low, high in (
        ("--history", options.history, 0, None),
        ("--max-clients", options.max_clients, 1, None),
        ("--threads", options.threads, 1, 1024),
    ):
        if value is not None:
            check_int(flag, value, low, high)
    if options.ttl is not None:
        check_float("--ttl", options.ttl, 0, 1e12, open_low=True)


def _serve(options: argparse.Namespace) -> int:
    _check_numbers(options)
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("uvicorn is not installed; pip install 'iciia_exp[serve]'") from error
    token = os.environ.get("ICIIA_EXP_TOKEN")
    if options.token_file is not None:
        try:
            token = options.token_file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{options.token_file}: cannot be read ({problem})") from error
    if token is not None and not (token := token.strip()):
        raise UserError(f"{options.token_file or 'ICIIA_EXP_TOKEN'}: the token is empty")
    run, limits = chosen_run(options), Limits(options.max_body)
    check_served(run, options.history, options.keep)
    backbone = chosen_backbone(run, options)
    states = options.states or _states_of(run)
    with _listen(options.host, options.port) as listener:
        store = open_store(states, run, options.history, options.keep, options.ttl, options.max_clients)
        app = make_app(run, store, options.history, options.keep, backbone, token, limits, options.threads)
        where = f"states in {without_password(states)}"
        print(f"http://{options.host}:{options.port}: {run.method.name}, {where}", flush=True)
        sys.setswitchinterval(0.001)  # between the event loop and the scheduler: a tenth more requests than with 5 ms
        config = uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _states_of(run: Run) -> str:
    """Return the default file of the states: in a run's directory, but beside a repository, which may be uploaded."""
    path = run.path.resolve()
    return str(path.with_name(f"{path.name}.states.sqlite") if run.is_repository else run.path / "states.sqlite")


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises a `UserError` if the port is in use or not allowed."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        problem = f"cannot listen on port {port} ({first_line(error.strerror or str(error))})"
        raise UserError(f"{host}: {problem}; choose another --port or --host") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
