"""What a detector is trained on: the same images, drawn alike, on any number of ranks."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastproj.core.errors import InputError
from fastproj.loaders.order import Order
from fastproj.transfer.batches import batches
from fastproj.transfer.objects import augmentation, read, require_outlines, trainable
from fastproj.transfer.sets import Annotated, open_set
from tests.support.detection import images, write_coco, write_voc

MADE = images(3, 10, empty=(4,))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> list[Annotated]:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train2017", MADE, crowd=(0, 3))
    return list(open_set("coco", root, ["train2017"], False).images)


def drawn(opened: list[Annotated], world: int, rank: int, **more) -> list:
    order = Order(len(opened), 4 // world, 7, rank=rank, world_size=world)
    how = {"read": partial(read, masks=True), "transform": augmentation([32, 48], 60, 0.5)}
    return list(batches(opened, order, 2, **how, **more))


def same(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][n], b[1][n]) for n in b[1])


def test_two_ranks_see_what_one_sees_and_workers_change_nothing(opened) -> None:
    kept = trainable(opened)
    assert len(kept) == 8  # of ten: one is empty, and the only object of another is a crowd
    alone = drawn(kept, 1, 0)
    first, second = drawn(kept, 2, 0), drawn(kept, 2, 1, workers=2)
    assert [len(batch) for batch in alone] == [4, 4]
    for whole, half, other in zip(alone, first, second, strict=True):
        assert all(same(a, b) for a, b in zip(whole, [*half, *other], strict=True))
    assert all(same(a, b) for a, b in zip(alone[1], drawn(kept, 1, 0, first=1)[0], strict=True))
    sides = {min(image.shape[1:]) for batch in alone for image, _ in batch}
    assert len(sides) > 1 and sides <= {32, 48, *range(32, 61)}


def test_boxes_and_outlines_move_with_the_pixels(opened) -> None:
    """A mask's own corners are its box's, after a mirror image and a change of size."""
    for batch in drawn(trainable(opened), 1, 0):
        for image, target in batch:
            assert image.dtype == torch.uint8
            assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.allclose(box, torch.stack(corners), atol=2)


def test_vocs_difficult_objects_are_trained_on(tmp_path: Path) -> None:
    write_voc(tmp_path, "2007", "trainval", MADE[:2], difficult=(0,))
    opened = open_set("voc", tmp_path, ["2007_trainval"], False).images
    assert len(trainable(opened)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_used_is_one_line(tmp_path: Path, workers: int) -> None:
    write_coco(tmp_path, "train2017", MADE)
    opened = trainable(open_set("coco", tmp_path, ["train2017"], False).images)
    opened[2].file.write_bytes(b"no image")
    with pytest.raises(InputError, match="is no image that Pillow reads") as refused:
        drawn(opened, 1, 0, workers=workers)
    assert "\n" not in str(refused.value)
    Image.new("RGB", (5, 5)).save(opened[2].file)
    with pytest.raises(InputError, match="has 5x5 pixels, its annotation says"):
        drawn(opened, 1, 0, workers=workers)


def test_an_object_without_an_outline_is_named_where_masks_are_asked_for(opened) -> None:
    image = trainable(opened)[0]
    without = Annotated(
        image.file, image.size, image.boxes, image.labels, image.ignored, image.areas
    )
    read(without, False)
    with pytest.raises(InputError, match="object 1 has no outline"):
        read(without, True)
    with pytest.raises(InputError, match="1 objects of it have no outline"):
        require_outlines("it", [image, without])


def test_a_crowd_needs_an_outline_only_where_it_is_scored(opened) -> None:
    outlines = [list(image.outlines) for image in opened]
    outlines[-1][0] = None  # of the first image that was drawn, a crowd
    some = [replace(i, outlines=tuple(o)) for i, o in zip(opened, outlines, strict=True)]
    require_outlines("it", some, crowds=False)
    with pytest.raises(InputError, match="1 objects of it have no outline"):
        require_outlines("it", some)
