"""The faults of a campaign, each done to a running system for real."""

import base64
import contextlib
import json
import os
import pickle
import random
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from celery import Celery

from omnirt_tasks.celery_app import broker_prefix, make_app
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.values import WakeUp, part_id
from omnirt_tasks.tasks import GENERATE, send_job
from tests.support.campaign.cluster import Cluster, Member, processes_below
from tests.support.campaign.plan import Fault
from tests.support.disks import full
from tests.support.waiting import eventually

OUTAGE_MAX_S = 3.0
FROZEN_LEASES = 1.5
FULL_S = 1.0
STUB_QUEUE = "cpu-stub-stub"
BACK_S = 60.0
"""How long it may take until what the last fault has ended is there again, to meet the next one."""


class Injector:
    """Does faults to one cluster, one at a time. `known_job` gives the id of some job, or None.

    A fault that finds its victim down waits until it is up again, so that none is done to nobody.
    """

    def __init__(self, cluster: Cluster, rng: random.Random, known_job: Callable[[], str | None]) -> None:
        self._cluster = cluster
        self._rng = rng
        self._known_job = known_job
        self._closing = threading.Event()
        self._app: Celery = make_app(cluster.settings)
        self._redis: Any = connect(cluster.settings.redis_url)
        self._do: Mapping[Fault, Callable[[], None]] = {
            Fault.DEVICE_KILLED: self._kill_device,
            Fault.WORKER_KILLED: self._kill_worker,
            Fault.WORKER_GROUP_KILLED: self._kill_worker_group,
            Fault.WORKER_FROZEN: self._freeze_worker,
            Fault.WORKER_RESTARTED: self._restart_worker,
            Fault.GATEWAY_KILLED: self._kill_gateway,
            Fault.BROKER_KILLED: self._kill_broker,
            Fault.CONNECTIONS_CUT: self._cut_connections,
            Fault.MESSAGES_DOUBLED: self._double_messages,
            Fault.GARBAGE_QUEUED: self._queue_garbage,
            Fault.DISK_FULL: self._fill_disk,
        }

    def do(self, fault: Fault) -> None:
        """Do it, and undo what does not mend by itself."""
        self._do[fault]()

    def close(self) -> None:
        """Cut short what waits, and let go of the connections."""
        self._closing.set()
        self._app.close()
        self._redis.close()

    def _some_worker(self) -> int:
        return self._pid_of(self._rng.choice(self._cluster.workers))

    def _pid_of(self, member: Member) -> int:
        pid = eventually(lambda: member.pid, BACK_S, told=self._cluster.tell)
        assert pid is not None
        return pid

    def _kill_device(self) -> None:
        worker = self._rng.choice(self._cluster.workers)

        def devices() -> list[psutil.Process]:
            return [process for process in processes_below(self._pid_of(worker)) if _is_device(process)]

        for device in eventually(devices, BACK_S, told=self._cluster.tell):
            _signal(device.pid, signal.SIGKILL)

    def _kill_worker(self) -> None:
        _signal(self._some_worker(), signal.SIGKILL)

    def _kill_worker_group(self) -> None:
        for process in reversed(processes_below(self._some_worker())):
            _signal(process.pid, signal.SIGKILL)

    def _freeze_worker(self) -> None:
        pid = self._some_worker()
        _signal(pid, signal.SIGSTOP)
        self._closing.wait(FROZEN_LEASES * self._cluster.settings.lease_ttl_s)
        _signal(pid, signal.SIGCONT)

    def _restart_worker(self) -> None:
        _signal(self._some_worker(), signal.SIGTERM)

    def _kill_gateway(self) -> None:
        _, gateway = self._rng.choice(self._cluster.gateways)
        for process in processes_below(self._pid_of(gateway)):
            _signal(process.pid, signal.SIGKILL)

    def _kill_broker(self) -> None:
        self._cluster.kill_broker()
        self._closing.wait(self._rng.uniform(0.0, OUTAGE_MAX_S))
        self._cluster.restart_broker()

    def _cut_connections(self) -> None:
        for kind in ("normal", "pubsub"):
            self._redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    def _double_messages(self) -> None:
        for _ in range(5):
            if (job_id := self._known_job()) is not None:
                try:
                    # That of a job that was split is nobody's, and its first part's may be anybody's.
                    for sent in (job_id, part_id(job_id, 0)):
                        send_job(self._app, WakeUp(sent, STUB_QUEUE))
                except StoreUnavailable:
                    return

    def _queue_garbage(self) -> None:
        for body in (b"\x80\x00 no message", json.dumps({"half": "a message"}).encode(), _pickled_message()):
            self._redis.lpush(broker_prefix(self._cluster.settings) + STUB_QUEUE, body)

    def _fill_disk(self) -> None:
        with full(self._cluster.settings.data_dir):
            self._closing.wait(FULL_S)


def _is_device(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:3] == ["-m", "workers.device_child"]
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _pickled_message() -> bytes:
    """A message that would touch a file if anybody unpickled it."""
    body = base64.b64encode(pickle.dumps(_Touch())).decode()
    headers = {"id": "pickled", "task": GENERATE, "lang": "py"}
    properties = {"delivery_tag": "pickled", "delivery_info": {"exchange": "", "routing_key": STUB_QUEUE}}
    message = {
        "body": body,
        "content-type": "application/x-python-serialize",
        "content-encoding": "binary",
        "headers": headers,
        "properties": {**properties, "body_encoding": "base64"},
    }
    return json.dumps(message).encode()


class _Touch:
    def __reduce__(self) -> tuple[object, ...]:
        return Path("unpickled").touch, ()
