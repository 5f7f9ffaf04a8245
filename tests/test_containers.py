"""docs/containers.md, the Dockerfile and the Kubernetes manifests: what holds without an engine."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fastproj.runs import environment
from fastproj.settings import RUN, load

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PAGE = (ROOT / "docs" / "containers.md").read_text("utf-8")
JOBS = [ROOT / "docs" / name for name in ("job.yaml", "job-indexed.yaml")]


def test_the_image_is_pinned_and_ends_without_root_and_make() -> None:
    assert re.search(r"^ARG BASE=\S+:\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.M)
    build, final = DOCKERFILE.split("\nFROM ${BASE} AS build")[1].split("\nFROM ${BASE}\n")
    user = [line for line in final.splitlines() if line.startswith("USER")]
    assert user == ["USER 1000:1000"]
    assert "-dev " in final and not re.search(
        r"(jpeg|opencv|turbo)\S*-dev|pkg-config|make\b", final
    )
    extras = re.search(r'^ARG EXTRAS="(.*)"', build, re.M)
    assert extras and "dali" in extras[1].split()


def test_the_images_commit_is_recorded_although_git_is_left_out(tmp_path: Path) -> None:
    assert environment._git(tmp_path) is None
    for text, found in (
        ("c0ffee\n", {"commit": "c0ffee", "dirty": False}),
        ("c0ffee-dirty\n", {"commit": "c0ffee", "dirty": True}),
        ("\n", None),  # built without the argument
    ):
        (tmp_path / ".commit").write_text(text)
        assert environment._git(tmp_path) == found
    assert '"${COMMIT}" >/fastproj/.commit' in DOCKERFILE


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_jobs_settings_are_read_and_it_saves_in_time(path: Path) -> None:
    job = list(yaml.safe_load_all(path.read_text("utf-8")))[-1]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = load(RUN, container["args"], "fastproj train", "")
    ranks = container["resources"]["limits"]["nvidia.com/gpu"] * job["spec"].get("completions", 1)
    assert settings.optim.batch_size % ranks == 0 and settings.run.resume == "auto"
    assert container["command"][-2:] == ["-m", "fastproj.train"]
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        "/workspace/data", "/workspace/runs", "/cache", "/dev/shm"  # noqa: S108  in the pod
    }  # fmt: skip


def test_the_pages_command_is_read() -> None:
    (command,) = re.findall(r"-m fastproj\.train (.*?)\n```", PAGE, re.S)
    assert load(RUN, shlex.split(command.replace("\\\n", " ")), "fastproj train", "").run.name


@pytest.mark.soak
@pytest.mark.parametrize("version", ["1.31.0", "1.37.0"])
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_kubernetes_schema_accepts_the_jobs(path: Path, version: str) -> None:
    """The published schemas, in a package of 108 MB that is not among the extras."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in yaml.safe_load_all(path.read_text("utf-8")):
        validator.validate(document, version, strict=True)
        document["spec"]["bakcoffLimit"] = 3
        with pytest.raises(validator.ValidationError):
            validator.validate(document, version, strict=True)
