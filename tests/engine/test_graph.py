"""Artifacts: named by what made them, made once, whole or absent."""

import pytest

from iciia_exp.engine.graph import Artifact, NotMade, ensure


@pytest.fixture
def graph(tmp_path):
    """Return what makes an artifact, and the list of those that were made."""
    made = []

    def artifact(kind, science=1, needs=(), **more):
        def make(folder):
            assert all(need.finished for need in needs)
            made.append(kind)
            (folder / more.get("last", "manifest.json")).write_text("{}")

        return Artifact(kind, kind, science, make, tmp_path, tuple(needs), **more)

    artifact.made = made
    return artifact


def test_what_is_needed_comes_first_and_everything_once(graph):
    backbone = graph("backbone")
    features = graph("features", needs=[backbone])
    runs = [graph("run", seed, [features], last="weights", in_place=True) for seed in (0, 1)]
    kinds = ("backbone", "features", "run")
    assert ensure(runs[0], kinds) == runs[0].folder
    assert graph.made == ["backbone", "features", "run"]
    ensure(runs[1], kinds)
    ensure(runs[0], kinds)
    assert graph.made == ["backbone", "features", "run", "run"]
    assert all(part.finished for part in (backbone, features, *runs))


def test_a_digest_is_of_the_science_and_of_all_that_is_needed(graph, tmp_path):
    first, second = graph("features", 1), graph("features", 2)
    assert first.digest == graph("features", 1).digest != second.digest
    assert graph("run", needs=[first]).digest != graph("run", needs=[second]).digest
    assert graph("run", needs=[first]).digest != graph("run").digest
    elsewhere = Artifact("features", "another label", 1, lambda folder: None, tmp_path / "elsewhere")
    assert elsewhere.digest == first.digest


def test_a_finished_artifact_asks_for_nothing(graph):
    features = graph("features", needs=[graph("backbone")])
    ensure(features, ("backbone", "features"))
    for path in features.folder.parent.glob("backbone-*/manifest.json"):
        path.unlink()
    ensure(graph("run", needs=[features]), ("run",))
    assert graph.made == ["backbone", "features", "run"]


def test_what_may_not_be_made_is_named_and_nothing_is_made(graph):
    backbone = graph("backbone")
    features = graph("features", needs=[backbone])
    run = graph("run", needs=[features])
    with pytest.raises(NotMade) as error:
        ensure(run, ("run",))
    assert error.value.artifact is backbone  # the first to make
    assert not graph.made
    ensure(backbone, ("backbone",))
    with pytest.raises(NotMade) as error:
        ensure(run, ("run",))
    assert error.value.artifact is features


@pytest.mark.parametrize("in_place", [False, True])
def test_killed_and_made_again(tmp_path, in_place):
    seen = []

    def make(folder):
        seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / "half").write_text("half")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (folder / "manifest.json").write_text("{}")

    artifact = Artifact("run", "run", 1, make, tmp_path, in_place=in_place)
    with pytest.raises(KeyboardInterrupt):
        ensure(artifact, ("run",))
    assert not artifact.finished
    ensure(artifact, ("run",))
    assert seen == [[], ["half"]]  # it goes on with what was left
    assert artifact.finished


def test_a_maker_that_leaves_nothing_is_an_error(tmp_path):
    for in_place in (False, True):
        with pytest.raises(RuntimeError, match=r"wrote no manifest\.json"):
            ensure(Artifact("run", "run", 1, lambda folder: None, tmp_path, in_place=in_place), ("run",))


def test_reports_say_whether_it_was_made_now(tmp_path):
    said = []

    def make(folder):
        (folder / "manifest.json").write_text("{}")

    artifact = Artifact("run", "run", 1, make, tmp_path, report=lambda folder, made: said.append((folder, made)))
    ensure(artifact, ("run",))
    ensure(artifact, ("run",))
    assert said == [(artifact.folder, True), (artifact.folder, False)]
