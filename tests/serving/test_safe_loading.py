"""Loading what others made runs no code of theirs and reads nothing outside: every leaf of every file in turn."""

import contextlib
import copy
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import wandb  # noqa: F401  # makes folders when it is imported first
import yaml
from torch import nn

from iciia_exp import ClientSession, Run
from iciia_exp.data.store import FeatureStore
from iciia_exp.engine.execute import execute
from iciia_exp.errors import UserError
from iciia_exp.methods.adapt.iciia import IciiaMethod
from iciia_exp.models.backbones.small_cnn import SmallCNN
from tests.making.damage import unchecked

#: What takes the place of a leaf. Called, each would leave a mark.
ATTACKS = {
    "target": {"_target_": "os.mkdir", "_args_": ["MARK"], "path": "MARK"},
    "copy": {"_target_": "shutil.copyfile", "src": "SECRET", "dst": "MARK"},
    "hub": {"_target_": "torch.hub.load", "repo_or_dir": "TRAP", "model": "spring", "source": "local"},
    "stored": {"name": "os.mkdir", "arguments": {"path": "MARK"}},
    "module": {"name": "trap", "arguments": {}},
    "parent": "../../SECRET",
    "absolute": "/SECRET",
    "interpolation": "${oc.env:HOME}",
    "python": "!!python/object/apply:os.mkdir [MARK]",
    "list": [[["MARK"]]],
    "nothing": None,
    "large": 10**5,
    "negative": -5,
}

#: A method that is made of parts, stored objects in a stored object.
NESTED = ("method=iciia_prior", "method.image.perceptron=4")

WATCHED = ("open", "os.mkdir", "os.system", "subprocess.Popen", "shutil.copyfile", "os.rename", "os.remove")

events: list = []
watching = False


def watch(event, arguments):
    if watching and event in WATCHED:
        events.append((event, arguments))


sys.addaudithook(watch)


def leaves(node, path=()):
    """Yield the paths of all leaves and inner nodes of a JSON value; of a list the first stands for all."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(node, path, value):
    """Return a copy with another value at a path."""
    node = copy.deepcopy(node)
    at = node
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return node


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a run whose backbone was trained here, in a folder with a trap and a secret beside it."""
    from hydra import compose, initialize_config_dir

    from iciia_exp.config.experiment import Experiment
    from iciia_exp.config.paths import CONF_DIR
    from iciia_exp.engine.stages import Stages
    from tests.conftest import SMALL

    root = tmp_path_factory.mktemp("safe")
    places = [f"cache_dir={root}/cache", f"output_dir={root}/outputs"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=[*SMALL, *places, *NESTED, "training.recipe.epochs=1"])
    stages = Stages(Experiment.from_config(config))
    execute(stages, brief=True)
    unchecked(root)
    (root / "SECRET").write_text("secret")
    (root / "trap").mkdir()
    (root / "trap" / "hubconf.py").write_text("import os\nos.mkdir('MARK')\ndef spring(): pass\n")
    return root, stages


def attack(value, root):
    """Return an attack with the places filled in."""
    text = json.dumps(value)
    for name in ("MARK", "SECRET", "TRAP"):
        text = text.replace(name, str(root / name.lower() if name == "TRAP" else root / name))
    return json.loads(text)


def loaded(stages, session, store_alone=False):
    """Do what a user does with a run of somebody else's."""
    if store_alone:
        store = FeatureStore.open(stages.features.folder)
        store.array()
        return store.table
    run = Run.load(stages.run.folder, cache_dir=stages.experiment.cache_dir)
    for look in (
        lambda: run.load_backbone(),
        lambda: run.features.array(),
        lambda: run.config,
        lambda: run.results,
        lambda: run.clients,
        lambda: run.partition,
        lambda: run.predict(torch.zeros(2, 32)),
        lambda: ClientSession.load(session, run),
    ):
        try:
            look()
        except UserError:
            continue
    return run


def files(stages):
    return {
        "run": stages.run.folder / "run.json",
        "config": stages.run.folder / "config.yaml",
        "training": stages.run.folder / "training.json",
        "results": stages.evaluation.folder / "results.json",
        "store": stages.features.folder / "manifest.json",
        "backbone": stages.backbone.folder / "manifest.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "config", "training", "results", "store", "backbone"])
def test_every_leaf_of_every_file(made, name, tmp_path, monkeypatch):
    global watching
    root, stages = made
    path = files(stages)[name]
    whole = path.read_text(encoding="utf-8")
    parse = yaml.safe_load if path.suffix == ".yaml" else json.loads
    write = (lambda value: yaml.safe_dump(value)) if path.suffix == ".yaml" else json.dumps
    session = tmp_path / "session"
    ClientSession(Run.load(stages.run.folder)).save(session)
    good = parse(whole)
    paths = list(leaves(good))
    assert len(paths) >= 4
    allowed = (str(root / "outputs"), str(root / "cache"), str(tmp_path), sys.prefix, sys.base_prefix, "/proc", "/sys")
    allowed = (*allowed, str(Path(__file__).resolve().parents[2]), os.devnull, "<")
    loaded(stages, session)  # what is imported on first use is imported now
    # what loading acts on: each leaf alone; what is only handed on as data: all leaves at once
    places = [[where] for where in paths] if name in ("run", "store") else [paths]
    try:
        for where in places:
            for label, value in ATTACKS.items():
                bad = good
                for leaf in sorted(where, key=len, reverse=True):
                    bad = replaced(bad, leaf, attack(value, root))
                path.write_text(write(bad), encoding="utf-8")
                events.clear()
                watching = True
                try:
                    loaded(stages, session, store_alone=name == "store")
                except UserError:  # anything else fails the test
                    pass
                finally:
                    watching = False
                outside = [
                    (event, arguments)
                    for event, arguments in events
                    if event != "open" or not (isinstance(arguments[0], int) or str(arguments[0]).startswith(allowed))
                ]
                assert not outside, (where, label, outside[:3])
                assert not (root / "MARK").exists(), (where, label)
    finally:
        path.write_text(whole, encoding="utf-8")


@pytest.mark.parametrize("name", ["run", "config", "results", "store", "backbone"])
def test_a_key_that_is_missing_and_deep_nesting(made, name, tmp_path):
    _, stages = made
    path = files(stages)[name]
    whole = path.read_text(encoding="utf-8")
    good = yaml.safe_load(whole)  # JSON is YAML
    session = tmp_path / "session"
    ClientSession(Run.load(stages.run.folder)).save(session)
    try:
        for key in good:
            path.write_text(json.dumps({k: v for k, v in good.items() if k != key}), encoding="utf-8")
            if name == "run" and key not in ("arrays", "parameters"):
                with pytest.raises(UserError, match=rf"run\.json: ({key}: expected|format None)"):
                    Run.load(stages.run.folder)
            with contextlib.suppress(UserError):  # anything else fails the test
                loaded(stages, session, store_alone=name == "store")
        for text in ("[" * 100_000, '{"a":' * 100_000, '{"a": ' + "[" * 100_000):
            path.write_text(text, encoding="utf-8")
            with contextlib.suppress(UserError):
                loaded(stages, session, store_alone=name == "store")
    finally:
        path.write_text(whole, encoding="utf-8")


def test_yaml_tags_are_no_code(made):
    _, stages = made
    path = stages.run.folder / "config.yaml"
    whole = path.read_text()
    path.write_text("a: !!python/object/apply:os.mkdir ['MARK']\n")
    try:
        with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
            Run.load(stages.run.folder).config  # noqa: B018
    finally:
        path.write_text(whole)
    assert not Path("MARK").exists()


class Mine(IciiaMethod):
    name = "mine"


class MyNetwork(SmallCNN):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [Mine, sys.modules[__name__], __name__], ids=["class", "module", "name"])
def test_plug_ins_are_loaded_where_the_caller_names_them(stages, plugin, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    made = stages("method._target_=mine.Mine", "backbone.model._target_=mine.MyNetwork")
    execute(made)
    if isinstance(plugin, str):
        monkeypatch.setitem(sys.modules, "tests.plugin", sys.modules[__name__])
        plugin = "tests.plugin"
    with pytest.raises(UserError, match=r"'tests:mine': no such Method in this package or its plug-ins; .*plugins="):
        Run.load(made.run.folder)
    run = Run.load(made.run.folder, plugins=plugin if isinstance(plugin, str) else [plugin])
    assert type(run.method) is Mine
    if plugin is not Mine:
        assert type(run.load_backbone()) is MyNetwork


def test_installed_plug_ins_are_found(stages, monkeypatch):
    from importlib.metadata import EntryPoint

    from iciia_exp.config import stored

    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    made = stages("method._target_=mine.Mine")
    execute(made)
    entry = EntryPoint("mine", "mine:Mine", "iciia_exp.methods")
    monkeypatch.setattr(stored, "entry_points", lambda group: [entry] if group == entry.group else [])
    assert type(Run.load(made.run.folder).method) is Mine


def test_a_run_of_an_older_version_says_what_to_do(made, tmp_path):
    _, stages = made
    old = tmp_path / "old"
    shutil.copytree(stages.run.folder, old)  # without checksums
    info = json.loads((old / "run.json").read_text())
    target = {"_target_": "iciia_exp.methods.iciia.IciiaMethod", "num_layers": 1, "heads": 4, "groups": 1}
    (old / "run.json").write_text(json.dumps({**info, "format": 1, "method": target}))
    with pytest.raises(UserError, match=r"format 1, this version reads 2; .*repeat its command"):
        Run.load(old)


def test_weights_of_a_file_are_given_again(stages, tmp_path):
    network = SmallCNN(10, dim=32, width=4)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    given = ("backbone.train=none", "backbone.recipe=null", f"+backbone.weights={tmp_path}/w.pt")
    made = stages(*given)
    execute(made)
    run = Run.load(made.run.folder)
    with pytest.raises(UserError, match=r"load_backbone\(weights=\.\.\.\) with the file w\.pt"):
        run.load_backbone()
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the file that the features were made with"):
        run.load_backbone(tmp_path / "other.pt")
    rebuilt = run.load_backbone(tmp_path / "w.pt")
    for name, tensor in network.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)


def test_a_store_reads_only_its_own_arrays(made):
    _, stages = made
    store = FeatureStore.open(stages.features.folder)
    for name in ("../features", "/etc/passwd", "nothing"):
        with pytest.raises(UserError):
            store.array(name)
