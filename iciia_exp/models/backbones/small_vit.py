"""Small ViT: a vision transformer for small images, trained here, that gives its tokens."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iciia_exp.errors import ConfigError, check_float, check_int
from iciia_exp.models.backbones.small_images import SmallImageBackbone
from iciia_exp.models.gather import TOKEN_ARRAYS, Gather, token_arrays

__all__ = ["SmallViT"]


class SmallViT(SmallImageBackbone):
    """timm's vision transformer with a class token; the feature is the class token after the final norm.

    It gives ``tokens`` [B, n, d], ``levels`` and ``block_input`` (`iciia_exp.models.gather.token_arrays`).

    Args:
        num_classes: K.
        channels: of the input image, 1 (grey) or 3 (RGB).
        size: height and width of the input in pixels; divisible by ``patch``.
        patch: height and width of a patch in pixels.
        dim: d and D; divisible by ``heads``.
        depth: N, number of blocks.
        heads: of a block.
        drop_path: largest share of images for which a block is left out, in training.
        mean, std: the input is (image - mean) / std.
        gather_first, gather_last, gather_grid: levels of the tokens, and side of their grid (`Gather`).
    """

    config_name = "small_vit"
    trunk_prefix = "net."
    gives = SmallImageBackbone.gives | TOKEN_ARRAYS

    def __init__(
        self,
        num_classes: int,
        channels: int = 1,
        size: int = 8,
        patch: int = 2,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        drop_path: float = 0.0,
        mean: float = 0.3,
        std: float = 0.5,
        gather_first: int = 0,
        gather_last: int | None = None,
        gather_grid: int | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.size = check_int("channels", channels, 1, 3), check_int("size", size, 4, 1024)
        self.dim = check_int("dim", dim, 1, 4096)
        for key, value, whole in (("patch", patch, size), ("heads", heads, dim)):
            if whole % check_int(key, value, 1):
                raise ConfigError(key, value, f"must divide {whole}")
        self.mean, self.std = check_float("mean", mean, -1e3, 1e3), check_float("std", std, 0.0, 1e3, open_low=True)
        self.gather = Gather(gather_first, gather_last, gather_grid, depth, (size // patch) ** 2)
        self.net = VisionTransformer(
            img_size=size,
            patch_size=patch,
            in_chans=channels,
            num_classes=0,
            embed_dim=dim,
            depth=check_int("depth", depth, 1, 100),
            num_heads=heads,
            drop_path_rate=check_float("drop_path", drop_path, 0.0, 0.9),
        )
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the class token after the final norm, [B, D]."""
        return self.net(images)

    def trunk_outputs(self, images: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Return ``features`` [B, D] and, if wanted, arrays of tokens (`token_arrays`)."""
        if not wanted & TOKEN_ARRAYS:
            return super().trunk_outputs(images, wanted)
        return token_arrays(self.net, images, self.gather, wanted)
