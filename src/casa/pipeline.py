"""The library at its simplest: a model with its processor as one object that answers, captions and streams.

    eyes = casa.load("casa-tiny")
    eyes.ask("page.png", "Read line 1.")
    for caption in eyes.watch("clip.mp4", fps=2):
        print(caption.time, caption.text)
    session = eyes.stream(max_text_tokens=128)

`eyes.model` and `eyes.processor` are the transformers objects.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image

from casa.analysis.ablations import NamedAblation, ablated, parse_ablation
from casa.errors import UserError
from casa.media.pictures import as_picture
from casa.models import CasaForConditionalGeneration, CasaProcessor
from casa.models.auto import load_pretrained
from casa.models.image_cache import ImageCache
from casa.streaming import FrameCaption, Sampling, StreamingSession, watch, watch_live
from casa.threads import settle

if TYPE_CHECKING:
    from casa.evaluation.evaluator import Data, Evaluator
    from casa.training.callbacks import Evaluate
    from casa.training.config import EvaluationSettings

Picture: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | torch.Tensor"
"""A path or web address, a PIL picture, an array or tensor, or the bytes of a file (docs/models.md, "Pictures")."""
Pictures: TypeAlias = "Picture | Sequence[Picture] | None"

Scores: TypeAlias = dict[str, dict[str, float]]


def load(
    name_or_path: str | os.PathLike[str] = "casa-tiny",
    *,
    device: str = "auto",
    weights: Literal["own", "int8"] = "own",
    image_cache: "ImageCache | str | os.PathLike[str] | None" = "memory",
) -> "CasaPipeline":
    """Loads a model and its processor, in evaluation mode, ready to use.

    Args:
        name_or_path: A checkpoint's folder, a hub id, or the name of a shipped model.
        device: "auto" (CUDA if it is there), "cpu", "cuda", "cuda:1", or "mps" (Apple's GPU, never tried yet).
        weights: "own", as they were saved, or "int8": half the memory of bf16 and faster, and nearly the same answers.
        image_cache: Where keys and values of pictures are kept for another question: "memory", a folder, which other
            processes share, an `ImageCache`, or "off".

    Returns:
        The pipeline around both.

    Raises:
        UserError: There is no such model, it cannot be read, or this machine has no such device.
    """
    kept = ImageCache.named(image_cache)
    return CasaPipeline(*load_pretrained(name_or_path, device, weights), kept)


class CasaPipeline:
    """A CASA model and its processor as one: `ask`, `watch`, `stream`.

    Attributes:
        model: The transformers model. Its device is where everything is computed.
        processor: The transformers processor.
        image_cache: Keys and values of pictures that were asked about; None keeps none.
    """

    def __init__(
        self,
        model: CasaForConditionalGeneration,
        processor: CasaProcessor,
        image_cache: "ImageCache | str | os.PathLike[str] | None" = "memory",
    ) -> None:
        self.model = model
        self.processor = processor
        self.image_cache = ImageCache.named(image_cache)

    def __repr__(self) -> str:
        name = self.model.config.name_or_path or type(self.model).__name__
        return f"{type(self).__name__}({name!r}, device={str(self.model.device)!r})"

    @overload
    def ask(self, pictures: Pictures, question: str, **settings: Any) -> str: ...

    @overload
    def ask(
        self, pictures: "Picture | Sequence[Pictures] | None", question: list[str], **settings: Any
    ) -> list[str]: ...

    @torch.no_grad()
    def ask(
        self,
        pictures: "Picture | Sequence[Pictures] | None",
        question: str | list[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        batch_size: int = 16,
        **generate: Any,
    ) -> str | list[str]:
        """Answers a question about pictures, or each of a list of questions by itself.

        Args:
            pictures: For one question: a picture, a list of pictures in the order in which the model sees them, or None
                for a question about none. For a list of questions: one picture that all are about, None, or a list with
                an entry of these forms for each question.
            question: The question, or a list of questions.
            max_new_tokens: The longest answer.
            temperature: 0 is greedy; above 0 words are drawn.
            top_k: Draws among the k likeliest tokens; 0 among all.
            top_p: Draws among the likeliest tokens that hold this share of the probability.
            seed: Of the draws. None draws anew each time. torch's own random state stays as it is.
            batch_size: Questions that are answered in one batch.
            generate: Anything else that `model.generate` takes.

        Returns:
            The bare answer, or the list of answers.

        Raises:
            UserError: A picture cannot be read, the lists differ in length, or a setting is out of range.
        """
        if max_new_tokens < 1 or batch_size < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}; both are 1 or more.")
        Sampling(temperature, top_k, top_p)  # checks them
        drawn = temperature > 0
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if drawn else {}
        generate |= {"max_new_tokens": max_new_tokens, "do_sample": drawn, **how}
        questions = [question] if isinstance(question, str) else list(question)
        shown: Sequence[Picture | Sequence[Pictures] | None] = [pictures] * len(questions)
        if not isinstance(question, str) and isinstance(pictures, list | tuple):
            shown = pictures
        if len(shown) != len(questions):
            raise UserError(
                f"there are {len(questions)} questions and {len(shown)} entries of pictures; give one entry per "
                "question, itself a list where a question is about several pictures."
            )
        chats = [_chat(about, asked) for about, asked in zip(shown, questions, strict=True)]
        answers: list[str] = []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if drawn:
                torch.manual_seed(torch.seed() if seed is None else seed)
            for first in range(0, len(chats), batch_size):
                answers += self._generate(chats[first : first + batch_size], generate)
        return answers[0] if isinstance(question, str) else answers

    def _generate(self, chats: list[list[dict[str, Any]]], generate: dict[str, Any]) -> list[str]:
        settle()
        inputs: Any = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        if self.image_cache is not None:
            inputs = self.image_cache.inputs(self.model, inputs)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        tokens = self.model.generate(**inputs, **generate)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def stream(
        self,
        prompt: str | None = None,
        max_text_tokens: int | None = None,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> StreamingSession:
        """Opens a live session on this model: one `step(frame)` per frame, at constant memory.

        Args:
            prompt: What the user asks for; None takes the processor's own.
            max_text_tokens: Bound on the text that is kept; None lets it grow by what is said.
            max_new_tokens: The longest caption of one frame.
            sampling: How words are drawn; greedy if None.
            seed: Of the draws.

        Returns:
            The session. Any number of them share the model.

        Raises:
            UserError: The bound is too small for the prompt and one frame.
        """
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
        return StreamingSession(self.model, self.processor, prompt, max_text_tokens, **settings)

    def watch(
        self,
        source: str | os.PathLike[str] | Iterable[Any],
        fps: float = 2.0,
        *,
        start: float = 0.0,
        end: float | None = None,
        live: bool | None = None,
        session: StreamingSession | None = None,
        **settings: Any,
    ) -> Iterator[FrameCaption]:
        """Captions a video from any source: a file frame by frame, a live source in time with the clock.

        Args:
            source: As for `casa.media.open_source`: a video file, a folder of pictures, "camera:0", an address, "-" for
                standard input, or any iterable of pictures.
            fps: Frames per second that are looked at.
            start: Seconds from the source's beginning; frames before it are not looked at.
            end: Seconds from the source's beginning; frames from it on are not looked at. None watches to the end.
            live: Whether to keep pace with the clock: late frames are dropped and captions cut at their budget. None
                does so if the source is live.
            session: Goes on with this session; a new one if None.
            settings: Those of `stream`, for a new session: `prompt`, `max_text_tokens`, `max_new_tokens`, ...

        Yields:
            One caption for each frame about which something is said, with `.time` of the frame in seconds, `.text`, and
            `.lag` of the caption behind its frame in seconds.

        Raises:
            UserError: The source cannot be opened or read.
        """
        # FFmpeg is an extra, which pictures do not need
        from casa.media import open_source

        if session is not None and settings:
            raise UserError(f"{', '.join(settings)}: these are for a new session, and one is given.")
        with open_source(source, fps, start=start, end=end, live=live) as frames:
            session = session if session is not None else self.stream(**settings)
            in_pace = frames.is_live if live is None else live
            found = (
                watch_live(session, frames, fps, in_real_time=not frames.is_live) if in_pace else watch(session, frames)
            )
            with closing(found) as captions:
                yield from (caption for caption in captions if caption.text)

    def evaluator(self, *, ablate: Sequence[str] = (), seed: int = 0, **settings: Any) -> "Evaluator":
        """Asks this model the questions of sets: `on_data(data, metrics)`, `on_task(name)`, with their `Summary`.

        Args:
            ablate: What is taken out of the model, as in `evaluate`.
            seed: Of words that are drawn, of resamples, and of ablations.
            settings: Of `casa.evaluation.evaluator.Evaluator`: records, resume, limit, suffix, batch_size, ...

        Returns:
            The evaluator.

        Raises:
            UserError: A setting is out of range.
        """
        from casa.evaluation.evaluator import Evaluator

        kept = self.image_cache
        # in memory, a run keeps by itself what it needs
        shared = kept if kept is not None and kept.folder is not None else None
        around = partial(ablated, self.model, *_of_the_model(ablate), seed=seed)
        more: dict[str, Any] = {"image_cache": shared, "ablate": ablate, "around": around, "seed": seed}
        more["make_session"] = lambda prompt: self.stream(prompt or None)
        return Evaluator(self.model, self.processor, **more, **settings)


def train(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    *,
    changes: Sequence[str] = (),
    report: Callable[[str], None] | None = None,
) -> Path | None:
    """Trains a model as a recipe says.

    Args:
        recipe: A .yaml file, e.g. recipes/lora-own-data.yaml.
        out: Folder of the run; runs/<name of the recipe> if None. It has to be new or empty unless `resume` is true.
        resume: Goes on from the newest checkpoint in `out`.
        changes: Changes to the recipe, as "optimisation.steps=2000".
        report: Is told in sentences what is done besides steps.

    Returns:
        The folder of the finished model, which `load` takes; None if a signal ended the run early.

    Raises:
        UserError: The recipe, its data or its model cannot be used, or `out` holds another run.
    """
    from casa.training.config import open_recipe
    from casa.training.run import train as train_by

    chosen = open_recipe(Path(recipe), changes)
    folder = Path(out) if out is not None else Path("runs") / Path(recipe).stem
    measure = recipe_scores(chosen.evaluation)
    return train_by(chosen, folder, resume=resume, evaluate=measure, on_message=report)


def evaluate(
    eyes: CasaPipeline | str | os.PathLike[str],
    tasks: Iterable[str] | None = None,
    *,
    data: "Data | None" = None,
    metrics: Sequence[str] | None = None,
    records: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    limit: int | None = None,
    largest: int | None = None,
    ablate: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Scores:
    """Scores a model on the offline tasks, on benchmarks by name, or on questions and answers of one's own.

    Args:
        eyes: What `load` gives, or the name or folder of a model.
        tasks: Of "pages", "scenes" and "stream", drawn from handwriting and photographs that were never trained on
            (all of them if left out, and there are no `data`); and benchmarks by name, such as "chartqa" (docs/
            evaluation.md has them all).
        data: Questions with their answers, in any shape and file of docs/data.md: a path, or the fields of
            `casa.data.SourceSettings` ({"path": ..., "shape": ...}), or a list of these. Of benchmarks, the folder or
            file of a copy; None reads the hub.
        metrics: How answers to `data` are scored: of `casa.evaluation.METRICS`.
        records: A .jsonl file for every question, its references, answer, scores and time.
        resume: Goes on with that file.
        seed: Another seed draws other pictures, words (at a temperature above 0), and resamples.
        limit: Pages, scenes, and numbers shown in streams (200 if left out), or rows of every source and benchmark (all
            if left out).
        largest: Longest side of a task's picture in px.
        ablate: What is taken out of the model, of `casa.analysis.ABLATIONS`: "no-images", "without-layers=3,4" ...
            Under "shuffled-images", which is not for offline tasks, every question has the pictures of another record.
        progress: Is called as progress(task, done, limit); limit is 0 where nobody knows it.
        settings: Of `casa.evaluation.AnswerSettings`: suffix, max_new_tokens, batch_size, temperature, ...; a `judge`
            (`casa.evaluation.judge.Judge`); and `cluster`, whose workers answer, as for `casa.cluster.spread`.

    Returns:
        By task, its scores by name, shares from 0 to 1, and "n": {"pages": {"digits", "lines", "n"}, ...}. Of `data`,
        {"data": {"anls", "anls_low", "anls_high", "n", "bad"}}: each score with the ends of its 95 % interval, and how
        many records could not be asked; of benchmarks too, with what else they report.

    Raises:
        UserError: A task or metric is unknown, data cannot be opened, or a setting is out of range.
    """
    from casa.evaluation import offline_tasks
    from casa.evaluation.standard import STANDARD

    wanted = list(offline_tasks.TASKS if tasks is None else tasks)
    named = [name for name in wanted if name in STANDARD]
    if data is None and not named:
        for name, given in {"metrics": metrics, "records": records, **settings}.items():
            if given is not None:
                raise UserError(f"{name} is for data of your own; name data, or leave it out.", field=(name, "data"))
    elif tasks is not None and (metrics is not None or (data is not None and len(named) < len(wanted))):
        what = "metrics" if metrics is not None else "data"
        raise UserError(f"tasks have {what} of their own; leave out tasks or {what}.", field=("tasks", what))
    names = offline_tasks.check_tasks(wanted, STANDARD)
    pipeline = eyes if isinstance(eyes, CasaPipeline) else load(eyes)
    if pipeline is not eyes and settings.get("cluster") is not None:
        settings["load"] = partial(load, eyes)  # type: ignore[arg-type]
    more = {"records": records, "resume": resume, "seed": seed, "limit": limit, "ablate": ablate, **settings}
    if data is not None and tasks is None:
        told = None if progress is None else lambda done: progress("data", done, 0)
        return {"data": pipeline.evaluator(progress=told, **more).on_data(data, metrics or ()).scores()}

    def answer(pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        return pipeline.ask(list(pictures), list(questions))

    found: Scores = {}
    for name in names:
        if name in STANDARD:
            told = None if progress is None else lambda done, name=name: progress(name, done, 0)
            path = None if data is None else os.fspath(data)  # type: ignore[arg-type]
            found[name] = pipeline.evaluator(progress=told, **more).on_task(name, path, alone=len(named) == 1).scores()
        else:
            parts = _of_the_model(ablate)
            if len(parts) < len(ablate):
                reason = "shuffled-images takes pictures of other records; leave it out of ablate, or name data."
                raise UserError(reason, field=("ablate", "data"))
            how: dict[str, Any] = {"seed": seed, "limit": 200 if limit is None else limit, "largest": largest}
            with ablated(pipeline.model, *parts, seed=seed):
                found |= offline_tasks.evaluate([name], answer, pipeline.stream, **how, progress=progress)
    return found


def _of_the_model(names: Sequence[str]) -> list[NamedAblation]:
    """The ablations that take parts out of a model: all but that which exchanges pictures. Raises UserError."""
    return [one for one in map(parse_ablation, names) if one.name != "shuffled-images"]


def recipe_scores(settings: "EvaluationSettings") -> "Evaluate | None":
    """Makes the function that asks a model questions while it trains.

    Args:
        settings: The recipe's `evaluation`.

    Returns:
        A function from a model and its processor to scores such as `pages_digits` and `anls`, and `bad_records` where
        some could not be asked; None if nothing is to be asked.

    Raises:
        UserError: A task is unknown, or what it is drawn from is not installed.
    """
    from casa.evaluation import offline_tasks

    if not settings.asks:
        return None
    names = offline_tasks.check_tasks(settings.tasks) if settings.tasks else []
    # what they are drawn from is an extra, and would be missed at the first measurement only
    offline_tasks.draw_one(names, settings.max_side)

    def scores(model: CasaForConditionalGeneration, processor: CasaProcessor) -> dict[str, float]:
        eyes, limit = CasaPipeline(model, processor, "off"), settings.limit
        found: dict[str, float] = {}
        if names:
            of_tasks = evaluate(eyes, names, limit=limit, largest=settings.max_side)
            found = {f"{task}_{name}": n for task, of in of_tasks.items() for name, n in of.items() if name != "n"}
        if settings.metrics and settings.data is not None:
            how = {"suffix": settings.suffix, "max_new_tokens": settings.max_new_tokens}
            told = eyes.evaluator(limit=limit, **how).on_data(settings.data.sources, settings.metrics)
            found |= {name: one.score for name, one in told.metrics.items()}
            found |= {"bad_records": sum(told.bad.values())} if told.bad else {}
        return found

    return scores


def _chat(shown: "Picture | Sequence[Pictures] | None", question: str) -> list[dict[str, Any]]:
    """One user's turn: the pictures, then the question."""
    pictures = list(shown) if isinstance(shown, list | tuple) else [] if shown is None else [shown]
    names = ["The picture"] if len(pictures) == 1 else [f"Picture {number}" for number in range(1, len(pictures) + 1)]
    images = [as_picture(picture, name) for picture, name in zip(pictures, names, strict=True)]
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
