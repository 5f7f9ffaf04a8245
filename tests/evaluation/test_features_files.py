"""Features files of every kind: written, read back, refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastproj.core.errors import InputError
from fastproj.evaluation.features import Features
from fastproj.evaluation.files import is_features_file, read_features, write_features

X, Y = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 0, 1])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"it{suffix}"
    write_features(path, Features(torch.from_numpy(X), torch.from_numpy(Y)), {"a": "b"})
    found = read_features(path).features
    assert np.array_equal(found.features, X) and np.array_equal(found.labels, Y)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            assert archive["index"].tolist() == [0, 1, 2, 3]
            assert {name: archive[name].dtype.name for name in archive} == {
                "features": "float32", "labels": "int64", "index": "int64",
            }  # fmt: skip


def test_files_of_other_programs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X.astype(np.float16))
    np.save(tmp_path / "a-labels.npy", Y.astype(np.uint8))
    torch.save({"features": torch.from_numpy(X), "labels": torch.from_numpy(Y)}, tmp_path / "a.pt")
    for name in ("a.npy", "a.pt"):
        assert is_features_file(name)
        found = read_features(tmp_path / name).features
        assert np.array_equal(found.features, X) and np.array_equal(found.labels, Y)
    assert not is_features_file("train.beton")


class Code:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("code-was-run"),))


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Code(), 1, 2, 3], dtype=object)
    np.savez("a.npz", features=objects, labels=Y)
    np.save("b.npy", objects)
    np.save("b-labels.npy", Y)
    torch.save({"features": Code(), "labels": Y}, "c.pt")
    for name in ("a.npz", "b.npy", "c.pt"):
        with pytest.raises(InputError, match=f"{name} is damaged or no features file"):
            read_features(name)
    assert not Path("code-was-run").exists()


def test_labels_that_are_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=X, labels=np.array([*"abab"]))
    with pytest.raises(InputError, match="a.npz is damaged or no features file"):
        read_features(tmp_path / "a.npz")


def _nan() -> np.ndarray:
    bad = X.copy()
    bad[1, 2] = bad[3, 0] = np.nan
    return bad


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"labels": Y}, "lacks features: it holds labels"),
        ({"features": X, "y": Y}, "lacks labels: it holds features, y"),
        ({"features": X, "labels": Y[:3]}, r"features of shape \(4, 3\) and labels of shape \(3,"),
        ({"features": X[0], "labels": Y}, r"features of shape \(3,\)"),
        ({"features": _nan(), "labels": Y}, "2 of 4 rows hold NaN or infinity"),
        ({"features": X, "labels": Y / 2}, "the labels are torch.float64: save whole numbers"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_cannot_be_used(parts: dict, words: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"it{suffix}"
    if suffix == ".npz":
        np.savez(path, **parts)
    else:
        save_file({n: torch.from_numpy(np.ascontiguousarray(p)) for n, p in parts.items()}, path)
    with pytest.raises(InputError, match=words) as caught:
        read_features(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no features file .*none.npz"):
        read_features(tmp_path / "none.npz")
    np.save(tmp_path / "alone.npy", X)
    with pytest.raises(InputError, match="no labels beside it: save them as .*alone-labels.npy"):
        read_features(tmp_path / "alone.npy")
    for suffix in (".npy", ".npz", ".safetensors", ".pt"):
        (tmp_path / f"text{suffix}").write_text("no features at all")
        with pytest.raises(InputError, match="is damaged or no features file"):
            read_features(tmp_path / f"text{suffix}")
    with pytest.raises(InputError, match=r"written to .npz or .safetensors"):
        write_features(tmp_path / "a.csv", Features(torch.ones(1, 1), torch.zeros(1)), {})
