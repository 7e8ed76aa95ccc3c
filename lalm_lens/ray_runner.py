"""The units of a study on a Ray cluster: one actor for each GPU that keeps its model, and a queue.

`RAY_ADDRESS` says which cluster, "auto" for the one that runs on this node; without it one is started here and stopped
at the end. All nodes need the same folders: clips, models and results. Ray 2.52 and later ask for a token: a cluster of
our own gets one of its own, another's is Ray's affair (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, `~/.ray/auth_token`).
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lalm_lens.errors import DataError, InputError, reason
from lalm_lens.runner import AGAIN_S, Models, Outcome, finish
from lalm_lens.units import Opened, Unit

TRIES = 3  # of a unit whose worker died
TOKEN = "RAY_AUTH_TOKEN"


class Worker:
    """Runs units, one at a time, on the GPU that Ray gives it; else on `device`."""

    def __init__(self, device: str, n_threads: int, command: list[str]):
        torch.set_num_threads(n_threads)  # or numbers would depend on who computes them
        sys.argv = command
        self.models = Models(device)

    def start(self) -> None:
        """Answered once the cluster has found a place for this worker."""

    def finish(self, unit: Unit, out: Path) -> Outcome | None:
        return finish(unit, out, self.models)


def run_ray(units: Sequence[Unit], out: Path, workers: int | None = None, device: str = "cpu") -> Iterator[Outcome]:
    """On all GPUs of a cluster, or on `workers` of them; without GPUs, on that many processes, 1 by default.
    Workers that the cluster has no place for wait for one, while the others go on.

    A unit whose worker died is run again, three times at most. Units that somebody else has claimed are waited for.
    Raises `InputError` for a cluster that cannot be reached.
    """
    if not units:
        return
    with cluster() as ray:
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        n_workers = min(workers or n_gpus or 1, len(units))
        worker = workers_of(ray, device)
        yield from drained(ray, Queue(units), out.absolute(), [worker() for _ in range(n_workers)], worker)


def workers_of(ray: ModuleType, device: str) -> Callable[[], Any]:
    """What starts a worker: on a GPU where the cluster has some, else on `device`."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    actor = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(Worker)
    return lambda: actor.remote("cuda" if has_gpus else device, torch.get_num_threads(), sys.argv)


class Queue:
    """The units that are left, and how often each was tried."""

    def __init__(self, units: Sequence[Unit]):
        self.units = list(units)
        self.tries = dict.fromkeys((unit.hash for unit in units), 0)

    def take(self, model: Opened | None) -> Unit:
        """The next one, of this model if there is one."""
        at = next((n for n, unit in enumerate(self.units) if unit.model == model), 0)
        unit = self.units.pop(at)
        self.tries[unit.hash] += 1
        return unit

    def wait(self, unit: Unit) -> None:
        """Somebody else has claimed it: once more, last of all."""
        self.tries[unit.hash] -= 1
        self.units.append(unit)

    def retry(self, unit: Unit) -> bool:
        if self.tries[unit.hash] >= TRIES:
            return False
        self.units.insert(0, unit)
        return True


def drained(
    ray: ModuleType, queue: Queue, out: Path, workers: Sequence[Any], worker: Callable[[], Any]
) -> Iterator[Outcome]:
    """Every unit's outcome, as they come; `worker` makes another worker. One that the cluster has no place for yet is
    given no unit."""
    starting = {one.start.remote(): one for one in workers}
    idle: list[Any] = []
    running: dict[Any, tuple[Any, Unit]] = {}
    last: dict[Any, Opened] = {}
    while queue.units or running:
        while queue.units and idle:
            one = idle.pop()
            unit = queue.take(last.get(one))
            last[one] = unit.model
            running[one.finish.remote(unit, out)] = one, unit
        (ready,), _ = ray.wait([*starting, *running], num_returns=1)
        if ready in starting:
            idle.append(starting.pop(ready))
            continue
        one, unit = running.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            another = worker()
            starting[another.start.remote()] = another
            if not queue.retry(unit):
                why = f"Its worker died {TRIES} times, at last because: {reason(error)}"
                yield Outcome(unit, failure=why)
            continue
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # as a full disk is: no other unit would be kept either
        idle.append(one)
        if outcome is not None:
            yield outcome
            continue
        queue.wait(unit)
        time.sleep(AGAIN_S if not running else 0)


@contextmanager
def cluster() -> Iterator[ModuleType]:
    """Ray, connected; and what is ours of it gone in the end."""
    try:
        ray = import_module("ray")
    except ModuleNotFoundError:
        raise DataError("--engine ray needs Ray: pip install 'lalm_lens[ray]'.") from None
    address = os.environ.get("RAY_ADDRESS")
    is_ours = address is None and TOKEN not in os.environ
    if is_ours:
        os.environ[TOKEN] = own_token()
    try:
        connect(ray, address)
        yield ray
    finally:
        ray.shutdown()
        if is_ours:
            del os.environ[TOKEN]


@cache
def own_token() -> str:
    """One for all clusters of this process, because Ray remembers the first."""
    return secrets.token_hex(32)


def connect(ray: ModuleType, address: str | None) -> None:
    own = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", logging_level="error", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(
            f"The Ray cluster at {address or 'this machine'} cannot be used ({reason(error)}). Where it asks for a "
            "token, set RAY_AUTH_MODE=token and put its token into RAY_AUTH_TOKEN or ~/.ray/auth_token."
        ) from error
