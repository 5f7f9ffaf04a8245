"""Other libraries' pipelines, used as in their own documentation.

Each reads two random resized crops per image. One call goes through all given images once.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as tv

from fastproj.augment.draw import View
from fastproj.bench.images import drain
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton

Call = Callable[[], object]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
TAPS = 13  # of a Gaussian blur, for torchvision and kornia; ours has as many


def ffcv(beton: Beton, size: int, batch: int, workers: int) -> Call:
    """FFCV's loader and crop. Both views are of one epoch; it decodes once per view."""
    batches = ffcv_loader(beton, size, batch, workers, views=2)
    return lambda: drain(batches)


def ffcv_loader(
    beton: Beton, size: int, batch: int, workers: int, views: int = 1
) -> Iterable[object]:
    """FFCV as its users do; its batches are not copied, so the next one overwrites them."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    try:
        path = str(beton.only_file)
    except InputError as error:  # a set of several files
        raise ImportError(str(error)) from None
    fields: dict[str, Any] = {"image": [RandomResizedCropRGBImageDecoder((size, size))]}
    for number in range(1, views):
        decoder = RandomResizedCropRGBImageDecoder((size, size))
        fields[f"image_{number}"] = PipelineSpec("image", decoder, [])
    unread = {name: None for name in ("index", "width", "height")}
    square = beton.manifest.store == "square"
    return Loader(
        path,
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        indices=np.arange(len(beton)) % len(np.unique(beton.pointer)),  # of the file's samples
        pipelines=fields | (unread if square else {"index": None}),
    )


def dali_files(files: Sequence[str], size: int, batch: int, workers: int) -> Call:
    """DALI reading files: it decodes each file once and takes both crops from it."""
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
    """SPDL reading files: FFmpeg decodes once per view, then crops and scales with its filters."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    try:
        spdl.io.demux_image(files[0])
    except RuntimeError as error:  # its wheel does not include FFmpeg
        raise ImportError("SPDL does not find FFmpeg's shared libraries") from error
    box = tv.RandomResizedCrop(size).get_params
    scale, ratio = [0.08, 1.0], [3 / 4, 4 / 3]

    def two_crops(file: str) -> list[Any]:
        packets = spdl.io.demux_image(file)
        height, width = packets.height, packets.width
        image = torch.empty(0, height, width)  # only its shape is used
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
    """torch's DataLoader with worker processes: per image one ``decode`` and two ``transform``.

    Workers stay alive between calls.
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
    """torchvision's v2 transforms: uint8 (3, H, W) or a Pillow image to float32 (3, h, w).

    If ``size`` is given, a random resized crop comes first.
    """
    jitter = tv.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    crop = [tv.RandomResizedCrop(size, antialias=True)] if size else []
    return tv.Compose(
        [
            *crop,
            tv.ToImage(),
            tv.RandomHorizontalFlip(view.flip_prob),
            tv.RandomApply([jitter], view.jitter_prob),
            tv.RandomGrayscale(view.gray_prob),
            tv.RandomApply([tv.GaussianBlur(TAPS, view.sigma)], view.blur_prob),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize(MEAN, STD),
        ]
    )


def pillow_views(view: View, size: int) -> tv.Compose:
    """The same on Pillow images; only the blur and the normalization use tensors."""
    jitter = tv.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return tv.Compose(
        [
            tv.RandomResizedCrop(size),
            tv.RandomHorizontalFlip(view.flip_prob),
            tv.RandomApply([jitter], view.jitter_prob),
            tv.RandomGrayscale(view.gray_prob),
            tv.RandomApply([tv.GaussianBlur(TAPS, view.sigma)], view.blur_prob),
            tv.ToImage(),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize(MEAN, STD),
        ]
    )


def lightly_views(size: int) -> Any:
    """lightly's SimCLR transform of one view; its defaults equal our preset ``simclr``."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    return SimCLRViewTransform(input_size=size)


def kornia_views(view: View) -> Any:
    """kornia's transforms for a float batch (N, 3, h, w)."""
    import kornia.augmentation as kornia

    return kornia.AugmentationSequential(
        kornia.RandomHorizontalFlip(p=view.flip_prob),
        kornia.ColorJitter(
            view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter_prob
        ),
        kornia.RandomGrayscale(p=view.gray_prob),
        kornia.RandomGaussianBlur((TAPS, TAPS), view.sigma, p=view.blur_prob),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    )
