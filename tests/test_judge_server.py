"""The judge behind a server: a small OpenAI-compatible one on loopback that answers well, badly, late, or not at all."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from falconlib.config import JudgeConfig
from falconlib.errors import FalconError
from falconlib.judge import ModelJudge, open_judge
from falconlib.judge.model import FIELDS, GRADES
from falconlib.judge.server import Gate, ServerChat
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
            server.bodies.append((self.path, self.headers["Authorization"], body))
            server.busy += 1
            server.most = max(server.most, server.busy)
        act = server.script[min(number, len(server.script)) - 1]
        try:
            self.act(act)
        except BrokenPipeError:  # a client that gave up
            pass
        finally:
            with server.lock:
                server.busy -= 1

    def act(self, act):
        status, text = 200, act
        if isinstance(act, int):
            status, text = act, "no"
        elif callable(act):
            text = act(self.body["messages"])
        elif isinstance(act, float):
            time.sleep(act)
            text = GOOD
        message = {"role": "assistant", "content": text}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        reply |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]} if text != "NO CHOICES" else {}
        data = b"<html>busy</html>" if text == "HTML" else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if text == "HTML" else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0.05")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Silent."""


@pytest.fixture
def server(monkeypatch):
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.lock, made.asked, made.bodies, made.busy, made.most, made.script = threading.Lock(), {}, [], 0, 0, [GOOD]
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", f"http://127.0.0.1:{made.server_address[1]}/v1")
    monkeypatch.setenv("FALCON_JUDGE_MODEL", "m")
    monkeypatch.setenv("FALCON_JUDGE_API_KEY", "secret")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def grade(server, *script, timeout_s=5.0):
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


@pytest.mark.parametrize("broken", [429, 500, 400, 413])
def test_a_server_that_stays_broken_gives_none(server, broken):
    assert grade(server, broken) == (Scores(), {"asked": 1, "repaired": 0, "unanswered": 1})
    assert len(server.bodies) == (1 if broken in (400, 413) else 4)


@pytest.mark.parametrize(
    "nonsense", ["2, 2, 2", "", "HTML", "NO CHOICES", GOOD.replace("1", "7"), GOOD.replace("1", "null"), "{}"]
)
def test_nonsense_is_repaired_once_and_then_none(server, nonsense):
    assert grade(server, nonsense, GOOD) == (Scores(1, 2, 2), {"asked": 1, "repaired": 1, "unanswered": 0})
    roles = [m["role"] for m in server.bodies[-1][2]["messages"]]
    assert roles == ["user", "assistant", "user"]
    server.asked.clear()
    assert grade(server, nonsense, nonsense, GOOD) == (Scores(), {"asked": 1, "repaired": 0, "unanswered": 1})


def test_a_late_server_is_given_up(server):
    began = time.monotonic()
    assert grade(server, 3.0, timeout_s=0.2)[0] == Scores()
    assert time.monotonic() - began < 2.5
    server.asked.clear()
    assert grade(server, 1.0, GOOD, timeout_s=0.3)[0] == Scores(1, 2, 2)


@pytest.mark.parametrize("refused", [401, 403, 404])
def test_a_refusal_is_an_error_and_names_no_key(server, refused):
    with pytest.raises(FalconError, match=str(refused)) as caught:
        grade(server, refused)
    assert "FALCON_JUDGE_API_KEY" in caught.value.remedy and "secret" not in str(caught.value)


def test_a_server_that_is_not_there_gives_none(monkeypatch, server):
    monkeypatch.setenv("FALCON_JUDGE_BASE_URL", "http://127.0.0.1:9/v1")
    assert grade(server, GOOD) == (Scores(), {"asked": 1, "repaired": 0, "unanswered": 1})


def test_many_questions_run_side_by_side_and_keep_their_order(server):
    codes = [f"def add(a, b):\n    return a + b + {i}\n" for i in range(16)]
    server.script = [0.15]
    began = time.monotonic()
    found = ModelJudge(ServerChat()).score_many([(TASK, c) for c in [*codes, CLEAN.replace("add", "plus")]])
    assert time.monotonic() - began < 2 and 2 <= server.most <= 8
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
    monkeypatch.setenv(missing, "x")
    monkeypatch.setenv("FALCON_JUDGE_PER_MINUTE", "many")
    with pytest.raises(FalconError, match="FALCON_JUDGE_PER_MINUTE = 'many'"):
        ServerChat()


def test_the_gate_spaces_its_callers():
    now, slept = [100.0], []
    gate = Gate("120", lambda: now[0], slept.append)
    for _ in range(3):
        gate.wait()
    assert slept == [0.0, 0.5, 1.0]
    now[0] = 200.0
    gate.wait()
    assert slept[-1] == 0.0
    free = Gate("0", lambda: 0.0, slept.append)
    free.wait()
    free.wait()
    assert slept[-2:] == [0.0, 0.0]


def test_every_field_of_the_rubric_is_asked_for(server):
    chat = ServerChat()
    server.script = [json.dumps(dict.fromkeys(FIELDS, 0))]
    assert chat.choose(["?"], list(FIELDS), GRADES) == [dict.fromkeys(FIELDS, "0")]


def test_a_rate_limit_spaces_the_requests(server, monkeypatch):
    monkeypatch.setenv("FALCON_JUDGE_PER_MINUTE", "600")
    began = time.monotonic()
    ServerChat().choose(["1", "2", "3", "4"], list(FIELDS), GRADES)
    assert time.monotonic() - began >= 0.3


@pytest.mark.slow
def test_a_real_model_behind_the_server(server):
    """The embedded model writes the replies, free to say anything: what comes back is a grade in range or None, all counted."""
    import torch

    from falconlib.policy.models import load_judge

    policy = load_judge("")

    def reply(messages):
        text = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([policy.encode(text)])
        with server.lock, torch.no_grad():
            made = policy.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        return policy.decode(made[0, ids.shape[1] :])

    server.script = [reply]
    chat = ServerChat(timeout_s=300)
    codes = [CLEAN, CLEAN.replace("a + b", "b + a"), CLEAN.replace("add", "plus")]
    for found in ModelJudge(chat).score_many([(TASK, code) for code in codes]):
        assert found == Scores() or {found.style, found.complexity, found.instruction} <= {-1, 0, 1, 2}
    assert chat.counts["asked"] == 3 and chat.counts["repaired"] + chat.counts["unanswered"] <= 3
