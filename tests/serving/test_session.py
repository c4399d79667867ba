"""Serving clients one image at a time."""

import json
import shutil

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from iciia_exp.data.readers.images import as_picture
from iciia_exp.errors import UserError
from iciia_exp.methods.base import Facts
from iciia_exp.serving.run import Run, save_method
from iciia_exp.serving.session import ClientSession, _checksum
from iciia_exp.serving.together import predict_next, predict_together, takes_many

D, K = 16, 4


ICIIA = {"_target_": "iciia_exp.methods.adapt.iciia.IciiaMethod", "heads": 2, "groups": 4}
ENCODER = {"_target_": "iciia_exp.methods.adapt.stream_encoder.StreamEncoder", "_partial_": True}
STREAM = {
    "_target_": "iciia_exp.methods.adapt.iciia_stream.IciiaStream",
    "encoder": {**ENCODER, "num_layers": 2, "heads": 2, "groups": 4},
}


def make_run(folder, seed=0, config=ICIIA, **settings):
    torch.manual_seed(seed)
    head, config = nn.Linear(D, K), {**config, **settings}
    method = instantiate(config, facts=Facts.of(head))
    facts = {"task": "single-label", "class_names": list("abcd"), "images": 16, "features": "none", "backbone": None}
    save_method(folder, method, head, config, facts)
    return Run.load(folder)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "iciia-1"
    folder.mkdir()
    return make_run(folder, num_layers=2, attention="causal")


def test_a_session_equals_the_whole_sequence(run):
    x = torch.randn(9, D)
    session = ClientSession(run, history=20)
    got = torch.stack([session.predict(row) for row in x])
    torch.testing.assert_close(got, run.predict(x), atol=1e-5, rtol=1e-5)
    assert session.state_bytes == 9 * 4 * 2 * 2 * D
    assert "9 images seen, 9 kept" in repr(session)


@pytest.mark.parametrize(("layers", "attention"), [(1, "full"), (2, "full")])
def test_full_attention_answers_for_the_newest_image(tmp_path, layers, attention):
    run = make_run(tmp_path, num_layers=layers, attention=attention)
    x = torch.randn(6, D)
    session = ClientSession(run)
    got = [session.predict(row.numpy()) for row in x]
    torch.testing.assert_close(got[-1], run.predict(x)[-1], atol=1e-5, rtol=1e-5)
    assert session.state_bytes == 6 * 4 * D * (2 if layers == 1 else 1)


def test_many_sessions_together_equal_each_alone(run):
    x, lengths = torch.randn(150, D), np.random.default_rng(0).integers(0, 9, 150)
    keeps = ("recent", "reservoir", "diverse")
    twins = [[ClientSession(run, f"c{i}", 5, keeps[i % 3], seed=i) for i in range(150)] for _ in range(2)]
    for sessions in twins:
        for session, n in zip(sessions, lengths, strict=True):
            for j in range(n):
                session.predict(x[j])
    together = predict_together(twins[0], x)
    alone = torch.stack([s.predict(row) for s, row in zip(twins[1], x, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for one, other in zip(*twins, strict=True):
        assert (one.seen, one.kept) == (other.seen, other.kept)
        torch.testing.assert_close(one._state, other._state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", ["recent", "reservoir"])
@pytest.mark.parametrize("history", [0, 1, 5])
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_next_images_of_many_sessions_equal_one_by_one(tmp_path, attention, history, keep):
    run = make_run(tmp_path, num_layers=2, attention=attention)
    pasts, counts = np.random.default_rng(0).integers(0, 9, 12), np.random.default_rng(1).integers(1, 9, 12)
    twins = [[ClientSession(run, f"c{i}", history, keep, seed=i) for i in range(12)] for _ in range(2)]
    for sessions in twins:
        for session, n in zip(sessions, pasts, strict=True):
            torch.manual_seed(0)
            for row in torch.randn(n, D):
                session.predict(row)
    assert all(map(takes_many, twins[0])) == (attention == "causal" and keep == "recent")
    x = [torch.randn(n, D) for n in counts]
    for _ in range(2):
        together = predict_next(twins[0], x)
        for session, x_nD, answers in zip(twins[1], x, together, strict=True):
            alone = torch.stack([session.predict(row) for row in x_nD])
            torch.testing.assert_close(answers, alone, atol=1e-5, rtol=1e-5)
    for one, other in zip(*twins, strict=True):
        assert (one.seen, one.kept, one.changed) == (other.seen, other.kept, other.changed)
        assert (one._age == other._age).all()
        torch.testing.assert_close(one._state, other._state, atol=1e-5, rtol=1e-5)


def test_next_images_of_which_one_cannot_be_answered_change_nothing(run):
    sessions = [ClientSession(run, name, history=3) for name in ("a", "b")]
    x = torch.randn(2, 4, D)
    predict_next(sessions, x.unbind())
    for wrong, message in ((1e30, "b: the answer is not finite"), (float("nan"), "b: features are not finite numbers")):
        x[1, 2] = wrong
        with pytest.raises(UserError, match=f"^{message}"):
            predict_next(sessions, x.unbind())
    assert [(s.seen, s.kept) for s in sessions] == [(4, 3)] * 2


@pytest.mark.parametrize("method", ["iciia", "iciia_stream"])
def test_a_compiled_session_is_the_same(tmp_path, method):
    (tmp_path / "r").mkdir()
    causal = {"num_layers": 2, "attention": "causal"}
    run = make_run(tmp_path / "r", **({"config": STREAM} if method == "iciia_stream" else causal))
    plain, compiled = ClientSession(run, history=3), ClientSession(run, history=3, compile="eager")
    for row in torch.randn(6, D):
        torch.testing.assert_close(compiled.predict(row), plain.predict(row), atol=1e-5, rtol=1e-5)
    alone = [ClientSession(run, history=0, compile=backend) for backend in (None, "eager")]
    torch.testing.assert_close(alone[1].predict(row), alone[0].predict(row), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="compile=nonsense"):
        ClientSession(run, compile="nonsense")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_session_compiled_ahead_of_time_is_the_same_and_goes_on_after_loading(tmp_path):
    (tmp_path / "r").mkdir()
    run = make_run(tmp_path / "r", num_layers=1, attention="causal")
    plain, compiled = ClientSession(run, history=3), ClientSession(run, history=3, compile="inductor")
    rows = torch.randn(8, D)
    for row in rows[:5]:
        torch.testing.assert_close(compiled.predict(row), plain.predict(row), atol=1e-5, rtol=1e-5)
    compiled.save(tmp_path / "s.safetensors")
    again = ClientSession.load(tmp_path / "s.safetensors", run, compile="inductor")
    assert again._compiled is compiled._compiled
    for row in rows[5:]:
        torch.testing.assert_close(again.predict(row), plain.predict(row), atol=1e-5, rtol=1e-5)
    seen = again.seen
    with pytest.raises(UserError, match="features are not finite numbers"):
        again.predict(torch.full((D,), float("inf")))
    with pytest.raises(UserError, match=r"features have shape \[3\]"):
        again.predict(torch.zeros(3))
    assert again.seen == seen


def test_a_large_feature_is_a_finite_one(run):
    session = ClientSession(run, history=3)
    assert session.predict(torch.full((D,), 1e8)).isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        session.predict(torch.tensor([float("nan"), *[0.0] * (D - 1)]))


@pytest.mark.parametrize("keep", ["recent", "reservoir", "diverse"])
def test_a_huge_feature_is_refused_and_the_past_unchanged(run, keep, tmp_path):
    sessions = [ClientSession(run, name, history=3, keep=keep) for name in ("a", "b")]
    other = ClientSession(run, "c", history=3, keep=keep)
    x = torch.randn(12, D)
    for row in x[:6]:
        predict_together(sessions, row.expand(2, D))
        other.predict(row)
    huge = torch.full((D,), 1e30)
    with pytest.raises(UserError, match=r"^b: the answer is not finite: the features are too large"):
        sessions[1].predict(huge)
    with pytest.raises(UserError, match=r"^b: the answer is not finite"):
        predict_together(sessions, torch.stack([x[6], huge]))
    assert [session.seen for session in sessions] == [6, 6]
    for row in x[6:]:
        want = other.predict(row)
        assert want.isfinite().all()
        torch.testing.assert_close(predict_together(sessions, row.expand(2, D)), want.expand(2, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.full((3, 2 * 2 * D), float("nan"))}, "state has numbers that are not finite"),
        ({"state": torch.zeros(3, 5)}, r"state is \[3, 5\]"),
        ({"age": torch.tensor([1, 1, 2])}, "age does not number"),
        ({"age": torch.tensor([4, 5, 6, 7])}, "keeps 4 images of 6, with a history of 3"),
        ({"history": 10**11}, r"history=100000000000: needs .* GiB .*; at most"),
        ({"history": -1}, "history=-1"),
        ({"history": "3"}, "history=3: must be a whole number"),
        ({"seen": 2}, "keeps 3 images of 2"),
        ({"seen": None}, "seen=None"),
        ({"keep": "all"}, "keep=all"),
        ({"random": {}}, "is not a saved session"),
        ({"format": 7}, "format 7, this version reads 3"),
        ({"client": None, "run": 5}, r"belongs to the run iciia-1 \(5\), not to iciia-1 \("),
        ({"run": [5]}, r"belongs to the run iciia-1 \(\[5\]\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_forged_session_is_refused(run, tmp_path, change, message):
    session = ClientSession(run, history=3)
    for row in torch.randn(6, D):
        session.predict(row)
    session.save(tmp_path / "good")
    with safe_open(tmp_path / "good", "pt") as file:
        facts = json.loads(file.metadata()["session"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts |= {k: v for k, v in change.items() if k not in tensors}
    tensors |= {k: v for k, v in change.items() if k in tensors}
    facts["checksum"] = _checksum({k: v for k, v in facts.items() if k != "checksum"}, tensors)
    save_file(tensors, tmp_path / "bad", {"session": json.dumps(facts)})
    with pytest.raises(UserError, match=f"^{tmp_path}/bad: .*{message}"):
        ClientSession.load(tmp_path / "bad", run)
    assert ClientSession.load(tmp_path / "good", run).seen == 6


def test_a_damaged_session_is_refused(run, tmp_path):
    session = ClientSession(run, history=3)
    for row in torch.randn(6, D):
        session.predict(row)
    session.save(tmp_path / "good")
    whole = bytearray((tmp_path / "good").read_bytes())
    whole[-5] ^= 1
    (tmp_path / "bad").write_bytes(whole)
    with pytest.raises(UserError, match=f"^{tmp_path}/bad: is damaged; its content is not what was written"):
        ClientSession.load(tmp_path / "bad", run)


class Pictures:
    """A backbone whose features are the mean of a picture's colours, and zeros."""

    def transform(self, image):
        return torch.tensor(np.asarray(as_picture(image).convert("RGB"), dtype=np.float32)).mean((0, 1)) / 255

    def features(self, images):
        return torch.cat([images, torch.zeros(len(images), D - 3)], 1)


def test_images_as_applications_have_them(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    same = (
        picture,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        pixels,
        pixels[::-1][::-1],
        chw,
        chw / 255,
        pixels / 255,
    )
    answers = [ClientSession(run, backbone=Pictures()).predict(image) for image in same]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-4, rtol=1e-4)
    session = ClientSession(run, "kitchen", backbone=Pictures())
    for wrong, message in (
        (pixels.astype(np.float32), "floating-point values from .* expected 0 to 1"),
        (pixels.astype(np.int32), "values of type int32"),
        (tmp_path / "none.png", "No such file"),
        (np.zeros((2, 3, 4, 5)), "takes a PIL image, a path, or numbers"),
        (None, "takes a PIL image|cannot read"),
    ):
        with pytest.raises(UserError, match=f"^kitchen: cannot read the image.*{message}"):
            session.predict(wrong)
    with pytest.raises(UserError, match=r"^kitchen: features have shape \[2\], the run wants \[16\]"):
        session.predict([1.0, 2.0])
    with pytest.raises(UserError, match="^kitchen: expected features, .* got list of Image; .* image by image"):
        session.predict([picture])
    assert session.seen == 0
    for several in ([picture, picture], [[picture], [picture]]):
        with pytest.raises(UserError, match="^predict: expected features, .* got list of (Image|list); for images use"):
            run.predict(several)
        with pytest.raises(UserError, match="^predict_together: expected features, .*; for images use"):
            predict_together([ClientSession(run), ClientSession(run)], several)


@pytest.mark.parametrize("kind", [torch.tensor, np.float64, np.ndarray.tolist])
def test_features_with_a_batch_axis_are_no_grey_picture(run, kind):
    rows = np.random.default_rng(0).random((3, D)).astype(np.float32)  # from 0 to 1, as a picture's
    want = ClientSession(run).predict(rows[0])
    for backbone in (None, Pictures()):
        torch.testing.assert_close(ClientSession(run, backbone=backbone).predict(kind(rows[:1])), want)
        with pytest.raises(UserError, match=r"^client: (features have shape|floats \[3, 16\] may be features of 3)"):
            ClientSession(run, backbone=backbone).predict(kind(rows))
    square = np.random.default_rng(0).random((D, D))
    assert ClientSession(run, backbone=Pictures()).predict(square).shape == (K,)


def test_together_takes_arrays_and_lists(run):
    x = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    answers = [
        predict_together((ClientSession(run) for _ in range(2)), same) for same in (torch.tensor(x), x, x.tolist())
    ]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


def test_recent_keeps_the_last(run):
    session = ClientSession(run, history=3)
    for i in range(8):
        session.predict(torch.full((D,), float(i)))
    assert sorted(session._age.tolist()) == [6, 7, 8]
    assert session.kept == 3


PROFILE = {"_target_": "iciia_exp.methods.adapt.client_profile.ClientProfile", "hidden": 8, "vector": 2}


@pytest.mark.parametrize("keep", ["recent", "reservoir", "diverse"])
@pytest.mark.parametrize("compile", [None, "eager"])
def test_a_past_is_in_its_order(tmp_path, keep, compile):
    """As an image takes the place of another, and after loading; the next images of many come to the same."""
    torch.manual_seed(0)
    run = make_run(tmp_path, config=PROFILE, change=0.2)
    method = run.method
    session, many = ClientSession(run, history=4, keep=keep, compile=compile), ClientSession(run, history=4, keep=keep)
    rows, states = 4 * torch.randn(14, D), {}
    for number, x_D in enumerate(rows, 1):
        past_PE = [states[age] for age in sorted(session._age[: session.kept].tolist())]
        past_1PE = torch.stack(past_PE)[None] if past_PE else torch.zeros(1, 0, method.state_width)
        with torch.inference_mode():
            logits_1K, own_1E = method.step(x_D[None], past_1PE)
        states[number] = own_1E[0]
        torch.testing.assert_close(session.predict(x_D), logits_1K.softmax(-1)[0], atol=1e-6, rtol=1e-5)
        if number == 9 and compile is None:
            session.save(tmp_path / "session")
            session = ClientSession.load(tmp_path / "session", run)
    answers = torch.cat([predict_next([many], [part])[0] for part in rows.split(5)])
    with torch.inference_mode():
        reversed_1K, _ = method.step(x_D[None], past_1PE.flip(1))
    assert (reversed_1K - logits_1K).abs().max() > 1e-3  # a method that looks at the order
    torch.testing.assert_close(answers[-1], logits_1K.softmax(-1)[0], atol=1e-6, rtol=1e-5)


def test_histories_of_several_lengths_are_served_together(run):
    twins = [[ClientSession(run, str(history), history) for history in (0, 3, 5, 9)] for _ in range(2)]
    for x_4D in torch.randn(12, 4, D):
        alone = torch.stack([session.predict(x_D) for session, x_D in zip(twins[1], x_4D, strict=True)])
        torch.testing.assert_close(predict_together(twins[0], x_4D), alone, atol=1e-5, rtol=1e-5)


def test_a_reservoir_is_a_uniform_sample(run):
    kept = np.zeros(12)
    for seed in range(400):
        session = ClientSession(run, history=3, keep="reservoir", seed=seed)
        for _ in range(12):
            session._remember(torch.zeros(session._state.shape[1]), torch.zeros(D))
        kept[session._age - 1] += 1
    assert abs(kept / 400 - 3 / 12).max() < 0.1


def test_diverse_keeps_images_that_differ(run):
    session = ClientSession(run, history=3, keep="diverse")
    corners = torch.eye(D)[:3]
    for row in (corners[0], corners[1], corners[2], corners[0] + 0.01, corners[1] + 0.01, corners[1]):
        session.predict(row)
    kept = session._features.argmax(1)
    assert sorted(kept.tolist()) == [0, 1, 2]
    assert session.state_bytes == 3 * 4 * (4 * D + D)


def test_no_history_is_the_method_on_one_image(run):
    session, x = ClientSession(run, history=0), torch.randn(3, D)
    for row in x:
        torch.testing.assert_close(session.predict(row), run.predict(row[None])[0], atol=1e-5, rtol=1e-5)
    assert session.state_bytes == 0


@pytest.mark.parametrize("keep", ["recent", "reservoir", "diverse"])
def test_a_saved_session_goes_on(run, tmp_path, keep):
    x = torch.randn(12, D)
    session = ClientSession(run, "kitchen", 4, keep, seed=3)
    for row in x[:7]:
        session.predict(row)
    session.save(tmp_path / "kitchen.safetensors")
    again = ClientSession.load(tmp_path / "kitchen.safetensors", run)
    assert again.client == "kitchen"
    assert again.seen == 7
    for row in x[7:]:
        torch.testing.assert_close(again.predict(row), session.predict(row))


def test_a_session_of_another_run_is_refused(run, tmp_path):
    ClientSession(run).save(tmp_path / "s")
    (tmp_path / "iciia-2").mkdir()
    other = make_run(tmp_path / "iciia-2", seed=1, num_layers=2, attention="causal")
    with pytest.raises(UserError, match=r"belongs to the run iciia-1 \(.*\), not to iciia-2 \("):
        ClientSession.load(tmp_path / "s", other)
    (tmp_path / "bad").write_text("x")
    with pytest.raises(UserError, match="is not a saved session"):
        ClientSession.load(tmp_path / "bad", run)
    with pytest.raises(UserError, match="no such session"):
        ClientSession.load(tmp_path / "nowhere", run)


def test_a_run_is_known_by_what_it_computes_with(run, tmp_path):
    x = torch.randn(4, D)
    session = ClientSession(run, "kitchen", history=3)
    for row in x[:3]:
        session.predict(row)
    session.save(tmp_path / "s")
    same = Run.from_pretrained(run.save_pretrained(tmp_path / "A" / "model"))
    assert same.identity == run.identity
    assert torch.equal(ClientSession.load(tmp_path / "s", same).predict(x[3]), session.predict(x[3]))
    ClientSession(same).save(tmp_path / "of_repository")
    assert ClientSession.load(tmp_path / "of_repository", run).seen == 0
    (tmp_path / "other").mkdir()
    trained = make_run(tmp_path / "other", seed=1, num_layers=2, attention="causal")
    other = Run.from_pretrained(trained.save_pretrained(tmp_path / "B" / "model"))
    (tmp_path / "settings").mkdir()
    assert len({run.identity, other.identity, make_run(tmp_path / "settings", num_layers=2).identity}) == 3
    with pytest.raises(UserError, match=r"belongs to the run model \(.*\), not to model \("):
        ClientSession.load(tmp_path / "of_repository", other)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (torch.full((D,), float("nan")), "kitchen: features are not finite"),
        (torch.zeros(D + 1), r"kitchen: features have shape \[17\], the run wants \[16\]"),
        (torch.zeros(2, D), r"kitchen: features have shape \[2, 16\], the run wants \[16\]"),
        ("photo.jpg", "kitchen: expected features, .* got str; for images"),
    ],
)
def test_what_is_no_image_is_refused(run, image, problem):
    session = ClientSession(run, "kitchen")
    with pytest.raises(UserError, match=problem):
        session.predict(image)
    assert session.seen == 0


def test_together_names_the_client(run):
    sessions = [ClientSession(run, name) for name in ("a", "b")]
    x = torch.randn(2, D)
    with pytest.raises(UserError, match="b: features are not finite"):
        predict_together(sessions, torch.stack([x[0], x[1] * float("inf")]))
    with pytest.raises(UserError, match="given twice"):
        predict_together([sessions[0]] * 2, x)
    with pytest.raises(UserError, match="2 sessions and 1 images"):
        predict_together(sessions, x[:1])
    with pytest.raises(UserError, match="no sessions"):
        predict_together([], x)
