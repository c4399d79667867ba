"""A seeded fuzz of the configuration: a command ends in a checked experiment, or in one line that names a key.

`FUZZ_EXAMPLES=2000 pytest tests/engine/test_fuzz.py` tries more commands.
"""

import os
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from iciia_exp.config.check import flatten
from iciia_exp.config.hydra_errors import dotted_keys, option_names
from iciia_exp.config.paths import CONF_DIR
from iciia_exp.engine import jobs
from iciia_exp.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 200))

NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "3",
    "16",
    "0.5",
    "-0.5",
    "1e-9",
    "1e30",
    "1e400",
    "1e12",
    "10000000000",
    "nan",
    "inf",
    "-inf",
)
WORDS = (
    "null",
    "true",
    "false",
    "abc",
    "''",
    "'  '",
    "é",
    "ü.pt",
    "max",
    "auto",
    "../x",
    "/dev/null",
    "/",
    "a/b",
    "x\\,y",
)
NESTED = (
    "[]",
    "[1]",
    "[iciia]",
    "[0,-1]",
    "[a,b]",
    "{}",
    "{a:1}",
    "{_target_:os.getcwd}",
    "{_target_:nowhere.X}",
    "[[1],[2]]",
)
LINKS = ("${seed}", "${nope}", "${method}", "${oc.env:NOPE}", "${heads}0", "${", "???")
BROKEN = (
    "a=b",
    "a b",
    "[1",
    "{a",
    "'x",
    "x]",
    "1,2",
    "range(1,3)",
    "choice(a,b)",
    "a:b:c",
    "\x1b[31m",
    "a#b",
    "%",
    "\\",
)
VALUES = st.sampled_from(NUMBERS + WORDS + NESTED + LINKS + BROKEN)
#: What an error may name in place of the key that was set: what an experiment needs, what the width D must fit, and
#: what Hydra's grammar or another key says of it.
OTHERS = ("data_dir", "heads", "groups", "not of the form")
#: Backbones that take seconds to build, for more examples only.
LARGE = ("c3d", "convnext_large", "efficientnet_b4", "efficientnet_b7", "resnet152", "swin_b")
GROUPS = sorted(
    p.name for p in CONF_DIR.iterdir() if p.is_dir() and p.name not in ("wandb", "launcher", "search", "sweep")
)


def keys_of(compose):
    config = compose("method=iciia_prior", "client_mix=all_types", "logger=csv", "trainer=cpu")
    values = dict.fromkeys(dotted_keys(config)) | flatten(OmegaConf.to_container(config, resolve=True))
    return {key: value for key, value in values.items() if key not in ("stage", "output_dir", "cache_dir")}


def near(value):
    """Return values like the default one."""
    if isinstance(value, bool):
        return st.booleans().map(lambda v: str(v).lower())
    if isinstance(value, int | float):
        return st.sampled_from((value + 1, value * 2, value / 2, int(value // 2), -value, str(value), f"'{value}'"))
    return st.sampled_from((value, "null", "1", "0.1", "true", "[1,2]", "ab"))


@st.composite
def override(draw, keys):
    kind = draw(
        st.sampled_from(["near"] * 8 + ["value"] * 4 + ["option"] * 3 + ["added", "deleted", "typo", "anything"])
    )
    key = draw(st.sampled_from(sorted(keys)))
    if kind == "near":
        return f"{key}={draw(near(keys[key]))}"
    if kind == "value":
        return f"{key}={draw(VALUES)}"
    if kind == "option":
        group = draw(st.sampled_from(GROUPS))
        plus = "+" if group == "experiment" else ""
        options = [name for name in option_names(group) if EXAMPLES > 200 or name not in LARGE]
        return f"{plus}{group}={draw(st.sampled_from(options) | VALUES)}"
    if kind == "added":
        return f"{draw(st.sampled_from(['+', '++']))}{key}{draw(st.sampled_from(['', '.new', '._partial_', '._target_', '._recursive_', '._convert_']))}={draw(VALUES)}"
    if kind == "deleted":
        return f"~{key}"
    if kind == "typo":
        at = draw(st.integers(0, len(key) - 1))
        return f"{key[:at]}{draw(st.sampled_from(['', 'x', '.', ' ']))}{key[at + 1 :]}={draw(VALUES)}"
    return draw(st.text(max_size=12))


def outcome(*overrides):
    """Return the error of a command's checks, or None."""
    try:
        jobs._execute(jobs.composed(overrides), overrides)
    except UserError as error:
        return str(error)
    return None


def names(overrides):
    for given_ in overrides:
        key = given_.lstrip("+~").partition("=")[0].partition("@")[0]
        yield from {key, key.split(".")[0], key.rpartition(".")[2]} - {""}


@pytest.mark.slow
def test_every_command_ends_in_an_experiment_or_one_line(compose, tmp_path, capsys):
    keys = keys_of(compose)

    @settings(
        max_examples=EXAMPLES,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.lists(override(keys), min_size=1, max_size=3))
    def fuzz(overrides):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = outcome("stage=check", "logger=csv", "trainer=cpu", *overrides)
        if message is not None:
            assert message.strip()
            assert "\n" not in message or "laid out as" in message, repr(message)
            assert any(name in message for name in (*names(overrides), *OTHERS)), (overrides, message)

    fuzz()
