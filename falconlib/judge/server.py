"""A judge's model behind an OpenAI-compatible server: hosted, vLLM, llama.cpp, `transformers serve`; from the environment.

FALCON_JUDGE_BASE_URL (such as http://localhost:8000/v1), FALCON_JUDGE_MODEL, FALCON_JUDGE_API_KEY (not needed where the
server wants none), FALCON_JUDGE_PER_MINUTE (requests, no limit without it). Retries with backoff, Retry-After and time limits
are the `openai` package's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from falconlib.errors import FalconError
from falconlib.judge.model import read_answer

SAMPLING = {"temperature": 0.0, "seed": 0, "max_tokens": 128}
PARALLEL = 8  # requests at once
RETRIES = 3  # of a request that met a full, broken or late server
REPAIR = "That is not one JSON object with these fields: {fields}; each one of: {options}. Answer again, with nothing else."


class ServerChat:
    """A Chat. model: "" is $FALCON_JUDGE_MODEL. timeout_s: per request. Raises FalconError when the address, the model or
    the package `openai` is missing."""

    name = "openai"

    def __init__(self, model: str = "", timeout_s: float = 60.0):
        try:
            import openai
        except ImportError as error:
            raise FalconError("the judge 'openai' needs the package openai", 'pip install "falconlib[judge]"') from error
        url, model = os.environ.get("FALCON_JUDGE_BASE_URL"), model or os.environ.get("FALCON_JUDGE_MODEL", "")
        if not url or not model:
            raise FalconError(
                "the judge 'openai' needs the address of a server and the name of its model",
                "export FALCON_JUDGE_BASE_URL=http://localhost:8000/v1 FALCON_JUDGE_MODEL=... FALCON_JUDGE_API_KEY=...",
            )
        key = os.environ.get("FALCON_JUDGE_API_KEY", "none")
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=RETRIES)
        self.model, self.gate = model, Gate(os.environ.get("FALCON_JUDGE_PER_MINUTE", "0"))
        self.identity: dict[str, Any] = {"model": model, "revision": url, "sampling": SAMPLING}
        self.counts = {"asked": 0, "repaired": 0, "unanswered": 0}

    def choose(self, prompts: Sequence[str], fields: Sequence[str], options: Sequence[str]) -> list[dict[str, str] | None]:
        """One answer per prompt; None after one repair, or when the server stays silent.

        Raises FalconError when the server refuses the request itself (key, model name, address).
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = list(pool.map(lambda prompt: self.ask(prompt, fields, options), prompts))
        self.counts["asked"] += len(found)
        self.counts["repaired"] += sum(answer is not None and repaired for answer, repaired in found)
        self.counts["unanswered"] += sum(answer is None for answer, _ in found)
        return [answer for answer, _ in found]

    def ask(self, prompt: str, fields: Sequence[str], options: Sequence[str]) -> tuple[dict[str, str] | None, bool]:
        """(answer or None, whether a second question was needed)."""
        messages = [{"role": "user", "content": prompt}]
        for attempt in (False, True):
            reply = self.reply(messages)
            if reply is None or (answer := read_answer(reply, fields, options)) is not None:
                return (None, attempt) if reply is None else (answer, attempt)
            wish = REPAIR.format(fields=", ".join(fields), options=", ".join(options))
            messages += [{"role": "assistant", "content": reply[:1000]}, {"role": "user", "content": wish}]
        return None, True

    def reply(self, messages: Sequence[dict[str, str]]) -> str | None:
        """The server's text; None when it stays silent, busy or broken after all retries."""
        import openai

        self.gate.wait()
        try:
            made = self.client.chat.completions.create(model=self.model, messages=messages, **SAMPLING)
            return made.choices[0].message.content or ""
        except openai.APIStatusError as error:
            if error.status_code not in (401, 403, 404):  # busy or broken after all retries, or a question it cannot take
                return None
            raise FalconError(
                f"the judge's server refuses with {error.status_code}: {str(error)[:200]}",
                "check FALCON_JUDGE_BASE_URL, FALCON_JUDGE_MODEL and FALCON_JUDGE_API_KEY",
            ) from error
        except openai.APIConnectionError:  # a time-out is one of them
            return None
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError):  # a reply that is no chat completion
            return ""


class Gate:
    """Lets at most `per_minute` callers through, evenly spaced, whichever thread they come from (0: all of them)."""

    def __init__(self, per_minute: str, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep):
        if not per_minute.isdecimal():
            raise FalconError(f"FALCON_JUDGE_PER_MINUTE = {per_minute!r}: a number of requests is expected", "0 is no limit")
        self.gap, self.clock, self.sleep = (60 / int(per_minute) if int(per_minute) else 0.0), clock, sleep
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Sleeps until it is this caller's turn."""
        with self.lock:
            turn = max(self.next, self.clock())
            self.next = turn + self.gap
        self.sleep(max(0.0, turn - self.clock()))
