"""``eval.json`` written and read back, and files that are none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastproj import demo
from fastproj.core.errors import InputError
from fastproj.evaluation.results import Evaluation, Row, read_evaluation, table, write_evaluation
from fastproj.runs.folder import RunFolder
from fastproj.runs.journal import Journal


def row(encoder: str = "pre-trained", probe: str = "knn", top1: float = 0.5, **chosen) -> Row:
    protocol = {"data": {}, "features": {"width": 8}, "probe": {"chosen": chosen}}
    metrics, seconds = {"top1": top1, "top5": 0.9}, {"features": 1.5, "probe": 0.25}
    return Row(encoder, "digits", probe, metrics, protocol, seconds, "features/a.npy")


EVALUATION = Evaluation({"file": "step-1.pt", "step": 1}, {"torch": "2"}, (row(),))


def test_what_is_written_is_read(tmp_path):
    run, classes = RunFolder(tmp_path), torch.tensor([3, 1, 2])
    write_evaluation(run, EVALUATION, {"features/a.npy": classes})
    assert read_evaluation(run) == EVALUATION
    kept = np.load(run.path / read_evaluation(run).rows[0].predictions)
    assert kept.dtype == np.uint8 and kept.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda found: found | {"schema": 1}, "has schema 1, expected 2"),
        (lambda found: {k: v for k, v in found.items() if k != "schema"}, "has schema 1"),
        (lambda found: [found], "has schema None"),
        (lambda found: found | {"rows": [{"encoder": "pre-trained"}]}, "its entries differ"),
        (lambda found: {k: v for k, v in found.items() if k != "versions"}, "its entries differ"),
        (lambda found: found | {"more": 1}, "its entries differ"),
    ],
)
def test_another_file_is_one_line(tmp_path, change, words):
    run = RunFolder(tmp_path)
    write_evaluation(run, EVALUATION, {})
    run.evaluation.write_text(json.dumps(change(json.loads(run.evaluation.read_text()))))
    with pytest.raises(InputError, match=rf"eval\.json .*{words}.*evaluate the run again"):
        read_evaluation(run)


def test_a_missing_and_a_cut_file_are_one_line(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(InputError, match="cannot read .*evaluate the run first"):
        read_evaluation(run)
    run.evaluation.write_text('{"schema": 2, "rows"')
    with pytest.raises(InputError, match="is damaged"):
        read_evaluation(run)


def test_predictions_that_cannot_be_written_leave_the_earlier_file(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "features").touch()
    with pytest.raises(InputError, match="cannot write .*features"):
        write_evaluation(run, EVALUATION, {"features/a.npy": torch.zeros(1)})
    assert not run.evaluation.exists()


def test_the_table_tells_what_limits_a_choice():
    limited = row(edge=["learning rate"], classes_not_held_out=3, learning_rate=0.3)
    text = table(replace(EVALUATION, rows=(row(top1=0.123), limited))).splitlines()
    assert len(text) == 5 and "12.30%" in text[1] and "lr 0.3" in text[2]
    assert "learning rate chosen at the end of the list" in text[3]
    assert "3 classes have one training image" in text[4]


def test_the_table_fits_100_columns_and_tells_ties_and_further_scores():
    tied = row(probe="few_shot", tie=True, learning_rate=0.03, weight_decay=0.001)
    tied.metrics["top1_10%"] = 0.75
    tied.protocol["probe"]["tolerance"] = 1e-6
    tied.protocol["probe"]["chosen"] |= {"suboptimality": 2e-4, "not_finite": [30.0]}
    text = table(replace(EVALUATION, rows=(tied,))).splitlines()
    assert max(map(len, text)) <= 100
    assert text[2:] == [
        "pre-trained, few_shot: also top1_10% 75.00%",
        "pre-trained, few_shot: all entries tie on the held-out images: the choice says nothing",
        "pre-trained, few_shot: solved only to 2e-04 of the objective",
        "pre-trained, few_shot: diverged at learning rate 30.0",
    ]


def test_the_demos_table_has_a_line_per_encoder(tmp_path):
    run = RunFolder(tmp_path)
    names = ("pixels", "random", "pre-trained")
    rows = tuple(
        row(encoder, probe, 0.1 * i + 0.5 * (probe == "knn"))
        for i, encoder in enumerate(names, start=1)
        for probe in ("logistic", "knn")
    )
    write_evaluation(run, replace(EVALUATION, rows=rows), {})
    with Journal(run.metrics, main=True, total=1) as book:
        book.event("end", step=1, images_per_second=1234.5)
    lines = demo.table(run, {"evaluate": 2.0}).splitlines()
    assert [line.split()[-2:] for line in lines[1:4]] == [
        ["10.00%", "60.00%"], ["20.00%", "70.00%"], ["30.00%", "80.00%"],
    ]  # fmt: skip
    assert lines[4:] == ["pre-training: 1,234 images/s", "seconds: evaluate 2.0"]
