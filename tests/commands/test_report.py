"""``fastproj report``: from folders on the command line to a page in a browser."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from fastproj import report
from fastproj.core.errors import InputError, run_command
from fastproj.evaluate import evaluate
from fastproj.evaluation.results import write_evaluation
from fastproj.prepare.encode import Store
from fastproj.report import Reporter
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, load
from fastproj.train import train
from tests.support import chromium
from tests.support.betons import digit_like, write
from tests.support.journals import write_config, write_journal, write_run


def leave(argv, capsys) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr that are no journal's."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(report.main, [str(word) for word in argv])
    out, err = capsys.readouterr()
    return left.value.code, out, [line for line in err.splitlines() if line.startswith("error")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of two epochs on images of columns, evaluated by kNN."""
    folder = tmp_path_factory.mktemp("trained")
    sets = {}
    for seed, split in enumerate(("train", "val")):
        source = digit_like(np.random.default_rng(seed), 24, 12, 4)
        sets[split] = write(source, folder / split, Store("raw")).path
    options = {
        "data.train": sets["train"], "data.val": sets["val"], "run.dir": folder, "run.name": "r",
        "run.device": "cpu", "model.encoder": "resnet_small", "model.stem": "cifar",
        "views.size": 12, "views.blur_prob": 0, "optim.batch_size": 8, "optim.epochs": 2,
        "projector.hidden": 16, "projector.out": 8, "train.log_every": 1, "train.online_every": 1,
        "eval.probes": "knn", "eval.knn_k": 3,
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    settings = load(RUN, argv, "test", "")
    run = RunFolder(train(settings))
    write_evaluation(run, *evaluate(run, settings))
    return run


def test_a_real_run_has_its_images_and_features(trained, tmp_path):
    page, over = Reporter([trained.path]).page()
    assert over
    found = {picture.name: picture for picture in page.pictures()}
    assert {"views", "neighbors", "embedding", "confusion", "online-top1", "time"} <= found.keys()
    assert sum(row[2] for row in found["confusion"].rows) == 24
    assert len(found["embedding"].rows) == 24 and "24 of 24 val images" in found["embedding"].how
    # The whole images beside the views are the set's own, of one bright column per class.
    tiles = np.asarray(found["views"].figure.axes[0].images[0].get_array())
    assert (tiles[:12, :12, 0].min(0) == 255).sum() == 1
    assert "is missing" not in page.html() and "cannot" not in page.html()


def test_a_run_without_its_data_says_so_and_reports_the_rest(trained, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    text = trained.config.read_text().replace("/val/", "/gone/")
    (moved / "config.yaml").write_text(text)
    (moved / "metrics.jsonl").write_bytes(trained.metrics.read_bytes())
    html = Reporter([moved]).page()[0].html()
    # Once: without scores there is no confusion matrix to be missed.
    assert html.count("gone/train.beton: no such beton") == 1
    assert 'id="views"' in html and 'id="loss"' in html and 'id="neighbors"' not in html


def test_what_needs_weights_is_made_once_per_checkpoint(trained, monkeypatch):
    made = []
    draw = report._draw
    monkeypatch.setattr(report, "_draw", lambda *given: made.append(1) or draw(*given))
    reporter = Reporter([trained.path])
    reporter.page(), reporter.page()
    assert len(made) == 1
    assert Reporter([trained.path, trained.path]).page()[0].title == "2 runs" and len(made) == 1


def test_the_command_writes_one_page_where_it_is_asked_to(tmp_path, capsys, monkeypatch):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    before = {path.name for path in one.iterdir()}
    assert leave([one], capsys) == (0, f"written: {one}/report.html\n", [])
    assert {path.name for path in one.iterdir()} == before | {"report.html"}
    monkeypatch.chdir(tmp_path)
    assert leave([one, two], capsys)[:2] == (0, "written: report.html\n")
    assert "<title>2 runs</title>" in (tmp_path / "report.html").read_text()
    argv = [one, "--out", "new/x.html", "--report.figures", "figures"]
    assert leave(argv, capsys)[:2] == (0, "written: new/x.html and figures\n")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"loss.png", "loss.svg", "spectrum.png"} <= names and len(names) % 2 == 0
    assert (tmp_path / "new/x.html").read_text() == (one / "report.html").read_text()


def test_bad_input_is_one_line(tmp_path, capsys):
    good = write_run(tmp_path / "good")
    damaged = write_run(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text("x\ny\n")
    foreign = write_config(tmp_path / "foreign")
    (foreign / "config.yaml").write_text("model: resnet\n")
    write_journal(foreign)
    started = write_config(tmp_path / "started")  # killed before its first event
    study = tmp_path / "study"
    write_run(study / "digits" / "a-seed0")
    empty = tmp_path / "empty"
    empty.mkdir()
    for argv, code, words in (
        ([], 2, "give run folders"),
        ([tmp_path / "none"], 1, "no such run folder"),
        ([empty], 1, "is no run folder"),
        ([good, damaged], 1, "damaged/metrics.jsonl, line 1 is no JSON object"),
        ([good, foreign], 1, "foreign/config.yaml was not written by fastproj train"),
        ([good, started], 1, "started/metrics.jsonl: No such file"),
        ([good, study], 1, "is a study: give it alone"),
        ([good, "--out", tmp_path / "good/config.yaml/x.html"], 1, "cannot write"),
        ([good, "--figures", tmp_path / "good/config.yaml"], 1, "cannot write"),
        ([good, "--optim.lr", "1"], 2, "unknown setting --optim.lr"),
        ([good, "--watch", "-1"], 2, "report.watch"),
    ):
        found, _, errors = leave(argv, capsys)
        assert found == code and len(errors) == 1 and words in errors[0], (argv, errors)


def test_a_study_before_its_end_is_its_runs_so_far(tmp_path):
    study = tmp_path / "few"
    write_run(study / "digits" / "a-seed0")
    write_run(study / "digits" / "b-seed0", end=False)
    write_run(study / "digits" / "sweep" / "a-try0-seed0")
    (study / "logs").mkdir()
    damaged = write_run(study / "digits" / "c-seed0")
    (damaged / "metrics.jsonl").write_text("x\n")
    page, over = Reporter([study]).page()
    assert not over and page.about == "3 runs, 2 of them over." and page.title == "Study few"
    assert "it has not ended" in page.notes[0] and "c-seed0" in page.notes[1]
    (study / "study.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        Reporter([study]).page()


def test_watch_refreshes_until_the_run_has_ended(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", epochs=1, end=False)
    pages, slept = [], []

    def sleep(seconds):
        pages.append((run / "report.html").read_text())
        slept.append(seconds)
        if len(slept) == 2:
            write_journal(run, epochs=1, first=1, end=True)

    monkeypatch.setattr(report.time, "sleep", sleep)
    code, out, _ = leave([run, "--watch", "9"], capsys)
    assert (code, slept) == (0, [9, 9]) and out.count("written: ") == 3
    assert all('http-equiv="refresh" content="9"' in page for page in pages)
    last = (run / "report.html").read_text()
    assert 'http-equiv="refresh"' not in last and "ended after 20 of 20 steps" in last


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None  # as if it were not installed\n"
        "from fastproj.__main__ import main\n"
        "main('report')"
    )
    command = [sys.executable, "-c", script, str(write_run(tmp_path / "run"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: fastproj report needs matplotlib")
    assert "fastproj-ssl[report]" in line


@pytest.mark.slow
def test_twenty_long_runs_are_compared_quickly(tmp_path, capsys):
    """Of 200 epochs each, in CPU time: other processes on the machine count for nothing."""
    runs = [write_run(tmp_path / f"r{n:02}", epochs=200, seed=n) for n in range(20)]
    before = time.process_time()
    assert leave([*runs, "--out", tmp_path / "x.html"], capsys)[0] == 0
    assert time.process_time() - before < 20
    assert (tmp_path / "x.html").stat().st_size < 5e6


SIZES = [(390, "light"), (1440, "dark"), (390, "dark"), (1440, "light")]


@pytest.mark.slow
def test_a_browser_shows_everything(trained, tmp_path):
    """In Chromium: no console error, nothing loaded, every figure there, nothing cut off."""
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    other = write_run(tmp_path / "a-long-name-for-a-run-to-be-broken-on-a-phone")
    pages = {
        "one": Reporter([trained.path]).page()[0],
        "several": Reporter([trained.path, other]).page()[0],
    }
    with chromium.browser(program, tmp_path / "profile") as browser:
        for name, page in pages.items():
            path = tmp_path / f"{name}.html"
            report.write(page, path)
            seen = {}
            for width, scheme in SIZES:
                browser.open(path, width, scheme)
                assert browser.errors() == [] and browser.requests() == [path.as_uri()]
                inside, outside = browser.evaluate(
                    "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
                )
                assert inside <= outside <= width
                drawn = browser.evaluate(
                    "[...document.querySelectorAll('figure')].map(f => [f.id, "
                    "f.querySelector('svg').getBoundingClientRect().width, "
                    "f.querySelector('svg').getBoundingClientRect().height])"
                )
                assert {of[0] for of in drawn} == {picture.name for picture in page.pictures()}
                assert all(min(of[1:]) > 60 for of in drawn)
                seen[width, scheme] = browser.evaluate(
                    "[getComputedStyle(document.body).backgroundColor, getComputedStyle("
                    "document.querySelector('#loss path[style*=c0]')).stroke]"
                )
            assert seen[390, "light"] == seen[1440, "light"] == ["rgb(255, 255, 255)",
                                                                 "rgb(0, 114, 178)"]  # fmt: skip
            assert seen[390, "dark"] == seen[1440, "dark"] != seen[390, "light"]
