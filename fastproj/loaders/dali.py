"""NVIDIA DALI over the same beton: the bytes it decodes are those of the mapped file.

DALI (``nvidia-dali-cuda120``, 1 GB) is looked for only when this engine is asked for. A step hands
it views into the memory map, and ``no_copy`` makes them its input as they are. On a CPU
libjpeg-turbo decodes, on a GPU nvJPEG (the hardware engines where there are some). Each image is
decoded once, and only the smallest box that holds all its views; from that each view is sliced and
resized. What DALI copies: the slices, and on a GPU the stored bytes to the device. The crops are
copied once more, into the batch that the receiver owns.

Pixels: the decoder's equal Pillow's (on a CPU). The resize is DALI's ``INTERP_LINEAR`` with
``antialias``: the same triangle as torchvision's, but where it shrinks a box and the triangle
reaches over the rim, DALI repeats the rim's pixel where torchvision cuts the triangle off.
Difference from the reference engine, measured on a CPU with 96 ImageNet photographs (400 px, JPEG)
to 224 px, their centres, small crops to 96 px, and 160 px squares to 128: 0.17/255 on average
each, at most 1/255 within and 7/255 on the rim; 0.25 and 22 where the tests' pictures shrink to
16 px. On a GPU: not measured.

DALI decodes what is left of a damaged JPEG without an error (a line on stderr is all). So a JPEG's
bytes are compared with the manifest's hash the first time the sample is read, in the caller's
thread: 0.05 ms an image, and the first epoch was as fast as the second.

Speed: on a CPU ``stream`` is the faster one. Two crops to 224 px of ImageNet photographs (at most
400 px, JPEG), 4 cores, batches of 64, in turn with ``stream``: a quarter of its images/s
(docs/performance.md). An image takes 4.4 ms of CPU time (n 7, beside other programs).
Decoding is not what costs (n 6): alone 1.1 ms (libjpeg-turbo by itself 1.0), both slices 0.6,
both resizes 2.9. Decode and slices together (n 9): the box that holds all views 1.54 ms, each view
decoded by itself 1.70, the whole image 1.77. A resize that takes the box as its region and needs no
slice saves 0.6 ms, but lets pixels outside the box in: 64/255 off at worst. A new pipeline every
epoch costs 20 - 40 ms. On a GPU: not measured.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.errors import InputError
from fastproj.loaders.base import Batch, Loader, to_device
from fastproj.loaders.crop import batch_like
from fastproj.manifest import HASH_BYTES, RAW

AHEAD = 2  # batches that DALI works on at a time

# What a step feeds: B images, then for each box of an image an array of B boxes.
Inputs = tuple[list[np.ndarray] | np.ndarray, ...]


class DaliLoader(Loader):
    """``workers`` threads.

    Raises InputError where DALI is missing or the manifest's hashes are damaged.
    """

    def _open(self) -> None:
        _dali()
        self._raw = bool((self.beton.mode == RAW).all())
        try:
            self._hashes = self.beton.manifest.sample_hashes()
        except ValueError as error:
            raise InputError(
                f"{self.beton.path.with_suffix('.json')}: damaged ({error}): write the beton again"
            ) from error
        self._intact = np.full(len(self.beton), self._raw)  # what need not be compared (again)

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        under_way: deque[Inputs] = deque()  # DALI reads this memory: it must outlive the step
        # Nothing but this frame refers to the pipeline. When the generator ends or is closed, it
        # goes, waits for what is under way and joins its threads.
        pipeline = self._pipeline(self._inputs(epoch, steps, under_way))
        for step in steps:
            positions = self.order.batch(epoch, step)
            crops = [
                batch_like(group.views, len(positions), group.size, self.device)
                for group in self.groups
            ]
            if len(positions):  # a rank may stand beyond the end of the set
                self._copy(self._run(pipeline, epoch, step), crops)
                under_way.popleft()
            yield Batch(
                tuple(group.flatten(0, 1) for group in crops),
                to_device(self.beton.label[positions], self.device),
                to_device(self.beton.index[positions], self.device),
            )

    def _inputs(self, epoch: int, steps: range, under_way: deque[Inputs]) -> Iterator[Inputs]:
        """Each step's inputs: the stored images, for JPEGs the box to decode, a box a view.

        Images are views into the mapped file, uint8 (height, width, 3) or (length,); boxes int32
        (B, 4) of top, left, height, width, and where a box is decoded the others lie in that.
        """
        for step in steps:
            positions = self.order.batch(epoch, step)
            if len(positions) == 0:
                return
            boxes = np.concatenate(self._boxes(epoch, positions)).astype(np.int32)
            images = [self._stored(int(position)) for position in positions]
            if not self._raw:
                first = boxes[..., :2].min(0)
                last = (boxes[..., :2] + boxes[..., 2:]).max(0)
                boxes[..., :2] -= first
                boxes = np.concatenate([np.concatenate([first, last - first], -1)[None], boxes])
            inputs = images, *boxes
            under_way.append(inputs)
            yield inputs

    def _stored(self, position: int) -> np.ndarray:
        beton, stored = self.beton, self.beton.stored(position)
        if not self._intact[position]:
            digest = beton.digest(position, stored.data)
            if digest[:HASH_BYTES] != self._hashes[position].tobytes():
                raise InputError(
                    f"{beton.path}: sample {beton.index[position]} is damaged (its bytes are not "
                    f"those of the manifest's hash): run data_prep/write_ffcv.py --verify "
                    f"{beton.path}, then write it again"
                )
            self._intact[position] = True
        if self._raw:
            return stored.reshape(beton.height[position], beton.width[position], 3)
        return stored

    def _pipeline(self, inputs: Iterator[Inputs]) -> Any:
        dali, _ = _dali()
        fn, types = dali.fn, dali.types
        gpu = self.device.type == "cuda"
        sizes = [group.size for group in self.groups for _ in range(group.views)]
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
                    adjust_orientation=False,  # as stored, like the other engines
                    jpeg_fancy_upsampling=True,  # on a GPU too, as libjpeg-turbo does
                    affine=False,  # or the threads of every rank sit on the same cores
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
        """The next step's crops: for each view DALI's TensorList (B, size, size, 3) uint8."""
        try:
            return pipeline.run()
        except StopIteration:  # elsewhere DALI has skipped every second epoch without a word
            raise RuntimeError(f"DALI ended epoch {epoch} before its step {step}") from None
        except RuntimeError as error:
            why = str(error).rpartition("encountered:")[2].partition("Current pipeline")[0]
            raise InputError(
                f"{self.beton.path}: DALI failed at epoch {epoch}, step {step} "
                f"({' '.join(why.split())}): use --data.engine stream"
            ) from error

    def _copy(self, views: Sequence[Any], crops: Sequence[Tensor]) -> None:
        """Each view from DALI's buffer to its place in the batch, on torch's stream."""
        _, feed_ndarray = _dali()
        gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if gpu else None
        places = [view.permute(0, 2, 3, 1) for group in crops for view in group]
        for view, place in zip(views, places, strict=True):
            feed_ndarray(view.as_tensor(), place, cuda_stream=stream)


def _dali() -> tuple[Any, Any]:
    """The module ``nvidia.dali``, and its copy into a torch tensor."""
    try:
        import nvidia.dali as dali
        from nvidia.dali.plugin.pytorch import feed_ndarray
    except ImportError as error:
        raise InputError(
            f"the engine dali needs NVIDIA DALI ({error}): run ./setup.sh dali, "
            "or use --data.engine stream"
        ) from error
    return dali, feed_ndarray
