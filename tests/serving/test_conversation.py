"""/v1/streams through a real server: frames in, events out, one stream as if it were alone."""

import io
import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from casa.serving import Limits
from casa.streaming import Sampling, StreamingSession
from casa.testing import PATIENCE, tiny_processor


def get(server, path, **headers):
    """Status, type and text of a page."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


@contextmanager
def kept_busy(submit):
    """A thread that can do nothing else meanwhile. submit: gives it a job."""
    begun, end = threading.Event(), threading.Event()

    def job():
        begun.set()
        end.wait(PATIENCE)

    submit(job)
    assert begun.wait(PATIENCE)
    try:
        yield
    finally:
        end.set()


@pytest.mark.slow
def test_captions_are_those_of_a_session_alone(server, client, model, pictures, frames):
    sampling = {"temperature": 1.2, "top_k": 20}
    session = StreamingSession(
        model,
        tiny_processor(),
        prompt="what",
        max_text_tokens=60,
        max_new_tokens=5,
        sampling=Sampling(**sampling),
        seed=3,
    )
    with client(server) as one:
        ready = one.hello(prompt="what", max_text_tokens=60, sampling=sampling, seed=3)
        assert (ready["type"], ready["model"], ready["prompt"]) == ("ready", "tiny", "what")
        assert ready["insertion"] == {"cache_bytes": "computed", "latency": None}
        heard = [one.show(frame, number / 2) for number, frame in enumerate(frames)]
        answer = one.ask("who")
    assert [text for text, _ in heard] == [session.step(picture) for picture in pictures]
    assert answer["text"] == session.ask("who")
    assert [usage["time"] for _, usage in heard] == [number / 2 for number in range(len(frames))]
    usage = heard[-1][1]
    assert usage["frame"] == len(frames)
    assert usage["dropped"] == 0
    assert 0 <= usage["latency"] <= usage["lag"]
    held = [usage["cache_bytes"] for _, usage in heard]
    inserted = [usage["insertion"]["cache_bytes"] for _, usage in heard]
    assert inserted == sorted(inserted)
    assert inserted[-1] - inserted[0] > held[-1] - held[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_frames_of_three_formats(server, client, model, pictures, encode, kind):
    sent = [encode(picture, kind) for picture in pictures[:4]]
    session = StreamingSession(model, tiny_processor(), max_text_tokens=1024, max_new_tokens=5)
    with client(server) as one:
        one.hello()
        heard = [one.show(frame)[0] for frame in sent]
    assert heard == [session.step(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in sent]
    assert any(heard)


@pytest.mark.slow
def test_captions_as_files_while_it_runs_and_afterwards(server, client, frames):
    with client(server) as one:
        name = one.hello()["stream"]
        said = [(number / 2, one.show(frame, number / 2)[0]) for number, frame in enumerate(frames)]
        live = get(server, f"/v1/streams/{name}/captions.srt")
        one.say(type="close")
        with pytest.raises(ConnectionClosed) as closed:
            one.hear()
        assert closed.value.rcvd.code == 1000
    assert live[0] == 200
    status, kind, text = get(server, f"/v1/streams/{name}/captions.jsonl")
    assert (status, kind) == (200, "application/jsonl; charset=utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["text"] for row in rows} == {text for _, text in said if text}
    assert get(server, f"/v1/streams/{name}/captions.vtt")[2].startswith("WEBVTT")
    assert get(server, f"/v1/streams/{name}/captions.srt")[2] == live[2]
    assert get(server, f"/v1/streams/{name}/captions.exe")[0] == 404
    assert get(server, "/v1/streams/other/captions.srt")[0] == 404


def test_pausing(server, client, frames):
    with client(server) as one:
        one.hello()
        one.show(frames[0])
        one.say(type="pause")
        assert one.hear()["type"] == "paused"
        one.socket.send(frames[1])
        assert one.ask("who")["type"] == "answer"
        one.say(type="resume")
        assert one.hear()["type"] == "resumed"
        # frames are counted as they were sent
        assert one.show(frames[2])[1]["frame"] == 3


def test_the_newest_of_the_frames_that_came_is_opened_and_questions_do_not_wait(serving, client, frames, until):
    with serving() as server, client(server) as one:
        name = one.hello()["stream"]
        one.show(frames[0])
        stream = server._state.worker._streams[name]
        with kept_busy(server._state.frame_thread.submit):
            one.socket.send(frames[1])
            # on its way to be opened, so that the next ones wait
            until(lambda: server._state.frame_thread._work_queue.qsize() == 1)
            for number in range(2, 7):
                one.socket.send(frames[number])
            assert one.ask("who")["time"] >= 0
            assert stream.dropped == 4
        last = one.hear_until("usage")[-1]
        # the second frame was watched, or was replaced by the last one
        if last["frame"] != 7:
            assert (last["frame"], last["dropped"]) == (2, 4)
            last = one.hear_until("usage")[-1]
        assert last["frame"] == 7
        assert last["dropped"] in (4, 5)


def test_times_are_the_clocks_where_nothing_else_is_said(server, client, frames):
    with client(server) as one:
        one.hello()
        first, second = (one.show(frame)[1]["time"] for frame in frames[:2])
    assert 0 <= first < second


@pytest.mark.slow
@pytest.mark.parametrize(
    "message",
    [
        b"no picture",
        b"",
        "no json",
        '{"type": "dance"}',
        '{"type": "ask"}',
        '{"type": "frame", "time": -1}',
        '{"type": "hello"}',
    ],
)
def test_a_wrong_message_is_an_error_event_and_no_more(server, client, frames, message):
    with client(server) as one:
        one.hello()
        one.socket.send(message)
        error = one.hear()
        assert (error["type"], error["fatal"]) == ("error", False)
        assert error["message"].endswith(".")
        sent = int(isinstance(message, bytes))
        assert error.get("frame", 0) == sent
        assert one.show(frames[0])[1]["frame"] == sent + 1


@pytest.mark.parametrize(
    "hello", [b"\x89PNG", "hi", "[]", '{"type": "ask", "question": "?"}', '{"type":"hello","fps":0}']
)
def test_a_wrong_hello_ends_it(server, client, hello):
    with client(server) as one:
        one.socket.send(hello)
        assert one.hear()["fatal"] is True
        with pytest.raises(ConnectionClosed) as closed:
            one.hear()
        assert closed.value.rcvd.code == 1008


def test_a_bound_too_small_for_the_prompt_ends_it(server, client):
    with client(server) as one:
        error = one.hello(max_text_tokens=5)
        assert (error["type"], error["fatal"]) == ("error", True)
        assert "max_text_tokens" in error["message"]


def test_more_sessions_than_allowed(serving, client, frames):
    with serving(max_sessions=1) as server, client(server) as first:
        first.hello()
        with client(server) as second:
            error = second.hello()
            assert "1 sessions are taken" in error["message"]
            with pytest.raises(ConnectionClosed) as closed:
                second.hear()
            assert closed.value.rcvd.code == 1013
        assert first.show(frames[0])[1]["frame"] == 1


def test_tokens(serving, client):
    with serving(token="secret") as server:
        for told, headers in (({"token": "secret"}, {}), ({}, {"Authorization": "Bearer secret"})):
            with client(server, additional_headers=headers) as one:
                ready = one.hello(**told)
                assert ready["type"] == "ready"
        for wrong in ("wrong", "\ud800"):
            with client(server) as one:
                assert "token" in one.hello(token=wrong)["message"]
        path = f"/v1/streams/{ready['stream']}/captions.srt"
        assert get(server, path)[0] == 401
        assert get(server, path, Authorization="Bearer wrong")[0] == 401
        assert get(server, path, Authorization="Bearer secret")[0] == 200
        assert get(server, "/metrics")[0] == 401
        assert get(server, "/v1/models")[0] == 401
        assert get(server, "/health")[0] == 200
        assert server.url.endswith("/#token=secret")


def test_pages_of_other_sites_are_turned_away(server, client):
    with pytest.raises(InvalidStatus) as refused:
        client(server, origin="http://evil.example")
    assert refused.value.response.status_code == 403
    assert get(server, "/v1/models", Origin="http://evil.example")[0] == 403
    # a name of another site that leads here
    for name, status in [("evil.example", 403), ("127.0.0.1", 200), ("localhost", 200), ("[::1", 403)]:
        assert get(server, "/v1/models", Host=f"{name}:{server.port}")[0] == status, name
    own = f"http://127.0.0.1:{server.port}"
    assert get(server, "/v1/models", Origin=own)[0] == 200
    with client(server, origin=own) as one:
        assert one.hello()["type"] == "ready"


@pytest.mark.slow
def test_names_that_the_server_goes_by(serving):
    for settings, status in [({"hosts": ["Casa.Example"]}, 200), ({"token": "secret"}, 200), ({}, 403)]:
        with serving(**settings) as server:
            assert get(server, "/health", Host="casa.example")[0] == status


def test_silence_ends_it(serving, client):
    with serving(limits=Limits(hello_seconds=0.1, idle_seconds=0.15)) as server:
        with client(server) as one:
            assert "hello" in one.hear()["message"]
        with client(server) as one:
            one.hello()
            assert one.hear()["fatal"] is True
            with pytest.raises(ConnectionClosed) as closed:
                one.hear()
            assert closed.value.rcvd.code == 1008


def test_more_messages_a_second_than_allowed(serving, client, frames):
    with serving(limits=Limits(messages_per_second=0.01)) as server, client(server) as one:
        one.hello()
        one.say(type="pause")
        assert one.hear()["type"] == "paused"
        one.say(type="resume")
        error = one.hear()
        assert "0.01 messages a second" in error["message"]
        assert error["fatal"] is False
        one.socket.send(frames[0])
        assert one.hear()["frame"] == 1
        (seat,) = server._state.worker.engine._seats.values()
        assert seat.paused


def test_a_model_whose_thread_has_ended_is_no_healthy_one(serving):
    with serving() as server:
        server._state.worker.stop()
        status, _, text = get(server, "/health")
        assert (status, json.loads(text)["status"]) == (503, "failed")


def test_metrics_do_not_wait_for_the_model(serving):
    with serving() as server, kept_busy(server._state.worker.call):
        assert get(server, "/metrics")[0] == get(server, "/health")[0] == 200


def test_health_and_metrics(serving, client, frames):
    with serving() as server, client(server) as one:
        one.hello()
        for frame in frames[:4]:
            one.show(frame)
        one.ask("who")
        one.socket.send("no json")
        one.hear()
        status, kind, text = get(server, "/metrics")
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        told = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        figures = {name: float(value) for name, value in told}
        assert figures["casa_frames_total"] == 4
        assert figures["casa_answers_total"] == 1
        assert figures["casa_errors_total"] == 1
        assert figures["casa_sessions"] == figures["casa_connections"] == figures["casa_streams_total"] == 1
        assert figures["casa_lag_seconds_count"] == 4
        assert figures["casa_cache_bytes"] > 0
        health = json.loads(get(server, "/health")[2])
        assert {name: health[name] for name in ("status", "model", "sessions", "max_sessions")} == {
            "status": "ok",
            "model": "tiny",
            "sessions": 1,
            "max_sessions": 16,
        }
