"""Work spread over the processes of a Ray cluster by Ray Data. The extra `casa-vlm[cluster]`; without it, no Ray.

items -> Ray's object store -> workers, each of which `begin`s once and then takes one item after another -> results
"""

import importlib.util
import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from casa.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class _Worker:
    """Of Ray Data: what `begin` has made, which takes items."""

    def __init__(self, begin: Callable[[], Callable[[Any], Iterable[Any]]]) -> None:
        self._begin, self._work = begin, None

    def __call__(self, row: dict[str, bytes]) -> list[dict[str, bytes]]:
        try:
            self._work = self._begin() if self._work is None else self._work
            found = [*self._work(pickle.loads(row["item"]))]
        except UserError as error:  # Ray would wrap it up in pages of its own
            found = [error]
        return [{"made": pickle.dumps(made)} for made in found]


def spread(
    items: Iterable[T], begin: Callable[[], Callable[[T], Iterable[R]]], cluster: str
) -> Generator[R, None, None]:
    """What comes of all items, in whatever order, as soon as an item is done.

    Args:
        items: All are read first, and lie in Ray's object store, which goes to disk where memory ends.
        begin: Called once by each worker, such as to load a model; gives what takes an item. Files that it names lie
            where all nodes see them.
        cluster: A Ray cluster's address, "auto" for the one that this machine belongs to, or "local" for a new one on
            this machine.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or a worker says so.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("a cluster needs Ray: install casa-vlm[cluster], or leave cluster out.", field="cluster")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else is told
    os.environ.setdefault("RAY_worker_niceness", "0")  # of workers begun here; Ray's own is 15, behind all other work
    import pyarrow
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # one line of progress is casa's
    ray.data.DataContext.get_current().enable_progress_bars = False
    begun = not ray.is_initialized()
    if begun:
        try:
            local = cluster == "local"
            how: dict[str, Any] = {"include_dashboard": False} if local else {}
            ray.init("local" if local else cluster, log_to_driver=False, logging_level=logging.WARNING, **how)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"there is no Ray cluster at {cluster}: {error}", field="cluster") from error
    try:
        refs: list[Any] = [ray.put(pyarrow.table({"item": [pickle.dumps(item)]})) for item in items]
        if not refs:
            return
        gpus = int(ray.cluster_resources().get("GPU", 0))
        workers = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)
        made = ray.data.from_arrow_refs(refs).flat_map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_args=(begin,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(refs))),
            num_gpus=1 if gpus else None,
            num_cpus=None if gpus else 1,
        )
        for row in made.iter_rows():
            found = pickle.loads(row["made"])
            if isinstance(found, UserError):
                raise found
            yield found
    finally:
        if begun:
            ray.shutdown()
