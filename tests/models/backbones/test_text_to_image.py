"""Pairs of text-to-image models: the same picture in every batch, costs, contents, and what they refuse."""

import numpy as np
import pytest
import torch

from iciia_exp.data.scenes import METRICS
from iciia_exp.errors import ConfigError, UserError
from iciia_exp.models.backbones.diffusers_pair import DiffusersPair
from iciia_exp.models.backbones.scene_pair import ScenePair
from iciia_exp.models.backbones.text_to_image import checked_pictures
from tests.making.diffusion import make_clip, make_pipeline

CAPTIONS = ["a small red one", "a small red one left of a large blue seven", "a large green four"]
ALL = frozenset({"features", "tokens", "quality", "flaws", "pictures"})
PAIRS = {"clarity": ["Clear photo", "Hazy photo"], "color": ["Colorful photo", "Dull photo"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_clip(folder / "clip")
    for number, name in enumerate(("small", "large")):
        make_pipeline(folder / name, seed=number)
    return folder


@pytest.fixture(params=["scenes", "diffusers"])
def pair(request, folder):
    torch.manual_seed(0)
    options = {"device_steps": 1, "cloud_steps": 2, "pictures": 2}
    if request.param == "scenes":
        channels = {"device_channels": [8, 8, 8], "cloud_channels": [8, 8, 16]}
        return ScenePair(len(METRICS), **channels, **options).eval().requires_grad_(False)
    names = [str(folder / name) for name in ("small", "large", "clip")]
    return DiffusersPair(3, *names, pairs=PAIRS, alignment=True, **options).eval()


@pytest.mark.slow
def test_a_picture_depends_on_its_prompt_alone(pair):
    batch = torch.stack([pair.transform(caption) for caption in CAPTIONS])
    together, alone = pair.outputs(batch, ALL), pair.outputs(batch[1:2], ALL)
    assert together["pictures"].dtype == torch.uint8
    assert together["quality"].shape[1:3] == (2, 2)
    for name, values in alone.items():
        tolerance = 1 if name == "pictures" else 1e-3  # the last digits depend on the size of a batch
        torch.testing.assert_close(values.float(), together[name][1:2].float(), atol=tolerance, rtol=1e-2)
    pictures = together["pictures"].float()
    assert (pictures[:, 0] - pictures[:, 1]).abs().mean() > 1  # both models
    assert (pictures[:, :, 0] - pictures[:, :, 1]).abs().mean() > 1  # both seeds
    assert not together["flaws"].any()
    assert ((together["quality"] >= 0) & (together["quality"] <= 1)).all()
    tokens = together["tokens"]
    real = (tokens != 0).any(-1).sum(1)
    assert 0 < real[0] < real[1] < tokens.shape[1]
    torch.testing.assert_close(together["features"], tokens.sum(1) / real[:, None])
    assert len(pair.words(CAPTIONS[0])) == real[0]


def test_costs_are_counted(pair):
    encoder, device, cloud, size = pair.costs()
    assert 0 < encoder < device
    assert cloud > 1.3 * device  # two steps against one
    assert size == pair.outputs(pair.transform(CAPTIONS[0])[None], ALL)["pictures"][0, 0, 0].numel()
    assert pair.macs(None) == device


def test_shapes_are_known_without_a_picture(pair, monkeypatch):
    example, wanted = pair.transform(CAPTIONS[0]), ALL - {"pictures"} | {"images"}
    made = {name: tuple(values.shape[1:]) for name, values in pair.outputs(example[None], wanted).items()}
    monkeypatch.setattr(pair, "generate", None)
    assert pair.output_shapes(example, wanted) == made


def test_prompts_only(pair):
    with pytest.raises(ValueError, match="the prompt is empty"):
        pair.transform("  ")
    with pytest.raises(UserError, match="takes prompts"):
        pair.transform(np.zeros((3, 4)))


def test_the_content_of_folders_counts(folder):
    config = {"device_model": str(folder / "small"), "cloud_model": "of/the-hub", "clip": str(folder / "clip")}
    before = DiffusersPair.content(config)
    assert len(before) == 2
    config_file = folder / "small" / "unet" / "config.json"
    text = config_file.read_text()
    config_file.write_text(text + " ")
    assert DiffusersPair.content(config) != before
    config_file.write_text(text)
    assert DiffusersPair.content(config) == before
    assert DiffusersPair.content({"device_model": "of/the-hub"}) is None


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    clip = str(folder / "clip")
    with pytest.raises(ConfigError, match=r"clip=.*cannot be loaded"):
        DiffusersPair(2, clip=str(tmp_path), pairs=PAIRS)
    pair = DiffusersPair(2, str(tmp_path), str(tmp_path), clip, pairs=PAIRS)
    with pytest.raises(ConfigError, match=r"device_model=.*cannot be loaded"):
        pair.generate("device", ["a"], [0])
    with pytest.raises(ConfigError, match="choose dataset=prompts"):
        DiffusersPair(2, clip=clip)
    with pytest.raises(ConfigError, match="knows the metrics of dataset=scenes"):
        ScenePair(3)


def test_pictures_that_are_not_finite_are_refused():
    pictures = np.zeros((2, 4, 4, 3), np.float32)
    pictures[1, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="the cloud's picture of 'b' has pixels that are not finite"):
        checked_pictures(pictures, "cloud", ["a", "b"])
    assert checked_pictures(np.full((1, 2, 2, 3), 0.5), "cloud", ["a"]).tolist() == [[[[128] * 3] * 2] * 2]
