"""The evaluation of a real, short run on real digits."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj import export
from fastproj.core.errors import InputError, SettingError
from fastproj.data.beton import open_beton
from fastproj.evaluate import evaluate, main
from fastproj.evaluation.features import Features
from fastproj.evaluation.pretrained import load_pretrained, save_pretrained
from fastproj.evaluation.probes.neighbors import knn
from fastproj.evaluation.probes.regression import logistic
from fastproj.evaluation.results import Row, read_evaluation, table, write_evaluation
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Source, open_sources
from fastproj.runs.command import open_run
from fastproj.runs.folder import RunFolder
from fastproj.settings import RUN, Settings, load
from fastproj.train import train
from tests.support import betons

CLASSES = tuple("0123456789")
BASELINES = ("--eval.baselines", "true")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of two betons (200 and 100 digits) and of a run of four steps."""
    root = Path(tmp_path_factory.mktemp("evaluate"))
    for source, count in zip(open_sources("digits", None, "all", False), (200, 100), strict=True):
        some = {n: getattr(source, n)[:count] for n in ("images", "labels", "names")}
        betons.write(replace(source, **some), root, Store("raw"))
    argv = f"""--run.dir {root} --run.name run --run.device cpu --data.train {root}/train.beton
        --data.val {root}/val.beton --views.size 8 --model.encoder resnet_small
        --projector.hidden 32 --projector.out 16 --optim.batch_size 50 --optim.epochs 1
        --optim.warmup_epochs 0 --train.keep 9 --eval.logistic_strengths 1e-3,1e-2
        --eval.knn_k 5"""
    train(load(RUN, argv.split(), "test", ""))
    return root


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A copy of it: what one test writes into the run is not another's, and the run has moved."""
    shutil.copytree(trained / "run", tmp_path / "moved")
    return tmp_path


def opened(root: Path, *options: str) -> tuple[RunFolder, Settings]:
    return open_run([str(root / "moved"), *options], "test", "")


def rows(root: Path, *options: str) -> list[Row]:
    return list(evaluate(*opened(root, *options))[0].rows)


def test_the_file_holds_a_header_and_one_row_per_encoder_and_probe(root):
    run, settings = opened(root, *BASELINES)
    evaluation, predictions = evaluate(run, settings)
    assert not run.evaluation.exists()  # evaluating writes nothing
    write_evaluation(run, evaluation, predictions)
    found = json.loads(run.evaluation.read_text())
    assert list(found) == ["schema", "checkpoint", "versions", "rows"] and found["schema"] == 2
    assert [(row["encoder"], row["data"], row["probe"]) for row in found["rows"]] == [
        (encoder, "test", probe)
        for encoder in ("pixels", "random", "pre-trained")
        for probe in ("logistic", "knn")
    ]
    newest = run.checkpoints / "step-00000004.pt"
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    assert found["checkpoint"] == {"file": str(newest), "sha256": digest, "step": 4, "epoch": 1}
    assert found["versions"]["torch"] and found["versions"]["device"] == "cpu"
    for row in found["rows"]:
        data, features, probe = (row["protocol"][part] for part in ("data", "features", "probe"))
        assert [data[split]["images"] for split in ("train", "val")] == [200, 100]
        assert features["crop"] == {"kind": "center", "size": 8, "crop_fraction": 1.0}
        assert all(seconds > 0 for seconds in row["seconds"].values())
        if row["probe"] == "logistic":
            assert probe["strengths"] == [1e-3, 1e-2] and probe["seed"] == 0
        else:
            assert probe["k"] == [5]
        assert f"{row['metrics']['top1']:.2%}" in table(evaluation)
    assert asdict(read_evaluation(run)) == json.loads(
        json.dumps(asdict(evaluation)), object_hook=_with_tuples
    )
    assert not list(run.path.rglob("*.tmp"))


def _with_tuples(found: dict) -> dict:
    lists = {"rows", "missing"} & found.keys()
    return found | {name: tuple(found[name]) for name in lists}


def test_a_choice_on_labels_that_the_encoder_has_seen_is_said(trained):
    argv = f"""--run.dir {trained} --run.name supcon --run.device cpu --views.size 8
        --data.train {trained}/train.beton --data.val {trained}/val.beton --eval.knn_k 5
        --model.encoder resnet_small --projector.hidden 32 --projector.out 16
        --optim.batch_size 50 --optim.epochs 1 --optim.warmup_epochs 0 --objective.name supcon"""
    run = RunFolder(train(load(RUN, argv.split(), "test", "")))
    words = "labels the encoder had seen: give one value of each"
    for run_folder, options, said in (
        (run.path, ["--eval.logistic_strengths", "1e-3,1e-2"], True),
        (run.path, ["--eval.logistic_strengths", "1e-2"], False),
        (trained / "run", ["--eval.cache", "false"], False),
    ):
        evaluation, _ = evaluate(*open_run([str(run_folder), *options], "test", ""))
        assert (words in table(evaluation)) == said


def test_the_predictions_give_the_accuracy(root):
    main([str(root / "moved")])
    run = RunFolder(root / "moved")
    labels = open_beton(read_evaluation(run).rows[0].protocol["data"]["val"]["file"]).label
    for row in read_evaluation(run).rows:
        predicted = np.load(run.path / row.predictions)
        assert predicted.dtype == np.uint8
        assert (predicted == labels).mean() == pytest.approx(row.metrics["top1"], abs=1e-6)


def test_probes_on_new_crops_are_rows_of_the_encoder_alone(root):
    found = rows(
        root, *BASELINES, "--eval.probes", "knn,published_cifar_barlow,solo,finetune",
        "--eval.published_cifar_barlow_epochs", "2", "--eval.solo_epochs", "1",
        "--eval.published_cifar_barlow_learning_rates", "0.3,3",
        "--eval.finetune_epochs", "1", "--eval.finetune_labels", "0.5",
        "--eval.crops", "five", "--eval.crop_fraction", "0.875", "--train.precision", "bfloat16",
    )  # fmt: skip
    on_crops = ["published_cifar_barlow", "solo", "finetune"]
    assert [(row.encoder, row.probe) for row in found] == [
        ("pixels", "knn"),
        *((name, probe) for name in ("random", "pre-trained") for probe in ("knn", *on_crops)),
    ]
    barlow, solo, tuned = (row.protocol["probe"] for row in found[-3:])
    assert barlow["optimizer"] == "lars" and barlow["learning_rates"] == [0.3, 3]
    assert (barlow["epochs"], barlow["images"], barlow["batch_size"]) == (2, 200, 200)
    assert solo["method"] == "simclr" and solo["crop"]["size"] == 8
    assert barlow["encoder"] == solo["encoder"] == "frozen, eval mode, bfloat16 in training"
    assert tuned["labels"] == 0.5 and 95 <= tuned["images"] <= 105  # stratified
    crops = [row.protocol["features"]["crop"]["kind"] for row in found[-4:]]
    assert crops == ["five"] + ["center"] * 3  # of val: what the published protocols score
    for row in found[-3:]:
        assert 0 < row.metrics["top1"] < 1 and row.seconds["probe"] > 0
    # The encoder that fine-tuning copied is as it was: kNN scores it the same again.
    again = ("--eval.probes", "knn", "--eval.crops", "five", "--eval.crop_fraction", "0.875")
    assert found[5].metrics == rows(root, *again)[0].metrics


def test_raw_pixels_equal_the_probes_on_the_stored_bytes(root, trained):
    sets = [open_beton(trained / f"{split}.beton") for split in ("train", "val")]
    plain = []
    for beton in sets:
        x = np.stack([beton.stored(i) for i in range(len(beton))]).astype(np.float32) / 255
        plain.append(Features(torch.from_numpy(x), torch.from_numpy(beton.label)))
    how = opened(root)[1].eval
    linear = logistic(*plain, 10, strengths=how.options["logistic_strengths"], seed=0)
    solved, nearest, *_ = rows(root, *BASELINES)
    assert solved.protocol["features"]["width"] == 192
    assert solved.metrics["top1"] == pytest.approx(linear.metrics["top1"], abs=0.011)  # one image
    assert nearest.metrics == knn(*plain, 10, k=how.options["knn_k"]).metrics


def test_the_random_encoder_is_the_one_pre_training_started_from(root):
    first = root / "moved/checkpoints/step-00000000.pt"
    found = rows(root, *BASELINES, "--eval.checkpoint", str(first))
    scores = [(row.probe, row.metrics, row.protocol["probe"]) for row in found]
    assert scores[2:4] == scores[4:6]
    weights = [row.protocol["features"]["encoder"]["weights"] for row in found[2:]]
    assert weights == ["as initialized from seed 0"] * 2 + ["of the checkpoint"] * 2
    last = rows(root)[0]
    assert last.protocol["probe"] != found[4].protocol["probe"]  # training did something


def test_depths_of_a_run_are_rows_and_a_baseline_has_no_projector(root):
    found = rows(root, *BASELINES, "--eval.depths", "h,hidden1,z")
    names = ["pixels", "random", "pre-trained", "pre-trained/hidden1", "pre-trained/z"]
    assert [row.encoder for row in found[::2]] == names
    widths = [row.protocol["features"]["width"] for row in found[::2]]
    assert widths == [192, 256, 256, 32, 16]
    assert found[-1].predictions == "features/test-pre-trained-z-knn-predictions.npy"
    again = rows(root, "--eval.depths", "z")  # from features/, computed by the call before
    assert [row.metrics for row in again] == [row.metrics for row in found[-2:]]
    assert len(list((root / "moved/features").glob("*.pt"))) == 2 + 3 * 2
    _fails(root, "has no hidden2; it has layer1, ", "--eval.depths", "hidden2")


def test_the_command_prints_the_table(root, capsys):
    main([str(root / "moved")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:5] == ["encoder", "data", "probe", "top-1", "top-5"]
    assert [line.split()[:3] for line in out[1:3]] == [
        ["pre-trained", "test", "logistic"], ["pre-trained", "test", "knn"],
    ]  # fmt: skip
    assert out[-1] == f"written: {root / 'moved/eval.json'}"


def test_a_table_that_cannot_be_kept_is_printed_first(root, capsys):
    (root / "moved/eval.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*eval\.json.*table above was not kept"):
        main([str(root / "moved")])
    assert capsys.readouterr().out.startswith("encoder ")


FAILING = ("--eval.probes", "knn,few_shot", "--eval.few_shot_labels", "500")


def test_a_probe_that_fails_leaves_the_rows_of_the_others(root, capsys):
    report = root / "moved/eval.json"
    words = "probe few_shot of pre-trained on test: few_shot takes 500 .*; the other rows are in "
    for probes in ("few_shot,knn", "knn,few_shot"):  # the second replaces what is not whole
        with pytest.raises(InputError, match=words) as refused:
            main([str(root / "moved"), *FAILING, "--eval.probes", probes])
        assert "\n" not in str(refused.value)
        out = capsys.readouterr().out.splitlines()
        assert out[1].split()[:3] == ["pre-trained", "test", "knn"]
        assert out[-1].startswith("missing: probe few_shot of pre-trained on test: few_shot takes")
        found = read_evaluation(RunFolder(root / "moved"))
        assert [row.probe for row in found.rows] == ["knn"] and len(found.missing) == 1
        assert (root / "moved" / found.rows[0].predictions).is_file()
    main([str(root / "moved")])
    whole = report.read_bytes()
    assert b"missing" not in whole
    capsys.readouterr()
    words = "eval.json holds a whole evaluation and stays as it is; the table above was not kept"
    with pytest.raises(InputError, match=words) as refused:
        main([str(root / "moved"), *FAILING, *BASELINES])
    assert "(and 2 more, see above)" in str(refused.value) and report.read_bytes() == whole
    assert capsys.readouterr().out.count("\nmissing: ") == 3  # of the pixels and at random too


def test_a_set_that_cannot_be_read_leaves_the_rows_of_the_sets_before_it(root, trained, capsys):
    other = root / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("run"))
    image = open_beton(other / "val.beton").stored(50).tobytes()
    content = bytearray((other / "val.beton").read_bytes())
    content[content.index(image) + 20] ^= 1
    (other / "val.beton").write_bytes(content)
    with pytest.raises(InputError, match="other/val.beton.*; the other rows are in ") as refused:
        main([str(root / "moved"), "--eval.sets", str(other), "--eval.cache", "false"])
    assert "\n" not in str(refused.value)
    found = read_evaluation(RunFolder(root / "moved"))
    assert [row.data for row in found.rows] == ["test", "test"] and len(found.missing) == 1


def without_run(root: Path, trained: Path, file: Path, *options: str) -> Row:
    sets = ["--data.train", f"{trained}/train.beton", "--data.val", f"{trained}/val.beton"]
    how = ["--run.device", "cpu", "--eval.probes", "knn", "--eval.knn_k", "5"]
    out = root / "out"
    main([*sets, *how, "--eval.checkpoint", str(file), "--eval.out", str(out), *options])
    (row,) = read_evaluation(RunFolder(out)).rows
    return row


def test_a_checkpoint_without_its_run_has_the_crops_of_its_training(root, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    export.main([str(root / "moved")])
    expected = rows(root, "--eval.probes", "knn")[0]
    assert expected.protocol["features"]["crop"]["size"] == 8
    exported = root / "moved/export/model.safetensors"
    for file in (root / "moved/checkpoints/step-00000004.pt", exported):
        row = without_run(root, trained, file)
        assert row.metrics == expected.metrics
        assert row.protocol["features"] == expected.protocol["features"]
    old = root / "old.safetensors"  # as exports were before they said it
    save_pretrained(replace(load_pretrained(exported), size=None), old)
    with pytest.raises(InputError, match="the images of resnet_small have: give --eval.size PIX"):
        without_run(root, trained, old)
    assert without_run(root, trained, old, "--eval.size", "8").metrics == expected.metrics


def test_the_command_line_changes_the_crops_of_a_run(root):
    for name in ("views", "eval"):
        (row,) = rows(root, "--eval.probes", "knn", f"--{name}.size", "12")
        assert row.protocol["features"]["crop"]["size"] == 12


def test_a_choice_at_the_end_of_its_list_is_printed(root):
    options = ("--eval.probes", "sgd", "--eval.sgd_learning_rates", "1e-7,3",
               "--eval.sgd_epochs", "20", "--eval.sgd_weight_decays", "0")  # fmt: skip
    evaluation, _ = evaluate(*opened(root, *options))
    assert "pre-trained, sgd: learning rate" in table(evaluation).splitlines()[2]


def test_an_export_is_evaluated_as_its_checkpoint_is(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # ONNX takes seconds, and is not asked for
    export.main([str(root / "moved")])
    exported = root / "moved/export/model.safetensors"
    direct, of_export = rows(root), rows(root, "--eval.checkpoint", str(exported))
    assert [row.metrics for row in direct] == [row.metrics for row in of_export]
    evaluation, _ = evaluate(*opened(root, "--eval.checkpoint", str(exported)))
    assert evaluation.checkpoint["step"] == 4 and evaluation.checkpoint["file"] == str(exported)


@pytest.mark.parametrize("kind", ["cut", "header", "weights", "metadata", "of others"])
def test_a_damaged_export_is_called_that(root, kind, monkeypatch):
    from safetensors.torch import load_file, save_file

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    export.main([str(root / "moved")])
    path = root / "moved/export/model.safetensors"
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[: len(content) // 2]
    elif kind == "of others":
        save_file(load_file(path), path)
        content = bytearray(path.read_bytes())
    else:
        at = {
            "header": 3,
            "weights": len(content) - 2,
            "metadata": content.index(b'"step":"4"') + 8,
        }
        content[at[kind]] ^= 1
    path.write_bytes(content)
    words = "no export of fastproj" if kind == "of others" else "is a damaged export"
    _fails(root, words, "--eval.checkpoint", str(path))


def write_split(folder: Path, split: str, classes: tuple[str, ...], labels: list[int]) -> str:
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    source = Source(split, classes, images, np.array(labels), [str(i) for i in labels])
    return str(betons.write(source, folder, Store("raw")).path)


@pytest.mark.parametrize(
    "classes, labels, words",
    [
        (("0", "1", "two", *CLASSES[3:]), [0] * 5, "has class 2 where .* has two"),
        (CLASSES[:4], [0] * 5, "has class 4 where .* has None"),
        (CLASSES, [-1] * 5, "validation labels run from -1"),
    ],
)
def test_sets_that_do_not_belong_together(root, tmp_path, classes, labels, words):
    _fails(root, words, "--data.val", write_split(tmp_path, "val", classes, labels))


def test_one_class(root, tmp_path):
    one = write_split(tmp_path, "one", ("0",), [0] * 5)
    _fails(root, "at least 2", "--data.train", one, "--data.val", one)


def test_one_image_per_class(root, tmp_path):
    single = write_split(tmp_path, "single", CLASSES, list(range(10)))
    _fails(root, "every class has one training image", "--data.train", single, "--eval.knn_k", "1")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data.val", "null"), "data.val is missing"),
        (("--eval.checkpoint", "nothing.pt"), "nothing.pt"),
        (("--eval.checkpoint", "nothing.safetensors"), "no export nothing.safetensors"),
        (("--eval.knn_k", "201"), "k = 201"),
        (("--eval.few_shot_labels", "500", "--eval.probes", "few_shot"), "few_shot takes 500"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(root, options, words):
    _fails(root, words, *options)


def test_a_run_without_checkpoint(root):
    shutil.rmtree(root / "moved/checkpoints")
    _fails(root, "holds no checkpoint")


def test_a_checkpoint_cut_in_half(root, tmp_path):
    whole = (root / "moved/checkpoints/step-00000004.pt").read_bytes()
    half = tmp_path / "half.pt"
    half.write_bytes(whole[: len(whole) // 2])
    _fails(root, "damaged", "--eval.checkpoint", str(half))


def _fails(root: Path, words: str, *options: str) -> None:
    """The command ends with one line and leaves an earlier report as it was."""
    report = root / "moved/eval.json"
    report.write_text("an earlier one")
    with pytest.raises(InputError, match=words) as caught:
        main([str(root / "moved"), *options])
    assert "\n" not in str(caught.value)
    assert report.read_text() == "an earlier one"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "give one run folder, not none"),
        (["RUN", "RUN"], "give one run folder, not RUN RUN"),
        (["--eval.baselines", "RUN"], "give one run folder, not none"),
        (["RUN", "--cfg", "rcfg/cifar10.yaml"], "takes no --cfg"),
        (["RUN", "--eval.sgd_epohcs", "3"], "did you mean --eval.sgd_epochs"),
        (["RUN", "--eval.knn_k"], "--eval.knn_k needs a value"),
    ],
)
def test_a_wrong_command_line_is_a_setting_error(root, argv, words):
    argv = [word.replace("RUN", str(root / "moved")) for word in argv]
    with pytest.raises(SettingError, match=words.replace("RUN", str(root / "moved"))):
        main(argv)


def test_help_needs_no_run_and_names_the_folder(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: python -m fastproj.evaluate FOLDER") and "--cfg" not in usage
