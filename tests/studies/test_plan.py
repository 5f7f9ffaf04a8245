"""From arms, sets and seeds to jobs; controls; what cannot be compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastproj.core.errors import InputError
from fastproj.studies.plan import Arm, Check, Plan, with_controls

ARMS = (
    Arm("default", "base", sweep={"optim.lr": ("1", "2")}),
    Arm("noisy", "{set}_n", {"superfluous.lambda_a": "3"}, {"": 1, "b": 2}, sweep={
        "superfluous.lambda_a": ("4", "5")}),
)  # fmt: skip


def plan(**changes: Any) -> Plan:
    made = {
        "folder": Path("runs/s"), "baseline": "default", "primary": "logistic.top1",
        "arms": with_controls(ARMS, "default", ["noisy"]),
        "sets": {"a": {"data.train": "t"}, "b": {}},
        "seeds": (7, 8), "sweep_seeds": (100,), "settings": {"optim.epochs": "1"},
    }  # fmt: skip
    return Plan(**{**made, **changes})


def test_jobs_go_seed_by_seed_and_lie_below_the_study() -> None:
    chosen = {(arm.name, name): arm.tries()[1] for arm in ARMS for name in "ab"}
    jobs = plan().jobs(chosen)
    assert [job.name for job in jobs] == [
        f"{name}/{arm}-seed{seed}"
        for seed in (7, 8)
        for name in "ab"
        for arm in ("default", "noisy", "no-op", "noisy-noise-only")
    ]
    first, noisy, no_op, alone = jobs[:4]
    assert first.run.path == Path("runs/s/a/default-seed7")
    assert first.overrides == {
        "run.dir": "runs/s/a", "run.name": "default-seed7", "run.seed": "7",
        "optim.epochs": "1", "data.train": "t", "optim.lr": "2",
    }  # fmt: skip
    assert first.argv()[0] == "--cfg=base" and "--optim.lr=2" in first.argv()
    assert noisy.recipe == "a_n" and noisy.overrides["superfluous.lambda_a"] == "5"
    # The no-op arm has the baseline's choice and another seed, and is paired with the same one.
    assert (no_op.overrides["optim.lr"], no_op.overrides["run.seed"]) == ("2", "10007")
    assert no_op.pair == 7
    assert alone.overrides["superfluous.lambda_a"] == alone.overrides["superfluous.lambda_b"] == "0"
    assert alone.overrides["run.seed"] == "7"
    # An arm of which every try failed is left out, and so are its controls.
    del chosen["noisy", "a"]
    assert [j.arm for j in plan().jobs(chosen) if j.dataset == "a"] == ["default", "no-op"] * 2


def test_a_sweep_tries_every_combination_on_seeds_of_its_own() -> None:
    two = replace(ARMS[0], sweep={"optim.lr": ("1", "2"), "projector.hidden": ("8", "16", "32")})
    assert len(two.tries()) == 6 and two.tries()[5] == {"optim.lr": "2", "projector.hidden": "32"}
    jobs = plan().sweeps()
    assert [job.name for job in jobs[:2]] == [
        "a/sweep/default-try0-seed100", "a/sweep/default-try1-seed100",
    ]  # fmt: skip
    assert len(jobs) == 2 * 2 * 2
    assert {job.arm for job in jobs} == {"default", "noisy"}
    assert {job.overrides["run.seed"] for job in jobs} == {"100"}


def test_published_gains_are_of_a_set_or_of_all() -> None:
    assert (ARMS[1].published_on("a"), ARMS[1].published_on("b")) == (1, 2)
    assert ARMS[0].published_on("a") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sets": {}}, "a study needs a set"),
        ({"arms": ARMS[:1]}, "a study compares arms"),
        ({"baseline": "defalt"}, "study.baseline is 'defalt', and the arms are default, noisy"),
        ({"arms": (ARMS[0], Arm("b", "r"))},
         "the same number of tries in its sweep, not default 2, b 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan(**changes)


def test_a_name_that_a_control_takes_is_refused() -> None:
    with pytest.raises(InputError, match="adds the arm 'no-op' itself"):
        with_controls([*ARMS, Arm("no-op", "r")], "default", [])


def test_arms_that_are_swept_have_a_control_each() -> None:
    """The sweep of one may choose another learning rate than that of the other."""
    tries = {"optim.lr": ("0.1", "0.2")}
    arms = [Arm("default", "r"), Arm("a", "r", {"superfluous.lambda_a": "1"}, sweep=tries),
            Arm("b", "r", {"superfluous.lambda_a": "2"}, sweep=tries)]  # fmt: skip
    found = with_controls(arms, "default", ["a", "b"])[4:]
    assert [(one.name, one.control) for one in found] == [
        ("a noise only", "a"), ("b noise only", "b"),
    ]  # fmt: skip


def test_arms_that_differ_in_the_penalty_alone_share_the_control_of_their_noise() -> None:
    def arm(name: str, **settings: str) -> Arm:
        return Arm(name, "r", {f"superfluous.{key}": value for key, value in settings.items()})

    arms = [Arm("default", "r"), arm("a", lambda_a="1"), arm("b", lambda_b="2"),
            arm("wide", lambda_a="1", sigma="0.3")]  # fmt: skip
    found = with_controls(arms, "default", ["a", "b", "wide"])[4:]
    assert [(one.name, one.control, one.shared) for one in found] == [
        ("no-op", "no-op", ()), ("a noise only", "a", ("b",)), ("wide noise only", "wide", ()),
    ]  # fmt: skip


def test_a_check_is_a_diagnostic_and_a_direction() -> None:
    assert Check.parse("near_zero_groups above 0.5", "x") == Check("near_zero_groups", "above", 0.5)
    assert str(Check.parse("matrix_information lower", "x")) == "matrix_information lower"
    for text in ("x", "x sinks", "x above", "x above much", "x lower 3"):
        with pytest.raises(InputError, match="f.yaml, line 3: acted must be"):
            Check.parse(text, "f.yaml, line 3")
