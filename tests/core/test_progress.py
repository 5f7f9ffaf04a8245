"""The one progress bar, at 80 columns, and what each long command shows of it."""

import re
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproj.core import progress
from fastproj.core.progress import Progress, write_line
from fastproj.evaluation.crops import crops_probe
from fastproj.evaluation.extract import Extractor
from fastproj.evaluation.features import features
from fastproj.loaders import Crop, open_loader
from fastproj.prepare.encode import Store
from fastproj.runs.journal import Journal, StepMeter
from tests.support.betons import digit_like, write
from tests.support.terminals import terminal


def test_at_80_columns_everything_of_a_long_count_is_shown(monkeypatch):
    with (
        terminal(monkeypatch) as screen,
        Progress(1_281_167, "features of train.beton", start=100_000) as bar,
    ):
        time.sleep(0.11)
        bar.update(500_000)
    bars = screen.bars()
    assert all(len(shown) <= 80 for shown in bars)
    words = r"features of train\.beton   47% .+ 600000/1281167  [\d:]+ left, [\d,]+ images/s"
    assert re.fullmatch(words, bars[-1]), bars


def test_a_line_is_written_above_the_bar(monkeypatch):
    with terminal(monkeypatch) as screen, Progress(10, unit="runs", keep=True) as bar:
        bar.say("1 failed")
        bar.update(4)
        write_line("12:00:00  4/10  a/d/seed0: it is whole")
        time.sleep(0.11)
        bar.update()
    assert "\r12:00:00  4/10  a/d/seed0: it is whole\r\n" in screen.text
    assert re.fullmatch(r" 50% .+ 5/10  [\d:]+ left, 1 failed", screen.bars()[-1])


def test_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for lines in (True, False):
        with Progress(2_000, "verify", lines=lines) as bar:
            bar.update(1_000)
        out, err = capsys.readouterr()
        assert out == ""
        expected = r"verify: 1,000/2,000 images, [\d,]+/s, [\d,]+ s left\n" if lines else ""
        assert re.fullmatch(expected, err)


def test_each_training_step_moves_the_bar(tmp_path, monkeypatch):
    """Every tenth step is logged; the others move the bar as well."""
    with (
        terminal(monkeypatch) as screen,
        Journal(tmp_path / "metrics.jsonl", main=True, total=156_000, start=9) as book,
    ):
        meter = StepMeter(book, batch_size=256, every=10)
        meter.begin_epoch(0, 9)
        for step in (10, 11, 12):
            time.sleep(0.11)  # tqdm draws ten times per second at most
            meter.step(step, {"loss": torch.tensor(5.123456)}, lr=0.1)
    bars = screen.bars()
    assert all(len(shown) <= 80 for shown in bars)
    counts = [found[1] for shown in bars if (found := re.search(r" (\d+)/156000 ", shown))]
    assert list(dict.fromkeys(counts)) == ["9", "10", "11", "12"]
    words = r"  0% +12/156000  [\d:]+ left, loss 5\.123, [\d,]+ images/s"
    assert re.fullmatch(words, bars[-1]), bars


@pytest.fixture
def beton(tmp_path):
    return write(digit_like(np.random.default_rng(0), 60, 10, 3), tmp_path, Store("raw"))


class Slow(nn.Module):
    """Means of the channels; tqdm draws each batch, as they are more than 0.1 s apart."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.11)
        return images.mean((2, 3))


def test_evaluate_and_embed_count_images_and_a_probe_its_steps(beton, monkeypatch):
    with terminal(monkeypatch) as screen:
        extractor = Extractor(8, torch.device("cpu"), batch_size=20, loader={"workers": 1})
        found = features(Slow(), extractor.open(beton), progress="features of train.beton")
    assert all(shown.startswith("features of train.beton") for shown in screen.bars())
    for count in (20, 40, 60):
        assert any(f" {count}/60 " in shown for shown in screen.bars()), screen.text

    with terminal(monkeypatch) as screen:
        train = open_loader(beton, [Crop(8, num_views=1)], 20, workers=1)
        crops_probe(Slow(), train, found, 3, learning_rates=(0.1,), epochs=2, milestones=(1,))
    for step in range(1, 7):
        assert any(re.match(rf"probe +\d+% .* {step}/6 ", shown) for shown in screen.bars())
