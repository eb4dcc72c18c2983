"""Where the modules of a merge are worked on: threads of this process, or a cluster of Dask or Ray.

Both clusters run what is sent to them, so the address names one that is trusted and reached from here alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from hydraopt.errors import ServiceError
from infra.listening import check_listens
from infra.settings import Settings

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def merge_workers(settings: Settings) -> Iterator[Executor | None]:
    """What :func:`hydraopt.merge` is given as ``executor``: None if no cluster is named.

    Workers open the adapters themselves, so they see the home folder under the same path as this process and have
    hydraopt installed.

    Raises:
        ServiceError: If the cluster's package is missing, nothing answers at its address, or it takes no work.
    """
    address = settings.merge_workers
    if address is None:
        yield None
        return
    kind = urlsplit(address).scheme
    check_listens("the cluster for merges", address, start="`dask scheduler` or `ray start --head`")
    package, open_cluster = _CLUSTERS[kind]
    with open_cluster(_imported(package, kind), address) as executor:
        yield executor


def _imported(package: str, kind: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ServiceError(
            f"HYDRAOPT_MERGE_WORKERS names a cluster of {kind}, and its package is not installed here: "
            f"pip install 'hydraopt[{kind}]', or unset the variable"
        ) from None


@contextmanager
def _dask(distributed: Any, address: str) -> Iterator[Executor]:
    with distributed.Client(address.replace("dask", "tcp", 1), set_as_default=False) as client:
        if not client.scheduler_info()["workers"]:
            raise ServiceError(
                f"merge workers: the Dask scheduler at {address} has no worker; start `dask worker`"
            )
        yield client.get_executor()


@contextmanager
def _ray(ray: Any, address: str) -> Iterator[Executor]:
    try:
        client = ray.init(address, log_to_driver=False)
    except ConnectionError as reason:  # its head node has half a minute to start a process for us
        last = (str(reason).strip() or type(reason).__name__).splitlines()[-1]
        raise ServiceError(f"merge workers: Ray at {address} does not let us in: {last}") from reason
    with client:
        yield _RayExecutor(ray)


_CLUSTERS = {"dask": ("distributed", _dask), "ray": ("ray", _ray)}
"""By the scheme of an address: the package that talks to such a cluster, and how it is opened."""


class _RayExecutor(Executor):
    """Ray's remote calls as :mod:`concurrent.futures` knows them."""

    def __init__(self, ray: Any) -> None:
        self._call = ray.remote(_call)

    def submit(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        future: Future[Result] = self._call.remote(function, args, kwargs).future()
        return future


def _call(function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    return function(*args, **kwargs)
