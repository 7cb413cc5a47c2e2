"""Thousands of films and pictures from one manifest: what each comes to is one entry, and a bad one costs itself only.

    {"id": "a", "video": "a.mp4"}                                  {"id": "a", "captions": [{"time", "text"}, ...]}
    {"id": "b", "image": "b.png", "question": "Read line 1."}  ->  {"id": "b", "text": "..."}
    {"id": "c", "video": "broken.mp4"}                             {"id": "c", "error": "a sentence"}

On one machine, films of a batch are watched side by side, frame by frame. On a cluster, Ray Data spreads batches over
workers that each hold a model. Entries go into a journal as they come, and into the output in the manifest's order.
"""

import hashlib
import importlib.util
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from casa.atomic import Journal, check_writable, replacing, write_text
from casa.cluster import spread
from casa.errors import UserError
from casa.media import Frame, VideoSource, open_picture, open_source
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.streaming import Sampling, StreamingEngine
from casa.threads import settle

Entry = dict[str, Any]  # as JSON holds it
KEYS = ("id", "video", "image", "question", "prompt")
OUTPUTS = (".jsonl", ".parquet")
# what must be the same for a run to be gone on with
SAME = ("fps", "prompt", "max_text_tokens", "max_new_tokens", "seed")


class Eyes(Protocol):
    """What `casa.load` gives."""

    model: CasaForConditionalGeneration
    processor: CasaProcessor

    def ask(self, pictures: Any, question: Any, **settings: Any) -> Any: ...


@dataclass(frozen=True)
class BatchRequest:
    """One run over a manifest.

    Args:
        manifest: JSON lines, one record each: `video` or `image`, a file beside the manifest or an address; `id`, which
            is the file if left out; of a picture its `question`; of a film its `prompt`.
        out: Entries in the manifest's order, as .jsonl or .parquet.
        fps: Frames looked at per second of a film.
        prompt: What is asked of films, and of pictures without a question; None takes the processor's own.
        max_text_tokens: As for `StreamingSession`, of a film; and so are `max_new_tokens`, `sampling` and `seed`.
        batch_size: Films that are watched side by side, and pictures that are asked about in one batch.
        resume: Go on from the journal that a run left beside `out`.

    Raises:
        UserError: Settings cannot be, or the manifest cannot be read.
    """

    manifest: Path
    out: Path
    fps: float = 2.0
    prompt: str | None = None
    max_text_tokens: int | None = None
    max_new_tokens: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    batch_size: int = 8
    resume: bool = False

    def __post_init__(self) -> None:
        if self.out.suffix.lower() not in OUTPUTS:
            raise UserError(f"{self.out} has no known ending; a batch is written as {' or '.join(OUTPUTS)}.")
        if self.out.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UserError("parquet needs pyarrow: install casa-vlm[cluster], or write .jsonl.")
        if not self.fps > 0 or self.batch_size < 1 or self.max_new_tokens < 1:
            raise UserError("fps is above 0; batch_size and max_new_tokens are 1 or more.")
        check_writable(self.out)

    @property
    def journal(self) -> Path:
        """Where entries stand until all are there."""
        return self.out.with_name(self.out.name + ".journal")

    def records(self) -> list[Entry]:
        """The manifest's records, checked, each with its `id` and a whole path. Raises UserError with the line."""
        try:
            lines = self.manifest.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.manifest} cannot be read: give JSON lines, in UTF-8.", field="batch") from error
        found: dict[str, Entry] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip():
                record = _record(line, f"line {number} of {self.manifest}", self.manifest.parent)
                if record["id"] in found:
                    raise UserError(f"line {number} of {self.manifest} has the id {record['id']!r} of an earlier one.")
                found[record["id"]] = record
        return list(found.values())

    def work(self, model: str) -> Entry:
        """What must be the same for a run to be gone on with."""
        return {"model": model, **{name: getattr(self, name) for name in SAME}, "sampling": asdict(self.sampling)}


def _record(line: str, where: str, folder: Path) -> Entry:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON; a record is one object on one line.") from error
    if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
        raise UserError(f"{where} is no object of texts, such as {{'id': 'a', 'video': 'a.mp4'}}.")
    kinds = [kind for kind in ("video", "image") if record.get(kind)]
    if len(kinds) != 1:
        raise UserError(f"{where} has {' and '.join(kinds) or 'neither'}; give video or image.")
    (kind,) = kinds
    if unknown := sorted(record.keys() - set(KEYS) - ({"question"} if kind == "video" else set())):
        raise UserError(f"{where} has {unknown[0]!r}; a record has {', '.join(KEYS)}.")
    if kind == "video" and "question" in record:
        raise UserError(f"{where} asks a question of a film; give prompt, which is said before its first frame.")
    source = record[kind]
    if "://" not in source:
        source = os.path.abspath(folder / source)
    return {**record, "id": record.get("id") or record[kind], kind: source}


def _mark(record: Entry) -> str:
    """Of what a record says, so that another one of the same id is not taken for it."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass
class BatchReport:
    """How far a run is. failed: records that came to an error. known: of an earlier run. seconds: of this one."""

    records: int
    done: int = 0
    failed: int = 0
    known: int = 0
    seconds: float = 0.0

    def sentence(self) -> str:
        """All counts in one line."""
        told = f"{self.done:,} of {self.records:,} done"
        told += f", {self.failed:,} failed" if self.failed else ""
        new = self.done - self.known
        if new and self.seconds > 0:
            rate = new / self.seconds
            told += f", {rate:.3g} a second"
            if left := self.records - self.done:
                told += f", {left / rate / 60:.0f} min left" if left / rate >= 90 else f", {left / rate:.0f} s left"
        return told


def caption_batch(
    request: BatchRequest,
    model: str,
    load: Callable[[str], Eyes],
    on_progress: Callable[[BatchReport], object] = lambda report: None,
    cluster: str | None = None,
) -> BatchReport:
    """Captions all films and answers all pictures of a manifest.

    Args:
        request: What, how and where to.
        model: Its name.
        load: `load(model)` gives the model with its processor; on a cluster, called by each worker.
        on_progress: Called after each record.
        cluster: A Ray cluster's address, "auto" for the one that this machine belongs to, or "local" for a new one on
            this machine; None does without Ray.

    Raises:
        UserError: The manifest or an output cannot be, or the journal is of another run.
    """
    records = request.records()
    marks = {record["id"]: _mark(record) for record in records}
    with Journal(request.journal, request.work(model), request.resume) as journal:
        known = {entry["id"]: entry for entry in journal.entries if marks.get(entry["id"]) == entry["record"]}
        report = BatchReport(len(records), len(known), sum("error" in entry for entry in known.values()), len(known))
        begun = time.monotonic()
        left = [record for record in records if record["id"] not in known]
        if left:
            if cluster is None:
                run = caption_records(load(model), left, request)
            else:
                batches = [
                    left[first : first + request.batch_size] for first in range(0, len(left), request.batch_size)
                ]
                run = spread(batches, partial(_captioning, request, model, load), cluster)
            with closing(run):
                for entry in run:
                    known[entry["id"]] = entry
                    journal.add({**entry, "record": marks[entry["id"]]})
                    report.done, report.failed = report.done + 1, report.failed + ("error" in entry)
                    report.seconds = time.monotonic() - begun
                    on_progress(report)
        _write(request.out, [known[record["id"]] for record in records])
    request.journal.unlink()
    return report


def _write(out: Path, entries: Sequence[Entry]) -> None:
    entries = [{name: value for name, value in entry.items() if name != "record"} for entry in entries]
    if out.suffix.lower() == ".jsonl":
        write_text(out, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        return
    import pyarrow
    from pyarrow import parquet

    said = pyarrow.struct([("time", pyarrow.float64()), ("text", pyarrow.string())])
    kinds = {"captions": pyarrow.list_(said), "frames": pyarrow.int64(), "damaged": pyarrow.int64()}
    names = ("id", "text", "captions", "error", "frames", "damaged")
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
    with replacing(out) as unfinished:
        parquet.write_table(pyarrow.Table.from_pylist(entries, schema), unfinished)


def caption_records(eyes: Eyes, records: Sequence[Entry], request: BatchRequest) -> Generator[Entry, None, None]:
    """What each record comes to, as soon as it is known; pictures first."""
    pictures = [record for record in records if "image" in record]
    for first in range(0, len(pictures), request.batch_size):
        yield from _answers(eyes, pictures[first : first + request.batch_size], request)
    yield from _films(eyes, [record for record in records if "video" in record], request)


def _failed(record: Entry, error: Exception) -> Entry:
    known = isinstance(error, (UserError, OSError))
    return {"id": record["id"], "error": str(error) if known else f"this failed ({type(error).__name__}: {error})."}


def _answers(eyes: Eyes, records: Sequence[Entry], request: BatchRequest) -> Iterator[Entry]:
    """A batch of pictures. Where it fails as a whole, each is asked about by itself."""
    opened: list[tuple[Entry, Image.Image]] = []
    for record in records:
        try:
            opened.append((record, open_picture(record["image"])))
        except Exception as error:
            yield _failed(record, error)
    sampling = request.sampling
    drawn: Entry = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    drawn |= {"seed": request.seed, "max_new_tokens": request.max_new_tokens}
    asked = request.prompt or eyes.processor.stream_prompt

    def ask(some: Sequence[tuple[Entry, Image.Image]]) -> Iterator[Entry]:
        questions = [record.get("question") or record.get("prompt") or asked for record, _ in some]
        texts = eyes.ask([picture for _, picture in some], questions, **drawn)
        yield from ({"id": record["id"], "text": text} for (record, _), text in zip(some, texts, strict=True))

    if not opened:
        return
    try:
        yield from list(ask(opened))
    except Exception:
        for one in opened:
            try:
                yield from list(ask([one]))
            except Exception as error:
                yield _failed(one[0], error)


@dataclass
class _Film:
    """A film that is watched."""

    record: Entry
    source: VideoSource
    frames: Iterator[Frame]
    coming: "Future[Frame | None]"
    captions: list[Entry] = field(default_factory=list)
    watched: int = 0
    error: str | None = None

    def entry(self) -> Entry:
        about = {"id": self.record["id"]}
        if self.error is not None:
            return {**about, "error": self.error}
        damaged = {"damaged": self.source.counts.skipped} if self.source.counts.skipped else {}
        return {**about, "captions": self.captions, "frames": self.watched, **damaged}


def _films(eyes: Eyes, records: Iterable[Entry], request: BatchRequest) -> Iterator[Entry]:
    """Films side by side, a frame of each in every step; the next frames are decoded meanwhile."""
    engine = StreamingEngine(
        eyes.model, eyes.processor, max_sessions=request.batch_size, max_batch_size=request.batch_size
    )
    waiting, watched = deque(records), dict[str, _Film]()
    threads = ThreadPoolExecutor(request.batch_size, "casa-films")
    try:
        while waiting or watched:
            while waiting and len(watched) < request.batch_size:
                record = waiting.popleft()
                try:
                    watched[record["id"]] = _opened(engine, record, request, threads)
                except Exception as error:
                    yield _failed(record, error)
            for name, film in list(watched.items()):
                try:
                    frame = film.coming.result()
                    if frame is not None:
                        engine.offer(name, frame.image, frame.time)
                        film.coming = threads.submit(next, film.frames, None)
                except Exception as error:
                    frame, film.error = None, _failed(film.record, error)["error"]
                if frame is None:
                    engine.close(name)
                    del watched[name]
                    film.source.close()
                    yield film.entry()
            settle()
            for event in engine.step():
                film = watched[event.session]
                film.watched += 1
                if event.error is not None:
                    film.error = event.error
                elif event.text:
                    film.captions.append({"time": round(float(str(event.tag)), 3), "text": event.text})
    finally:
        for film in watched.values():
            film.source.close()
        threads.shutdown(cancel_futures=True)


def _opened(engine: StreamingEngine, record: Entry, request: BatchRequest, threads: ThreadPoolExecutor) -> _Film:
    """A film at its beginning. Raises whatever its source raises."""
    source = open_source(record["video"], request.fps, live=False if "://" in record["video"] else None)
    try:
        engine.open(
            record["id"],
            prompt=record.get("prompt") or request.prompt,
            max_text_tokens=request.max_text_tokens,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            seed=request.seed,
        )
    except BaseException:
        source.close()
        raise
    frames = iter(source)
    return _Film(record, source, frames, threads.submit(next, frames, None))


def _captioning(request: BatchRequest, model: str, load: Callable[[str], Eyes]) -> Callable[[Sequence[Entry]], Any]:
    """What a worker of a cluster begins with."""
    return partial(caption_records, load(model), request=request)
