"""Networks for scenes: text encoders, text-conditioned diffusion models, and an image-text model that scores pictures.

All are small enough to be trained on a processor (`iciia_exp.models.backbones.scene_pair`).

Legend: B pictures, n tokens of a caption, d width of a token.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iciia_exp.data.scenes import PAIRS, PIXELS, TRUTHS, WORDS, altered
from iciia_exp.errors import UserError

__all__ = ["MAX_TOKENS", "SceneDiffusion", "SceneScorer", "SceneText", "make_scheduler", "tokenize", "wear"]

#: Tokens of a caption; longer ones are cut.
MAX_TOKENS = 24

#: Height and width of the squares of pixels that the UNet reads as one.
_FOLD = 2
#: Further weight of the pixels of objects in the loss.
_OBJECTS = 3.0

_VOCABULARY = (
    "",
    "?",
    *WORDS,
    *sorted({word for pair in PAIRS.values() for t in pair for word in t.split()} - {*WORDS}),
)
_NUMBERS = {word: number for number, word in enumerate(_VOCABULARY)}


def tokenize(captions: Sequence[str]) -> Tensor:
    """Return the numbers of the words, int64 [B, MAX_TOKENS]; 0 is padding, 1 an unknown word."""
    rows = [[_NUMBERS.get(word, 1) for word in caption.lower().split()][:MAX_TOKENS] for caption in captions]
    return torch.tensor([row + [0] * (MAX_TOKENS - len(row)) for row in rows])


class SceneText(nn.Module):
    """Text encoder: embeddings of words, and a transformer layer over them unless it is a bag of words.

    Args:
        width: d.
        ordered: with places and a transformer layer.
    """

    def __init__(self, width: int, ordered: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(len(_VOCABULARY), width, padding_idx=0)
        self.layer: nn.Module | None = None
        if ordered:
            self.places = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, width))
            self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids_Bn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens, 0 where padded, and their mean: [B, n, d] and [B, d]."""
        real_Bn1 = (ids_Bn != 0).unsqueeze(-1)
        x_Bnd = self.words(ids_Bn)
        if self.layer is not None:
            some_Bn = ids_Bn != 0
            some_Bn[:, 0] = True  # an empty caption attends to its first padding
            x_Bnd = self.layer(x_Bnd + self.places, src_key_padding_mask=~some_Bn)
        x_Bnd = self.norm(x_Bnd) * real_Bn1
        return x_Bnd, x_Bnd.sum(1) / real_Bn1.sum(1).clamp(min=1)


class SceneDiffusion(nn.Module):
    """A text encoder and a UNet that predicts the velocity of noise.

    A bag of words is one token, their mean.

    Args:
        channels: of the UNet at 16, 8 and 4 squares of 2 pixels; cross-attention is at 8 and 4, where it is cheap.
        width: d of the text.
        ordered: whether the text encoder reads the words in order.
    """

    def __init__(self, channels: Sequence[int], width: int = 64, ordered: bool = True) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        except ImportError as error:
            raise UserError("diffusers is not installed; pip install 'iciia_exp[route]'") from error
        self.ordered = ordered
        self.text = SceneText(width, ordered)
        self.unet = UNet2DConditionModel(
            sample_size=PIXELS // _FOLD,
            in_channels=3 * _FOLD**2 + 2,
            out_channels=3 * _FOLD**2,
            block_out_channels=tuple(channels),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=8,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=width,
        )
        side = torch.linspace(-1, 1, PIXELS // _FOLD)
        #: Row and column of every square, which convolutions alone would not know.
        self.place: Tensor
        self.register_buffer("place", torch.stack(torch.meshgrid(side, side, indexing="ij")), persistent=False)

    def encode(self, ids_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the tokens, their mean, and which tokens are real (None of a bag of words: it is one token)."""
        tokens_Bnd, mean_Bd = self.text(ids_Bn)
        if not self.ordered:
            return mean_Bd.unsqueeze(1), mean_Bd, None
        real_Bn = ids_Bn != 0
        real_Bn[:, 0] = True
        return tokens_Bnd, mean_Bd, real_Bn

    def velocity(self, noisy: Tensor, step_B: Tensor, text: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """Return the predicted velocity, [B, 3, PIXELS, PIXELS]."""
        tokens, mean, real = text
        folded = torch.cat([F.pixel_unshuffle(noisy, _FOLD), self.place.expand(len(noisy), -1, -1, -1)], 1)
        found = self.unet(folded, step_B, tokens, class_labels=mean, encoder_attention_mask=real).sample
        return F.pixel_shuffle(found, _FOLD)

    def loss(self, pictures: Tensor, ids_Bn: Tensor, scheduler: Any, unconditional: float = 0.1) -> Tensor:
        """Return the mean squared error of the velocity at random steps; pixels at and around objects count more.

        Args:
            pictures: from -1 to 1, [B, 3, PIXELS, PIXELS].
            ids_Bn: captions; a share ``unconditional`` of them is left out, for guidance.
            scheduler: of diffusers.
        """
        count = len(pictures)
        step_B = torch.randint(scheduler.config.num_train_timesteps, (count,), device=pictures.device)
        noise = torch.randn_like(pictures)
        keep_B1 = torch.rand(count, 1, device=pictures.device) >= unconditional
        noisy, wanted = (f(pictures, noise, step_B) for f in (scheduler.add_noise, scheduler.get_velocity))
        error = (self.velocity(noisy, step_B, self.encode(ids_Bn * keep_B1)) - wanted).square()
        bright = F.max_pool2d(pictures.amax(1, keepdim=True) + 1, 5, 1, 2).clamp(max=1)
        weight = 1 + _OBJECTS * bright  # most of a picture is black, and soon learned
        return (weight * error).sum() / (weight.sum() * error.shape[1])

    @torch.no_grad()
    def sample(self, ids_Bn: Tensor, seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
        """Return pictures from -1 to 1 by DDIM, [B, 3, PIXELS, PIXELS]; each depends on its caption and seed alone."""
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.stack([torch.randn(3, PIXELS, PIXELS, generator=rng) for rng in rngs]).to(ids_Bn.device)
        text = self.encode(ids_Bn if guidance == 1 else torch.cat([torch.zeros_like(ids_Bn), ids_Bn]))
        for step in scheduler.timesteps:
            found = self.velocity(x if guidance == 1 else torch.cat([x, x]), step.to(x.device), text)
            if guidance != 1:
                without, found = found.chunk(2)
                found = without + guidance * (found - without)
            x = scheduler.step(found, step, x).prev_sample
        return x.clamp(-1, 1)


def make_scheduler() -> Any:
    """Return diffusers' DDIM of velocities; its last step is of pure noise, so that training and sampling agree."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=True,
    )


class SceneScorer(nn.Module):
    """A contrastive image-text model: two towers and a scale.

    Args:
        width: d, of both towers.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.text = SceneText(width)
        channels, layers = (3, 32, 64, 96), []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU(), nn.MaxPool2d(2)]
        side = PIXELS // 8
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, 256), nn.GELU())
        self.to_picture, self.to_text = nn.Linear(256, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return the unit vectors of pictures from -1 to 1, [B, d]."""
        return F.normalize(self.to_picture(self.image(pictures)), dim=-1)

    def texts(self, ids_Bn: Tensor) -> Tensor:
        """Return the unit vectors of texts, [B, d]."""
        return F.normalize(self.to_text(self.text(ids_Bn)[1]), dim=-1)

    def clearness(self, pictures_Bd: Tensor) -> Tensor:
        """Return how much closer pictures are to the good text of each of `PAIRS` than to the bad one, [B, 1]."""
        ids = tokenize([text for pair in PAIRS.values() for text in pair]).to(pictures_Bd.device)
        good_md, bad_md = self.texts(ids).unflatten(0, (-1, 2)).unbind(1)
        return self._scale() * pictures_Bd @ (good_md - bad_md).T

    def quality(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the metrics, from 0 to 1, [B, K].

        Those of `TRUTHS` are softmaxes over a caption and those that are wrong in one object (or pair of neighbours),
        averaged over the objects; the others are softmaxes over the good and the bad text of a pair.
        """
        vectors_Bd = self.pictures(pictures)
        wrong = [[altered(caption, kind) for kind in TRUTHS] for caption in captions]
        texts = [
            [caption, *(text for kind in kinds for group in kind for text in group)]
            for caption, kinds in zip(captions, wrong, strict=True)
        ]
        counts = torch.tensor([len(some) for some in texts], device=pictures.device)
        texts_Td = self.texts(tokenize([text for some in texts for text in some]).to(pictures.device))
        logits_T = self._scale() * (texts_Td * vectors_Bd.repeat_interleave(counts, 0)).sum(1)
        found = []
        for kinds, own_and_wrong in zip(wrong, logits_T.split(counts.tolist()), strict=True):
            own, rest = own_and_wrong[:1], own_and_wrong[1:]
            groups = iter(rest.split([len(group) for kind in kinds for group in kind]))
            shares = [[torch.cat([own, next(groups)]).softmax(0)[0] for _ in kind] for kind in kinds]
            found.append(torch.stack([torch.stack(of_kind).mean() for of_kind in shares]))
        return torch.cat([torch.stack(found), self.clearness(vectors_Bd).sigmoid()], 1)

    def loss(self, pictures: Tensor, ids_Bn: Tensor, wrong_WBn: Tensor) -> Tensor:
        """Return the contrastive loss of pictures and captions, and the log-loss of how clean pictures are.

        The pictures are worn first, so that pictures of a model, which are never as clean, are judged as well.

        Args:
            pictures: from -1 to 1.
            ids_Bn: their captions.
            wrong_WBn: W captions for each that are wrong in some words, which its picture must be told apart from.
        """
        worn, clean_B1 = wear(pictures)
        vectors_Bd, own_Bd = self.pictures(worn), self.texts(ids_Bn)
        number_B = torch.arange(len(pictures), device=pictures.device)
        logits = self._scale() * vectors_Bd @ own_Bd.T
        loss = F.cross_entropy(logits, number_B) + F.cross_entropy(logits.T, number_B)
        wrong_WBd = self.texts(wrong_WBn.flatten(0, 1)).unflatten(0, wrong_WBn.shape[:2])
        rather_BW = self._scale() * ((own_Bd - wrong_WBd) * vectors_Bd).sum(-1).T
        loss = loss + len(TRUTHS) * F.softplus(-rather_BW).mean()  # a term for each kind
        return loss + F.binary_cross_entropy_with_logits(self.clearness(vectors_Bd), clean_B1)

    def _scale(self) -> Tensor:
        return self.scale.exp().clamp(max=100)


def wear(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Blur, darken and add noise to most of the pictures; return them and how clean they are, 0 to 1, [B, 1]."""
    shape = (len(pictures), 1, 1, 1)
    level, blur, dark, noise = (torch.rand(shape, device=pictures.device) for _ in range(4))
    level = level * (torch.rand_like(level) < 0.8)
    blurred = F.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False)
    worn = pictures + level * blur * (blurred - pictures)
    worn = (worn + 1) * (1 - 0.6 * level * dark) - 1
    return (worn + 0.4 * level * noise * torch.randn_like(worn)).clamp(-1, 1), 1 - level.flatten(1)
