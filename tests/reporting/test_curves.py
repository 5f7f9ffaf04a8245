"""From a real journal to curves."""

import pytest

from fastproj.reporting import curves
from fastproj.runs.journal import Journal, read
from tests.support.journals import write_journal


def test_curves_are_what_the_epochs_said(tmp_path):
    found = curves.curves(read(write_journal(tmp_path)))
    epochs = [1, 2, 3, 4]
    assert found == {
        "loss": (epochs, [5.0, 4.0, 3.0, 2.0]),
        "online_probe": (epochs, pytest.approx([0.0, 0.1, 0.2, 0.3])),
        "matrix_information": (epochs, pytest.approx([1.0, 0.9, 0.8, 0.7])),
        "matrix_information_std": (epochs, [0.05] * 4),
        "negative_loss_minus_information": (epochs, [-6.0, -7.0, -8.0, -9.0]),
        "negative_loss_minus_information_std": (epochs, [0.5] * 4),
        "entropy_minus_information": (epochs, [1.0, 2.0, 3.0, 4.0]),
        "entropy_minus_information_std": (epochs, [0.25] * 4),
        "rankme_features": (epochs, [30.0, 31.0, 32.0, 33.0]),
        "dead_latents": (epochs, [0.25] * 4),
        "online_top1": ([2, 4], pytest.approx([0.1, 0.3])),
        "online_top5": ([2, 4], pytest.approx([0.2, 0.6])),
        "online_knn_top1": ([2, 4], [0.3, 0.3]),
    }


def test_the_spectra_are_those_of_the_last_epoch_that_has_them(tmp_path):
    events = read(write_journal(tmp_path, epochs=3))
    wanted = {
        "spectrum_features": ([1, 2, 9], [0.52, 0.25, 0.0]),
        "spectrum_projections": ([1, 4], [0.75, 0.25]),
    }
    assert curves.spectra(events) == wanted
    assert curves.spectra([*events, {"event": "epoch", "epoch": 3, "diagnostics": {}}]) == wanted
    assert curves.spectra(events[:2]) == {}


def test_an_epoch_in_two_parts_counts_once(tmp_path):
    write_journal(tmp_path, epochs=2)
    path = write_journal(tmp_path, epochs=2, first=1, sparsehead=0.5)  # epoch 1 again, to its end
    found = curves.curves(read(path))
    assert found["loss"] == ([1, 2, 3], [5.0, 4.0, 3.0])
    assert found["online_knn_top1"] == ([2], [0.3])
    assert found["penalty.sparsehead"] == ([2, 3], [0.5, 0.5])


def test_an_interrupted_epoch_and_its_rest(tmp_path):
    """As a signal leaves it: both parts stay in the journal, and the second is the later one."""
    path = tmp_path / "metrics.jsonl"
    with Journal(path, main=True, total=10) as book:
        book.event("epoch", step=4, epoch=0, steps=4, loss=5.0,
                   seconds={"data_wait": 0.0, "step": 1.0, "pause": 0.5})  # fmt: skip
    with Journal(path, main=True, total=10, start=4) as book:
        book.event("start")
        book.event("epoch", step=10, epoch=0, steps=6, loss=3.0,
                   seconds={"data_wait": 0.0, "step": 2.0, "pause": 0.0})  # fmt: skip
    assert curves.curves(read(path)) == {"loss": ([1], [3.0])}
    assert curves.times(read(path)) == {
        "data_wait": ([1], [0.0]), "step": ([1], [3.0]), "pause": ([1], [0.5]),
    }  # fmt: skip


def test_the_terms_of_the_loss_at_the_logged_steps():
    events = [
        {"event": "step", "step": n, "loss": 3.0, "terms": {"objective": 1.0 + n, "sparsehead": n}}
        for n in range(1, 4)
    ]
    wanted = {"objective": ([1, 2, 3], [2.0, 3.0, 4.0]), "sparsehead": ([1, 2, 3], [1, 2, 3])}
    assert curves.terms([{"event": "start", "step": 0}, *events]) == wanted
    assert curves.terms([{"event": "step", "step": 1, "loss": 3.0}]) == {}


def test_many_logged_steps_become_means_of_neighbors():
    events = [{"event": "step", "step": n, "loss": n % 7} for n in range(1, 1001)]
    places, values = curves.steps(events, "loss")
    assert len(places) <= curves.POINTS and places[0] == 3 and places[-1] == 1000
    wanted = [[n % 7 for n in range(at, min(at + 3, 1001))] for at in range(1, 1001, 3)]
    assert values == pytest.approx([sum(part) / len(part) for part in wanted])
    few = curves.steps(events[:5], "loss")
    assert few == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) and curves.steps(events, "lr") == ([], [])


def test_every_diagnostic_has_its_panel():
    """What the trainer logs is drawn with a title and a unit, none as a left-over."""
    told = ["negative_loss_features", "log_n_minus_nce_features", "matrix_entropy_features"]
    told += ["matrix_information", "negative_loss_minus_information", "entropy_minus_information"]
    stds = [f"{name}_std" for name in told]
    told += ["used_codes", "near_zero_groups", "dead_latents", "loss", "online_probe"]
    told += ["online_top1", "online_top5", "online_knn_top1"]
    told += [f"{m}_{of}" for m in ("alignment", "uniformity", "rankme")
             for of in ("features", "projections")]  # fmt: skip
    assert curves.panels(told + stds) == curves.PANELS
    *_, new, penalty = curves.panels([*told, "new_measure", "penalty.matrix_information"])
    assert (new.title, penalty.title) == ("New measure", "Penalty: matrix information")
    assert penalty.group == "training" and new.group == "diagnostics"
    for panel in [*curves.PANELS, curves.SPECTRA, new, penalty]:
        assert panel.axis and panel.how.endswith(".")
