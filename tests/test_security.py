"""What comes from elsewhere runs no code, writes nothing outside, and secrets are not kept.

ruff's rules S hold the rest: no pickle, no shell, no unsafe YAML, no unpacking without a filter.
"""

import ast
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastproj.core.errors import InputError, SettingError
from fastproj.prepare.command import main as prepare
from fastproj.prepare.sources import open_sources
from fastproj.settings import RUN, load

ROOT = Path(__file__).parents[1]
SHIPPED = [*ROOT.glob("*.py"), *(p for d in ("fastproj", "tools", "data_prep", "examples")
                                 for p in (ROOT / d).rglob("*.py"))]  # fmt: skip
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def test_files_are_loaded_without_their_pickles() -> None:
    """``torch.load`` with ``weights_only=True`` everywhere, and ``np.load`` never with pickles."""
    found = dict.fromkeys(SAFE, 0)
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in SAFE:
                option, safe = SAFE[name]
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                # NumPy's default is the safe one, torch's is not in every version.
                default = str(safe) if name == "np.load" else "missing"
                assert given.get(option, default) == str(safe), f"{path}:{node.lineno}"
                found[name] += 1
    assert all(found.values())


def test_a_recipe_is_read_as_nodes_so_that_no_object_is_made(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    ran = tmp_path / "ran"
    recipe.write_text(f"run:\n  name: !!python/object/apply:os.mkdir [{ran}]\n")
    with pytest.raises(SettingError):
        load(RUN, ["--cfg", str(recipe), "--data.train", "x"], "train", "")
    recipe.write_text(f"run:\n  name: !!python/object/apply:os.mkdir {ran}\n")
    assert load(RUN, ["--cfg", str(recipe), "--data.train", "x"], "train", "").run.name == str(ran)
    assert not ran.exists()


def test_cifars_pickles_are_not_opened_before_their_checksum(tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    ran, folder = tmp_path / "ran", tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name in [*(name for name, _ in CIFAR10.train_list + CIFAR10.test_list), "batches.meta"]:
        (folder / name).write_bytes(b"cos\nmkdir\n(V%b\ntR." % str(ran).encode())
    with pytest.raises(InputError, match="no complete cifar10"):
        open_sources("cifar10", tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_whose_names_lead_outside_writes_nothing(kind: str, tmp_path: Path) -> None:
    inside, image = tmp_path / "a" / "b", io.BytesIO()
    inside.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "PNG")
    names = ["../../cat/0.png", f"{tmp_path}/dog/0.png", "cat/../../../1.png"]
    path = inside / f"set.{kind}"
    if kind == "tar":
        for kind_of_link in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            with tarfile.open(path, "w") as tar:
                link = tarfile.TarInfo("dog/2.png")
                link.type, link.linkname = kind_of_link, "/etc/passwd"
                tar.addfile(link)
            with pytest.raises(InputError, match="dog/2.png is a link to /etc/passwd"):
                open_sources("archive", path)
        with tarfile.open(path, "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(image.getvalue())
                tar.addfile(member, io.BytesIO(image.getvalue()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, image.getvalue())
    (source,) = open_sources("archive", path)
    assert [bytes(read) for read in source.images[:]] == [image.getvalue()] * 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", path.name]


SECRETS = ["https://me:s3cr3t@host/x", "s3://s3cr3t@bucket/x", "https://h/x?a=1&api_token=s3cr3t",
           "https://h/x?X-Amz-Signature=s3cr3t&b=2", "https://h/x?sig=s3cr3t"]  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    """A plugin's or anyone's setting: config.yaml, the journal and environment.json keep them."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"train:\n  init_from: {url}\n")
    for argv in (["--train.init_from", url], ["--cfg", str(recipe)]):
        with pytest.raises(SettingError, match="train.init_from is a URL with a password") as said:
            load(RUN, [*argv, "--data.train", "x"], "train", "")
        assert "s3cr3t" not in str(said.value)
    with pytest.raises(SettingError, match="data.root is a URL"):
        prepare(["--data.dataset", "folder", "--data.root", url, "--data.out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("text", ["a@b", "me@host:folder", "https://h/x?page=2", "runs/a?b=token"])
def test_what_only_looks_like_one_is_taken(text: str) -> None:
    assert load(RUN, ["--data.train", text], "train", "").data.train == text
