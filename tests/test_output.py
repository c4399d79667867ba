"""What commands print: names of others cannot change the terminal, and no output ends a run."""

import io
import subprocess
import sys

import pandas as pd
import pytest

from iciia_exp.__main__ import main
from iciia_exp.engine.terminal import console, result_table, setup_logging
from iciia_exp.errors import ConfigError, UserError, printable
from iciia_exp.output import exit_status, print_error, robust_streams
from iciia_exp.report import text as text_tables
from iciia_exp.results.tables import settings
from tests.engine.test_terminal import ROW

NASTY = "a\x1b[2Jb\nc\u202ed|e[/f][red]g\\input{x}\r"


def test_control_characters_are_escaped():
    assert printable("café 30 °, 漢字 ±") == "café 30 °, 漢字 ±"
    assert printable("a\x1b[31m\u202e\x07\n\tb") == "a\\x1b[31m\\u202e\\x07\n\tb"
    assert printable("a\nb", lines=False) == "a\\nb"
    assert printable("caf\udce9.png") == "caf\\udce9.png"
    assert "\n" not in str(ConfigError("name", "a\nb\x1b", "is wrong"))
    assert "\x1b" not in str(ConfigError("name", "a\nb\x1b", "is wrong"))


def test_names_in_tables_are_text(capsys):
    row = ROW | {"backbone": NASTY, "config.method.x": NASTY, "task": "single-label", "cost_images": 16}
    row |= {"backbone_macs": 9, "test_clients": 1, "test_images": 1}
    rows = [row, row | {"digest": "e", "setting_digest": "t", "config.method.x": "=1+1", "groups": 8}]
    console().print(result_table(rows))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[/f][red]" in "".join(out.split())
    table = settings(rows)
    lines = text_tables.markdown(text_tables.summary(table)).splitlines()
    assert len(lines) == 2 + 1 + 2
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    tex = text_tables.latex(text_tables.summary(table).assign(method="[x] y"), NASTY)
    assert r"\input" not in tex
    assert "\n[x]" not in tex
    assert "{}[x] y" in tex


def test_a_spreadsheet_runs_no_cell(tmp_path):
    rows = [ROW | {"backbone": name, "dataset": f"@{name}", "task": "single-label"} for name in ("=cmd|' /C calc'!A0",)]
    table = settings([row | {"cost_images": 16, "backbone_macs": 9} for row in rows])
    found = pd.read_csv(io.StringIO(text_tables.csv(table)))
    assert found["backbone"][0] == "'=cmd|' /C calc'!A0"
    assert found["dataset"][0].startswith("'@")
    assert found["gain"][0] == ROW["gain"]


def test_a_terminal_without_the_character_gets_another(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    robust_streams()
    print("90.0 ± 1.2 – café → 漢")
    console().print("± [/x]")
    sys.stdout.flush()
    assert raw.getvalue().splitlines()[0] == rb"90.0 +- 1.2 - caf\xe9 -> \u6f22"
    assert raw.getvalue().splitlines()[1] == b"+- [/x]"


def test_errors_of_commands_are_one_line(capsys):
    def fail(error):
        raise error

    assert exit_status(lambda: fail(UserError("x: laid out as\n  a/b\x1b")), failed=2) == 2
    assert capsys.readouterr().err == "error: x: laid out as\n  a/b\\x1b\n"
    assert exit_status(lambda: fail(PermissionError(13, "Permission denied", "/a/b")), failed=1) == 1
    assert capsys.readouterr().err == "error: /a/b: Permission denied\n"
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0, failed=1)
    print_error("a")
    assert capsys.readouterr().err == "error: a\n"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_run_ends_well_on_any_terminal(small, encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    monkeypatch.setattr(sys, "argv", ["iciia_exp", *small, "method=backbone", "output_dir='o[/a] ü'"])
    with pytest.raises(SystemExit) as stop:
        main()
        sys.exit(0)
    assert not stop.value.code
    sys.stdout.flush()
    assert b"[/a]" in raw.getvalue()


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_run(small, spawn, tmp_path):
    command = [sys.executable, "-u", "-m", "iciia_exp", *small, "method=backbone"]
    process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=120) in (0, 120)  # 120: Python could not write its last buffer
    assert b"Traceback" not in process.stderr.read()
    assert list((tmp_path / "outputs").rglob("results.json"))


@pytest.mark.parametrize("command", ["iciia_exp --help", "iciia_exp --version", "iciia_exp.cache list"])
def test_a_full_disk_behind_the_output_is_one_line(command, tmp_path):
    line = f"{sys.executable} -m {command} > /dev/full"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == "error: output: No space left on device\n"
    assert done.returncode in (1, 2)


def test_a_list_of_the_cache_may_be_cut(tmp_path):
    for number in range(3000):
        (tmp_path / "cache/features" / f"a-{number:012x}.partial").mkdir(parents=True)
    cut = f"{sys.executable} -m iciia_exp.cache list | head -n 1"
    done = subprocess.run(cut, shell=True, capture_output=True, text=True, timeout=60)
    assert "3000 entries" in done.stdout
    assert done.stderr == ""


def test_log_lines_have_no_control_characters(capsys):
    import logging

    setup_logging()
    logging.getLogger("iciia_exp.x").info("images of %s", NASTY)
    assert "\x1b" not in capsys.readouterr().out
    logging.getLogger("iciia_exp.x").warning("images of %s", NASTY)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("warning: images of a")
    assert out.count("\n") == 1


def test_closed_output_ends_no_run(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    robust_streams()
    print("to nobody")
    console().print("to nobody")
    print_error("to nobody")
    for stream in (sys.stdout, sys.stderr):
        stream.close()
