"""NVIDIA DALI as an engine for the same beton.

DALI (``nvidia-dali-cuda120``, 1 GB) is imported only when this engine is requested. Each step hands
it slices of the memory map, which ``no_copy`` makes its input without a copy. libjpeg-turbo decodes
on a CPU, nvJPEG on a GPU (with its hardware engines if there are any). Only the smallest box that
holds all crops of an image is decoded, once; each crop is then sliced from it and resized. DALI
copies the slices and, on a GPU, the stored bytes to the device. The crops are copied once more,
into the batch that the receiver owns.

Pixels: on a CPU the decoder's equal Pillow's. The resize is DALI's ``INTERP_LINEAR`` with
``antialias``, the same triangle filter as torchvision's. They differ where a box shrinks and the
filter extends past its edge: DALI repeats the edge pixel, torchvision cuts the filter off.
Difference from the reference engine on a CPU, measured on 96 ImageNet photographs (400 px, JPEG)
cropped to 224 px, their centers, small crops to 96 px, and 160 px squares cropped to 128 px:
0.17/255 on average for each, at most 1/255 inside and 7/255 at edges. For the tests' pictures
shrunk to 16 px: 0.25/255 on average, at most 22/255. Not measured on a GPU.

DALI decodes what is left of a damaged JPEG and only prints a line on stderr. Each sample's hash,
which is compared when it is first read, names it.

Speed: on a CPU ``stream`` is four times as fast (images/s, measured in alternation with it: two
crops to 224 px of ImageNet photographs of at most 400 px, JPEG, 4 cores, batches of 64;
docs/performance.md). CPU time per image, other programs running:

    everything                                       4.4 ms (n = 7)
    parts (n = 6): decoding (libjpeg-turbo alone)    1.1 ms (1.0)
                   both slices                       0.6 ms
                   both resizes                      2.9 ms
    decoding and slices together (n = 9):
                   the box that holds both crops     1.54 ms
                   each crop decoded by itself       1.70 ms
                   the whole image                   1.77 ms

``fn.resize`` could take the box as its region and need no slice. That saves 0.6 ms, but pixels
outside the box get in: up to 64/255 off. A new pipeline per epoch costs 20 to 40 ms. Not measured
on a GPU.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.core.errors import InputError
from fastproj.data.layout import RAW
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.crop import batch_like

AHEAD = 2  # batches that DALI works on at a time

# One step's input: B images, then for each box of an image an array of B boxes.
Inputs = tuple[list[np.ndarray] | np.ndarray, ...]


class DaliLoader(Loader):
    """Loads with DALI in ``workers`` threads. Raises InputError if DALI is missing."""

    def _open(self) -> None:
        _dali()
        self._raw = bool((self.beton.mode == RAW).all())
        if not self._raw and (self.beton.mode == RAW).any():
            raise InputError(
                f"{self.beton.path} holds raw images and JPEGs, and DALI reads one kind: take "
                "--data.engine stream"
            )

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        pending: deque[Inputs] = deque()  # DALI reads this memory: it must outlive the step
        # Only this frame refers to the pipeline. When the generator ends or is closed, the pipeline
        # is deleted, which waits for its pending steps and joins its threads.
        pipeline = self._pipeline(self._inputs(epoch, steps, pending))
        for step in steps:
            positions = self.order.batch(epoch, step)
            crops = [
                batch_like(crop.num_views, len(positions), crop.size, self.device)
                for crop in self.crops
            ]
            if len(positions):  # a rank may get nothing of the last, smaller step
                self._copy(self._run(pipeline, epoch, step), crops)
                pending.popleft()
            yield Batch(
                tuple(views.flatten(0, 1) for views in crops),
                to_device(self.beton.label[positions], self.device),
                to_device(self.beton.index[positions], self.device),
            )

    def _inputs(self, epoch: int, steps: range, pending: deque[Inputs]) -> Iterator[Inputs]:
        """Yield each step's inputs: stored images, for JPEGs the box to decode, one box per view.

        Images are slices of the mapped file, uint8 (height, width, 3) or (length,). Boxes are int32
        (B, 4) of top, left, height, width; for JPEGs relative to the decoded box.
        """
        for step in steps:
            positions = self.order.batch(epoch, step)
            if len(positions) == 0:
                return
            self.first_read.check(positions)
            boxes = np.concatenate(self._boxes(epoch, positions)).astype(np.int32)
            images = [self._stored(int(position)) for position in positions]
            if not self._raw:
                first = boxes[..., :2].min(0)
                last = (boxes[..., :2] + boxes[..., 2:]).max(0)
                boxes[..., :2] -= first
                boxes = np.concatenate([np.concatenate([first, last - first], -1)[None], boxes])
            inputs = images, *boxes
            pending.append(inputs)
            yield inputs

    def _stored(self, position: int) -> np.ndarray:
        beton, stored = self.beton, self.beton.stored(position)
        if self._raw:
            return stored.reshape(beton.height[position], beton.width[position], 3)
        return stored

    def _pipeline(self, inputs: Iterator[Inputs]) -> Any:
        dali, _ = _dali()
        fn, types = dali.fn, dali.types
        gpu = self.device.type == "cuda"
        sizes = [crop.size for crop in self.crops for _ in range(crop.num_views)]
        count = len(sizes) + (1 if self._raw else 2)
        number = self.device.index if gpu else None
        if gpu and number is None:
            number = torch.cuda.current_device()
        pipeline = dali.Pipeline(
            self.order.batch_size, self.workers, number, prefetch_queue_depth=AHEAD
        )
        with pipeline:
            image, *boxes = fn.external_source(
                inputs,
                num_outputs=count,
                no_copy=True,
                dtype=[types.UINT8] + [types.INT32] * (count - 1),
                ndim=[3 if self._raw else 1] + [1] * (count - 1),
                layout=["HWC" if self._raw else ""],
            )
            if self._raw:
                image = image.gpu() if gpu else image
            else:
                decoded, *boxes = boxes
                image = fn.decoders.image_slice(
                    image,
                    decoded[:2],
                    decoded[2:],
                    axes=[0, 1],
                    device="mixed" if gpu else "cpu",
                    adjust_orientation=False,  # ignore EXIF, like the other engines
                    jpeg_fancy_upsampling=True,  # on a GPU too, as libjpeg-turbo does
                    affine=False,  # otherwise all ranks' threads are bound to the same cores
                )
            pipeline.set_outputs(
                *[
                    fn.resize(
                        fn.slice(image, box[:2], box[2:], axes=[0, 1]),
                        size=(size, size),
                        interp_type=types.INTERP_LINEAR,
                        antialias=True,
                    )
                    for box, size in zip(boxes, sizes, strict=True)
                ]
            )
        return pipeline

    def _run(self, pipeline: Any, epoch: int, step: int) -> Sequence[Any]:
        """The next step's crops: one TensorList of DALI per view, uint8 (B, size, size, 3)."""
        try:
            return pipeline.run()
        except StopIteration:  # DALI is known to skip every second epoch silently in other set-ups
            raise RuntimeError(f"DALI ended epoch {epoch} before its step {step}") from None
        except RuntimeError as error:
            why = str(error).rpartition("encountered:")[2].partition("Current pipeline")[0]
            raise InputError(
                f"{self.beton.path}: DALI failed at epoch {epoch}, step {step} "
                f"({' '.join(why.split())}): use --data.engine stream"
            ) from error

    def _copy(self, views: Sequence[Any], crops: Sequence[Tensor]) -> None:
        """Copy each view from DALI's buffer to its place in the batch, on torch's stream."""
        _, feed_ndarray = _dali()
        gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if gpu else None
        places = [view.permute(0, 2, 3, 1) for crop in crops for view in crop]
        for view, place in zip(views, places, strict=True):
            feed_ndarray(view.as_tensor(), place, cuda_stream=stream)


def _dali() -> tuple[Any, Any]:
    """The module ``nvidia.dali``, and its function that copies into a torch tensor."""
    try:
        import nvidia.dali as dali
        from nvidia.dali.plugin.pytorch import feed_ndarray
    except ImportError as error:
        raise InputError(
            f"the engine dali needs NVIDIA DALI ({error}): run ./setup.sh dali, "
            "or use --data.engine stream"
        ) from error
    return dali, feed_ndarray
