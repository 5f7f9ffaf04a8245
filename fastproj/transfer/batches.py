"""Images and targets to train on: which, in which order and how drawn depends on the seed alone.

Order, flip and side of sample i in epoch e are functions of (seed, e, i): 1 rank and 2, any number
of workers and a resumed run give the same ones.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastproj.core.errors import InputError
from fastproj.loaders.order import Order
from fastproj.loaders.reference import PATIENCE

T = TypeVar("T")
Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]  # uint8 (3, h, w), and what of it is trained on


def read_pixels(file: Path) -> tv_tensors.Image:
    """An image file's pixels, uint8 (3, h, w); ``InputError`` for a file that is no image."""
    try:
        with Image.open(file) as opened:
            return tv_tensors.Image(v2.functional.pil_to_tensor(opened.convert("RGB")))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} is no image that Pillow reads ({error}): copy it again") from None


class _Samples(Dataset[Sample | InputError]):
    def __init__(
        self,
        images: Sequence[Any],
        read: Callable[[Any], Sample],
        seed: int,
        transform: v2.Transform | None,
    ) -> None:
        self.images, self.read, self.seed, self.transform = images, read, seed, transform

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        epoch, index = key
        try:
            sample = self.read(self.images[index])
        except InputError as error:  # raised by whoever asked: a worker would add its traceback
            return error
        if self.transform is None:
            return sample
        with torch.random.fork_rng(devices=[]):
            address = np.random.SeedSequence([self.seed, epoch, index])
            torch.manual_seed(int(address.generate_state(1)[0]))
            image, target = self.transform(*sample)
        return image.as_subclass(Tensor), {n: t.as_subclass(Tensor) for n, t in target.items()}


def batches(
    images: Sequence[T],
    order: Order,
    epoch: int,
    first: int = 0,
    *,
    read: Callable[[T], Sample],
    transform: v2.Transform | None = None,
    workers: int = 0,
) -> Iterator[list[Sample]]:
    """This rank's batches of ``epoch`` from its step ``first`` on, read by ``workers`` processes.

    ``transform``: of what ``read`` returns of an image. Raises ``InputError`` for an image that
    cannot be read, and where a worker was killed.
    """
    loader = DataLoader(
        _Samples(images, read, order.seed, transform),
        batch_sampler=[
            [(epoch, int(index)) for index in order.batch(epoch, step)]
            for step in range(first, order.steps)
        ],
        num_workers=workers,
        collate_fn=list,
        timeout=PATIENCE if workers else 0,
        generator=torch.Generator(),  # torch's global one would be drawn from
    )
    try:
        for batch in loader:
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # what a worker raised, not its end
            raise
        raise InputError(
            f"a worker process gave no batch ({str(error).partition(chr(10))[0]}): it was killed, "
            "or shared memory is full: make /dev/shm larger, or give fewer --data.workers"
        ) from error
