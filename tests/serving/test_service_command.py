"""The service's command line: states, ports, tokens, and a kill."""

import importlib
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("fastapi", reason="fastapi is not installed")
import httpx

from iciia_exp.errors import UserError
from iciia_exp.methods.base import Facts
from iciia_exp.serving import hub
from iciia_exp.serving.run import Run, save_method
from iciia_exp.serving.service import _states_of, main
from tests.serving.test_service import alone, ask, free_port, redis_server, wait_for
from tests.serving.test_session import D, K

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def start(spawn, run, states, port, *more):
    command = [
        sys.executable,
        "-m",
        "iciia_exp.serving.service",
        str(run.path),
        "--states",
        states,
        "--port",
        str(port),
    ]
    process = spawn([*command, "--history", "5", *more], env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(port)
    return process


@pytest.mark.slow
def test_nothing_that_was_answered_is_lost_by_a_kill(run, spawn, tmp_path):
    port, states = free_port(), str(tmp_path / "states.sqlite")
    x, answered = torch.randn(4, 200, D), [0] * 4
    process = start(spawn, run, states, port)
    assert main([str(run.path), "--states", states, "--history", "5"]) == 1, "the file is in use"
    pool = ThreadPoolExecutor(4)

    def talk(number):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            for row in x[number]:
                ask(client, f"c{number}", row[None])
                answered[number] += 1

    talks = [pool.submit(talk, number) for number in range(4)]
    while min(answered) < 20:
        assert not any(talk.done() for talk in talks)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(talk.exception() is not None for talk in talks)
    process = start(spawn, run, states, port)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number in range(4):
            seen = client.get(f"/clients/c{number}").json()["seen"]
            assert answered[number] <= seen <= answered[number] + 1
            got = ask(client, f"c{number}", x[number, seen : seen + 1])
            torch.testing.assert_close(got, alone(run, f"c{number}", x[number, : seen + 1])[-1:], atol=1e-6, rtol=1e-5)
    process.terminate()
    assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn ends by the signal after it has closed


def test_passwords_are_not_shown(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    port = free_port()
    for url in (
        f"redis://me:s3cret@127.0.0.1:{port}",
        f"redis://:s3@cret@127.0.0.1:{port}/0?password=s3cret",
        f"redis://:cr/s3cret@127.0.0.1:{port}",
        "redis://:s3cret",
    ):
        assert main([str(run.path), "--states", url]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "s3" not in err
        assert "cret" not in err
    with redis_server() as url:
        import redis

        redis.Redis.from_url(url).config_set("requirepass", "s3cret")
        with_password = url.replace("//", "//:s3cret@")
        assert main([str(run.path), "--states", with_password, "--port", str(free_port())]) == 0
        out, err = capsys.readouterr()
        assert f"states in {url.replace('//', '//***@')}" in out
        assert "s3cret" not in out + err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--ttl", value) for value in ("-5", "0", "nan", "inf", "1e300")),
        *((flag, value) for flag in ("--max-clients", "--threads", "--max-body") for value in ("-1", "0")),
        *(("--threads", "100000"), ("--history", "-1"), ("--port", "0"), ("--port", "99999")),
    ],
)
def test_a_number_out_of_range_is_refused_at_start(run, tmp_path, capsys, monkeypatch, flag, value):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    states = tmp_path / "states.sqlite"
    assert main([str(run.path), "--states", str(states), flag, value]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {flag}=")
    assert not states.exists()


def test_what_stands_before_a_token_is_no_part_of_it(run, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("iciia_exp.serving.service.make_app", lambda *arguments: given.append(arguments[5]))
    (tmp_path / "token").write_text("\ufeffpässwort\n", encoding="utf-8")
    command = [str(run.path), "--states", str(tmp_path / "states"), "--port", str(free_port())]
    assert main([*command, "--token-file", str(tmp_path / "token")]) == 0
    monkeypatch.setenv("ICIIA_EXP_TOKEN", " secret ")
    assert main([*command[:2], str(tmp_path / "other"), *command[3:]]) == 0
    assert given == ["pässwort", "secret"]


def test_a_port_in_use_is_one_line_and_leaves_no_file(run, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        file = tmp_path / "states.sqlite"
        for number, message in (
            (port, f"error: 127.0.0.1: cannot listen on port {port} ("),
            (99999, "error: --port=99999"),
        ):
            assert main([str(run.path), "--port", str(number), "--states", str(file)]) == 1
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(message)
    assert not file.exists()


def test_states_of_a_repository_are_beside_it(run, tmp_path):
    folder = run.save_pretrained(tmp_path / "model")
    assert _states_of(Run.load(folder)) == str(tmp_path / "model.states.sqlite")
    assert _states_of(run) == str(run.path / "states.sqlite")


def test_a_method_of_ones_own_is_a_plug_in(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_method_of_a_test"
    (tmp_path / f"{name}.py").write_text(
        "from iciia_exp.methods.adapt.iciia import IciiaMethod\n\n\nclass Own(IciiaMethod):\n    pass\n"
    )
    (tmp_path / "run").mkdir()
    method = importlib.import_module(name).Own(Facts.of(nn.Linear(D, K)), heads=2)
    head, config = nn.Linear(D, K), {"_target_": f"{name}.Own", "heads": 2}
    stored = {"task": "single-label", "class_names": list("abcd"), "images": 4, "features": "f", "backbone": None}
    save_method(tmp_path / "run", method, head, config, stored)
    assert hub.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 1
    assert "name the plug-in that it comes from" in capsys.readouterr().err
    command = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--plugin"]
    assert hub.main([*command, "no_such_module"]) == 1
    assert "plug-in no_such_module: cannot be imported (No module named" in capsys.readouterr().err
    assert hub.main([*command, name]) == 0


def test_weights_that_are_not_needed_are_refused(finished):
    run = Run.load(finished.run.folder)
    with pytest.raises(UserError, match="^digit.png: is not needed; the backbone's weights are in the cache"):
        run.load_backbone("digit.png")
