"""Two ranks share the images: the same features and the same table as one."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fastproj import evaluate as command
from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton, open_beton
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import features
from fastproj.evaluation.load import LoadedEncoder
from fastproj.evaluation.results import read_evaluation
from fastproj.loaders import Center, Loader, open_loader
from fastproj.models.encoders import build_encoder
from fastproj.prepare.encode import Store
from fastproj.runs.folder import RunFolder
from tests.support import betons
from tests.support.corruptions import stand_in
from tests.support.ranks import on_ranks

COUNT, SIDE, CPU = 21, 12, torch.device("cpu")


def evaluated(folder: Path, out: Path, train: str) -> list[Tensor]:
    """Features of two engines' batches, and how many images this rank did; the command last."""
    torch.manual_seed(0)
    encoder, seen = build_encoder("resnet_small", "cifar").eval(), []
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    beton = open_beton(folder / "train.beton")
    loaded = LoadedEncoder(encoder, {"name": "it"}, "ours", lambda: encoder)
    extractor = Extractor(SIDE, CPU, batch_size=4, loader={"workers": 1})
    found = extractor.encode(beton, loaded, ["h"], ((0.3,) * 3, (0.2,) * 3))["h"]
    mine = torch.tensor(sum(seen))
    uneven = features(encoder, _all_on_the_first_rank(beton), mean=(0.3,) * 3, std=(0.2,) * 3)
    with patch.dict(sys.modules, imagecorruptions=stand_in()):
        command.main(
            f"""--data.train {folder}/{train}.beton --data.val {folder}/val.beton --views.size 32
            --eval.encoder torch.nn:Flatten --eval.normalize imagenet --run.device cpu
            --eval.probes logistic,knn,corruptions --eval.corruptions_names fog,snow
            --eval.corruptions_severities 3
            --eval.corruptions_strengths 1e-2 --data.workers 1
            --eval.logistic_strengths 1e-2 --eval.knn_k 3 --eval.out {out}""".split()
        )
    return [found.features, found.labels, uneven.features, uneven.labels, mine]


def _all_on_the_first_rank(beton: Beton) -> Loader:
    return open_loader(
        beton, [Center(SIDE)], COUNT, shuffle=False, drop_last=False, workers=1,
        rank=dist.rank(), world_size=dist.world_size(),
    )  # fmt: skip


def test_two_ranks_give_the_features_and_the_table_of_one(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("val", 1), ("other", 2)):
        source = betons.digit_like(np.random.default_rng(seed), COUNT, SIDE, classes=3)
        betons.write(replace(source, split=split), tmp_path, Store("raw"))
    alone = evaluated(tmp_path, tmp_path / "one", "train")
    for train in ("other", "train"):  # the second time val's features are kept, train's are not
        rank = partial(evaluated, tmp_path, tmp_path / "two", train)
        ranks = on_ranks(2, rank, tmp_path, seconds=200)
    assert [int(rank[4]) for rank in (alone, *ranks)] == [21, 12, 9]
    for rank in ranks:
        for at in (0, 2):
            largest = alone[0].abs().max().item()
            torch.testing.assert_close(rank[at], alone[0], rtol=0, atol=1e-6 * largest)
            assert torch.equal(rank[at + 1], alone[1])
    one, two = (read_evaluation(RunFolder(tmp_path / name)) for name in ("one", "two"))
    assert [row.metrics for row in one.rows] == [row.metrics for row in two.rows]
    assert [row.probe for row in one.rows] == ["logistic", "knn", "corruptions"]


def of_few_images(folder: Path, out: Path) -> Tensor:
    """Two sets of fewer images than the ranks can share; 1 where the command failed."""
    try:
        command.main(
            f"""--data.train {folder}/train.beton --data.val {folder}/val.beton
            --eval.sets {folder}/again --eval.size 12 --eval.encoder torch.nn:Flatten
            --run.device cpu --eval.probes few_shot,knn --eval.few_shot_labels 500
            --eval.knn_k 3 --eval.out {out}""".split()
        )
    except InputError as error:
        print(error)
        return torch.tensor(1)
    return torch.tensor(0)


def test_a_rank_without_images_and_a_probe_that_fails_stop_nobody(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("val", 1)):
        source = betons.digit_like(np.random.default_rng(seed), 5, SIDE, classes=3)
        for folder in (tmp_path, tmp_path / "again"):
            betons.write(replace(source, split=split), folder, Store("raw"))
    out = tmp_path / "out"
    failed = on_ranks(4, partial(of_few_images, tmp_path, out), tmp_path, seconds=200)
    assert [int(rank) for rank in failed] == [1, 0, 0, 0]  # the first one probes, and says it
    found = read_evaluation(RunFolder(out))
    assert [(row.data, row.probe) for row in found.rows] == [("test", "knn"), ("again", "knn")]
    assert all("few_shot takes 500 images" in line for line in found.missing)
    assert len(found.missing) == 2
