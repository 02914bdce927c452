"""Augmentation as a pure function of (seed, epoch, index).

A run that was killed and resumed, or that uses another number of loader workers, sees the same
pixels to the bit: no random state is carried from one image to the next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from harness.data.images import ImageDataset

#: A sample is asked for by its index, or by (index, copy) where it is repeated within an epoch.
Index = int | tuple[int, int]


class PixelTransform:
    """Fit to the size, and for training crop and flip at random; then normalise.

    It works on whole batches of uint8 pixels, so that it costs less than a small model's step.

    Args:
        image_size: `(height, width)` of the result.
        padding: pixels of black around an image before the random crop; 0 for no crop.
        flip: probability of a left-right flip.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        padding: int = 0,
        flip: float = 0.0,
    ) -> None:
        self.image_size = tuple(image_size)
        self.padding, self.flip = padding, flip
        self.fit = transforms.Compose(
            [
                transforms.Resize(max(image_size), str_to_interp_mode(interpolation)),
                transforms.CenterCrop(image_size),
            ]
        )
        # (pixel / 255 - mean) / std as one multiplication and one addition
        std = torch.tensor(std).view(3, 1, 1)
        self.scale = 1 / (255 * std)
        self.shift = -torch.tensor(mean).view(3, 1, 1) / std

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Random decisions for `count` images: int64 `(count, 3)` of top, left, flipped."""
        corner = generator.integers(0, 2 * self.padding + 1, (count, 2))
        flipped = generator.random((count, 1)) < self.flip
        return np.concatenate([corner, flipped], axis=1)

    def apply(self, pixels: np.ndarray, decisions: np.ndarray | None = None) -> Tensor:
        """uint8 `(B, H, W, 3)`, decisions `(B, 3)` or none: float32 `(B, 3, H, W)`."""
        if decisions is not None and (self.padding or self.flip):
            pixels = self._crop_and_flip(pixels, decisions)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32)
        return images.mul_(self.scale).add_(self.shift).contiguous()

    def _crop_and_flip(self, pixels: np.ndarray, decisions: np.ndarray) -> np.ndarray:
        (height, width), edge = self.image_size, (self.padding, self.padding)
        padded = np.pad(pixels, ((0, 0), edge, edge, (0, 0)))
        top, left, flipped = decisions.T[:, :, None]
        rows = top + np.arange(height)
        columns = left + np.where(flipped, np.arange(width)[::-1], np.arange(width))
        images = np.arange(len(pixels))[:, None, None]
        return padded[images, rows[:, :, None], columns[:, None, :]]

    def to_pixels(self, image: Image.Image) -> np.ndarray:
        """A PIL image as uint8 `(H, W, 3)`: the shorter side resized, the centre cropped."""
        return np.array(self.fit(image))

    def __call__(self, image: Image.Image) -> Tensor:
        """One image `(3, H, W)`, with decisions drawn from torch's global random state."""
        seed = torch.randint(2**62, ()).item() if self.padding or self.flip else 0
        decisions = self.draw(np.random.default_rng(seed), 1)
        return self.apply(self.to_pixels(image)[None], decisions)[0]

    def __repr__(self) -> str:
        random = f", padding {self.padding}, flip {self.flip}" if self.padding or self.flip else ""
        return f"PixelTransform({self.image_size}{random})"


class AugmentedDataset(Dataset):
    """A data set under a training transform: `dataset[index] -> (Tensor (3, H, W), label)`.

    The transform's randomness is a pure function of (seed, epoch, index), so the order of access,
    the number of workers and earlier epochs change nothing. Call `set_epoch(epoch)` before each
    epoch's loader is iterated; workers that persist see it too. Repeated augmentation asks for
    `(index, copy)` pairs: every copy has its own randomness. The global random states of Python,
    NumPy and torch are left as they were.
    """

    def __init__(
        self, dataset: ImageDataset, transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        # shared memory: `set_epoch` must reach loader workers that outlive an epoch
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._plans: dict[tuple[int, int], np.ndarray] = {}
        if isinstance(transform, PixelTransform):
            _ = dataset.pixels  # decoded before workers are forked, so that they share it

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose randomness the next samples get."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Index) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> list[tuple[Tensor, int]]:
        """A batch at once: torch's loader calls this where it exists."""
        pairs = [index if isinstance(index, tuple) else (int(index), 0) for index in indices]
        if isinstance(self.transform, PixelTransform):
            images = self._from_pixels(self.transform, pairs)
        else:
            images = [self._seeded(index, copy) for index, copy in pairs]
        labels = self.dataset.labels
        return [
            (image, int(labels[index])) for image, (index, _) in zip(images, pairs, strict=True)
        ]

    def _from_pixels(self, transform: PixelTransform, pairs: list[tuple[int, int]]) -> Tensor:
        decisions = np.stack([self._plan(transform, copy)[index] for index, copy in pairs])
        pixels = self.dataset.pixels
        if pixels is not None and pixels.shape[1:3] == transform.image_size:
            chosen = pixels[[index for index, _ in pairs]]
        else:
            chosen = np.stack([transform.to_pixels(self.dataset[index][0]) for index, _ in pairs])
        return transform.apply(chosen, decisions)

    def _plan(self, transform: PixelTransform, copy: int) -> np.ndarray:
        """The decisions for every image of this epoch, drawn once: `(N, 3)`."""
        key = (self.epoch, copy)
        if key not in self._plans:
            if any(epoch != self.epoch for epoch, _ in self._plans):
                self._plans.clear()
            generator = np.random.default_rng([self.seed, self.epoch, copy])
            self._plans[key] = transform.draw(generator, len(self))
        return self._plans[key]

    def _seeded(self, index: int, copy: int) -> Tensor:
        """One image through a transform that draws from the global random states."""
        image = self.dataset[index][0]
        words = np.random.SeedSequence([self.seed, self.epoch, index, copy]).generate_state(3)
        # timm's transforms use all three generators
        python_state = random.getstate()
        numpy_state = np.random.get_state()  # noqa: NPY002
        torch_state = torch.get_rng_state()
        try:
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))  # noqa: NPY002
            torch.default_generator.manual_seed(int(words[2]))
            return self.transform(image)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            torch.set_rng_state(torch_state)
