"""The pages of a run, of several runs and of a study, from small folders."""

import fcntl
import json
from dataclasses import replace

import numpy as np
import pytest

from fastproj.core.errors import InputError
from fastproj.evaluation.results import Evaluation, Row, write_evaluation
from fastproj.report import Reporter
from fastproj.reporting.comparison import comparison_page, differing, labels
from fastproj.reporting.page import Missing, Page, Table
from fastproj.reporting.read import Setting, read_run
from fastproj.reporting.run import Pictures, run_page
from fastproj.reporting.samples import Embedded, Views
from fastproj.reporting.study import check, forest, read_study, study_page, sweep
from fastproj.runs.folder import RunFolder
from fastproj.studies import results, table
from fastproj.studies.plan import Arm, Check, Plan
from fastproj.studies.scores import Val, read_score
from tests.support.journals import write_config, write_journal, write_run
from tests.support.studies import LABELS, fake_run

NONE = Pictures("no views", "no features", "no labels")


def evaluated(folder, right=30, content="v"):
    """Scores and predictions of a linear probe that is right on the first ``right`` images."""
    import torch

    run = RunFolder(folder)
    predicted = np.where(np.arange(len(LABELS)) < right, LABELS, (LABELS + 1) % 4)
    path = run.predictions("digits", "pre-trained", "logistic").relative_to(folder).as_posix()
    protocol = {"data": {"val": {"content": content}}, "features": {"width": 8}, "probe": {"k": 5}}
    row = Row("pre-trained", "digits", "logistic", {"top1": right / 40, "top5": 1.0}, protocol,
              {"features": 2.0, "probe": 3.0}, path)  # fmt: skip
    header = {"file": "step.pt", "sha256": "5" * 64, "step": 8, "epoch": 1}
    write_evaluation(run, Evaluation(header, {}, (row,)), {path: torch.from_numpy(predicted)})
    return read_run(run)


def pictures() -> Pictures:
    """Of random images and features."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8)
    views = Views(images[:3], np.stack([images[:3]] * 2), {"flip": [0.5, 0.5]}, 100)
    features = draw.normal(size=(40, 5)).astype(np.float32)
    return Pictures(views, Embedded(images, features, LABELS, tuple("abcd"), 40, "w"),
                    (LABELS, tuple("abcd"), "v"))  # fmt: skip


def names(page: Page) -> set[str]:
    return {picture.name for picture in page.pictures()}


def missing(page: Page) -> list[str]:
    return [f"{b.what}: {b.why}" for s in page.sections for b in s.blocks if isinstance(b, Missing)]


def tables(page: Page) -> dict[str, Table]:
    return {b.title: b for s in page.sections for b in s.blocks if isinstance(b, Table)}


CURVES = {"step-loss", "step-lr", "loss", "online-probe", "online-top1", "matrix-information",
          "entropy-minus-information", "rankme-features", "dead-latents"}  # fmt: skip


def test_a_whole_run_has_everything(tmp_path):
    write_run(tmp_path / "one", sparsehead=0.5)
    page = run_page(evaluated(tmp_path / "one"), pictures())
    assert names(page) == CURVES | {
        *("spectrum", "penalty-sparsehead", "step-images-per-second", "step-data-wait", "time"),
        *("step-terms", "confusion", "views", "neighbors", "embedding"),
    }
    assert missing(page) == [] and page.about == "ended after 40 of 40 steps"
    for picture in page.pictures():
        assert picture.how.endswith(".") and picture.rows and len(picture.head) > 1
    found = tables(page)
    assert ("objective.name", "simclr", "default") in found["Defaults"].rows
    assert ("data.train", "none/train.beton", "command line") in found["Given"].rows
    assert found["Scores"].rows == [
        ("pre-trained", "digits", "logistic", "75.00", "100.00", "2.0", "3.0")
    ]
    assert json.loads(found["Protocols"].rows[0][3])["probe"] == {"k": 5}
    assert ("packages timm", "none") in found["Machine"].rows
    html = page.html()
    assert "python -m fastproj train --x &#x27;&lt;y&gt;&#x27;" in html
    (confusion,) = [p for p in page.pictures() if p.name == "confusion"]
    wrong = [row for row in confusion.rows if row[0] != row[1]]
    assert sum(row[2] for row in wrong) == 10 and confusion.title.endswith("of the logistic probe")


def test_each_corruption_at_each_severity(tmp_path):
    write_run(tmp_path)
    run = evaluated(tmp_path)
    (linear,) = run.evaluation.rows
    accuracies = {"fog 1": 0.5, "fog 4": 0.25, "snow 1": 0.75, "snow 4": 0.5}
    probe = {"corruptions": ["fog", "snow"], "severities": [1, 4], "accuracies": accuracies}
    metrics = {"top1": 0.5, "top1_clean": 0.8, "top1_fog": 0.375, "top1_snow": 0.625}
    row = replace(linear, probe="corruptions", metrics=metrics,
                  protocol=linear.protocol | {"probe": probe})  # fmt: skip
    page = run_page(replace(run, evaluation=replace(run.evaluation, rows=(linear, row))), NONE)
    found = tables(page)
    assert found["Scores"].head[3:6] == (
        "top1 (% of val)",
        "top5 (% of val)",
        "top1_clean (% of val)",
    )
    assert found["Scores"].rows[1][3:6] == ("50.00", "", "80.00")
    table = found["Corruptions: pre-trained encoder, digits"]
    assert table.head == ("corruption", "severity 1", "severity 4", "mean")
    assert table.rows == [("fog", "50.00", "25.00", "37.50"), ("snow", "75.00", "50.00", "62.50")]
    assert "80.00%" in table.how


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_at_its_beginning_says_what_is_not_there_yet(tmp_path, epochs):
    write_run(tmp_path, epochs=epochs, end=False)
    page = run_page(read_run(RunFolder(tmp_path)), NONE)
    lines = missing(page)
    assert any("evaluate the run first" in line for line in lines)
    for words in ("augmented views: no views", "map of the features: no features"):
        assert any(words in line for line in lines)
    assert any("no step was logged yet" in line for line in lines) == (not epochs)
    assert "still going, or cut" in page.about and f"{10 * epochs} of" in page.about
    assert page.html()


def test_how_far_a_run_came(tmp_path):
    write_run(tmp_path / "a", end=False)
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"event": "error", "message": "full disk", "time": 1}\n{"event": "st')
    run = read_run(RunFolder(tmp_path / "a"))
    assert run.over and run.status() == "stopped by an error after 40 of 40 steps: full disk"
    write_config(tmp_path / "b")
    (tmp_path / "b/metrics.jsonl").touch()
    run = read_run(RunFolder(tmp_path / "b"))
    assert not run.over and run.status() == "started, and its journal is still empty"
    assert run_page(run, NONE).html()


def test_a_score_that_is_missing_is_named(tmp_path):
    run = evaluated(write_run(tmp_path / "run"))
    failed = replace(run.evaluation, missing=("probe knn of pre-trained on digits: k = 99",))
    found = missing(run_page(replace(run, evaluation=failed), NONE))
    assert "a score: probe knn of pre-trained on digits: k = 99" in found


def test_a_foreign_or_damaged_run_is_an_error(tmp_path):
    run = RunFolder(write_run(tmp_path / "run"))
    run.evaluation.write_text("{")
    run.environment.unlink()
    found = read_run(run)
    assert found.evaluation is None and "is damaged" in found.missing["eval.json"]
    assert "environment.json" in missing(run_page(found, NONE))[-1]
    run.metrics.write_text('{"event": "start", "step": 0}\nnonsense\n')
    with pytest.raises(InputError, match="line 2 is no JSON object"):
        read_run(run)
    run.metrics.write_text('{"iteration": 0}\n')
    with pytest.raises(InputError, match="line 1 is no JSON object of a run"):
        read_run(run)
    run.metrics.unlink()
    with pytest.raises(InputError, match="is this a run folder"):
        read_run(run)
    run.config.write_text("model: {width: 3}\n")
    with pytest.raises(InputError, match="was not written by fastproj train"):
        read_run(run)


def test_values_and_sources_of_settings(tmp_path):
    run = RunFolder(tmp_path)
    run.config.write_text(
        "plugins: [/a/b.py#sha256=0]\nrun:\n  name: 'a  # default'  # command line\n"
        "optim:\n  lr: 0.5  # file /x # y/recipe.yaml\n  wd: null  # default\n"
    )
    run.metrics.touch()
    assert read_run(run).settings == (
        Setting("plugins", "[/a/b.py#sha256=0]", "file or command line"),
        Setting("run.name", "'a  # default'", "command line"),
        Setting("optim.lr", "0.5", "file /x # y/recipe.yaml"),
        Setting("optim.wd", "null", "default"),
    )


def test_several_runs_over_one_another(tmp_path):
    write_run(tmp_path / "x/a", seed=0)
    write_run(tmp_path / "y/a", seed=1, epochs=2, end=False)
    runs = [evaluated(tmp_path / "x/a"), evaluated(tmp_path / "y/a", 20, content="other")]
    assert labels(runs) == ["x/a", "y/a"]
    assert differing(runs) == {"run.seed": ["0", "1"], "optim.epochs": ["4", "2"]}
    page = comparison_page(runs, "two")
    split = {"online-top1", "online-top5", "online-knn-top1", "negative-loss-minus-information"}
    split |= {"spectrum-features", "spectrum-projections"}
    assert names(page) == CURVES | split | {"step-images-per-second"}
    (spectrum,) = [p for p in page.pictures() if p.name == "spectrum-features"]
    assert spectrum.rows == [(1, 0.53, 0.51), (2, 0.25, 0.25)]  # a logarithm has no 0
    assert spectrum.figure.axes[0].get_yscale() == "log"
    (loss,) = [p for p in page.pictures() if p.name == "loss"]
    assert loss.head == ("epoch", "x/a: loss", "y/a: loss")
    assert loss.rows == [(1, 5.0, 5.0), (2, 4.0, 4.0), (3, 3.0, None), (4, 2.0, None)]
    found = tables(page)
    assert found["Scores"].head[1] == "logistic, digits: top1 (% of val)"
    assert found["Scores"].rows == [("x/a", "75.00", "100.00"), ("y/a", "50.00", "100.00")]
    assert found["Settings that differ"].rows == [("x/a", "0", "4"), ("y/a", "1", "2")]
    assert missing(page) == [
        "digits, logistic: the runs were scored on different val images: their scores cannot be "
        "compared"
    ]
    assert page.about == "2 runs, 1 of them over."


def test_the_lines_of_many_runs_are_named_once(tmp_path):
    runs = [read_run(RunFolder(write_run(tmp_path / f"r{n}", epochs=n > 0))) for n in range(7)]
    page = comparison_page(runs[:3], "three")
    assert "legend" not in names(page)
    (loss,) = [p for p in page.pictures() if p.name == "step-loss"]
    texts = [text.get_text() for text in loss.figure.axes[0].get_legend().get_texts()]
    assert texts == ["r1", "r2"]  # the first one has not come to a step
    page = comparison_page(runs, "seven")
    assert "legend" in names(page)
    colors = {p.name: [line.get_color() for line in p.figure.axes[0].lines][:7]
              for p in page.pictures()}  # fmt: skip
    assert colors["loss"] == colors["legend"] == colors["step-loss"] == colors["dead-latents"]


@pytest.fixture
def study(tmp_path):
    """Two sets of three arms, with a sweep and a check, as ``fastproj study`` writes it."""
    plan = Plan(
        folder=tmp_path / "few",
        baseline="default",
        primary="logistic.top1",
        arms=(
            Arm("default", "demo", sweep={"optim.lr": ("0.01", "0.1", "1")}),
            Arm("treated", "demo", published={"": 0.5}, sweep={"optim.lr": ("0.01", "0.1", "1")},
                acted=Check("matrix_information", "below", 0.5)),
            Arm("no-op", "demo", control="no-op"),
        ),
        sets={"digits": {}, "more": {}},
        seeds=(0, 1, 2),
        sweep_seeds=(0, 1),
    )  # fmt: skip
    scores = {}

    def score(job, right, **more):
        fake_run(job, right, **more)
        write_config(job.run.path)
        scores[job] = read_score(job, plan.primary, Val(LABELS, "v"))

    for number, job in enumerate(plan.sweeps()):
        score(job, 20, holdout=0.5 + 0.01 * (job.trial or 0) + 0.001 * number)
    choices, sweeps = results.choose(plan, scores)
    for job in plan.jobs(choices):
        treated = job.arm == "treated"
        score(job, 30 + job.pair % 2 + 3 * treated + (treated and job.pair),
              diagnostics={"matrix_information": 0.4 if treated else 0.9})  # fmt: skip
        write_journal(job.run.path, epochs=3, end=True)
    report = results.report(plan, scores, sweeps, set(), {"digits/x-seed9": "no <memory>"})
    (plan.folder / "study.json").write_text(json.dumps(report))
    runs = {job.name: read_run(job.run) for job in plan.jobs(choices)}
    return read_study(plan.folder / "study.json"), runs


def test_a_study_is_answered(study):
    report, runs = study
    page = study_page(report, runs)
    wanted = {f"{kind}-{dataset}" for kind in ("gains", "plane", "paths")
              for dataset in ("digits", "more")}  # fmt: skip
    wanted |= {f"check-{dataset}-treated" for dataset in ("digits", "more")}
    wanted |= {f"sweep-{d}-{arm}" for d in ("digits", "more") for arm in ("default", "treated")}
    assert names(page) == wanted
    for picture in page.pictures():
        assert picture.how.endswith(".") and picture.rows
        (axes,) = picture.figure.axes
        assert "(" in axes.get_xlabel() and axes.get_ylabel() + "".join(
            text.get_text() for text in axes.get_yticklabels()
        )
    chosen = "digits: optim.lr 1; more: optim.lr 1"
    assert tables(page)["What each arm is"].rows == [
        (arm, "demo", "", chosen) for arm in ("default", "treated", "no-op")
    ]
    html = page.html()
    for sentence in table.conclusions(report):
        assert sentence.partition(";")[0] in html
    assert "no &lt;memory&gt;" in html and tables(page)["Table"].rows[0][1] == "default"
    assert [row[3] for row in tables(page)[""].rows] == ["acted", "acted"]


def test_the_forest_shows_the_gains_of_the_study(study):
    report, runs = study
    (forest,) = [p for p in study_page(report, runs).pictures() if p.name == "gains-digits"]
    row = report["sets"][0]["rows"][1]
    # By hand: of 40 images, 33, 35 and 35 right against 30, 31 and 30.
    gains = np.array([3, 4, 5]) * 2.5 - np.array([0, 0, 0])
    assert row["gain_mean"] == pytest.approx(gains.mean())
    (axes,) = forest.figure.axes
    lines = [(line.get_marker(), list(line.get_xdata())) for line in axes.lines]
    assert ("None", [row["gain_low"], row["gain_high"]]) in lines
    assert ("o", [row["gain_mean"]]) in lines and ("D", [0.5]) in lines
    assert [marker for marker, _ in lines].count("s") == 1  # the control
    assert forest.rows[0][:3] == ["treated", 3, row["gain_mean"]]


def test_the_sweep_marks_its_choice(study):
    report, runs = study
    (drawn,) = [p for p in study_page(report, runs).pictures() if p.name == "sweep-digits-treated"]
    (axes,) = drawn.figure.axes
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    found = report["sweeps"][1]
    best = int(np.argmax(found["holdout"]))
    assert (list(star.get_xdata()), list(star.get_ydata())) == (
        [float(found["tries"][best]["optim.lr"])], [found["holdout"][best]]
    )  # fmt: skip
    assert axes.get_xscale() == "log" and [row[0] for row in drawn.rows] == ["0.01", "0.1", "1"]
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert len(dots[0].get_xdata()) == 6  # three tries on two seeds


def test_a_sweep_of_words_and_of_two_settings():
    tries = [{"optim.lr": lr, "projector.kind": kind} for kind in ("mlp", "linear")
             for lr in ("0.2", "0.1", "low")]  # fmt: skip
    found = {"set": "s", "arm": "a", "tries": tries, "holdout": [1.0, 2.0, 3.0, 6.0, None, 4.0],
             "chosen": tries[3], "edge": []}  # fmt: skip
    (axes,) = sweep({"runs": []}, found).figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
             for line in axes.lines}  # fmt: skip
    assert drawn == {
        "projector.kind mlp": ([0, 1, 2], [1, 2, 3]),
        "projector.kind linear": ([0, 2], [6, 4]),
        "chosen": ([0], [6]),
    }
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.2", "0.1", "low"]
    failed = {**found, "tries": [{"a.b": "1"}], "holdout": [None], "chosen": None}
    assert sweep({"runs": []}, failed).figure.legends == []


def test_no_label_leaves_its_figure(study):
    report, runs = study
    row = report["sets"][0]["rows"][1]
    long = {**row, "arm": "superfluous noise only", "check": "alignment_features lower",
            "diagnostic": {"arm": [0.25, 0.5], "baseline": [0.75, 1.0]}}  # fmt: skip
    tries = [{"optim.lr": "1e-3", "matrix_information.weight": f"1e-{n}"} for n in range(6)]
    tried = {"set": "s", "arm": "a", "tries": tries, "holdout": [61.25] * 6, "chosen": tries[0],
             "edge": []}  # fmt: skip
    pictures = [
        *study_page(report, runs).pictures(),
        check(long, "default", "did not act"),
        forest("s", [long] * 6, "default", "logistic.top1"),
        sweep({"runs": []}, tried),
    ]
    for picture in pictures:
        picture.figure.draw_without_rendering()
        drawn = picture.figure.get_tightbbox()
        width, height = picture.figure.get_size_inches()
        assert min(drawn.x0, drawn.y0) > -0.02, picture.name
        assert drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02, picture.name


def test_the_paths_are_means_over_seeds(study):
    report, runs = study
    (paths,) = [p for p in study_page(report, runs).pictures() if p.name == "paths-digits"]
    # Journals are alike, of three epochs; the only probe event comes after the second one.
    assert paths.rows[0] == ("default", pytest.approx(0.9), pytest.approx(10.0))
    assert len(paths.rows) == 3
    assert not [p for p in study_page(report, {}).pictures() if p.name.startswith("paths")]


def test_a_study_that_goes_on_or_was_stopped_says_so(study, tmp_path):
    folder = tmp_path / "few"
    page, over = Reporter([folder]).page()
    assert over and not page.notes
    with open(folder / "study.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        page, over = Reporter([folder]).page()
        assert not over and "The study is going on" in page.notes[0]
    found = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**found, "stopped": True}))
    page, over = Reporter([folder]).page()
    assert over and "The study was stopped" in page.notes[0]


def test_predictions_of_other_images_make_no_confusion_matrix(tmp_path):
    write_run(tmp_path / "r")
    run = evaluated(tmp_path / "r", content="of others")
    (said,) = [line for line in missing(run_page(run, pictures())) if "confusion" in line]
    assert "of other images than val now has" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("[]", "schema None"), ('{"schema": 9}', "schema 9"),
     ('{"schema": 1}', "lacks arms")],
)  # fmt: skip
def test_a_damaged_study_is_one_line(tmp_path, text, words):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        read_study(tmp_path / "study.json")
    assert "\n" not in str(error.value)
