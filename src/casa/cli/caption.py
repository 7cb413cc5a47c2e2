"""`casa caption`: watches a video and says what is new, as it goes."""

from pathlib import Path
from typing import Annotated

import typer

from casa.errors import UserError


def caption(
    words: Annotated[list[str], typer.Argument(metavar="[MODEL] VIDEO", help="casa-tiny if left out.")],
    out: Annotated[list[Path] | None, typer.Option(help="Captions as .srt, .vtt or .jsonl; may be repeated.")] = None,
    burn: Annotated[Path | None, typer.Option(help="The video again, with captions drawn in (.mp4).")] = None,
    fps: Annotated[float, typer.Option(help="Frames looked at per second.")] = 2.0,
    start: Annotated[float, typer.Option(help="Second to start at.")] = 0.0,
    end: Annotated[float | None, typer.Option(help="Second to stop at.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask for; the model's own prompt if left out.")] = None,
    max_text_tokens: Annotated[int | None, typer.Option(help="Bound on the text remembered; none if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Caption a video frame by frame at constant memory; prints each caption when it is said.

    Example: casa caption casa-tiny talk.mp4 --out talk.srt --burn talk-captioned.mp4
    """
    if len(words) not in (1, 2):
        raise UserError("caption takes one video: casa caption casa-tiny talk.mp4 --out talk.srt")
    name, video = words if len(words) == 2 else ("casa-tiny", words[0])
    from casa.media import burn_captions, captions_from_frames, probe, read_frames, write_jsonl, write_srt, write_vtt
    from casa.models.at_hand import load_at_hand
    from casa.streaming import StreamingSession

    writers = {".srt": write_srt, ".vtt": write_vtt, ".jsonl": write_jsonl}
    for path in out or ():
        if path.suffix not in writers:
            raise UserError(f"{path} has no known ending; use {', '.join(writers)}.")
    times: list[float] = []
    texts: list[str] = []
    with read_frames(video, fps=fps, start=start, end=end) as frames:  # refuses a bad video before a model is loaded
        model, processor = load_at_hand(name, device)
        session = StreamingSession(model, processor, prompt=prompt, max_text_tokens=max_text_tokens)
        for frame in frames:
            times.append(frame.time)
            texts.append(session.step(frame.image))
            if texts[-1]:
                print(f"{frame.time:8.2f} s  {texts[-1]}", flush=True)
    captions = captions_from_frames(times, texts, end=probe(video).duration)
    for path in out or ():
        writers[path.suffix](path, captions)
    if burn is not None:
        burn_captions(video, captions, burn)
