"""From run folders to rows, sentences and tables, on folders with known numbers."""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastproj.core.errors import InputError
from fastproj.studies import results, table
from fastproj.studies.plan import Arm, Check, Job, Plan, with_controls
from fastproj.studies.running import StudyError
from fastproj.studies.scores import Score, Val, read_score, same_protocol
from tests.support.studies import LABELS, fake_run

# images of 40 on which the probe is right, per seed
RIGHT = {
    "default": (20, 22, 21), "lower": (24, 27, 24), "idle": (20, 22, 22), "no-op": (20, 22, 20),
}  # fmt: skip
CHOICES: dict[tuple[str, str], dict[str, str]] = {(arm, "s"): {} for arm in RIGHT}


def make_plan(tmp_path: Path, **changes: Any) -> Plan:
    arms = [
        Arm("default", "r"),
        Arm("lower", "r", {"optim.lr": "1"}, {"": 1.03}, Check("matrix_information", "lower")),
        Arm("idle", "r", {}, {}, Check("used_codes", "above", 0.5)),
    ]
    made = {"folder": tmp_path / "study", "baseline": "default", "primary": "logistic.top1",
            "arms": with_controls(arms, "default", []), "sets": {"s": {}},
            "seeds": (0, 1, 2), "sweep_seeds": (9,)}  # fmt: skip
    return Plan(**{**made, **changes})


def write_runs(plan: Plan) -> list[Job]:
    jobs = plan.jobs(CHOICES)
    for job in jobs:
        information = {"lower": 0.5 + 0.1 * job.pair}.get(job.arm, 1.0)
        codes = {"used_codes": 0.9 - 0.3 * job.pair} if job.arm == "idle" else {}
        fake_run(job, RIGHT[job.arm][job.pair],
                 diagnostics={"matrix_information": information, **codes})  # fmt: skip
    return jobs


def read_all(plan: Plan, jobs: list[Job]) -> dict[Job, Score]:
    return {job: read_score(job, plan.primary, Val(LABELS, "v")) for job in jobs}


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    plan = make_plan(tmp_path)
    scores = read_all(plan, write_runs(plan))
    assert same_protocol(scores) == {}
    return results.report(plan, scores, [], {"s/default-seed0"}, {})


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in report["sets"][0]["rows"]}


def test_a_row_holds_the_paired_difference_of_the_same_seeds(report: dict[str, Any]) -> None:
    row = rows(report)["lower"]
    values = [60, 67.5, 60]  # percent; the baseline has 50, 55, 52.5: gains of 10, 12.5, 7.5
    assert (row["n"], row["pairs"], row["mean"]) == (3, 3, pytest.approx(np.mean(values)))
    assert row["std"] == pytest.approx(np.std(values, ddof=1))
    assert (row["gain_mean"], row["gain_std"]) == pytest.approx((10, 2.5))
    half = 4.302653 * 2.5 / math.sqrt(3)  # t(0.975, 2)
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((10 - half, 10 + half), abs=1e-5)
    t = 10 / (2.5 / math.sqrt(3))
    p = 1 - t / math.sqrt(2 + t * t)
    assert row["p"] == pytest.approx(p) and row["p_holm"] == pytest.approx(2 * p)  # of two arms
    assert row["p_permutation"] == 0.25  # 2 of 8 exchanges of signs
    # Seed by seed 4, 5 and 3 images on which only the treated run is right, and none the other way.
    assert row["mcnemar"] == pytest.approx({"0": 2 / 2**4, "1": 2 / 2**5, "2": 2 / 2**3})
    assert "p_mcnemar" not in row
    # Per image: 1 for images 20 to 23 where all three seeds gain, and so on; their mean is 0.1.
    assert row["images_low"] < 10 < row["images_high"] and row["images_low"] >= 0
    assert row["published"] == 1.03 and row["seeds_needed"] > 3
    assert row["metrics"]["knn.top5"] == 1
    pooled = np.mean([np.var(RIGHT[arm], ddof=1) for arm in RIGHT]) ** 0.5 * 100 / 40
    assert report["sets"][0]["pooled_std"] == pytest.approx(pooled)


def test_a_treatment_that_did_not_act_is_called_that(report: dict[str, Any]) -> None:
    lower, idle, no_op = (rows(report)[name] for name in ("lower", "idle", "no-op"))
    assert lower["acted"] is True and lower["diagnostic"]["arm"] == [0.5, 0.6, 0.7]
    assert idle["acted"] is False  # the last seed uses 0.3 of the codes
    assert idle["conclusion"].endswith(
        "; used_codes above 0.5 was not shown, so this is no test of the treatment"
    )
    assert no_op["conclusion"].startswith("the noise floor: no gain larger than")
    assert "p_holm" not in no_op and "p_holm" not in rows(report)["default"]


@pytest.mark.parametrize(
    ("check", "ours", "base", "verdict"),
    [
        ("x lower", [1.0, 1.1, 1.2], [2.0, 2.2, 2.1], True),
        ("x lower", [2.0, 2.2, 2.1], [1.0, 1.1, 1.2], False),
        ("x higher", [2.0, 2.2, 2.1], [1.0, 1.1, 1.2], True),
        ("x lower", [1.0, 3.0, 1.9], [2.0, 2.2, 2.1], False),  # the interval holds zero
        ("x lower", [1.0, 1.0], [2.0, 2.0], True),  # no spread at all
        ("x lower", [1.0, 1.0], [1.0, 1.0], False),
        ("x lower", [1.0], [2.0], None),
        ("x lower", [], [], None),
        ("x above 0.5", [0.6, 0.7], [], True),
        ("x above 0.5", [0.6, 0.4], [], False),
        ("x below 0.5", [0.1], [], True),
        ("x below 0.5", [], [], None),
    ],
)
def test_acted(check: str, ours: list[float], base: list[float], verdict: bool | None) -> None:
    assert results.acted(Check.parse(check, ""), ours, base) is verdict


def test_the_noise_of_an_arm_is_taken_off_it(tmp_path: Path) -> None:
    arms = with_controls([Arm("default", "r"), Arm("x", "r")], "default", ["x"])
    plan = make_plan(tmp_path, arms=arms)
    jobs = plan.jobs({("default", "s"): {}, ("x", "s"): {}})
    right = {"default": (20, 22, 21), "no-op": (20, 22, 20), "x": (30, 31, 33),
             "x noise only": (29, 31, 32)}  # fmt: skip
    for job in jobs:
        fake_run(job, right[job.arm][job.pair])
    found = rows(results.report(plan, read_all(plan, jobs), [], set(), {}))
    assert found["x"]["beyond_noise"]["gain_mean"] == pytest.approx(100 * (1 + 0 + 1) / 3 / 40)
    assert "; against its noise alone +1.67 points (-1.92 to +5.25)" in found["x"]["conclusion"]
    assert found["x noise only"]["conclusion"].startswith("the noise of x alone: ")


def test_two_arms_with_one_noise_are_both_compared_with_its_control(tmp_path: Path) -> None:
    penalty = {"superfluous.lambda_a": "1"}
    arms = with_controls(
        [Arm("default", "r"), Arm("x", "r", penalty), Arm("y", "r")], "default", ["x", "y"]
    )
    plan = make_plan(tmp_path, arms=arms)
    jobs = plan.jobs({(name, "s"): {} for name in ("default", "x", "y")})
    right = {"default": (20, 22, 21), "no-op": (20, 22, 20), "x": (30, 31, 33),
             "y": (29, 31, 32), "x noise only": (29, 31, 32)}  # fmt: skip
    for job in jobs:
        fake_run(job, right[job.arm][job.pair])
    found = rows(results.report(plan, read_all(plan, jobs), [], set(), {}))
    assert found["y"]["beyond_noise"]["gain_mean"] == 0
    assert found["x"]["beyond_noise"]["gain_mean"] == pytest.approx(100 * 2 / 3 / 40)
    assert found["x noise only"]["conclusion"].startswith("the noise of x, y alone: ")


def test_other_depths_and_sets_are_metrics_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    jobs = write_runs(plan)
    for job in jobs:
        found = json.loads(job.run.evaluation.read_text())
        h = found["rows"][0]
        places = {"pre-trained/z": "s", "pre-trained": "other", "pre-trained/hidden1": "other"}
        found["rows"] += [
            {**h, "encoder": encoder, "data": data, "metrics": {"top1": 0.25 + job.pair / 4},
             "predictions": None}
            for encoder, data in places.items()
        ] + [{**h, "encoder": "random", "metrics": {"top1": 0}}]  # fmt: skip
        job.run.evaluation.write_text(json.dumps(found))
    scores = read_all(plan, jobs)
    first = scores[jobs[0]]
    assert first.primary == 50 and first.metrics["logistic.top1"] == 0.5
    for place in ("z", "other", "other/hidden1"):
        assert first.metrics[f"logistic.top1@{place}"] == 0.25
    deep = read_score(jobs[0], "logistic.top1@z", Val(LABELS, "v"))
    assert (deep.primary, deep.correct) == (25, None)
    assert deep.hours == pytest.approx((10 + 2 * 20 + 5 * 3) / 3600)

    report = results.report(plan, scores, [], set(), {})
    lines = list(csv.DictReader(io.StringIO(table.metrics_csv(report))))
    assert {line["arm"] for line in lines} == set(RIGHT)
    chosen = {(line["arm"], line["metric"]): line for line in lines}
    assert len(lines) == len(chosen) == 4 * (2 * 2 + 3)
    lower = chosen["lower", "logistic.top1"]
    assert (lower["n"], lower["gain_mean"]) == ("3", "10") and lower["std"] == "4.33013"
    assert float(lower["gain_low"]) == pytest.approx(rows(report)["lower"]["gain_low"], rel=1e-5)
    z = chosen["idle", "logistic.top1@z"]
    # Equal in all seeds: a gain of 0, of which no spread is known.
    assert (z["mean"], z["std"], z["gain_mean"], z["gain_low"]) == ("50", "25", "0", "")
    assert chosen["default", "logistic.top1"]["gain_mean"] == ""


def test_rates_are_only_of_runs_that_were_alone(report: dict[str, Any]) -> None:
    rates = {run["job"]: run["images_per_second"] for run in report["runs"]}
    assert rates.pop("s/default-seed0") is None and set(rates.values()) == {100}
    assert report["hours"] == pytest.approx(12 * (10 + 20 + 2 * 3) / 3600)
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))


def test_a_sweep_chooses_on_the_holdout_and_never_on_val(tmp_path: Path) -> None:
    swept = Arm("default", "r", sweep={"optim.lr": ("1", "2", "3")})
    other = Arm("x", "r", sweep={"optim.lr": ("4", "5", "6")})
    plan = make_plan(tmp_path, arms=(swept, other))
    jobs = plan.sweeps()
    held = {"default": (0.5, 0.7, 0.6), "x": (0.9, 0.1, 0.2)}
    for job in jobs:
        assert job.trial is not None
        right = 40 - 10 * job.trial  # val: the first try is best, whatever the holdout says
        if (job.arm, job.trial) != ("x", 0):  # that run failed, so its 0.9 is lost
            fake_run(job, right, held[job.arm][job.trial])
    scores = read_all(plan, [job for job in jobs if job.run.path.exists()])
    choices, found = results.choose(plan, scores)
    assert choices == {("default", "s"): {"optim.lr": "2"}, ("x", "s"): {"optim.lr": "6"}}
    assert found[0]["holdout"] == pytest.approx([50, 70, 60]) and found[0]["edge"] == []
    assert found[1]["holdout"][0] is None and found[1]["edge"] == ["optim.lr"]
    knn = make_plan(tmp_path, arms=(swept, other), primary="knn.top1")
    with pytest.raises(StudyError, match="that of knn.top1 has none"):
        results.choose(knn, read_all(knn, list(scores)))


def test_a_metric_that_no_probe_gives_names_those_there_are(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, primary="logistic.top2")
    jobs = write_runs(plan)
    with pytest.raises(
        StudyError, match=r"'logistic.top2', which no probe gives .* logistic.top1, logistic.top5"
    ):
        read_score(jobs[0], plan.primary, Val(LABELS, "v"))


def test_runs_that_were_scored_otherwise_are_left_out_by_name(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    jobs = write_runs(plan)
    fake_run(jobs[1], val="other images")
    fake_run(jobs[2], epochs=9)
    scores = {job: read_score(job, plan.primary, None) for job in jobs}
    lines = same_protocol(scores)
    assert list(lines) == [jobs[1].name, jobs[2].name] and len(scores) == len(jobs) - 2
    assert "(val): evaluate it again" in lines[jobs[1].name]
    assert "(probe): evaluate it again" in lines[jobs[2].name]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("eval.json", "{", "is damaged"),
        ("eval.json", None, "cannot read .*eval.json"),
        ("metrics.jsonl", "x\n", "line 1 is no JSON object"),
        ("environment.json", "{", "cannot read .*environment.json"),
        (
            "features/s-pre-trained-logistic-predictions.npy",
            "x",
            "predictions.npy: .*evaluate the run",
        ),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    plan = make_plan(tmp_path)
    job = write_runs(plan)[0]
    (job.run.path / name).unlink()
    if text is not None:
        (job.run.path / name).write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_score(job, plan.primary, Val(LABELS, "v"))
    assert "\n" not in str(caught.value)


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    job = write_runs(plan)[0]
    with pytest.raises(InputError, match="has 40 predictions for 41 val images"):
        read_score(job, plan.primary, Val(np.zeros(41, int), "v"))

    words = "was scored on other images than val now has"
    with pytest.raises(InputError, match=words) as caught:
        read_score(job, plan.primary, Val(LABELS, "w"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "told", [{"draws": 5}, {"corrupted": "the center crops of val", "accuracies": {"fog 1": 0.5}}]
)
def test_one_of_several_draws_or_clean_images_say_nothing_of_single_images(
    tmp_path: Path, told: dict
) -> None:
    plan = make_plan(tmp_path)
    job = write_runs(plan)[0]
    assert read_score(job, plan.primary, Val(LABELS, "v")).correct is not None
    found = json.loads(job.run.evaluation.read_text())
    for row in found["rows"]:
        row["protocol"]["probe"].update(told)
    job.run.evaluation.write_text(json.dumps(found))
    score = read_score(job, plan.primary, Val(LABELS, "v"))
    assert score.correct is None and "accuracies" not in score.protocol["probe"]


def test_arms_without_a_common_seed_have_no_gain(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    jobs = [
        job for job in write_runs(plan)
        if (job.arm == "default") == (job.pair == 0) and job.arm in ("default", "lower")
    ]  # fmt: skip
    report = results.report(plan, read_all(plan, jobs), [], set(), {})
    found = rows(report)
    assert found["lower"]["conclusion"] == (
        "no seed in common with default: nothing can be concluded"
    )
    assert found["idle"]["conclusion"] == "no run has a result"
    for form in (table.text, table.as_csv, table.as_markdown, table.as_latex):
        assert "nan" not in form(report)


def test_the_tables_have_one_line_per_arm_and_the_numbers_of_the_report(
    report: dict[str, Any],
) -> None:
    lines = table.text(report).splitlines()
    assert lines[0].split()[:3] == ["arm", "n", "logistic.top1"]
    assert re.search(r"^lower +3 +62.50 ± 4.33 +\+10.00 +\+3.79 to \+16.21 +0.04\d? +\+1.03 +yes$",
                     lines[2])  # fmt: skip
    assert f"s, lower: {rows(report)['lower']['conclusion']}." in lines
    assert "a cpu" in lines[-2] and "commit cccccccccc;" in lines[-2]
    found = list(csv.DictReader(io.StringIO(table.as_csv(report))))
    assert [line["arm"] for line in found] == list(RIGHT)
    assert float(found[1]["gain_low"]) == pytest.approx(rows(report)["lower"]["gain_low"], rel=1e-5)
    assert table.as_markdown(report).splitlines()[3].startswith("| s | lower | 3 | 62.50 ± 4.33 |")


def test_latex_has_booktabs_rules_as_many_cells_and_no_bare_mark(report: dict[str, Any]) -> None:
    report["sets"][0]["rows"][1]["arm"] = "50% & more_of #1"
    text = table.as_latex(report)
    lines = text.splitlines()
    columns = re.fullmatch(r"\\begin\{tabular\}\{(\w+)\}", lines[0])
    assert columns and len(columns[1]) == len(table.HEAD)
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    for line in lines[2:-2]:
        assert line == r"\midrule" or len(re.findall(r"(?<!\\)&", line)) == len(table.HEAD) - 1
    assert r"50\% \& more\_of \#1 & 3 & 62.50 $\pm$ 4.33 & $+10.00$ & $+3.79$ to $+16.21$" in text
    assert r"logistic.top1 (\%)" in lines[2]
