"""Execute the flows of one work pool, each in a process of its own: ``python -m flows.worker cpu`` or ``gpu``.

``hydraopt up --profile production`` starts one per pool; containers run the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from typing import get_args

import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.workers.process import ProcessWorker

from flows.deployments import PROCESSES, Pool, clear_leftovers, read_entries
from infra.local_services.pools import service_of
from infra.mlflow_webhook import listen
from infra.settings import Settings

_LOG = logging.getLogger("prefect.hydraopt.worker")


def register(pool: Pool) -> None:
    """Have the pool and its deployments on the server, and close what a killed worker of it left behind."""
    entries = read_entries(pool)
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=pool, type=ProcessWorker.type))
        except ObjectAlreadyExists:
            _LOG.debug("work pool %s exists", pool)
    clear_leftovers(entries)
    for entry in entries:
        entry.deployment().apply(work_pool_name=pool)


def device_line(pool: Pool) -> str:
    """What this pool computes on, in one sentence for its log."""
    if torch.cuda.is_available():
        return f"work pool {pool}: computes on {torch.cuda.get_device_name()}"
    if pool == "gpu":
        return "work pool gpu: no CUDA device here, its merges and trainings run on the CPU"
    return "work pool cpu: computes on the CPU"


def main() -> None:
    """Register, then poll until a signal ends this process."""
    parser = argparse.ArgumentParser(prog="python -m flows.worker", description=__doc__)
    parser.add_argument("pool", choices=get_args(Pool))
    pool: Pool = parser.parse_args().pool
    if pool == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the card belongs to the other pool
        listen(Settings.load())
    register(pool)
    _LOG.info(device_line(pool))
    # Without a limit on the pool: a killed worker would keep its slots.
    worker = ProcessWorker(work_pool_name=pool, name=service_of(pool), limit=PROCESSES)
    asyncio.run(_poll(worker))


async def _poll(worker: ProcessWorker) -> None:
    """Until SIGTERM, which ends it in order: by itself it would leave its flows' processes behind."""
    polling = asyncio.ensure_future(worker.start())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, polling.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await polling


if __name__ == "__main__":
    main()
