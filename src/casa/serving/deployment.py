"""Many replicas on Ray Serve: `casa serve MODEL --replicas N` on one machine, `serve run casa.serving.deployment:app`
on a cluster. The extra `casa-vlm[cluster]`.

    clients -> ingress (page, WebSockets, chat)  -> replica: one model, one engine, the server of one machine
                   |                                   |
                   +----<- registry (an actor) <-------+  reports twice a second
                            folder of states      <----+  every two seconds, and when it ends

Ray places replicas, begins dead ones anew and scales them; frames and answers go from ingress to replica directly.
"""

import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import ray
import yaml
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from casa.errors import UserError
from casa.serving.admission import ServerState, scope_of
from casa.serving.app import create_app
from casa.serving.handover import SAVE_SECONDS, Handover
from casa.serving.ingress import create_ingress
from casa.serving.limits import Limits
from casa.serving.replicas import REPORT_SECONDS, Registry, Replicas, Report
from casa.serving.server import Server
from casa.settings import Settings, build

NAME, INGRESS = "casa", "casa-ingress"  # of the application and its deployments
MEASURE_SECONDS = 2.0  # as `create_app` has it
WAKE_SECONDS = 30.0  # for a replica to come where there is none
OBJECTS = 100 * 2**20  # bytes of Ray's store, through which nothing goes here
DRAIN_SECONDS = 15.0  # for streams to leave a replica
FULL_SHARE = 0.8  # of what replicas sustain, above which there are to be more

log = logging.getLogger("casa.serving")


@dataclass(frozen=True)
class ClusterSettings(Settings):
    """What replicas and ingresses of one application are told.

    Args:
        model: A checkpoint's folder, which all nodes see, or a shipped name.
        replicas: How many; the least with `max_replicas`, and 0 then lets them end when nobody is there.
        max_replicas: Up to so many, as frames a second ask for; None keeps their number.
        states: A folder that all nodes see, where streams' states lie; needed on more than one machine.
        token: Asked of every client.
        hosts: Names that the server goes by.
        fps: Of a stream that does not say.
        allow_fetch: Chats may name pictures on the public internet.
        image_cache: As for `create_app`.
        limits: As for `casa serve`, "name=value".
        device: Of a replica: auto, cpu, cuda or mps.
        weights: own, as they were saved, or int8.
        host: Where a replica listens; its node's address if left out.
        cpus: That Ray counts for a replica; gpus: likewise.
        threads: Of torch in a replica; 0 leaves them as they are.
        save_seconds: Between two saves of a stream.
        downscale_seconds: For which there are too many replicas, before one ends.
        secret: The token of the replicas; drawn if left out.
    """

    model: str = "casa-tiny"
    replicas: int = 1
    max_replicas: int | None = None
    states: str = ""
    token: str | None = None
    hosts: tuple[str, ...] = ()
    fps: float = 2.0
    allow_fetch: bool = False
    image_cache: str = "memory"
    limits: tuple[str, ...] = ()
    device: str = "auto"
    weights: str = "own"
    host: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 0
    save_seconds: float = SAVE_SECONDS
    downscale_seconds: float = 30.0
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replicas < (0 if self.max_replicas else 1) or (self.max_replicas or 1) < 1:
            raise UserError("replicas is 1 or more; it may be 0 where max_replicas is given.", field="replicas")
        Limits.parse(self.limits)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class RegistryActor(Registry):
    """The registry as an actor; begun anew wherever it was lost, and filled by the next reports."""


def registry() -> Any:
    """The registry of this cluster."""
    return RegistryActor.options(name="casa-registry", namespace=NAME, lifetime="detached", get_if_exists=True).remote()


class Replica:
    """One model behind the server of one machine, at a port of its own that only the ingress knows the token of."""

    def __init__(self, settings: ClusterSettings) -> None:
        import torch

        from casa.models.auto import load_pretrained

        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._name = secrets.token_hex(8)
        model, processor = load_pretrained(settings.model, settings.device, settings.weights)
        self._handover = Handover(Path(settings.states), settings.save_seconds)
        app = create_app(
            model,
            processor,
            name=Path(settings.model).resolve().name,
            fps=settings.fps,
            token=settings.secret,
            allow_fetch=settings.allow_fetch,
            limits=Limits.parse(settings.limits),
            measure_seconds=MEASURE_SECONDS,
            image_cache=settings.image_cache,
            handover=self._handover,
        )
        self._state: ServerState = app.state.casa
        self._state.scope = scope_of(settings.token)
        self._server = Server(app, settings.host or ray.util.get_node_ip_address(), 0)
        self._thread = threading.Thread(target=self._server.run, name="casa-replica", daemon=True)
        self._thread.start()
        # a stream that came now would wait for this; and Ray ends an old replica when the new one is there
        self._state.measured.wait(10 * MEASURE_SECONDS)
        self._ended = threading.Event()
        threading.Thread(target=self._report, name="casa-reports", daemon=True).start()

    def __call__(self) -> str:
        """Its name. Asked by an ingress that has no replica: what waits for an answer has Ray begin one."""
        return self._name

    def report(self) -> Report:
        """What it says of itself, now."""
        worker = self._state.worker
        load = worker.load.report(worker.asked())
        return Report(
            name=self._name,
            address=f"{self._server.host}:{self._server.port}",
            sustained_fps=load["sustained_fps"],
            asked_fps=load["asked_fps"] or 0.0,
            streams=worker.streams,
            chats=self._state.chats.here,
            leaving=self._handover.draining,
            process=os.getpid(),
        )

    def _report(self) -> None:
        told = None
        while not self._ended.is_set():
            try:
                told = registry() if told is None else told
                ray.get(told.report.remote(self.report()), timeout=5)
            except Exception:  # the registry is being begun again
                told = None
            self._ended.wait(REPORT_SECONDS)

    def check_health(self) -> None:
        """Asked by Ray, which begins a replica anew that raises here."""
        if self._server.is_running and not self._state.worker.is_alive:
            raise RuntimeError("the model's thread has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray; `replicas_wanted` reads it."""
        told = self.report()
        return {"asked_fps": told.asked_fps, "sustained_fps": told.sustained_fps or 0.0, "chats": float(told.chats)}

    def __del__(self) -> None:
        """Asked by Ray before the process ends: all streams leave with their states."""
        if not hasattr(self, "_ended"):
            return
        end = time.monotonic() + DRAIN_SECONDS
        loop = self._state.loop
        if loop is not None and self._server.is_running:
            loop.call_soon_threadsafe(self._handover.drain)
            with suppress(Exception):
                ray.get(registry().leave.remote(self._name), timeout=2)
            while self._state.connections and time.monotonic() < end:
                time.sleep(0.02)
        self._ended.set()
        self._server.stop()
        self._thread.join(max(0.0, end - time.monotonic()))


def replicas_wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy: as many as the frames a second that streams ask for need, 80 % full.

    What replicas sustain is what they have measured. Somebody who waits while there is none has one begun.
    """
    now, state = context.current_num_replicas, {}
    asked, sustained, chats = (_latest(context, name) for name in ("asked_fps", "sustained_fps", "chats"))
    measured = [value for value in sustained.values() if value > 0]
    wanted = 0
    if measured:
        each = sum(measured) / len(measured)
        wanted = ceil(sum(asked.values()) / (FULL_SHARE * each))
    if sum(chats.values()) or (context.total_queued_requests or 0) > 0 or sum(asked.values()) > 0:
        wanted = max(wanted, 1)
    if not measured and now:  # nothing is known yet
        wanted = max(wanted, now)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(low, min(high, wanted)), state


def _latest(context: Any, name: str) -> dict[Any, float]:
    """By replica, the newest of what it has recorded."""
    series = (context.raw_metrics or {}).get(name, {})
    return {replica: points[-1].value for replica, points in series.items() if points}


def replica_deployment(settings: ClusterSettings) -> Any:
    """The replicas as a bound deployment of Ray Serve."""
    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                initial_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                metrics_interval_s=1.0,
                look_back_period_s=2.0,
                upscale_delay_s=2.0,
                downscale_delay_s=settings.downscale_seconds,
                policy=AutoscalingPolicy(policy_function="casa.serving.deployment:replicas_wanted"),
            )
        }
    return serve.deployment(
        Replica,
        name=NAME,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_SECONDS + 5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        max_ongoing_requests=1000,
        **scale,
    ).bind(settings)  # type: ignore[attr-defined]


def follow(settings: ClusterSettings) -> Replicas:
    """The replicas of this cluster, as an ingress sees them."""
    found, asking = registry(), threading.Lock()

    def wake() -> None:
        # what waits at Ray's handle has it begin a replica; one question is enough
        if asking.acquire(blocking=False):
            try:
                serve.get_deployment_handle(NAME, NAME).remote().result(timeout_s=WAKE_SECONDS)
            except Exception:  # there is none yet
                log.debug("no replica has answered", exc_info=True)
            finally:
                asking.release()

    return Replicas(lambda: ray.get(found.reports.remote(), timeout=5), wake)


def ingress_app(settings: ClusterSettings) -> FastAPI:
    """The ingress of these replicas."""
    limits = Limits.parse(settings.limits)
    return create_ingress(follow(settings), settings.secret, token=settings.token, hosts=settings.hosts, limits=limits)


def share_of_gpus(device: str, replicas: int) -> float:
    """Of this machine's GPUs, what each of so many replicas has: one whole, or a part of one."""
    import torch

    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return 1.0 if count >= replicas else int(100 * count / replicas) / 100


@contextmanager
def on_this_machine(settings: ClusterSettings) -> Iterator[FastAPI]:
    """The replicas on a Ray of their own, or on the one that this process has joined; and their ingress.

    Ray's own proxies are not begun, nor its dashboard: nothing but the ingress is to be reached from elsewhere.
    """
    begun = not ray.is_initialized()
    with tempfile.TemporaryDirectory(prefix="casa-") as folder:
        states = settings.states or str(Path(folder) / "states")
        settings = replace(settings, states=states, host=settings.host or "127.0.0.1")
        try:
            if begun:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else is told
                # Ray's own is 15: a replica would wait for whatever else runs on this machine
                os.environ.setdefault("RAY_worker_niceness", "0")
                most = max(settings.replicas, settings.max_replicas or 0)
                ray.init(
                    "local",
                    num_cpus=ceil(most * settings.cpus) + 1,
                    include_dashboard=False,
                    object_store_memory=OBJECTS,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(proxy_location="Disabled")
            serve.run(replica_deployment(settings), name=NAME, route_prefix=None)
            yield ingress_app(settings)
        finally:
            with suppress(Exception):
                serve.shutdown()
            if begun:
                ray.shutdown()


def app(arguments: dict[str, Any]) -> Any:
    """For `serve run casa.serving.deployment:app model=... states=...`, and config files of `serve deploy`.

    Args:
        arguments: `ClusterSettings` by name, and `ingresses`, how many there are; texts are read as YAML. The
            token may be in the environment, as CASA_TOKEN.

    Raises:
        UserError: One is unknown or cannot be.
    """
    given = {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in arguments.items()}
    ingresses = given.pop("ingresses", 1)
    settings = build(ClusterSettings, {"token": os.environ.get("CASA_TOKEN"), **given})
    if not settings.states:
        raise UserError("states names a folder that all nodes see, where streams' states lie; give one.")

    def build_ingress() -> FastAPI:
        # Ray takes a plain function for what builds an application, and anything else for the application itself
        return ingress_app(settings)

    made = serve.deployment(
        serve.ingress(build_ingress)(),
        name=INGRESS,
        num_replicas=ingresses,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 1},
    )
    return made.bind(replica_deployment(settings))  # type: ignore[attr-defined]
