"""Command: one HTML page on runs or on a study. ``python -m fastproj.report runs/NAME``

One run: everything that it has so far. Several runs: what differs, and their curves over one
another. A study's folder: gains, sweeps and sentences. The page loads nothing from anywhere, and
goes into the folder of the run or study; that of several runs goes to ``report.html`` here.
"""

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from fastproj.__main__ import main as run_as_script

    run_as_script("report")

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastproj.core.device import choose_device
from fastproj.core.errors import InputError, SettingError
from fastproj.core.files import lock, write_text, writing
from fastproj.data.beton import Beton, open_beton
from fastproj.data.subset import subset
from fastproj.evaluate import find_checkpoint, open_extractor
from fastproj.evaluation.load import load_encoder
from fastproj.evaluation.protocol import normalization
from fastproj.loaders import Center, Loader, open_loader
from fastproj.reporting.comparison import comparison_page
from fastproj.reporting.page import Page
from fastproj.reporting.read import Reported, read_run
from fastproj.reporting.run import Pictures, run_page
from fastproj.reporting.samples import Embedded, Views, shares
from fastproj.reporting.study import read_study, study_page
from fastproj.runs.command import require_pretraining, split
from fastproj.runs.folder import RunFolder
from fastproj.settings import REPORT, RUN, Settings, load
from fastproj.training.build import build_augmentations, build_crops

PROG = "python -m fastproj.report"
SHOWN = 6  # training images whose views are shown
DRAWN = 2000  # views per crop for which operations are counted
EMBEDDED = 1000  # val images at most whose features are shown
SIDE = 64  # of a shown image at most, pixels
STUDY = "study.json"


@dataclass
class Reporter:
    """Makes the page of ``folders`` as often as asked; what needs weights once per checkpoint."""

    folders: Sequence[Path]
    _kept: dict[Any, Pictures] = field(default_factory=dict)

    def page(self) -> tuple[Page, bool]:
        """The page as things stand, and whether nothing more will come.

        Raises ``InputError`` for a folder that is neither a run nor a study, and for a damaged one.
        """
        studies = [path for path in self.folders if _is_study(path)]
        if studies and len(self.folders) > 1:
            raise InputError(f"{studies[0]} is a study: give it alone, or run folders")
        if studies:
            return _of_study(studies[0])
        runs = [read_run(RunFolder.open(path)) for path in self.folders]
        over = all(run.over for run in runs)
        if len(runs) > 1:
            return comparison_page(runs, f"{len(runs)} runs"), over
        return run_page(runs[0], self._pictures(runs[0])), over

    def _pictures(self, run: Reported) -> Pictures:
        """What needs the data and weights of the run; where it cannot be had, why not."""
        try:
            require_pretraining(run.folder)
            settings = load(RUN, [], PROG, "", config=run.folder.config)
        except InputError as error:
            return Pictures(str(error), str(error), str(error))
        try:
            path: Path | None = find_checkpoint(run.folder, settings)
        except InputError:
            path = None
        key = path and (path, path.stat().st_mtime_ns)
        if key not in self._kept:
            self._kept = {key: _draw(run.folder, settings)}
        return self._kept[key]


def _is_study(path: Path) -> bool:
    """Whether ``path`` is the folder of a study, ended or not."""
    if (path / STUDY).is_file():
        return True
    return not RunFolder(path).config.is_file() and any(_runs_in(path))


def _runs_in(path: Path) -> Iterator[RunFolder]:
    """The run folders of a study's folder: set by set, then those of its sweeps."""
    for depth in ("*/*", "*/sweep/*"):
        found = [RunFolder(folder) for folder in sorted(path.glob(depth))]
        yield from (run for run in found if run.config.is_file())


def _of_study(path: Path) -> tuple[Page, bool]:
    """The page of a study: of its result, or of its runs so far; a damaged run is a line."""
    runs, notes = {}, []
    for folder in _runs_in(path):
        try:
            runs[folder.path.relative_to(path).as_posix()] = read_run(folder)
        except InputError as error:
            notes.append(str(error))
    if (path / STUDY).is_file():
        found, goes_on = read_study(path / STUDY), _goes_on(path)
        if goes_on or found.get("stopped"):
            what = "is going on" if goes_on else "was stopped"
            notes.insert(0, f"The study {what}: this is its result when it last ended.")
        return study_page(found, runs, notes), not goes_on
    if not runs:
        raise InputError(f"{path}: no run of this study can be read: {notes[0]}")
    notes.insert(0, f"The study has no {STUDY} yet: it has not ended. These are its runs so far.")
    return comparison_page([*runs.values()], f"Study {path.resolve().name}", notes), False


def _goes_on(path: Path) -> bool:
    """Whether a process brings the study in ``path`` on."""
    try:
        with open(path / "study.lock", "rb") as file:
            return not lock(file)
    except FileNotFoundError:
        return False


def _draw(run: RunFolder, settings: Settings) -> Pictures:
    """Views, features and labels, each on its own: one that fails is a line."""
    found: list[Any] = []
    for make in (_views, _embedded, _labels):
        try:
            found.append(make(run, settings))
        except (InputError, OSError) as error:
            found.append(" ".join(str(error).split()))
    return Pictures(*found)


def _views(run: RunFolder, settings: Settings) -> Views:
    """Views of some training images, as the run draws them at its beginning."""
    beton = open_beton(settings.data.train)
    few = subset(beton, _spread(len(beton), SHOWN))
    crops = build_crops(settings, 0)
    augmentation = build_augmentations(settings, beton, crops)[0]
    generator = torch.Generator().manual_seed(settings.run.seed)
    with closing(_open(few, crops[:1], settings)) as loader:
        (batch,) = loader
    views = augmentation(batch.crops[0], augmentation.sample(len(few), generator))
    stored = beton.manifest
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (stored.mean, stored.std))
    pixels = ((views * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    side = min(crops[0].size, SIDE)
    if side < crops[0].size:
        pixels = torch.nn.functional.interpolate(pixels.float(), side, mode="area").to(torch.uint8)
    by_view = pixels.unflatten(0, (-1, len(few))).permute(0, 1, 3, 4, 2).numpy()
    drawn = augmentation.sample(DRAWN, generator)
    return Views(_center(few, side, settings), by_view, shares(drawn, augmentation.views), DRAWN)


def _embedded(run: RunFolder, settings: Settings) -> Embedded:
    """Features of some val images, under the run's newest checkpoint."""
    val = _val(settings)
    path = find_checkpoint(run, settings)
    train, encoder = open_beton(settings.data.train), load_encoder(path)
    few = subset(val, _spread(len(val), EMBEDDED))
    extractor = open_extractor(settings, choose_device("auto"), encoder)
    norm = normalization(settings.eval.normalize, encoder, train)
    found = extractor.encode(few, encoder, ("h",), norm)["h"]
    return Embedded(
        images=_center(few, min(extractor.size, SIDE), settings),
        features=found.features.cpu().numpy(),
        labels=found.labels.cpu().numpy(),
        classes=val.classes,
        of=len(val),
        weights=path.name,
    )


def _labels(run: RunFolder, settings: Settings) -> tuple[np.ndarray, Sequence[str], str]:
    val = _val(settings)
    return val.label, val.classes, val.manifest.content


def _val(settings: Settings) -> Beton:
    if settings.data.val is None:
        raise InputError("the run has no data.val")
    return open_beton(settings.data.val)


def _center(beton: Beton, side: int, settings: Settings) -> np.ndarray:
    """The images as uint8 (n, side, side, 3)."""
    with closing(_open(beton, [Center(side)], settings)) as loader:
        parts = [batch.crops[0] for batch in loader]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()


def _open(beton: Beton, crops: Sequence[Any], settings: Settings) -> Loader:
    return open_loader(
        beton, crops, len(beton), device=torch.device("cpu"), seed=settings.run.seed,
        shuffle=False, drop_last=False, workers=settings.data.workers,
    )  # fmt: skip


def _spread(total: int, count: int) -> np.ndarray:
    """At most ``count`` positions in [0, total), evenly spread; int64."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def write(page: Page, out: Path, figures: Path | None = None, refresh: int = 0) -> None:
    """Write the page to ``out`` and, where ``figures`` names a folder, each figure into it.

    Raises ``InputError`` where they cannot be written.
    """
    for folder in [out.parent, *([figures] if figures else [])]:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    write_text(out, page.html(refresh))
    if figures:
        for picture in page.pictures():
            picture.save(figures)


def main(argv: Sequence[str]) -> None:
    description = "Write one HTML page on runs, or on a study."
    if "--help" in argv or "-h" in argv:
        load(REPORT, ["--help"], PROG, description, config=Path())
    folders, options = split(argv)
    if not folders:
        raise SettingError(
            f"command line: give run folders or a study's folder: {PROG} runs/NAME "
            "[--section.name VALUE ...]"
        )
    how = load(REPORT, options, PROG, description).report
    paths = [*{Path(folder).resolve(): Path(folder) for folder in folders}.values()]
    # A study's folder is no run's, and its page has the same name.
    own = RunFolder(paths[0] if len(paths) == 1 else Path()).report
    out = Path(how.out) if how.out else own
    figures = Path(how.figures) if how.figures else None
    reporter = Reporter(paths)
    while True:
        page, over = reporter.page()
        refresh = 0 if over else how.watch
        write(page, out, figures, refresh)
        print(f"written: {out}" + (f" and {figures}" if figures else ""), flush=True)
        if not refresh:
            return
        print(f"again in {refresh} s; Ctrl-C ends this", file=sys.stderr, flush=True)
        time.sleep(refresh)
