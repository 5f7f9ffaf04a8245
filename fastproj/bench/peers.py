"""Other people's pipelines, used as their own documentation does.

Each reads two random resized crops an image. A call goes once through the images it is given.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as tv

from fastproj.bench.images import drain
from fastproj.manifest import Beton
from fastproj.views import View

Call = Callable[[], object]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
TAPS = 13  # of a Gaussian blur: torchvision and kornia want a size; ours reaches as far


def ffcv(beton: Beton, size: int, batch: int, workers: int) -> Call:
    """FFCV's loader and crop: it has no second view, so it goes through the set once a view."""
    batches = ffcv_loader(beton, size, batch, workers)
    return lambda: drain(chain(batches, batches))


def ffcv_loader(beton: Beton, size: int, batch: int, workers: int) -> Iterable[object]:
    """FFCV as its examples use it, without the copy that owning a batch would take."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    fields = {"image": [RandomResizedCropRGBImageDecoder((size, size))]}
    unread = {name: None for name in ("index", "width", "height")}
    square = beton.manifest.store == "square"
    return Loader(
        str(beton.path),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        indices=np.arange(len(beton)) % len(np.unique(beton.pointer)),  # of the file's samples
        pipelines=fields | (unread if square else {"index": None}),
    )


def dali_files(files: Sequence[str], size: int, batch: int, workers: int) -> Call:
    """DALI reading files: each decoded once, both crops cut from it."""
    from nvidia.dali import fn, pipeline_def

    gpu = torch.cuda.is_available()

    @pipeline_def
    def two_crops() -> tuple[Any, Any]:
        encoded, _ = fn.readers.file(files=list(files), random_shuffle=True, name="files")
        images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu")
        first, second = (fn.random_resized_crop(images, size=size) for _ in range(2))
        return first, second

    def call() -> None:
        pipeline = two_crops(
            batch_size=batch, num_threads=workers, device_id=0 if gpu else None, seed=0
        )
        for _ in range(-(-len(files) // batch)):
            pipeline.run()

    return call


def spdl_files(files: Sequence[str], size: int, batch: int, workers: int) -> Call:
    """SPDL reading files: decoded by FFmpeg once a view, which crops and scales in its filters."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    try:
        spdl.io.demux_image(files[0])
    except RuntimeError as error:  # its wheel brings no FFmpeg
        raise ImportError("SPDL finds no shared libraries of FFmpeg") from error
    box = tv.RandomResizedCrop(size).get_params
    scale, ratio = [0.08, 1.0], [3 / 4, 4 / 3]

    def two_crops(file: str) -> list[Any]:
        packets = spdl.io.demux_image(file)
        height, width = packets.height, packets.width
        image = torch.empty(0, height, width)  # for its shape alone
        frames = []
        for source in (packets.clone(), packets):
            top, left, h, w = box(image, scale, ratio)
            frames.append(
                spdl.io.decode_packets(
                    source,
                    filter_desc=f"crop={w}:{h}:{left}:{top},scale={size}:{size},format=rgb24",
                )
            )
        return frames

    def batched(images: list[list[Any]]) -> list[Any]:
        return [spdl.io.convert_frames(list(view)) for view in zip(*images, strict=True)]

    def call() -> None:
        pipeline: Any = (
            PipelineBuilder()
            .add_source(np.random.default_rng(0).permutation(files).tolist())
            .pipe(two_crops, concurrency=workers)
            .aggregate(batch)
            .pipe(batched)
            .add_sink(2)
            .build(num_threads=workers)
        )
        with pipeline.auto_stop():
            drain(pipeline.get_iterator())

    return call


def data_loader(
    beton: Beton, transform: Callable[[Any], Any], decode: Callable[[np.ndarray], Any],
    batch: int, workers: int,
) -> Call:  # fmt: skip
    """torch's DataLoader: ``transform(decode(stored bytes))`` gives one view, worker processes two.

    Workers stay alive from one call to the next.
    """
    loader = DataLoader(
        _TwoViews(beton, transform, decode),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    return lambda: drain(loader)


class _TwoViews(Dataset[tuple[Tensor, Tensor]]):
    def __init__(
        self,
        beton: Beton,
        transform: Callable[[Any], Tensor],
        decode: Callable[[np.ndarray], Any],
    ) -> None:
        self.beton, self.transform, self.decode = beton, transform, decode

    def __len__(self) -> int:
        return len(self.beton)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        image = self.decode(np.array(self.beton.stored(position)))
        return self.transform(image), self.transform(image)


def pillow(stored: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(stored.tobytes())).convert("RGB")


def torchvision_decode(stored: np.ndarray) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.from_numpy(stored), mode=ImageReadMode.RGB)


def torchvision_views(view: View, size: int | None = None) -> tv.Compose:
    """torchvision's v2 transforms of an image, uint8 (3, H, W) or Pillow's, to float32 (3, h, w).

    A random resized crop to ``size`` comes first where one is given.
    """
    jitter = tv.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    crop = [tv.RandomResizedCrop(size, antialias=True)] if size else []
    return tv.Compose(
        [
            *crop,
            tv.ToImage(),
            tv.ToDtype(torch.float32, scale=True),
            tv.RandomHorizontalFlip(view.flip),
            tv.RandomApply([jitter], view.jitter),
            tv.RandomGrayscale(view.gray),
            tv.RandomApply([tv.GaussianBlur(TAPS, view.sigma)], view.blur),
            tv.Normalize(MEAN, STD),
        ]
    )


def pillow_views(view: View, size: int) -> tv.Compose:
    """The same on Pillow's images, of which only the blurred and normalised ones are tensors."""
    jitter = tv.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return tv.Compose(
        [
            tv.RandomResizedCrop(size),
            tv.RandomHorizontalFlip(view.flip),
            tv.RandomApply([jitter], view.jitter),
            tv.RandomGrayscale(view.gray),
            tv.RandomApply([tv.GaussianBlur(TAPS, view.sigma)], view.blur),
            tv.ToImage(),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize(MEAN, STD),
        ]
    )


def lightly_views(size: int) -> Any:
    """lightly's SimCLR transform of one view with its own defaults, which are ``simclr``'s."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    return SimCLRViewTransform(input_size=size)


def kornia_views(view: View) -> Any:
    """kornia's transforms of a float batch (N, 3, h, w)."""
    import kornia.augmentation as kornia

    return kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=view.flip),
        kornia.ColorJitter(
            view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter
        ),
        kornia.RandomGrayscale(p=view.gray),
        kornia.RandomGaussianBlur((TAPS, TAPS), view.sigma, p=view.blur),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    )
