"""From a real journal to the figure's lines."""

import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from fastproj import report
from fastproj.core.errors import run_command
from fastproj.report import curves, draw, spectra
from fastproj.runs.journal import Journal, read


def write_run(folder, epochs=4, first=0, **more):
    """A journal as training writes it, of epochs whose numbers can be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / "metrics.jsonl", main=True, total=40, start=10 * first) as book:
        book.event("start", steps=40)
        for epoch in range(first, first + epochs):
            book.event("step", step=10 * epoch + 5, epoch=epoch, loss=99.0, lr=0.1)
            book.event(
                "epoch",
                step=10 * (epoch + 1),
                epoch=epoch,
                steps=10,
                loss=5.0 - epoch,
                online_probe=0.1 * epoch,
                diagnostics={
                    "negative_loss_minus_information": -6.0 - epoch,
                    "negative_loss_minus_information_std": 0.5,
                    "entropy_minus_information": 1.0 + epoch,
                    "entropy_minus_information_std": 0.25,
                    "rankme_features": 30.0 + epoch,
                    "dead_latents": 0.25,
                    "spectrum_features": [[1, 0.5 + 0.01 * epoch], [2, 0.25], [9, 0.0]],
                    "spectrum_projections": [[1, 0.75], [4, 0.25]],
                },
                seconds={"data_wait": 0.5, "step": 2.0, "pause": 0.0},
                **more,
            )
            if epoch % 2:
                book.event(
                    "probe",
                    step=10 * (epoch + 1),
                    epoch=epoch,
                    online_top1=0.1 * epoch,
                    online_top5=0.2 * epoch,
                    online_knn_top1=0.3,
                    seconds=1.5,
                    protocol={"knn": {"k": 20, "temperature": 0.07}},
                )
    return folder / "metrics.jsonl"


def write_config(folder):
    """The run's settings, of another name and place: what is given on the command line counts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "data: {train: none.beton}\nrun: {dir: elsewhere, name: other}\n"
    )
    return str(folder)


def lines(figure: Figure) -> dict[str, tuple[list, list]]:
    """Every line by its label."""
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.get_lines()
    }


def test_curves_are_what_the_epochs_told(tmp_path):
    found = curves(read(write_run(tmp_path)))
    epochs = [1, 2, 3, 4]
    assert found == {
        "loss": (epochs, [5.0, 4.0, 3.0, 2.0]),
        "online_probe": (epochs, pytest.approx([0.0, 0.1, 0.2, 0.3])),
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
    events = read(write_run(tmp_path, epochs=3))
    wanted = {
        "spectrum_features": ([1, 2, 9], [0.52, 0.25, 0.0]),
        "spectrum_projections": ([1, 4], [0.75, 0.25]),
    }
    assert spectra(events) == wanted
    assert spectra([*events, {"event": "epoch", "epoch": 3, "diagnostics": {}}]) == wanted
    assert spectra(events[:2]) == {}
    found = curves(events)
    (axes,) = [a for a in draw("r", found, wanted).axes if a.get_title().startswith("singular")]
    drawn = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }
    assert drawn == wanted and axes.get_yscale() == "log"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["features", "projections"]
    assert axes.get_xlabel() == "singular value, from the largest"


def test_an_epoch_in_two_parts_counts_once(tmp_path):
    write_run(tmp_path, epochs=2)
    path = write_run(tmp_path, epochs=2, first=1, sparsehead=0.5)  # epoch 1 again, to its end
    found = curves(read(path))
    assert found["loss"] == ([1, 2, 3], [5.0, 4.0, 3.0])
    assert found["online_knn_top1"] == ([2], [0.3])
    assert found["penalty.sparsehead"] == ([2, 3], [0.5, 0.5])


def test_an_interrupted_epoch_and_its_rest(tmp_path):
    """As a signal leaves it: both parts stay in the journal, and the second is the later one."""
    with Journal(tmp_path / "metrics.jsonl", main=True, total=10) as book:
        book.event("epoch", step=4, epoch=0, steps=4, loss=5.0)
    with Journal(tmp_path / "metrics.jsonl", main=True, total=10, start=4) as book:
        book.event("start")
        book.event("epoch", step=10, epoch=0, steps=6, loss=3.0)
    assert curves(read(tmp_path / "metrics.jsonl")) == {"loss": ([1], [3.0])}


def test_the_figure_has_a_panel_a_measure(tmp_path):
    found = curves(read(write_run(tmp_path, objective=3.0, matrix_information=0.5)))
    figure = draw("my run", found | {"new_measure": ([1, 2], [7.0, 8.0])})
    assert figure.get_suptitle() == "my run"
    drawn = lines(figure)
    stds = {name for name in found if name.endswith("_std")}
    assert drawn.keys() == found.keys() - stds | {"new_measure"}
    for name in ("loss", "rankme_features", "entropy_minus_information", "penalty.objective"):
        assert drawn[name] == found[name]
    for name in ("online_probe", "online_top1", "dead_latents"):  # shares, in per cent
        assert drawn[name] == (found[name][0], pytest.approx([100 * v for v in found[name][1]]))
    assert [axes.get_title() for axes in figure.axes] == [
        *["loss", "online probe", "online accuracy", "authors' curves (trends only)", "RankMe"],
        *["dead latents", "new measure", "penalty: matrix information"],
    ]
    for axes in figure.axes:
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel()
        assert (axes.get_legend() is not None) == (len(axes.get_lines()) > 1)
    authors = figure.axes[3]
    texts = [text.get_text() for text in authors.get_legend().get_texts()]
    assert texts == ["S₂(h) − I₂(h; z)", "−loss(h) − I₂(h; z)"]
    names = [line.get_label() for line in authors.get_lines()]
    assert names == ["entropy_minus_information", "negative_loss_minus_information"]
    for band, name in zip(authors.collections, names, strict=True):  # mean ± std
        corners = band.get_paths()[0].vertices
        for x, y in zip(*found[name], strict=True):
            std = found[f"{name}_std"][1][0]
            assert {y - std, y + std} <= {float(v) for at, v in corners if at == x}


def test_every_diagnostic_has_its_panel():
    """What the trainer can tell is drawn with a title and a unit, none as a left-over."""
    told = ["negative_loss_features", "log_n_minus_nce_features", "matrix_entropy_features"]
    told += ["matrix_information", "negative_loss_minus_information", "entropy_minus_information"]
    stds = [f"{name}_std" for name in told]
    told += ["used_codes", "near_zero_groups", "dead_latents", "loss", "online_probe"]
    told += ["online_top1", "online_top5", "online_knn_top1"]
    told += [f"{m}_{of}" for m in ("alignment", "uniformity", "rankme")
             for of in ("features", "projections")]  # fmt: skip
    figure = draw("all", {name: ([1], [0.5]) for name in told + stds})
    assert lines(figure).keys() == set(told)
    assert [axes.get_title() for axes in figure.axes] == [panel.title for panel in report.PANELS]


def test_the_command_writes_the_picture(tmp_path, capsys, monkeypatch):
    titles = []
    monkeypatch.setattr(report, "draw", lambda *given: titles.append(given[0]) or draw(*given))
    write_run(tmp_path / "first")
    write_run(tmp_path / "second", epochs=1)
    for name in ("first", "second"):
        with pytest.raises(SystemExit) as left:
            run_command(report.main, [write_config(tmp_path / name)])
        assert left.value.code == 0
        picture = tmp_path / name / "diagnostics.png"
        assert capsys.readouterr().out == f"written: {picture}\n"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
        assert {path.name for path in picture.parent.iterdir()} == {
            *["config.yaml", "metrics.jsonl", picture.name]
        }
    assert titles == ["first", "second"]


@pytest.mark.parametrize("started", [True, False])
def test_a_run_without_epochs_is_one_line(tmp_path, capsys, started):
    if started:
        write_run(tmp_path / "run", epochs=0)
    with pytest.raises(SystemExit) as left:
        run_command(report.main, [write_config(tmp_path / "run")])
    assert left.value.code == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    words = "holds no epoch yet" if started else "is this a run folder?"
    assert len(error) == 1 and words in error[0] and str(tmp_path / "run") in error[0]
    assert not (tmp_path / "run/diagnostics.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    write_run(tmp_path / "run")
    script = (
        "import sys; sys.modules['matplotlib'] = None  # as if it were not installed\n"
        "from fastproj import report\n"
        "from fastproj.core.errors import run_command\n"
        "run_command(report.main)"
    )
    command = [sys.executable, "-c", script, write_config(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the report needs matplotlib") and "fastproj-ssl[report]" in line
