"""A judge's model behind an OpenAI-compatible server: hosted, vLLM, llama.cpp, `transformers serve`; from the environment.

FALCON_JUDGE_BASE_URL (such as http://localhost:8000/v1), FALCON_JUDGE_MODEL, FALCON_JUDGE_API_KEY (not needed where the
server wants none), FALCON_JUDGE_PER_MINUTE (requests, retries among them; no limit without it), FALCON_JUDGE_SAMPLING (a JSON
object in place of SAMPLING, for a server that wants other fields, such as {"max_completion_tokens": 4000} or a
response_format). Key, user and query of the address appear in no message and no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from falconlib.errors import FalconError
from falconlib.judge.model import Answer, Keep, forget, read_answer

SAMPLING = {"temperature": 0.0, "seed": 0, "max_tokens": 128}
PARALLEL = 8  # requests at once
RETRIES = 3  # of a request that met a full or broken server
BACKOFF_S = 0.5  # before the first retry, doubled for the next ones, unless the server says when to come back
SILENT = 5 * PARALLEL  # questions in a row without any reply, five rounds of all places: the rest of the batch is not asked
REPAIR = "That is not the form. Answer the question again, with nothing but this object, each <grade> one of {options}: {form}"
REMEDY = "check FALCON_JUDGE_BASE_URL, FALCON_JUDGE_MODEL and FALCON_JUDGE_API_KEY"


class ServerChat:
    """A Chat. model: "" is $FALCON_JUDGE_MODEL. revision: see JudgeConfig. timeout_s: for a question, retries and repair
    included, the wait for its turn not. Raises FalconError when address, model or the package `openai` is missing or unusable."""

    name = "openai"

    def __init__(self, model: str = "", timeout_s: float = 60.0, revision: str = "", clock: Callable[[], float] = time.monotonic):
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise FalconError("the judge 'openai' needs the package openai", 'pip install "falconlib[judge]"') from error
        self.url, model = os.environ.get("FALCON_JUDGE_BASE_URL", ""), model or os.environ.get("FALCON_JUDGE_MODEL", "")
        if not self.url or not model:
            raise FalconError(
                "the judge 'openai' needs the address of a server and the name of its model",
                "export FALCON_JUDGE_BASE_URL=http://localhost:8000/v1 FALCON_JUDGE_MODEL=... FALCON_JUDGE_API_KEY=...",
            )
        self.key = os.environ.get("FALCON_JUDGE_API_KEY", "").strip() or "none"
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise FalconError("FALCON_JUDGE_API_KEY holds blanks or characters that no header can carry", "copy it again")
        self.model, self.timeout_s, self.clock = model, timeout_s, clock
        self.gate = Gate(os.environ.get("FALCON_JUDGE_PER_MINUTE", "0"), clock)
        self.sampling = sampling(os.environ.get("FALCON_JUDGE_SAMPLING", ""))
        self.identity: dict[str, Any] = {"model": model, "revision": revision, "address": public_address(self.url)}
        self.identity |= {"sampling": self.sampling, "repair": REPAIR}
        self.counts = {"asked": 0, "repaired": 0, "unanswered": 0}
        self.heard, self.silent = False, 0  # whether it ever answered; questions in a row without a reply

    def choose(self, prompts: Sequence[str], fields: Sequence[str], options: Sequence[str], keep: Keep = forget) -> list[Answer]:
        """One answer per prompt; None when the server is silent, late, broken, or talks nonsense twice. All are counted.

        Raises FalconError when the server refuses the request itself (key, model name, address), or cannot be reached or
        understands nothing, before it has answered anything. Ctrl-C gives up what is under way.
        """
        work: list[Any] = []

        async def ask_all() -> list[tuple[Answer, bool]]:
            work.extend((asyncio.get_running_loop(), asyncio.current_task()))
            with ThreadPoolExecutor(1) as writer:  # one answer after the other, while the requests go on
                return await self.ask_all(prompts, partial(work[0].run_in_executor, writer, keep), fields, options)

        with ThreadPoolExecutor(1) as pool:  # a thread of its own: a notebook's has an event loop already
            try:
                asking = pool.submit(asyncio.run, ask_all())
                while not asking.done():  # in short waits: a signal that another thread was given does not end a long one
                    wait([asking], 0.2)
                found = asking.result()
            except BaseException:  # Ctrl-C may show itself as another error of a wait that it broke
                with contextlib.suppress(LookupError, RuntimeError):  # not begun yet, or over already
                    work[0].call_soon_threadsafe(work[1].cancel)
                raise
        self.counts["asked"] += len(found)
        self.counts["repaired"] += sum(answer is not None and repaired for answer, repaired in found)
        self.counts["unanswered"] += sum(answer is None for answer, _ in found)
        return [answer for answer, _ in found]

    async def ask_all(self, prompts: Sequence[str], keep: Callable, *form: Sequence[str]) -> list[tuple[Answer, bool]]:
        """The answers, PARALLEL at once; the very first question goes alone, so that a wrong setting is found by one."""
        import openai

        places, self.silent = asyncio.Semaphore(PARALLEL), min(self.silent, SILENT - 1)  # a new batch tries again
        async with openai.AsyncOpenAI(base_url=self.url, api_key=self.key, timeout=self.timeout_s, max_retries=0) as client:
            client.organization = client.project = None  # those of the environment are for another server

            async def one(prompt: str) -> tuple[Answer, bool]:
                async with places:
                    asked = self.silent < SILENT
                    answer, repaired = await self.ask(client, prompt, *form) if asked else (None, False)
                await asyncio.shield(keep(prompt, answer))  # to the end, even when the others are given up
                return answer, repaired

            alone = 0 if self.heard else 1
            first = [await one(prompt) for prompt in prompts[:alone]]
            others = [asyncio.ensure_future(one(prompt)) for prompt in prompts[alone:]]
            try:
                found = [*first, *await asyncio.gather(*others)]
            finally:  # one that failed takes the others along, before their client is closed
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
        if self.silent >= SILENT:
            text = (
                f"the judge's server left {self.silent} questions in a row without a reply; the rest of this batch is not asked"
            )
            sys.stderr.write(f"falconlib: {text}\n")
        return found

    async def ask(self, client: Any, prompt: str, fields: Sequence[str], options: Sequence[str]) -> tuple[Answer, bool]:
        """(answer or None, whether a second question was needed). The second one shows the form without a grade: whoever says it
        back has not answered."""
        messages, left = [{"role": "user", "content": prompt}], self.timeout_s
        wish = REPAIR.format(options=", ".join(options), form=json.dumps(dict.fromkeys(fields, "<grade>")))
        for attempt in (False, True):
            reply, left = await self.reply(client, messages, left)
            self.silent = self.silent + 1 if reply is None else 0
            if reply is None or (answer := read_answer(reply, fields, options)) is not None:
                return (None, attempt) if reply is None else (answer, attempt)
            messages += [{"role": "assistant", "content": reply[:1000]}, {"role": "user", "content": wish}]
        return None, True

    async def reply(self, client: Any, messages: Sequence[dict[str, str]], left: float) -> tuple[str | None, float]:
        """The server's text and the seconds that are left of `left`; None when it stays silent, busy or broken."""
        import openai

        for retry in range(RETRIES + 1):
            await asyncio.sleep(self.gate.turn())
            began, pause, lost = self.clock(), BACKOFF_S * 2**retry, False
            try:
                request = client.chat.completions.create(model=self.model, messages=messages, extra_body=self.sampling)
                made = await asyncio.wait_for(request, left)  # whole: a server that drips its reply does not prolong it
                self.heard, text = True, made.choices[0].message.content
                return (text if isinstance(text, str) else ""), left - (self.clock() - began)
            except openai.APIStatusError as error:
                code, told = error.status_code, error.response.headers.get("Retry-After", "")
                if not self.heard and code < 500 and code not in (408, 409, 413, 429):
                    raise FalconError(f"the judge's server refuses with {code}{self.said(error, code)}", REMEDY) from None
                if code not in (408, 409, 429) and code < 500:  # a question it cannot take, or a key that has run out
                    return None, left
                pause = float(told) if told.replace(".", "", 1).isdecimal() else pause
            except (openai.APITimeoutError, TimeoutError):
                return None, left
            except openai.APIConnectionError:
                lost = not self.heard
            except (openai.APIError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
                self.heard = True
                return "", left - (self.clock() - began)  # a reply that is no chat completion
            left -= self.clock() - began + pause
            if left <= 0 or retry == RETRIES:
                if lost:
                    raise FalconError(f"no judge's server answers at {self.identity['address']}", REMEDY)
                break
            await asyncio.sleep(pause)
        return None, left

    def said(self, error: Exception, code: int) -> str:
        """What the server says against a request: it may name the parameter or the model. No secret of ours is in it, and
        nothing is repeated of what it says about a key."""
        text, parts = str(getattr(error, "message", "")), urlsplit(self.url)
        secrets = [self.key, parts.password, parts.username, *(value for _, value in parse_qsl(parts.query))]
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return f": {text[:200]}" if code not in (401, 403) else ""


def sampling(text: str) -> dict[str, Any]:
    """FALCON_JUDGE_SAMPLING as data, SAMPLING for "". Raises FalconError when it is no JSON object."""
    try:
        found = json.loads(text) if text else SAMPLING
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FalconError(
            f"FALCON_JUDGE_SAMPLING = {text!r}: a JSON object is expected", 'such as {"max_completion_tokens": 4000}'
        )
    return found


def public_address(url: str) -> str:
    """The address without user, password and query. Raises FalconError when it is none of a web server."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise FalconError("FALCON_JUDGE_BASE_URL is no address of a web server", "such as http://localhost:8000/v1")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"


class Gate:
    """Lets at most `per_minute` requests through, evenly spaced (0: all of them)."""

    def __init__(self, per_minute: str, clock: Callable[[], float] = time.monotonic):
        if not per_minute.isdecimal():
            raise FalconError(f"FALCON_JUDGE_PER_MINUTE = {per_minute!r}: a number of requests is expected", "0 is no limit")
        self.gap, self.clock, self.next = (60 / int(per_minute) if int(per_minute) else 0.0), clock, 0.0

    def turn(self) -> float:
        """Seconds until it is this caller's turn."""
        turn = max(self.next, self.clock())
        self.next = turn + self.gap
        return max(0.0, turn - self.clock())
