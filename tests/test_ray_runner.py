"""Units on a Ray cluster: what dies is run again, and the table is the same."""

import math
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from test_study import STUDY, assert_same, done

from lalm_lens.assets.clips import write_clips
from lalm_lens.errors import DataError
from lalm_lens.planning import planned
from lalm_lens.ray_runner import TOKEN, TRIES, Queue, drained, run_ray
from lalm_lens.runner import Outcome, unfinished, write_list
from lalm_lens.study import Study

pytestmark = pytest.mark.numbers


class Died(Exception):
    pass


class Raised(Exception):
    def __init__(self, cause: Exception):
        self.cause = cause


class Fake(SimpleNamespace):
    __hash__ = object.__hash__


class FakeRay:
    """Workers that answer at once, as they are told to: with an outcome, None where another has the claim, or death.
    Of the first workers `n_cpus` have a place, the others never answer."""

    exceptions = SimpleNamespace(RayActorError=Died, RayTaskError=Raised)

    def __init__(self, answers: dict[str, list[object]], n_cpus: float = math.inf):
        self.answers = {name: deque(its) for name, its in answers.items()}
        self.by: dict[str, list[int]] = {}
        self.n_workers = 0
        self.n_cpus = n_cpus

    def worker(self) -> Fake:
        self.n_workers += 1
        number = self.n_workers

        def finish(unit, out):
            self.by.setdefault(unit.hash, []).append(number)
            answers = self.answers.get(unit.hash)
            return unit, "never" if number > self.n_cpus else answers.popleft() if answers else "finished"

        def start():
            return number, "never" if number > self.n_cpus else "started"

        return Fake(finish=SimpleNamespace(remote=finish), start=SimpleNamespace(remote=start))

    def wait(self, asked, num_returns):
        answered = [its for its in asked if its[1] != "never"]
        assert answered, "it waits for ever"
        return answered[:1], [its for its in asked if its is not answered[0]]

    def get(self, ready):
        unit, answer = ready
        if answer == "died":
            raise Died("killed")
        if isinstance(answer, Exception):
            raise Raised(answer)
        return None if answer == "claimed" else Outcome(unit)


def fake_unit(name: str, model: str = "a") -> Fake:
    return Fake(hash=name, model=model)


def outcomes_of(
    answers: dict[str, list[object]], units: list, n_workers: int = 1, n_cpus: float = math.inf
) -> tuple[dict, FakeRay]:
    ray = FakeRay(answers, n_cpus)
    workers = [ray.worker() for _ in range(n_workers)]
    found = list(drained(ray, Queue(units), Path("out"), workers, ray.worker))
    assert sorted(its.unit.hash for its in found) == sorted(unit.hash for unit in units)  # each once
    return {its.unit.hash: its.failure for its in found}, ray


def test_a_unit_whose_worker_dies_is_given_to_another():
    failures, ray = outcomes_of({"b": ["died"] * (TRIES - 1)}, [fake_unit(name) for name in "abc"])
    assert not any(failures.values())
    assert ray.n_workers == 1 + TRIES - 1
    assert len(ray.by["b"]) == TRIES
    assert len(ray.by["a"]) == len(ray.by["c"]) == 1


def test_a_unit_that_kills_its_workers_is_given_up():
    failures, ray = outcomes_of({"b": ["died"] * TRIES}, [fake_unit(name) for name in "abc"])
    assert failures["b"] == f"Its worker died {TRIES} times, at last because: killed"
    assert failures["a"] is failures["c"] is None
    assert len(ray.by["b"]) == TRIES


def test_a_unit_that_is_claimed_elsewhere_is_waited_for():
    failures, ray = outcomes_of({"a": ["claimed"] * 5}, [fake_unit(name) for name in "ab"])
    assert not any(failures.values())
    assert len(ray.by["a"]) == 6


def test_what_a_worker_cannot_write_ends_the_study():
    with pytest.raises(OSError, match="No space left"):
        outcomes_of({"b": [OSError(28, "No space left on device")]}, [fake_unit(name) for name in "abc"])


def test_a_worker_keeps_its_model():
    units = [fake_unit(f"{n}{model}", model) for n in range(3) for model in "xy"]
    _, ray = outcomes_of({}, units, n_workers=2)
    assert {len({by for name, (by,) in ray.by.items() if name.endswith(model)}) for model in "xy"} == {1}


def test_a_worker_without_a_place_holds_no_unit():
    failures, ray = outcomes_of({}, [fake_unit(name) for name in "abcde"], n_workers=4, n_cpus=2)
    assert not any(failures.values())
    assert {by for (by,) in ray.by.values()} == {1, 2}


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'lalm_lens\[ray\]'"):
        list(run_ray([fake_unit("a")], Path("out")))
    assert list(run_ray([], Path("out"))) == []


def kill_workers(n: int, plan, out: Path, killed: list[int]) -> None:
    """Each once another unit is finished."""
    for _ in range(n):
        before = len(unfinished(plan.units, out))
        while len(unfinished(plan.units, out)) == before:
            time.sleep(0.01)
        workers = [
            child for child in psutil.Process().children(recursive=True) if "ray::Worker" in "".join(child.cmdline())
        ]
        for worker in workers[:1]:
            worker.kill()
            killed.append(worker.pid)


@pytest.mark.stress
@pytest.mark.parametrize(("workers", "n_kills"), [(2, 0), *[(1, 4)] * 5])
def test_a_study_on_ray_is_that_of_one_process_whatever_is_killed(tmp_path, workers, n_kills):
    assert TOKEN not in os.environ
    write_clips(tmp_path / "clips", "gender", 6, seed=5, duration_s=0.5)
    (tmp_path / "study.toml").write_text(STUDY)
    plan = planned(Study.read(tmp_path / "study.toml"))
    expected, out, killed = done(plan, tmp_path / "local"), tmp_path / "ray", []
    write_list(plan, out)
    killer = threading.Thread(target=kill_workers, args=(n_kills, plan, out, killed))
    killer.start()
    found = list(run_ray(plan.units, out, workers=workers))
    killer.join()
    assert len(killed) == n_kills
    assert len(found) == len(plan.units)
    assert not any(outcome.failure for outcome in found)
    assert_same(out, expected)
    assert TOKEN not in os.environ
