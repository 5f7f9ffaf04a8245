"""The names in a run folder, and what is no run folder."""

import re
from pathlib import Path

import pytest

from fastproj.core.errors import InputError
from fastproj.runs.folder import RunFolder

PACKAGE = Path(__file__).parents[2] / "fastproj"


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("missing", "no such run folder"),
        ("file", "is a file"),
        ("empty", "is no run folder, it has no config.yaml"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            RunFolder.open(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_run_opens_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").touch()
    assert RunFolder.open(tmp_path / "a").metrics == tmp_path / "a/metrics.jsonl"
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    assert RunFolder.open(".").name == "b"


def test_no_other_file_writes_the_names():
    """In code: a docstring or a message may say ``eval.json``, a path is never built from it."""
    run = RunFolder(Path())
    names = [p.name for p in (run.config, run.environment, run.metrics, run.checkpoints,
                              run.evaluation, run.report, run.weights, run.onnx)]  # fmt: skip
    built = re.compile(rf"""/ f?["'](?:{"|".join(map(re.escape, names))})""")
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("folder.py", "journal.py"):
            assert not built.search(path.read_text()), path
    assert built.search('folder / "eval.json"')
