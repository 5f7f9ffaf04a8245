"""One function per kind of hostile input: see ``damage.Fuzzed``."""

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from PIL import Image

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.evaluation.load import load_encoder
from fastproj.prepare.encode import Store, encode_chunk
from fastproj.reporting import curves
from fastproj.reporting.read import read_run
from fastproj.runs import checkpoint, journal, resume
from fastproj.runs.command import open_run
from fastproj.runs.folder import RunFolder
from fastproj.settings import (
    BENCH,
    DEMO,
    EMBED,
    PREPARE,
    REPORT,
    RUN,
    SEGMENT,
    STUDY,
    TRANSFER,
    load,
)
from fastproj.study import build_plan
from fastproj.training.build import build_trainer
from tests.faults.betons import adopted_files, beton_bits, beton_tables, manifests
from tests.faults.damage import STORES, VALUES, Damage, Fuzzed, damaged, write_again
from tests.support.betons import digit_like, photographs, write_here

ROOT = Path(__file__).parents[2]

LINES = [
    "1", "-1", "0", "1e400", ".nan", "~", "''", "true", "[]", "[1, [2]]", "{a: b}", "{}", "&x [*x]",
    "*x", "!!python/object:os.system x", "!!binary aGk=", "|", "'", "<<: x", "? x", "knn,linear",
    "9" * 400, "\t", "\u2028", "é", "2024-01-01", "0x10", "1_0", "a: b: c", "- 1", "[[[[[[[[",
]  # fmt: skip


@st.composite
def _changed_lines(take: DrawFn, text: str) -> bytes:
    lines = text.splitlines()
    for _ in range(take(st.integers(1, 4))):
        at = take(st.integers(0, len(lines) - 1))
        name = lines[at].partition(":")[0]
        value = take(st.sampled_from(LINES) | st.text(max_size=12))
        changed = take(st.sampled_from([f"{name}: {value}", f"  {lines[at]}", lines[at].strip(), "",
                                        f"{lines[at]}\n{lines[-1 - at]}", value]))  # fmt: skip
        lines[at] = changed
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def yaml_settings(folder: Path) -> Fuzzed:
    """recipes, a run's config.yaml and studies: any bytes, any line"""
    folder.joinpath("config.yaml").write_text(load(RUN, ["--data.train", "x"], "p", "").to_yaml())
    runs = [ROOT / "rcfg/demo.yaml", ROOT / "rcfg/cifar10_swav_multicrop.yaml",
            folder / "config.yaml"]  # fmt: skip
    studies = [ROOT / "rcfg/study/digits.yaml", ROOT / "rcfg/study/digits_lambda.yaml"]
    path = folder / "case.yaml"

    def read(case: tuple[bool, bytes | Damage]) -> None:
        argv = ["--cfg", str(write_again(path, case[1]))]
        read = None
        with suppress(InputError):
            if case[0]:
                build_plan(load(STUDY, argv, "fastproj study", ""))
            else:
                read = load(RUN, argv, "fastproj train", "")
        if read is not None:  # what a run writes of it is read as the same
            write_again(path, read.to_yaml().encode())
            assert load(RUN, argv, "fastproj train", "").flat() == read.flat()

    def cases(files: Sequence[Path], study: bool) -> SearchStrategy[tuple[bool, bytes | Damage]]:
        texts = [file.read_text() for file in files]
        damages = [damaged(text.encode()) for text in texts]
        return st.tuples(st.just(study), st.one_of([*map(_changed_lines, texts), *damages]))

    return st.one_of(cases(runs, False), cases(runs, False), cases(studies, True)), read


def command_lines(folder: Path) -> Fuzzed:
    """command lines of every command"""
    schemas = {"train": RUN, "evaluate": RUN, "export": RUN, "embed": EMBED, "study": STUDY,
               "report": REPORT, "prepare": PREPARE, "demo": DEMO, "bench": BENCH,
               "transfer": TRANSFER, "segment": SEGMENT}  # fmt: skip
    names = sorted({f"--{name}" for schema in schemas.values() for name in schema.params})
    value = st.sampled_from([*LINES, "null", "cifar", "simclr", "1,2", str(folder), "--", "-h"])
    name = st.sampled_from([*names, "--cfg", "--debug", "--plugins", "--help", "--run.resume"])
    word = st.one_of(name, st.tuples(name, value).map("=".join), value, st.text(max_size=8))
    pair = st.tuples(name, value)
    words = st.lists(st.one_of(pair, pair, st.tuples(word)), max_size=8)

    def read(case: tuple[str, list[tuple[str, ...]]]) -> None:
        command, argv = case[0], [word for words in case[1] for word in words]
        # The system's refusal (a name of 400 digits) is one line of the command as well.
        refused = (InputError, OSError, SystemExit)
        with suppress(*refused), contextlib.redirect_stdout(io.StringIO()):
            if command in ("evaluate", "export"):
                open_run(argv, f"fastproj {command}", "")
            else:
                load(schemas[command], argv, f"fastproj {command}", "")

    return st.tuples(st.sampled_from([*schemas]), words), read


LEAVES: list[Any] = [
    None, True, -1, 0, 7, 2**70, 0.5, float("nan"), float("inf"), "", "x", [], {}, [[]], (1, 2),
    torch.zeros(()), torch.zeros(0), torch.zeros(3, 5), torch.tensor(float("nan")),
    torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64), torch.ones(1, 1),
    torch.zeros(1).expand(2**40), torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"),
    {"state": {}, "param_groups": []}, {0: torch.zeros(2)},
]  # fmt: skip


@st.composite
def _changed_state(take: DrawFn, state: Any) -> Any:
    """A copy of nested dicts and lists, one of whose entries is another or gone."""
    keys = [*state] if isinstance(state, dict) else [*range(len(state))]
    copy: Any = dict(state) if isinstance(state, dict) else list(state)
    key = take(st.sampled_from(keys))
    if isinstance(copy[key], dict | list) and copy[key] and take(st.integers(0, 5)):
        copy[key] = take(_changed_state(copy[key]))
    elif take(st.integers(0, 4)):
        copy[key] = take(st.sampled_from(LEAVES))
    else:
        del copy[key]
    return copy


def _zipped(parts: dict[str, bytes]) -> bytes:
    """Records with right checksums, whatever is in them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        for name, content in parts.items():
            records.writestr(name, content)
    return file.getvalue()


def checkpoints(folder: Path) -> Fuzzed:
    """checkpoints to resume from and to evaluate: any bytes, any pickle, any entry"""
    beton = write_here(digit_like(np.random.default_rng(0), 16, 12, 4), folder, STORES[0])
    given = {"data.train": beton.path, "run.device": "cpu", "model.encoder": "resnet_small",
             "views.size": 8, "projector.hidden": 16, "projector.out": 8, "optim.batch_size": 4,
             "optim.epochs": 2, "optim.warmup_epochs": 0, "optim.optimizer": "adamw",
             "train.precision": "float32"}  # fmt: skip
    settings = load(RUN, [f"--{name}={value}" for name, value in given.items()], "p", "")
    trainer = build_trainer(settings, dist.Rank(0, 1, 0), torch.device("cpu"), beton)
    for batch in trainer.epoch():
        trainer.train_step(batch)
    whole = {"settings": settings.flat(), "data": "d", "mean": beton.manifest.mean,
             "std": beton.manifest.std, **trainer.state_dict()}  # fmt: skip
    path = checkpoint.step_path(folder, trainer.step)
    checkpoint.save(path, whole, 1)
    content = path.read_bytes()
    load_encoder(path)  # a whole one is read
    with zipfile.ZipFile(path) as records:
        parts = {name: records.read(name) for name in records.namelist()}
    pickle = next(name for name in parts if name.endswith("data.pkl"))

    def read(case: dict[str, Any] | Damage) -> None:
        if isinstance(case, dict):
            torch.save(case, path)
        elif len(case.whole) == len(content):
            write_again(path, case)
        else:
            write_again(path, _zipped({**parts, pickle: bytes(case)}))
        with suppress(InputError):
            found = load_encoder(path)
            found.module.eval()(torch.zeros(1, 3, 8, 8) - torch.tensor(found.mean)[:, None, None])
        with suppress(InputError):
            resume.restore(path, settings.flat(), "d", beton.path, trainer.load_state_dict)
            trainer.train_step(next(iter(trainer.epoch())))

    return st.one_of(_changed_state(whole), damaged(content), damaged(parts[pickle])), read


@st.composite
def _changed_events(take: DrawFn, events: list[dict[str, Any]]) -> bytes:
    lines = [json.dumps(event) for event in events]
    for _ in range(take(st.integers(1, 3))):
        at = take(st.integers(0, len(lines) - 1))
        event = take(st.sampled_from(events))
        if take(st.booleans()):
            name = take(st.sampled_from([*event, "step", "event"]))
            kept = {key: value for key, value in event.items() if key != name}
            lines[at] = json.dumps(kept | ({name: take(VALUES)} if take(st.booleans()) else {}))
        else:
            lines[at : at + take(st.integers(0, 2))] = [json.dumps(take(VALUES))]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")


def journals(folder: Path) -> Fuzzed:
    """journals, as report, train and evaluate read them: any bytes, any event"""
    run = RunFolder(folder)
    run.config.write_text(load(RUN, ["--data.train", "x"], "p", "").to_yaml())
    seconds = {"data_wait": 0.1, "step": 0.5, "pause": 0.1}
    events: list[dict[str, Any]] = [
        {"event": "start", "time": 1.0, "step": 0, "steps": 4, "loader": "resident"},
        {"event": "step", "time": 2.0, "step": 1, "epoch": 0, "loss": 2.5, "lr": 0.1,
         "images_per_second": 10.0, "data_wait": 0.1},
        {"event": "epoch", "time": 3.0, "step": 2, "epoch": 0, "steps": 2, "loss": 2.0,
         "online_probe": 0.5, "seconds": seconds, "diagnostics": {"rank": 3.0, "eigen": [1, 0.5]}},
        {"event": "probe", "time": 3.5, "step": 2, "epoch": 0, "knn": 0.3, "linear": 0.4},
        {"event": "checkpoint", "time": 4.0, "step": 2, "file": "step-00000002.pt"},
        {"event": "error", "time": 4.5, "message": "x"},
        {"event": "end", "time": 5.0, "step": 4, "seconds": seconds, "images_per_second": 9.0},
    ]  # fmt: skip
    text = "".join(json.dumps(event) + "\n" for event in events).encode()

    def read(content: bytes | Damage) -> None:
        write_again(run.metrics, content)
        with suppress(InputError):
            found = read_run(run)
            found.status()
            resume.finished(run)
            lines = curves.curves(found.events)
            curves.panels(lines)
            curves.spectra(found.events)
            curves.steps(found.events, "loss")
            curves.times(found.events)
            with journal.Journal(run.metrics, True, 4, 4) as written:
                meter = journal.StepMeter(written, 16, 1)
                with contextlib.redirect_stderr(io.StringIO()):
                    meter.end(4)

    return damaged(text) | _changed_events(events), read


def image_files(folder: Path) -> Fuzzed:
    """image files that a set is prepared from: JPEG, PNG, GIF, TIFF, BMP, WebP, PPM"""
    photographs(np.random.default_rng(0), folder / "photographs", 1)
    with Image.open(folder / "photographs" / "0.jpg") as file:
        picture = file.resize((40, 30))
    turned = picture.getexif()
    turned[0x0112] = 6
    saved: list[bytes] = []
    for mode, kind, how in (
        ("RGB", "JPEG", {"exif": turned}), ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "PNG", {}), ("P", "PNG", {}),
        ("I;16", "PNG", {}), ("RGBA", "PNG", {}), ("P", "GIF", {}), ("RGB", "TIFF", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "BMP", {}), ("RGB", "WEBP", {}),
        ("RGB", "PPM", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        (picture.convert("L") if mode == "I;16" else picture).convert(mode).save(
            buffer, kind, **how
        )
        saved.append(buffer.getvalue())

    def read(case: tuple[Store, Damage]) -> None:
        chunk = encode_chunk([bytes(case[1])], [0], case[0])
        assert len(chunk.results) == 1

    return st.tuples(st.sampled_from(STORES), st.one_of([*map(damaged, saved)])), read


INPUTS: dict[str, Callable[[Path], Fuzzed]] = {
    kind.__name__: kind
    for kind in (
        *(beton_tables, beton_bits, adopted_files, manifests, yaml_settings, command_lines),
        *(checkpoints, journals, image_files),
    )
}
