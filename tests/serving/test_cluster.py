"""A real Ray cluster of several nodes on this machine: replicas are killed, replaced, scaled, and lose their node.

Each node has room for one replica; the ingress is in this process. Of each frame that twelve cameras send, exactly one
thing is to be told: watched or dropped. Figures go to the file that CASA_CLUSTER_RECORD names.
"""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from casa.errors import UserError  # noqa: E402
from casa.provenance import provenance  # noqa: E402
from casa.serving import relay  # noqa: E402
from casa.serving.deployment import (  # noqa: E402
    NAME,
    ClusterSettings,
    app,
    ingress_app,
    replica_deployment,
    replicas_wanted,
)
from casa.serving.server import Server  # noqa: E402
from casa.settings import build  # noqa: E402
from casa.testing import PATIENCE, tiny_checkpoint  # noqa: E402
from projects.loadtest.client import StreamLog, noise, watch  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning"),
]

STREAMS, FPS, SIZE = 12, 1.0, 56
SILENCE = 5.0  # s without a word; a goal, and no verdict: it hangs on what else runs here
FIGURES = {}


@pytest.fixture(scope="module")
def nodes():
    """A head without room, and two nodes with room for a replica each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ |= {"RAY_worker_niceness": "0"}  # as `casa serve` has it
    cluster: Any = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False},
    )
    try:
        cluster.of_replicas = [cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, namespace=NAME)
        with socket.create_server(("127.0.0.1", 0)) as free:
            cluster.port = free.getsockname()[1]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": cluster.port})
        yield cluster
    finally:
        with suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        if path := os.environ.get("CASA_CLUSTER_RECORD"):
            about = {"cluster": "casa", "seed": 0, "streams": STREAMS, "fps": FPS, "size": SIZE}
            with open(path, "w", encoding="utf-8") as file:
                json.dump({**about, **provenance(), "events": FIGURES}, file, indent=2)
                file.write("\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("cluster") / "model"))


@pytest.fixture
def serving(nodes, model, tmp_path):
    """A context: replicas on the cluster, and an ingress here."""

    @contextmanager
    def run(**changes):
        usual = {"model": model, "states": str(tmp_path / "states"), "threads": 1, "cpus": 2.0, "host": "127.0.0.1"}
        usual |= {"limits": ("load=1e9", f"caption_seconds={PATIENCE}", "sessions=32"), "save_seconds": 1.0}
        settings = ClusterSettings(**(usual | changes))
        serve.run(replica_deployment(settings), name=NAME, route_prefix=None)
        server = Server(ingress_app(settings), port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_for(lambda: server.is_running)
            yield server, settings
        finally:
            server.stop()
            thread.join(PATIENCE)
            serve.delete(NAME)

    return run


def wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def replicas(server):
    return server._state.replicas.all()


def running():
    states: Any = serve.status().applications[NAME].deployments[NAME].replica_states
    return states.get("RUNNING", 0)


def while_cameras_send(server, act, seconds=12.0, streams=STREAMS):
    """Has cameras send frames, does something in their midst, and gives what each was told."""
    url, frames = f"ws://127.0.0.1:{server.port}/v1/streams", noise(8, SIZE)
    hello = {"max_new_tokens": 4}

    async def all_of_them():
        stop = asyncio.Event()
        logs = [StreamLog() for _ in range(streams)]
        tasks = [
            asyncio.create_task(watch(url, frames, fps=FPS, hello=hello, log=log, stop=stop, patience=PATIENCE))
            for log in logs
        ]
        while not all(len(log.watched) > 2 for log in logs):
            assert not any(log.refused for log in logs), next(log.refused for log in logs if log.refused)
            await asyncio.sleep(0.2)
        moment = time.monotonic()
        await asyncio.to_thread(act)
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - moment)))
        stop.set()
        return await asyncio.gather(*tasks)

    return asyncio.run(all_of_them())


def checked(name, logs):
    """All streams are alive, and no frame was told of twice or lost; the figures are kept."""
    FIGURES[name] = {
        "frames": sum(log.sent for log in logs),
        "dropped": sum(log.dropped for log in logs),
        "told_twice": sum(log.twice for log in logs),
        "lost": sum(log.lost for log in logs),
        "moved": sum(bool(log.moved) for log in logs),
        "silence_seconds": round(max(log.silence for log in logs), 2),
        "silence_is_short": max(log.silence for log in logs) < SILENCE,
    }
    assert [log.refused for log in logs] == [None] * len(logs)
    assert (FIGURES[name]["told_twice"], FIGURES[name]["lost"]) == (0, 0), FIGURES[name]
    return FIGURES[name]


def test_a_replica_is_killed_and_a_new_one_comes(serving):
    with serving(replicas=2) as (server, _):
        wait_for(lambda: len(replicas(server)) == 2)

        def kill():
            os.kill(max(replicas(server), key=lambda one: one.streams).process, signal.SIGKILL)

        found = checked("replica killed", while_cameras_send(server, kill))
        assert 0 < found["moved"] < STREAMS
        wait_for(lambda: len(replicas(server)) == 2)


def test_a_replica_hangs(serving):
    """As one does whose node has lost its power: its connections stay open, and nothing comes."""
    with serving(replicas=2) as (server, _):
        wait_for(lambda: len(replicas(server)) == 2)
        stopped = []

        def hang():
            stopped.append(max(replicas(server), key=lambda one: one.streams).process)
            os.kill(stopped[0], signal.SIGSTOP)

        try:
            found = checked("replica hangs", while_cameras_send(server, hang))
            assert 0 < found["moved"] < STREAMS
        finally:
            for process in stopped:
                with suppress(ProcessLookupError):  # Ray has ended it meanwhile
                    os.kill(process, signal.SIGCONT)


def test_a_rolling_update_replaces_both(serving):
    with serving(replicas=2) as (server, settings):
        wait_for(lambda: len(replicas(server)) == 2)
        before = {one.name for one in replicas(server)}

        def update():
            # another version is another `save_seconds`
            changed = ClusterSettings(**{**vars(settings), "save_seconds": 1.5})
            serve.run(replica_deployment(changed), name=NAME, route_prefix=None)
            wait_for(lambda: not before & {one.name for one in replicas(server)})

        found = checked("rolling update", while_cameras_send(server, update))
        assert found["moved"] == STREAMS


def test_a_node_is_lost(serving, nodes):
    with serving(replicas=2) as (server, _):
        wait_for(lambda: len(replicas(server)) == 2)

        def lose():
            nodes.remove_node(nodes.of_replicas.pop(), allow_graceful=False)

        try:
            found = checked("node lost", while_cameras_send(server, lose))
            assert 0 < found["moved"] < STREAMS
        finally:
            nodes.of_replicas.append(nodes.add_node(num_cpus=2, object_store_memory=80 * 2**20))


def test_to_zero_and_back(serving, monkeypatch):
    monkeypatch.setattr(relay, "WAIT_SECONDS", PATIENCE)  # busy cores take longer to begin a replica
    with serving(replicas=0, max_replicas=1, downscale_seconds=2.0) as (server, _):
        checked("from zero", while_cameras_send(server, lambda: None, seconds=3, streams=2))
        wait_for(lambda: not running())
        wait_for(lambda: not replicas(server))
        checked("from zero again", while_cameras_send(server, lambda: None, seconds=3, streams=2))


def test_rays_own_proxy_leads_to_the_ingress(nodes, model, tmp_path):
    """As `serve run casa.serving.deployment:app` begins it."""
    given = {
        "model": model,
        "replicas": "1",
        "cpus": "2",
        "states": str(tmp_path),
        "token": "open",
        "limits": "[load=1e9]",
    }
    serve.run(app(given), name=NAME)
    try:
        frames = noise(2, SIZE)
        url = f"ws://127.0.0.1:{nodes.port}/v1/streams"
        log = asyncio.run(watch(url, frames, token="open", patience=PATIENCE))
        assert (log.refused, log.watched, log.lost) == (None, [1, 2], 0)
        assert "give the server's token" in (asyncio.run(watch(url, frames)).refused or "")
    finally:
        serve.delete(NAME)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"replica": 2, "states": "/"}, "did you mean"), ({"replicas": 0, "states": "/"}, "1 or more"), ({}, "states")],
)
def test_settings_that_cannot_be(given, words):
    with pytest.raises(UserError, match=words):
        app(given)


def test_the_manifest_says_what_ray_and_the_settings_take():
    file = Path(__file__).parents[2] / "projects" / "loadtest" / "kuberay.yaml"
    (service,) = (one for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one["kind"] == "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    given = dict(application.args)
    assert given.pop("ingresses") > 0
    assert build(ClusterSettings, given).states == "/states"


class Context:
    """As Ray Serve has it."""

    capacity_adjusted_min_replicas, capacity_adjusted_max_replicas = 0, 8

    def __init__(self, asked, sustained, queued=0, now=None):
        class Point:
            def __init__(self, value):
                self.value = value

        self.current_num_replicas = len(asked) if now is None else now
        self.total_queued_requests = queued
        series = {"asked_fps": asked, "sustained_fps": sustained, "chats": [0.0] * len(asked)}
        self.raw_metrics = {
            name: {number: [Point(0.0), Point(value)] for number, value in enumerate(values)}
            for name, values in series.items()
        }


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (Context([], []), 0),
        (Context([], [], queued=1), 1),
        (Context([4.0], [10.0]), 1),
        (Context([8.0], [10.0]), 1),
        (Context([9.0], [10.0]), 2),
        (Context([20.0, 20.0], [10.0, 20.0]), 4),
        (Context([200.0], [10.0]), 8),
        (Context([0.0, 0.0], [10.0, 10.0]), 0),
        (Context([6.0, 2.0], [0.0, 0.0]), 2),
    ],
)
def test_how_many_replicas_are_wanted(context, wanted):
    assert replicas_wanted(context) == (wanted, {})
