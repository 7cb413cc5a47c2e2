"""A language model behind an OpenAI-compatible API as the judge of answers: a number from 0 to 10 for each."""

import os
import re
from collections.abc import Mapping
from time import sleep
from typing import Any

from casa.errors import UserError

TRIES, TIMEOUT = 4, 60.0  # and seconds of each
SLOW_DOWN = (408, 409, 429)
WORDS = """You judge answers about pictures and films. Compare the given answer with the reference.
Question: {question}
Reference: {reference}
Given: {answer}
How well does the given answer say what the reference says? Reply with one whole number from 0 (not at all) to 10
(the same in other words), and nothing else."""


class Judge:
    """Asks a judge for each answer.

    Args:
        url: Where its API begins, such as "http://127.0.0.1:8000/v1".
        model: Its name there.
        key: Of the API; that of OPENAI_API_KEY if left out, if there is one.
        wait: Seconds before it is asked again the first time; twice as long each time after.

    Raises:
        UserError: httpx is not installed.
    """

    def __init__(self, url: str, model: str, key: str | None = None, wait: float = 1.0) -> None:
        try:
            import httpx
        except ImportError as error:
            raise UserError("A judge is asked through httpx: install casa-vlm[serve].") from error
        key = key if key is not None else os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url, self.model, self._wait = url.rstrip("/"), model, wait
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT)
        self._broken = httpx.TransportError

    def __call__(self, line: Mapping[str, Any]) -> float:
        """The judgement of a line of records, from 0 to 1. Raises UserError if there is none to be had."""
        asked = WORDS.format(
            question=line["question"], reference=" / ".join(line["references"]), answer=line["answer"] or "(nothing)"
        )
        reply = self._ask(asked)
        found = re.search(r"\d+(?:\.\d+)?", reply)
        if found is None or not 0 <= float(found[0]) <= 10:
            raise UserError(f"The judge {self.model} replied {reply!r:.80}, no number from 0 to 10: take another.")
        return float(found[0]) / 10

    def _ask(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 8}
        why = ""
        for attempt in range(TRIES):
            if attempt:
                sleep(self._wait * 2 ** (attempt - 1))
            try:
                response = self._client.post(f"{self.url}/chat/completions", json=body)
            except self._broken as error:
                why = str(error) or type(error).__name__
                continue
            if response.status_code == 200:
                try:
                    return str(response.json()["choices"][0]["message"]["content"])
                except (ValueError, KeyError, IndexError, TypeError):
                    raise UserError(
                        f"{self.url} does not answer as OpenAI's API does: check the judge's URL."
                    ) from None
            why = f"status {response.status_code}: {response.text[:120]}"
            if response.status_code < 500 and response.status_code not in SLOW_DOWN:
                break
        raise UserError(
            f"The judge at {self.url} does not answer ({why}); mend that, and go on with resume=True.", field="resume"
        )
