"""The judge behind a server: a small OpenAI-compatible one on loopback that answers well, badly, late, or not at all."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from falconlib.config import JudgeConfig
from falconlib.errors import FalconError
from falconlib.judge import ModelJudge, open_judge
from falconlib.judge.model import FIELDS, GRADES, question
from falconlib.judge.server import SILENT, Gate, ServerChat, public_address
from falconlib.records import Scores, Task

pytest.importorskip("openai")
TASK = Task("t/1", "t", "train", "Write a function that adds two numbers.", "add", ("assert add(1, 2) == 3",))
CLEAN = "def add(a, b):\n    return a + b\n"
GOOD = json.dumps({"style": 1, "complexity": 2, "instruction": 2})


class Handler(BaseHTTPRequestHandler):
    """Answers by the server's script: the n-th request of a question gets its n-th item, the last one from then on."""

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.body = body
        with server.lock:
            key = body["messages"][0]["content"]
            number = server.asked[key] = server.asked.get(key, 0) + 1
            server.headers = self.headers
            server.bodies.append((self.path, self.headers["Authorization"], body))
            server.busy += 1
            server.most = max(server.most, server.busy)
        act = server.script[min(number, len(server.script)) - 1]
        try:
            self.act(act)
        except (BrokenPipeError, ConnectionResetError):  # a client that gave up
            pass
        finally:
            with server.lock:
                server.busy -= 1

    def act(self, act):
        if callable(act):
            act = act(self.body["messages"])
        status, text, raw = 200, act, None
        if isinstance(act, int):
            status, text = act, "no"
        elif isinstance(act, threading.Event):
            act.wait(60)
            text = GOOD
        elif isinstance(act, tuple):  # ("RAW", body), ("CONTENT", any JSON), ("DRIP", seconds a byte) or (status, JSON)
            raw = act[1] if act[0] == "RAW" else json.dumps(act[1]) if isinstance(act[0], int) else None
            status, text = (act[0] if isinstance(act[0], int) else 200), (act[1] if act[0] == "CONTENT" else GOOD)
        message = {"role": "assistant", "content": text}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        reply |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]} if text != "NO CHOICES" else {}
        data = b"<html>busy</html>" if text == "HTML" else json.dumps(reply).encode()
        data = data if raw is None else raw.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if text == "HTML" else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        if isinstance(act, tuple) and act[0] == "DRIP":
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(act[1])
        else:
            self.wfile.write(data)

    def log_message(self, *args):
        """Silent."""


@pytest.fixture
def server(monkeypatch):
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.lock, made.asked, made.bodies, made.busy, made.most, made.script = threading.Lock(), {}, [], 0, 0, [GOOD]
    made.retry_after, made.base = "0.05", f"http://127.0.0.1:{made.server_address[1]}/v1"
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", made.base)
    monkeypatch.setenv("FALCON_JUDGE_MODEL", "m")
    monkeypatch.setenv("FALCON_JUDGE_API_KEY", "secret")
    monkeypatch.setattr("falconlib.judge.server.BACKOFF_S", 0.01)
    monkeypatch.delenv("FALCON_JUDGE_PER_MINUTE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def grade(server, *script, timeout_s=60.0):
    server.script = list(script)
    chat = ServerChat(timeout_s=timeout_s)
    return ModelJudge(chat).score_many([(TASK, CLEAN)])[0], chat.counts


def test_a_good_server_is_asked_once_in_the_usual_form(server):
    assert grade(server, GOOD) == (Scores(1, 2, 2), {"asked": 1, "repaired": 0, "unanswered": 0})
    ((path, key, body),) = server.bodies
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "m" and body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == ["user"] and "  2|     return a + b" in body["messages"][0]["content"]


@pytest.mark.parametrize("busy", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again(server, busy):
    assert grade(server, busy, busy, GOOD) == (Scores(1, 2, 2), {"asked": 1, "repaired": 0, "unanswered": 0})
    assert len(server.bodies) == 3


@pytest.mark.parametrize("broken", [429, 500, 413])
def test_a_server_that_stays_broken_gives_none(server, broken):
    assert grade(server, broken) == (Scores(), {"asked": 1, "repaired": 0, "unanswered": 1})
    assert len(server.bodies) == (1 if broken == 413 else 4)


def test_the_repair_shows_what_was_wrong_and_a_form_without_grades(server):
    grade(server, "Two out of two.", GOOD)
    _, bad, wish = (m["content"] for m in server.bodies[-1][2]["messages"])
    assert bad == "Two out of two." and "-1, 0, 1, 2" in wish and '"complexity": "<grade>"' in wish


@pytest.mark.parametrize("fields, options", [(list(FIELDS), GRADES), (["winner"], ("A", "B", "tie")), (["x"], ("{}", "2"))])
def test_what_says_back_the_form_it_was_shown_has_not_answered(server, fields, options):
    """No text that the questions show may pass for an answer: a model that repeats it has judged nothing."""
    server.script = [lambda messages: messages[-1]["content"]]
    chat = ServerChat()
    assert chat.choose([question(FIELDS, "t", CLEAN)], fields, options) == [None] and chat.counts["unanswered"] == 1
    server.script = ["no", lambda messages: "{" + messages[-1]["content"].rpartition("{")[2]]
    assert chat.choose(["?"], fields, options) == [None]


@pytest.mark.parametrize("refused", [400, 402, 404, 410, 422, 301])
def test_a_wrong_setting_is_told_at_first_and_a_question_that_cannot_be_taken_is_none_later(server, refused):
    server.script = [(refused, {"error": {"message": "Unexpected fields: seed; your key: secret"}})]
    with pytest.raises(FalconError, match=rf"{refused}: .*Unexpected fields: seed; your key: [*]{{3}}"):
        ServerChat().choose(["?"], list(FIELDS), GRADES)
    server.script = [lambda messages: GOOD if messages[0]["content"] == "first" else (refused, {})]
    chat = ServerChat()
    assert [a is None for a in chat.choose(["first", "second"], list(FIELDS), GRADES)] == [False, True]


@pytest.mark.parametrize("refused", [401, 403, 404])
def test_a_refusal_in_mid_run_costs_one_answer_and_no_other(server, tmp_path, refused):
    """Such as a moderated program: one identifier must not stop a training run, nor lose what was paid for."""
    server.script = [lambda messages: (refused, {}) if "bad" in messages[0]["content"] else GOOD]
    codes = [CLEAN, *(f"def add(a, b):\n    return a + b + {i}\n" for i in range(9)), "def add(a, bad):\n    return a + bad\n"]
    config = JudgeConfig(backend="openai", cache=str(tmp_path / "c.sqlite"))
    with open_judge(config, None) as judge:
        found = judge.score_many([(TASK, code) for code in codes])
    assert found == [Scores(1, 2, 2)] * 10 + [Scores()] and judge.counts["unanswered"] == 1
    server.script, before = [GOOD], len(server.bodies)
    with open_judge(config, None) as judge:
        judge.score_many([(TASK, code) for code in codes])
    assert len(server.bodies) == before + 1  # only the refused one is asked again


def test_an_error_among_many_questions_keeps_the_answers_and_stops_the_others(server, capfd):
    """The first question is late, so nothing was heard when the others go out side by side, and one of them is refused."""
    kept, chat = {}, ServerChat(timeout_s=20.0)
    refused = threading.Event()

    def reply(messages):
        name = messages[0]["content"]
        if name == "first":
            return 500
        if name == "second":
            refused.wait(10)
            return (401, {})
        time.sleep(0.05 if name == "third" else 5)
        return GOOD

    server.script = [reply]
    monkeypatched, chat.heard = chat.reply, False

    async def unheard(*arguments):
        found = await monkeypatched(*arguments)
        chat.heard = False  # as if it were the very beginning
        if found[0]:
            refused.set()
        return found

    chat.reply = unheard
    with pytest.raises(FalconError, match="401"):
        chat.choose(["first", "second", "third", *map(str, range(40))], list(FIELDS), GRADES, kept.__setitem__)
    assert kept["third"] is not None and len(server.asked) < 20
    assert "Traceback" not in capfd.readouterr().err and "never retrieved" not in capfd.readouterr().err


def test_ctrl_c_gives_up_what_is_under_way_and_keeps_what_came(server):
    kept, held = {}, threading.Event()

    def reply(messages):
        if messages[0]["content"] == "5":
            os.kill(os.getpid(), signal.SIGINT)
        if int(messages[0]["content"]) >= 5:
            held.wait(30)  # far beyond what the test may take: nobody waits for it
        return GOOD

    server.script = [reply]
    try:
        with pytest.raises(KeyboardInterrupt):
            ServerChat(timeout_s=60.0).choose([str(i) for i in range(40)], list(FIELDS), GRADES, kept.__setitem__)
        assert "0" in kept and len(server.asked) < 40
    finally:
        held.set()


def test_a_400_names_the_parameter_and_no_key(server):
    server.script = [(400, {"error": {"message": "'max_tokens' is not supported; your key: secret"}})]
    with pytest.raises(FalconError, match=r"400: .*'max_tokens' is not supported; your key: [*]{3}") as caught:
        ServerChat().choose(["?"], list(FIELDS), GRADES)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__  # the cause would show the key


@pytest.mark.parametrize(
    "nonsense",
    [
        *("2, 2, 2", "", "HTML", "NO CHOICES", GOOD.replace("1", "7"), GOOD.replace("1", "null"), "{}"),
        *(5, 1.5, True, None, {"style": 1}, [{"type": "text", "text": GOOD}]),
        *(
            ("RAW", text)
            for text in ('{"choices": {"a": 1}}', '{"choices": null}', "[1]", '"hi"', "null", '{"a":', "[" * 200_000)
        ),
        ("RAW", "[" * 200_000 + "]" * 200_000),
    ],
    ids=lambda n: repr(n)[:40],
)
def test_nonsense_is_repaired_once_and_then_none(server, nonsense):
    nonsense = nonsense if isinstance(nonsense, str) else ("CONTENT", nonsense) if not isinstance(nonsense, tuple) else nonsense
    assert grade(server, nonsense, GOOD) == (Scores(1, 2, 2), {"asked": 1, "repaired": 1, "unanswered": 0})
    roles = [m["role"] for m in server.bodies[-1][2]["messages"]]
    assert roles == ["user", "assistant", "user"]
    server.asked.clear()
    assert grade(server, nonsense, nonsense, GOOD) == (Scores(), {"asked": 1, "repaired": 0, "unanswered": 1})


@pytest.mark.parametrize("slow", ["HELD", ("DRIP", 0.5)], ids=["no reply", "no end"])
def test_a_late_server_is_given_up(server, slow):
    """A question has one deadline, whether the reply does not begin or does not end (it takes 100 s here)."""
    held = threading.Event()
    slow = held if slow == "HELD" else slow
    try:
        assert grade(server, slow, timeout_s=0.4)[0] == Scores() and len(server.bodies) <= 1
        server.asked.clear()
        assert grade(server, "no JSON", slow, timeout_s=0.8)[0] == Scores()  # the repair has what is left
    finally:
        held.set()


def test_a_server_that_asks_for_more_patience_than_there_is_is_given_up(server):
    server.retry_after = "100"
    assert grade(server, 429, GOOD)[0] == Scores() and len(server.bodies) == 1  # it is not waited for
    for odd in ("-5", "junk", "nan", ""):
        server.retry_after = odd
        server.asked.clear()
        assert grade(server, 429, GOOD)[0] == Scores(1, 2, 2)


def test_a_silent_server_is_not_asked_for_ever(server, capsys):
    chat, prompts, kept = ServerChat(timeout_s=60.0), [str(i) for i in range(120)], {}
    server.script = [500]
    assert chat.choose(prompts, list(FIELDS), GRADES, kept.__setitem__) == [None] * 120
    assert kept == dict.fromkeys(prompts)  # what was not asked has no answer either, and a replay knows so
    assert chat.counts == {"asked": 120, "repaired": 0, "unanswered": 120}
    assert SILENT <= len(server.asked) <= SILENT + 8 and capsys.readouterr().err.count("without a reply") == 1
    server.script = [GOOD]
    assert None not in chat.choose(prompts, list(FIELDS), GRADES)  # a new batch tries again


def test_questions_go_on_while_an_answer_is_written(server):
    everybody = threading.Event()

    def keep(prompt, answer):
        assert prompt == "0" or everybody.wait(60)

    server.script = [lambda messages: (len(server.bodies) == 20 and everybody.set()) or GOOD]
    assert None not in ServerChat().choose([str(i) for i in range(20)], list(FIELDS), GRADES, keep)


def test_a_partly_silent_server_keeps_its_answers(server):
    """Every second question stays without a reply; those that fail come back together, which is no sign of a dead server."""
    server.script = [lambda messages: GOOD if int(messages[0]["content"]) % 16 < 8 else 500]
    found = ServerChat(timeout_s=60.0).choose([str(i) for i in range(64)], list(FIELDS), GRADES)
    assert [answer is not None for answer in found] == [i % 16 < 8 for i in range(64)]


def test_the_pause_before_a_retry_doubles(server, monkeypatch):
    pauses, real = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *more: pauses.append(seconds) or real(0))
    assert grade(server, 500, 500, 500, GOOD)[0] == Scores(1, 2, 2)
    assert [pause for pause in pauses if pause] == [0.01, 0.02, 0.04]


def test_sampling_can_be_set_for_servers_that_want_other_fields(server, monkeypatch):
    assert grade(server, GOOD)[0] == Scores(1, 2, 2)
    usual = server.bodies[-1][2]
    assert (usual["temperature"], usual["seed"], usual["max_tokens"]) == (0, 0, 128)
    monkeypatch.setenv("FALCON_JUDGE_SAMPLING", '{"max_completion_tokens": 4000}')
    chat = ServerChat()
    chat.choose(["?"], list(FIELDS), GRADES)
    assert set(server.bodies[-1][2]) == {"model", "messages", "max_completion_tokens"}
    assert chat.identity["sampling"] == {"max_completion_tokens": 4000}
    for odd in ("[1]", "{bad", "4000"):
        monkeypatch.setenv("FALCON_JUDGE_SAMPLING", odd)
        with pytest.raises(FalconError, match="FALCON_JUDGE_SAMPLING"):
            ServerChat()


def test_two_servers_of_one_model_name_share_no_answers_without_a_revision(server, tmp_path, monkeypatch):
    config = JudgeConfig(backend="openai", cache=str(tmp_path / "c.sqlite"))

    def asked(revision, host):
        monkeypatch.setenv("FALCON_JUDGE_BASE_URL", server.base.replace("127.0.0.1", host))
        before = len(server.bodies)
        with open_judge(replace(config, revision=revision), None) as judge:
            judge.score_many([(TASK, CLEAN)])
        return len(server.bodies) - before

    assert [asked("", "127.0.0.1"), asked("", "localhost"), asked("", "127.0.0.1")] == [1, 1, 0]
    assert [asked("r1", "127.0.0.1"), asked("r1", "localhost"), asked("r2", "localhost")] == [1, 0, 1]
    with pytest.raises(FalconError, match=r"m \(r1\), m \(r2\)"), open_judge(replace(config, replay=True), None):
        pass
    for revision in ("r1", "r2", server.base):
        with open_judge(replace(config, replay=True, revision=revision), None) as judge:
            assert judge.score_many([(TASK, CLEAN)]) == [Scores(1, 2, 2)]


def test_a_replay_finds_its_judge_among_samplings_and_failed_starts(server, tmp_path, monkeypatch):
    config = JudgeConfig(backend="openai", cache=str(tmp_path / "c.sqlite"), revision="r")
    ways, first = ('{"max_tokens": 10}', '{"max_tokens": 20}'), json.loads(GOOD)
    for number, way in enumerate((*ways, '{"seed": 1}')):
        monkeypatch.setenv("FALCON_JUDGE_SAMPLING", way)
        server.script = [json.dumps(first | {"style": number}) if number < 2 else 401]
        server.asked.clear()
        with open_judge(config, None) as judge:
            if number == 2:
                with pytest.raises(FalconError, match="401"):
                    judge.score_many([(TASK, CLEAN)])
            else:
                judge.score_many([(TASK, CLEAN)])
    for number, way in enumerate(ways):
        monkeypatch.setenv("FALCON_JUDGE_SAMPLING", way)
        with open_judge(replace(config, replay=True), None) as judge:
            assert judge.score_many([(TASK, CLEAN)])[0].style == number
    monkeypatch.delenv("FALCON_JUDGE_SAMPLING")
    with pytest.raises(FalconError) as caught, open_judge(replace(config, replay=True), None):
        pass
    assert " or ".join(ways) in str(caught.value) and "seed" not in str(caught.value)


@pytest.mark.parametrize("refused", [401, 403, 404])
def test_a_refusal_is_an_error_and_names_no_key(server, refused):
    with pytest.raises(FalconError, match=str(refused)) as caught:
        grade(server, refused)
    assert "FALCON_JUDGE_API_KEY" in caught.value.remedy and "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_error_at_first_and_none_later(monkeypatch, server):
    chat = ServerChat()
    assert None not in chat.choose(["?"], list(FIELDS), GRADES)
    server.shutdown()
    server.server_close()
    assert chat.choose(["!"], list(FIELDS), GRADES) == [None]
    with pytest.raises(FalconError, match="no judge's server answers at http://127"):
        grade(server, GOOD)
    with pytest.raises(FalconError, match="no judge's server answers"):
        monkeypatch.setattr("falconlib.judge.server.BACKOFF_S", 10)  # longer than the question's time
        grade(server, GOOD, timeout_s=1.0)


@pytest.mark.parametrize("url", ["localhost:9", "x", "http://", "ftp://x/v1", "http://[::bad/v1", "http://127.0.0.1:99999/v1"])
def test_a_wrong_address_is_an_error(monkeypatch, server, url):
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", url)
    with pytest.raises(FalconError, match="no address of a web server"):
        ServerChat()


def test_nothing_secret_gets_out(monkeypatch, server, tmp_path, capfd):
    """Neither key nor user and query of the address stand in an error, a card, the cache or the output."""
    url = server.base.replace("http://", "http://user:PASSWORD@") + "?api-key=QUERY"
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", url)
    assert public_address(url) == server.base and public_address("http://[::1]:80/v1?x#y") == "http://[::1]:80/v1"
    with open_judge(JudgeConfig(backend="openai", cache=str(tmp_path / "c")), None) as judge:
        judge.score_many([(TASK, CLEAN)])
        shown = repr((judge.version, judge.identity)) + repr([p.read_bytes() for p in tmp_path.iterdir()])
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", server.base)
    for status in (400, 401, 403, 404):
        server.script = [(status, {"error": {"message": "wrong key secret of user with PASSWORD and QUERY"}})]
        with pytest.raises(FalconError) as caught:
            monkeypatch.setenv("FALCON_JUDGE_BASE_URL", url)
            ServerChat().choose(["?"], list(FIELDS), GRADES)
        shown += "".join(traceback.format_exception(caught.value)).split("FalconError:")[1]
    for word in ("secret", "PASSWORD", "QUERY"):
        assert word not in shown + "".join(capfd.readouterr())
    monkeypatch.setenv("FALCON_JUDGE_API_KEY", "seçret")
    with pytest.raises(FalconError, match="characters") as caught:
        ServerChat()
    assert "seç" not in str(caught.value)


def test_what_belongs_to_another_server_is_not_sent(monkeypatch, server):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("FALCON_JUDGE_API_KEY", "")
    assert grade(server, GOOD)[0] == Scores(1, 2, 2)
    assert "elsewhere" not in str(server.headers) and server.bodies[0][1] == "Bearer none"


def test_many_questions_run_side_by_side_and_keep_their_order(server):
    codes = [f"def add(a, b):\n    return a + b + {i}\n" for i in range(16)]
    together = threading.Barrier(8)  # nobody is answered before eight are there; the very first question goes alone

    def reply(messages):
        if server.bodies[0][2]["messages"] != messages:
            together.wait(60)
        return GOOD

    server.script = [reply]
    found = ModelJudge(ServerChat()).score_many([(TASK, c) for c in [*codes, CLEAN.replace("add", "plus")]])
    assert server.most == 8
    assert found[:-1] == [Scores(1, 2, 2)] * 16 and found[-1].instruction == -1


def test_the_cache_keeps_a_server_from_being_asked_again(server, tmp_path):
    config = JudgeConfig(backend="openai", cache=str(tmp_path / "answers.sqlite"))
    for _ in range(2):
        with open_judge(config, None) as judge:
            assert judge.score_many([(TASK, CLEAN)]) == [Scores(1, 2, 2)]
    assert len(server.bodies) == 1


@pytest.mark.parametrize("missing", ["FALCON_JUDGE_BASE_URL", "FALCON_JUDGE_MODEL"])
def test_a_missing_address_is_named(server, monkeypatch, missing):
    monkeypatch.delenv(missing)
    with pytest.raises(FalconError, match="address of a server") as caught:
        ServerChat()
    assert missing in caught.value.remedy
    monkeypatch.setenv(missing, "http://x/v1")
    monkeypatch.setenv("FALCON_JUDGE_PER_MINUTE", "many")
    with pytest.raises(FalconError, match="FALCON_JUDGE_PER_MINUTE = 'many'"):
        ServerChat()


def test_the_gate_spaces_its_callers():
    now = [100.0]
    gate = Gate("120", lambda: now[0])
    assert [gate.turn() for _ in range(3)] == [0.0, 0.5, 1.0]
    now[0] = 200.0
    assert gate.turn() == 0.0
    free = Gate("0", lambda: 0.0)
    assert [free.turn(), free.turn()] == [0.0, 0.0]


def test_every_field_of_the_rubric_is_asked_for(server):
    chat = ServerChat()
    server.script = [json.dumps(dict.fromkeys(FIELDS, 0))]
    assert chat.choose(["?"], list(FIELDS), GRADES) == [dict.fromkeys(FIELDS, "0")]


def test_a_rate_limit_spaces_the_requests(server, monkeypatch):
    monkeypatch.setenv("FALCON_JUDGE_PER_MINUTE", "600")
    began = time.monotonic()
    ServerChat().choose(["1", "2", "3", "4"], list(FIELDS), GRADES)
    assert time.monotonic() - began >= 0.3
    began = time.monotonic()
    grade(server, 500, 500, 500, GOOD)  # retries wait for their turn as well
    assert time.monotonic() - began >= 0.3


def test_a_replay_needs_neither_server_nor_environment_nor_address(server, tmp_path, monkeypatch):
    config = JudgeConfig(backend="openai", revision="r", cache=str(tmp_path / "answers.sqlite"))
    with open_judge(config, None) as judge:
        first = judge.score_many([(TASK, CLEAN)])
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", server.base.replace("127.0.0.1", "localhost") + "/")
    with open_judge(config, None) as judge:  # the same server by another name is not asked again
        assert judge.score_many([(TASK, CLEAN)]) == first and len(server.bodies) == 1
    for name in ("FALCON_JUDGE_BASE_URL", "FALCON_JUDGE_MODEL", "FALCON_JUDGE_API_KEY"):
        monkeypatch.delenv(name)
    for model in ("", "m"):
        with open_judge(replace(config, replay=True, model=model), None) as judge:
            assert judge.score_many([(TASK, CLEAN)]) == first and "openai m" in judge.version
            with pytest.raises(FalconError, match="about the task 'Write a function that adds two numbers"):
                judge.score_many([(TASK, CLEAN.replace("a + b", "b + a"))])
    with pytest.raises(FalconError, match=r"with these models .*: m"), open_judge(replace(config, replay=True, model="n"), None):
        pass
    assert len(server.bodies) == 1


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """`transformers serve`, an OpenAI-compatible server of others, with the embedded model on loopback: its address and model."""
    from conftest import got

    from falconlib.policy.embedded import model_dir

    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason=f"transformers serve needs {name}")
    model, program = str(got(model_dir)), Path(sys.executable).with_name("transformers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, str(program), "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        while not listening(port):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait(60)


def listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_real_model_behind_a_real_server_is_asked_and_its_chatter_is_no_grade(real_server, monkeypatch, tmp_path):
    """The embedded model, free to say anything, writes programs twice: None, counted and replayed. Its answers are grades only
    where decoding is constrained to them, as LocalChat does it."""
    from falconlib.policy.models import load_judge

    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", real_server[0])
    monkeypatch.setenv("FALCON_JUDGE_MODEL", real_server[1])
    monkeypatch.delenv("FALCON_JUDGE_SAMPLING", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    pairs = [(TASK, code) for code in (CLEAN, CLEAN.replace("a + b", "b + a"), CLEAN.replace("add", "plus"))]
    config = JudgeConfig(backend="openai", cache=str(tmp_path / "c.sqlite"), timeout_s=900.0)
    with open_judge(config, None) as judge:
        found = judge.score_many(pairs)
        assert judge.counts == {"asked": 3, "repaired": 0, "unanswered": 3} and found == [Scores()] * 3
    with open_judge(replace(config, replay=True), None) as judge:
        assert judge.score_many(pairs) == found
    with open_judge(replace(config, backend="local"), load_judge) as judge:
        assert Scores() not in judge.score_many(pairs) and judge.counts["unanswered"] == 0
    monkeypatch.setenv("FALCON_JUDGE_MODEL", "no/such-model")
    with pytest.raises(FalconError, match="refuses with 4"):
        ServerChat().choose(["?"], list(FIELDS), GRADES)
