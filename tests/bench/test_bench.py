"""The benchmark measures what it says, names what it does not measure, and writes it down."""

import importlib.util
import json
import mmap
import platform
import re
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from fastproj.bench import (
    Engine,
    Plan,
    Row,
    chain,
    compare,
    decode,
    detection,
    endtoend,
    features,
    growth,
    heads,
    loaders,
    logistic,
    neighbors,
    peers,
    probe,
    published,
    start,
    step,
    timed,
    views,
)  # fmt: skip
from fastproj.bench.__main__ import ALONE, STAGES, bench, main, number, table
from fastproj.bench.alone import alone, memory
from fastproj.bench.images import are_jpegs, as_files, describe, several_times
from fastproj.bench.picture import draw
from fastproj.core.errors import InputError, run_command
from fastproj.data.beton import Beton
from fastproj.evaluation.probes.sgd import fit
from fastproj.evaluation.probes.softmax import certify, solve
from fastproj.prepare.encode import Store
from fastproj.settings import BENCH, load
from tests.support.betons import digit_like, photographs, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 30, 16, 3)
    return write(source, tmp_path_factory.mktemp("small"), Store("raw"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    folder = tmp_path_factory.mktemp("photos")
    source = photographs(np.random.default_rng(0), folder / "files", 12)
    return write(source, folder / "beton", Store("jpeg", quality=90))


def plan(photos: Beton | None = None, small: Beton | None = None, repeats: int = 1) -> Plan:
    return Plan(photos, None, small, torch.device("cpu"), 1, repeats)


def measured(rows: list[Row], repeats: int = 1) -> dict[str, Row]:
    """The rows by engine, each with a rate between its bounds."""
    for row in rows:
        assert row.rate and row.slowest and row.fastest and row.seconds and not row.missing
        assert row.slowest <= row.rate <= row.fastest and row.repeats == repeats
    return {row.engine: row for row in rows}


def engine(name: str, calls: list[str], role: Any = "ours", work: int = 1) -> Engine:
    def prepare() -> Any:
        calls.append(f"prepare {name}")
        return lambda: calls.append(name)

    return Engine(name, role, work, prepare)


def test_engines_take_turns_after_their_warm_up() -> None:
    calls: list[str] = []
    warm = replace(engine("c", calls), warm=True)
    rows = compare("s", "c", "u", [engine("a", calls), engine("b", calls), warm], 2, 3)
    prepared = ["prepare a", "a", "a", "prepare b", "b", "b", "prepare c"]
    assert calls == [*prepared, *["a", "b", "c"] * 3]
    assert list(measured(rows, 3)) == ["a", "b", "c"]
    assert {(row.stage, row.case, row.unit) for row in rows} == {("s", "c", "u")}


def test_rates_are_work_over_seconds_and_shares_are_of_the_limit() -> None:
    def lasting(name: str, role: Any, work: int, seconds: list[float]) -> Engine:
        left = iter([9.0, *seconds])
        return Engine(name, role, work, lambda: lambda: next(left))

    ours, peer, limit = compare("s", "c", "u", [
        lasting("ours", "ours", 100, [1.0, 4.0, 2.0]), lasting("peer", "peer", 10, [2.0] * 3),
        lasting("limit", "limit", 400, [4.0, 4.0, 2.0]),
    ], 1, 3)  # fmt: skip
    assert (ours.rate, ours.slowest, ours.fastest, ours.seconds) == (50, 25, 100, 2)
    assert (ours.share, peer.share, limit.share) == (0.5, 0.05, None)


def test_an_engine_that_cannot_be_imported_is_named_as_missing() -> None:
    def prepare() -> Any:
        import no_such_peer

        return no_such_peer

    calls: list[str] = []
    gone, here = compare("s", "c", "u", [Engine("x", "peer", 1, prepare), engine("y", calls)], 1, 1)
    assert gone.missing == "No module named 'no_such_peer'" and gone.rate is None
    assert here.rate
    text = table([asdict(gone), asdict(here)])
    assert re.search(r"x +peer +– +missing: No module named 'no_such_peer'", text)


def test_a_call_that_fails_is_no_missing_engine() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare("s", "c", "u", [Engine("x", "peer", 1, lambda: fails)], 1, 1)


@pytest.mark.parametrize(
    ("rate", "text"), [(25389.4, "25,389"), (100, "100"), (12.34, "12.3"), (0.04211, "0.0421")]
)
def test_numbers_have_three_digits(rate: float, text: str) -> None:
    assert number(rate) == text


def test_a_set_listed_several_times_is_the_same_set(small: Beton) -> None:
    many = several_times(small, 61)
    assert len(many) == 90 and many.index.tolist() == list(range(90))
    hashes = small.manifest.sample_hashes()
    assert np.array_equal(many.manifest.sample_hashes(), np.tile(hashes, (3, 1)))
    for i in range(90):
        assert np.array_equal(many.stored(i), small.stored(i % 30))
        assert many.label[i] == small.label[i % 30]


def test_files_hold_the_stored_bytes_and_go_again(photos: Beton, small: Beton) -> None:
    assert are_jpegs(photos) and not are_jpegs(small)
    with as_files(photos) as files:
        assert [Path(f).read_bytes() for f in files] == [bytes(photos.stored(i)) for i in range(12)]
    assert not Path(files[0]).exists()


@pytest.mark.slow  # a process
def test_a_process_of_its_own_gives_its_last_words() -> None:
    given = {"rows": 4, "sizes": [8, 64, 8, 2], "device": "cpu", "repeats": 1}
    with pytest.raises(InputError, match="heads.measured: (?s:.*)KeyError: 'no head'"):
        alone(heads.measured, name="no head", **given)


def test_memory_of_this_process() -> None:
    before = memory("VmRSS")
    kept = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE)  # new pages, not reused heap
    kept.write(b"1" * len(kept))
    assert memory("VmHWM") >= memory("VmRSS") > memory("RssAnon") >= len(kept)
    assert memory("VmRSS") - before > 0.9 * len(kept)
    with pytest.raises(OSError, match="has no VmNothing"):
        memory("VmNothing")


def test_decode_beside_its_limit(photos: Beton) -> None:
    rows = measured(decode.run(plan(photos), images=24, size=32, batch=7))
    assert {row.role for row in rows.values()} == {"ours", "limit"}
    assert rows["stream"].share and rows["stream"].case == "padded batches of 7, jpeg store"


@pytest.mark.slow  # FFCV compiles its pipeline
def test_every_loader_is_measured_on_the_same_images(photos: Beton, small: Beton) -> None:
    rows = loaders.run(plan(photos, small), images=24, photo=32, small=16)
    for row in rows:
        assert row.rate or row.missing, row
    found = {(row.case.split(",")[1].split()[0], row.engine) for row in rows}
    both = {"stream", "dali", "ffcv", "torch DataLoader + torchvision", "FFCV"}
    jpegs = both | {"DALI from files", "SPDL from files", "decode alone"}
    raw = both | {"resident", "memory copy"}
    assert found == {("jpeg", name) for name in jpegs} | {("raw", name) for name in raw}


def test_detections_input_beside_torchvisions(photos: Beton) -> None:
    rows = detection.run(plan(photos), images=6)
    assert [row.role for row in rows] == ["ours", "peer", "peer", "limit"] * 2
    assert all(row.rate for row in rows)


@pytest.mark.parametrize("make", [peers.torchvision_views, peers.pillow_views])
def test_torchvisions_chain_gives_normalized_floats(make: Any, photos: Beton) -> None:
    decoded = peers.pillow(np.array(photos.stored(0)))
    torch.manual_seed(0)  # a view that is brightened much has no pixel below the mean
    view = make(chain.SIMCLR[0], 32)(decoded)
    assert view.shape == (3, 32, 32) and view.dtype == torch.float32 and view.min() < 0


@pytest.mark.slow
def test_the_chain_beside_its_peers(photos: Beton) -> None:
    rows = measured(chain.run(plan(photos), images=24, rounds=1, size=16, batch=4))
    assert [row.role for row in rows.values()] == ["ours", "peer", "peer", "peer", "limit"]


@pytest.mark.slow  # compiles
def test_views_beside_their_peers_on_a_sets_own_crops(photos: Beton, small: Beton) -> None:
    cases = (("photos", 16, 4, 2), ("small", 16, 4, 2))
    assert not views.run(plan(small=small), cases[:1])
    rows = measured(views.run(plan(photos), cases))
    assert {row.case for row in rows.values()} == {"16 px, batch 4, jpeg store, all operations"}
    assert list(rows) == ["augment", "chain", "chain, compiled", "kornia", "torchvision", "lightly",
                          "memory copy"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.soak
def test_heads_with_the_memory_of_a_step() -> None:
    rows = measured(heads.run(plan(), rows=64, sizes=(64, 20_000, 64, 20)))
    weights = 4 * 20_000 * 128  # bytes
    for name in heads.HEADS:
        peak = rows[name].peak_bytes
        assert peak and 3 * weights < peak < 20 * weights
    assert rows["matrix products"].peak_bytes is None


def test_both_heads_are_one_function() -> None:
    torch.manual_seed(0)
    sparse = heads.Sparse(8, 32, 8, 4)
    plain = heads.Plain(8, 32, 8, 4)
    plain.load_state_dict(
        {
            "encoder.weight": sparse.encoder.weight,
            "encoder.bias": sparse.encoder.bias,
            "decoder.weight": sparse.decoder.T,
            "decoder.bias": sparse.bias,
            "pre_bias": torch.randn(8),
        }
    )
    sparse.pre_bias.data = plain.pre_bias.data
    x = torch.randn(5, 8)
    assert torch.allclose(plain(x), sparse(x), atol=1e-6)


def test_the_step_waits_for_data_as_long_as_it_says(small: Beton) -> None:
    rows = measured(step.run(plan(small=small), batch=6, steps=2), step.TURNS)
    assert list(rows) == ["resident", "stream", "the step on ready data"]
    assert all(re.fullmatch(r"data wait \d+\.\d%", rows[n].note) for n in ("resident", "stream"))


def test_probes_one_by_one_are_those_of_the_grid() -> None:
    rows = measured(probe.run(plan(), images=512, features=8, classes=3, epochs=1))
    assert [row.role for row in rows.values()] == ["ours", "peer", "limit"]
    x, y = torch.randn(300, 9), torch.arange(300) % 3
    every = torch.arange(300)
    grid = [(0.1, 1e-3), (0.3, 1e-2)]
    together = fit(x, y, every, 3, grid, 2, 64, 0)
    for head, each in zip(together, grid, strict=True):
        assert torch.allclose(head, fit(x, y, every, 3, [each], 2, 64, 0)[0], atol=1e-5)


def test_scikit_learns_path_reaches_the_same_objective_and_accuracy() -> None:
    ours, theirs, limit = logistic.run(plan(), 300, 200, 8, classes=(3,), strengths=(0.01, 0.1))
    assert [row.role for row in (ours, theirs, limit)] == ["ours", "peer", "limit"]
    assert ours.rate and theirs.rate and limit.rate and not theirs.missing
    accuracy = re.fullmatch(r"certified: \S+ of the objective; (\S+) % of 200 others", ours.note)
    assert accuracy and float(accuracy[1]) > 50
    apart = re.fullmatch(
        r"LogisticRegression, .*, tol 1e-0\d, \d thread\(s\), objective within 1e-05; "
        r"accuracies at most (\S+) points from ours",
        theirs.note,
    )
    assert apart and float(apart[1]) <= 0.5  # one of 200


def test_a_path_that_ends_too_far_away_is_given_up() -> None:
    x, y = logistic.correlated(300, 8, 3)
    strengths = torch.tensor([0.1, 0.01], dtype=torch.float64)
    best = solve(x, y, 3, strengths).objective
    peer = logistic.ScikitLearn(x, y, strengths, best)
    peer.prepare()
    _, values, _ = certify(x, y, peer.heads, strengths)
    assert ((values - best) / best).max() <= logistic.EXCESS
    assert peer.solve(1.0, 1, closely=True)[0] is None and peer.solve(1.0, 1)[0] is not None
    beyond = logistic.ScikitLearn(x, y, strengths, best / 2)
    with pytest.raises(AssertionError, match="does not come within 1e-05"):
        beyond.prepare()


def test_features_beside_the_encoder_as_trained(small: Beton) -> None:
    found = measured(features.run(plan(small=small), 18, 16))
    assert [row.role for row in found.values()] == ["ours", "peer", "peer", "limit"]
    assert {row.case for row in found.values()} == {"resnet_small, 16 px, 18 images"}
    assert not features.run(plan())


def test_neighbors_beside_brute_force_of_others() -> None:
    rows = neighbors.run(plan(), images=300, queries=40, features=8, classes=3)
    assert [row.role for row in rows] == ["ours", "peer", "peer", "limit"]
    assert {"knn", "scikit-learn"} <= measured(rows).keys()


def test_a_probe_on_new_crops_beside_plain_torch(small: Beton) -> None:
    rows = published.run(plan(small=small), 30, 6, 16, encoders=("resnet_small",))
    found = measured(rows)
    roles = [row.role for row in rows]
    assert roles == ["ours"] * (len(rows) - 2) + ["peer", "limit"] and len(rows) in (4, 6)
    assert "ours, 6 learning rate(s), float32" in found
    assert {row.case for row in rows} == {"resnet_small, 16 px, batch 6, 30 images"}
    assert not published.run(plan())


def test_end_to_end_on_few_images(small: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"no such engine": ("peer", lambda job, seed: __import__("no_such_peer"))}
    monkeypatch.setattr(endtoend, "ENGINES", endtoend.ENGINES | missing)
    rows = endtoend.run(
        plan(small=small), images=18, held_out=6, epochs=1, seeds=2, batch=6, size=16
    )  # fmt: skip
    *here, gone = rows
    assert gone.missing == "No module named 'no_such_peer'"
    assert here[-1].engine == endtoend.PEER and "minus" not in here[-1].note
    for row in here[:-1]:
        assert re.fullmatch(
            r"linear \S+ ± \S+ \(minus lightly \S+, 95 % \S+ to \S+\); kNN .*\)", row.note
        )
    found = measured([row for row in here if not row.missing], 2)
    assert {row.case for row in rows} == {
        "resnet_small, SimCLR, 16 px, batch 6, 1 epochs of 18 images"
    }
    first = found["ours, both views in one pass"]
    assert first.seconds and first.rate == pytest.approx(18 / first.seconds)
    assert not endtoend.run(plan())


def test_end_to_end_trains_the_same_weights_on_disjoint_images(small: Beton) -> None:
    train, val = endtoend._split(small, 12, 6)
    assert len(train) == 12 and len(val) == 6
    assert not set(train.pointer.tolist()) & set(val.pointer.tolist())
    assert np.bincount(train.label).tolist() == [4] * 3
    assert np.bincount(val.label).tolist() == [2] * 3
    job = endtoend.Job(train, 1, 6, 16, "resnet_small", plan(small=small))
    one, other, third = (job.build(seed) for seed in (0, 0, 1))
    for mine, same, another in zip(
        one[0].parameters(), other[0].parameters(), third[0].parameters(), strict=True
    ):
        assert torch.equal(mine, same)
        assert mine.ndim == 1 or not torch.equal(mine, another)
    image, label = endtoend.RawImages(train, np.array)[5]
    assert np.array_equal(image.ravel(), train.stored(5)) and label == train.label[5]


def test_paired_differences_are_scipys() -> None:
    ours, theirs = [51.0, 53.0, 52.5], [50.0, 51.0, 52.0]
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    text = endtoend.paired(ours, theirs)
    assert text == f"minus lightly +1.17, 95 % {low:+.2f} to {high:+.2f}"
    assert endtoend.paired([2.0], [1.0]) == "minus lightly +1.00"


def test_a_stage_that_takes_long_is_no_part_of_all(
    small: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda plan, name=name: ran.append(name) or [])
    settings = load(BENCH, ["--out", str(tmp_path / "x.json")], "", "")
    assert len(list(bench("all", settings))) == len(ran) == len(STAGES) - len(ALONE)
    assert not set(ALONE) & set(ran)
    assert len(list(bench("endtoend", settings))) == 1 and ran[-1] == "endtoend"


def test_a_first_batch_is_timed_after_the_imports(photos: Beton) -> None:
    given = {"path": str(photos.path), "size": 16, "batch": 4, "workers": 1, "device": "cpu"}
    before, seconds = start.first_batch(engine="stream", **given)
    assert 0 < seconds < before


@pytest.mark.slow  # a process each
def test_a_start_that_lacks_its_engine(photos: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (start.ENGINES[0], ("x", "peer", None, "no_such_peer"))
    monkeypatch.setattr(start, "ENGINES", given)
    ours, gone = start.run(plan(photos), size=16, batch=4)
    assert gone.missing == "No module named 'no_such_peer'" and not gone.note
    assert measured([ours]) and re.fullmatch(r"Python and imports before it: \d+\.\d s", ours.note)


@pytest.mark.slow  # a process a point
@pytest.mark.soak
def test_growth_has_a_point_for_each_place(photos: Beton, small: Beton) -> None:
    rows = growth.run(plan(photos, small), 64, workers=(1,), pixels=(16,), batches=(8,),
                      latents=(200,), photo=32, small=16)  # fmt: skip
    points: dict[str, list[str]] = {}
    for row in rows:
        assert row.rate and row.peak_bytes and row.peak_bytes > 0
        points.setdefault(row.case.partition(":")[0], []).append(row.engine)
    assert points == {
        "workers": ["1"], "pixels": ["16"], "batch": ["8"], "latents": ["200"],
        "epochs": ["1", "2", "3"] * 2,
    }  # fmt: skip


def test_what_is_read_is_counted(small: Beton) -> None:
    result = growth.read(str(small.path), "auto", 60, 8, True, 16, 1, "cpu", 2)
    assert result["work"] == 56 and len(result["seconds"]) == len(result["held"]) == 3


def test_the_file_says_what_was_measured_and_not_where(
    photos: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bench.json"
    options = ["--bench.photos", str(photos.path), "--repeats", "1", "--out", str(out)]
    with pytest.raises(SystemExit) as left:
        run_command(main, ["decode", *options])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "not measured: stages that need squares, small" in said and "decode alone" in said
    text = out.read_text()
    assert not re.search(r'"[^"]*/(tmp|home|root|usr|work)\b', text) and platform.node() not in text
    result = json.loads(text)
    assert [row["engine"] for row in result["rows"]] == ["stream", "decode alone"]
    assert result["environment"]["packages"].keys() >= {"torch", "ffcv", "dali", "spdl", "kornia"}
    assert result["settings"]["photos"] == describe(photos)
    assert result["settings"]["photos"]["images"] == 12 and result["settings"]["small"] is None
    assert out.with_suffix(".svg").read_text().count("decode: padded batches") == 1


def test_a_stage_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(main, ["stairs"])
    assert left.value.code == 2
    assert "no stage 'stairs' to measure" in capsys.readouterr().err


def row(stage: str, case: str, name: str, role: Any, rate: float | None = None) -> dict[str, Any]:
    bounds = {} if rate is None else {"slowest": rate * 0.9, "fastest": rate * 1.1, "seconds": 1.0}
    missing = "" if rate else "it is not here"
    peak = 10**9 if stage == "growth" else None
    made = Row(stage, case, name, role, "images", rate, **bounds, peak_bytes=peak, missing=missing)
    return asdict(made)


ROWS = [
    row("loaders", "two crops of 224 px, jpeg store", "stream", "ours", 2000),
    row("loaders", "two crops of 224 px, jpeg store", "dali", "ours", 1500),
    row("loaders", "two crops of 224 px, jpeg store", "FFCV", "peer", 800),
    row("loaders", "two crops of 224 px, jpeg store", "SPDL from files", "peer"),
    row("loaders", "two crops of 224 px, jpeg store", "decode alone", "limit", 4000),
    row("growth", "workers: two crops", "1", "ours", 500),
    row("growth", "workers: two crops", "2", "ours", 900),
]


def test_one_picture_of_all_cases_and_always_the_same(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(ROWS, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for shown in ("stream", "dali", "FFCV", "decode alone", "2,000", "workers"):
        assert shown in text
    assert "SPDL" not in text


@pytest.fixture(scope="module")
def maker() -> Any:
    """tools/performance.py, a script and no package."""
    path = ROOT / "tools" / "performance.py"
    spec = importlib.util.spec_from_file_location("make_performance", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes_now(maker: Any) -> None:
    written = maker.PAGE.read_text(encoding="utf-8")
    assert written == maker.page(maker.load()), "run: python tools/performance.py"


def test_ratios_are_of_the_fastest_of_each_side(maker: Any) -> None:
    cells = maker.ratios(ROWS)
    found = {(line[0], line[3]): line[1:] for line in cells[1:]}
    assert found["decode and two exact crops", "decode alone"] == [
        "stream", "2,000 images/s", "decode alone", "4,000 images/s", "0.50"
    ]  # fmt: skip
    assert found["the same", "FFCV"][-1] == "2.50"
    assert sum(line[-1] == "not measured" for line in cells) == len(maker.RATIOS) - 2


def test_a_page_says_what_is_missing_and_what_was_not_measured(maker: Any) -> None:
    environment = {"packages": {"torch": "2.15.0", "dali": None}, "git": None, "gpus": ["H100"],
                   "cores": 4, "cpu": "Xeon", "platform": "Linux", "python": "3.11"}  # fmt: skip
    sets = {"photos": None, "squares": None, "small": None}
    result = {
        "environment": environment,
        "settings": {"workers": 4, **sets},
        "threads": 4,
        "rows": ROWS,
    }
    page = maker.page({"bench-cpu.json": result})
    assert "| SPDL from files | peer |" in page and "missing: it is not here" in page
    assert "H100, 4 cores of Xeon" in page and "dali" not in page.partition("## Ratios")[0]
    assert "| workers | images/s |" in page and "1.00 GB" in page


def test_seconds_are_the_clocks_or_the_calls_own() -> None:
    assert timed(lambda: 3.5) == 3.5
    assert 0 < median(timed(lambda: None) for _ in range(5)) < 0.1
