"""The judge's process: holds the tests and expected values, runs the asserts, calls the candidate through a socket.

It is forked before it is given the tests, and writes one JSON record at the end. Standard library only.
"""

import importlib
import json
import operator
import reprlib
from collections import Counter

from falconlib.sandbox.candidate import describe, load
from falconlib.sandbox.codec import ProtocolError
from falconlib.sandbox.proxies import Died, Function, Peer, call
from falconlib.sandbox.rewrite import plan

MAX_RECORDS = 5000  # assertions recorded one by one
MAX_TEXTS = 500  # of them with what was expected and got: all must fit into the record
_OPS = {"Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
        "Is": operator.is_, "IsNot": operator.is_not, "In": lambda a, b: a in b, "NotIn": lambda a, b: a not in b}  # fmt: skip
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 20
for _name in ("repr_Handle", "repr_Function"):  # asks the program nothing
    setattr(_repr, _name, lambda value, level: "<candidate object>")


class Refused(Exception):
    """These tests cannot be proxied."""


def show(value):
    """A short text for people."""
    try:
        return _repr.repr(value)[:500]
    except (ValueError, RecursionError, MemoryError):
        return f"<{type(value).__name__}>"


class Recorder:
    """Collects one record per executed assert. It is the `__site__` of the rewritten tests. runs: [assert, questions asked
    before, how often] of the gold program, so that a long answer to one question makes up for no short one to another; empty
    when nobody knows: then only those outside loops and branches have to run, once."""

    def __init__(self, todo, peer, runs):
        self.sites, self.peer, self.records, self.statuses = todo.sites, peer, [], set()
        self.gold, self.ran, self.inside = bool(runs), Counter(), 0  # inside: questions asked by asserts, which lead nowhere
        straight = [(s.number, 0, 1) for s in todo.sites if s.straight and not s.constant]
        self.due = Counter({(number, asked): times for number, asked, times in runs or straight})
        self.planned = self.due.total() if runs or not todo.dynamic else None
        self.idle, self.cut = 0, False  # asserts that ran before the program was asked; whether some were not recorded

    def __call__(self, number):
        return Attempt(self, self.sites[number])

    def key(self, site):
        """Which assert it is, and how many questions led to it."""
        return site.number, 0 if site.barred or self.peer is None else self.peer.count - self.inside

    def add(self, key, snippet, status, info=None, texts=(None, None)):
        if key is not None:
            self.ran[key] += 1
            if self.gold and status == "pass" and self.ran[key] > self.due[key]:
                return  # longer answers earn no more
        if len(self.records) >= MAX_RECORDS and status in self.statuses:
            self.cut = True
            return
        self.statuses.add(status)
        info, texts = info or {}, texts if len(self.records) < MAX_TEXTS else (None, None)
        record = {"snippet": snippet, "status": status, "error": info or None, "expected": texts[1], "got": texts[0]}
        own = status == "pass" and self.peer is not None and self.peer.candidate_eq
        self.records.append({**record, "own": own})

    def rest(self, snippets, status, info):
        """What snippets did not reach gets the status of what ended them."""
        for snippet in snippets:
            for key in [k for k in self.short() if self.sites[k[0]].snippet == snippet] or [None]:
                self.add(key, snippet, status, info)

    def spared(self, snippet):
        """Each `assert False` that a try of this snippet rightly did not reach is a test passed."""
        for site in [s for s in self.sites if s.barred and s.snippet == snippet and not self.ran[s.number, 0]]:
            if self.unasked():
                self.skip(site)
            else:
                self.add((site.number, 0), snippet, "pass")

    def skip(self, site):
        """An assert that says nothing about the program."""
        self.ran[self.key(site)] += 1
        self.idle += 1

    def told(self):
        """Its part of the judge's record. Where records were cut there should be as many as there are: the status holds for
        all. The runs matter where loops and branches decide them."""
        expected = len(self.records) if self.cut else self.planned and self.planned - self.idle
        runs = [] if self.planned else [(*key, times) for key, times in self.ran.items()]
        return {"records": self.records, "expected": expected, "runs": runs}

    def unasked(self):
        return self.peer is not None and self.peer.count == 0

    def faulty(self, error):
        """Whether an error is the tests' own: nothing was asked yet, or it is of a kind that no answer causes."""
        theirs = isinstance(error, (Died, ProtocolError)) or hasattr(error, "candidate")
        return self.peer is not None and not theirs and (self.unasked() or isinstance(error, (ImportError, SystemExit)))

    def short(self):
        """The keys of the asserts that still have to run, each as often."""
        ran = self.ran if self.gold else Counter((number, 0) for number, _ in self.ran)
        return list((self.due - ran).elements())


class Attempt:
    """One execution of one assert."""

    def __init__(self, recorder, site):
        self.recorder, self.site = recorder, site
        self.good, self.message, self.texts, self.key = False, None, (None, None), recorder.key(site)

    def compare(self, left, name, right):
        self.good = bool(_OPS[name](left, right))
        self.texts = show(left), show(right)
        return self.good

    def truth(self, value):
        self.good = bool(value)
        return self.good

    def explain(self, message):
        self.message = message

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        site = self.site
        if self.recorder.peer is not None and not site.barred:
            self.recorder.inside = self.recorder.peer.count - self.key[1]
        if error is not None and self.recorder.faulty(error):
            return False
        if error is not None:
            self.recorder.add(self.key, site.snippet, *classify(error))
        elif self.recorder.unasked():
            if not self.good:
                raise AssertionError("an assert fails before the program is asked for anything")
            if not site.constant:
                self.recorder.skip(site)
        elif not (site.constant and self.good):  # a constant that holds is no test
            info = None if self.message is None else {"message": show(self.message)}
            self.recorder.add(self.key, site.snippet, "pass" if self.good else "fail", info, self.texts)
        return True


def classify(error):
    """(status, error data) of an exception that ended an assert or a snippet."""
    if isinstance(error, Died):
        return "died", None
    if isinstance(error, ProtocolError):
        return "runtime_error", {"type": "ProtocolError", "message": str(error)}
    return placed(getattr(error, "candidate", None) or describe(error))  # lines of describe: where tests share the process


def placed(info):
    """Memory ran out, or the program said so."""
    return ("memory" if info["type"] == "MemoryError" and not info.get("raised") else "runtime_error"), info


def run(job, fd, write, retire):
    """Judges one program. job: {tests, setup, entry}; fd: socket of the candidate; write(bytes): where the record goes;
    retire(): called before tests run that might change this process. Returns (as clean as before, candidate hung up)."""
    try:
        todo = plan(job["setup"], job["tests"], job["entry"])
        if todo.in_process:
            raise Refused(todo.in_process)
    except (SyntaxError, ValueError, RecursionError, MemoryError, Refused) as error:
        told = {"refused": str(error)} if isinstance(error, Refused) else {"broken": f"{type(error).__name__}: {error}"}
        write(packed(told))
        return True, False
    if not todo.harmless:
        retire()
    peer = Peer(fd, todo.handles, write)
    recorder, result = Recorder(todo, peer, job["runs"]), {"loaded": False, "error": None, "broken": None}
    try:
        first = peer.receive()
        result["loaded"] = first.get("loaded") is True
        if not result["loaded"]:
            ended = classify(peer.revived(first.get("error")))
            result["error"] = ended[1]
    except (Died, ProtocolError) as error:
        ended = classify(error)
    if result["loaded"]:
        names = {"type": type_of, "__type__": type, "__inout__": inout} | {n: Function(peer, n) for n in todo.names}
        result["broken"] = execute(todo, recorder, names)
    else:
        recorder.rest(range(len(todo.snippets)), *ended)
    lost = peer.dead or peer.violation is not None
    result |= {"waited": peer.waited, "candidate_eq": peer.candidate_eq, "inout": peer.inout, "lost": lost}
    result["refused"] = peer.refused
    write(packed(result | recorder.told()))
    clean = todo.harmless and not peer.violation and not any(r["status"] == "memory" for r in recorder.records)
    return clean, lost


def packed(record):
    """JSON that every decoder takes: texts of a program may hold lone surrogates."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")


def inout(function, *positions):
    """The callable of a bare statement `f(xs)` whose argument is read again."""
    if type(function) is not Function:
        return function
    return lambda *args, **kwargs: call(function, args, kwargs, positions)


def type_of(value, *more):
    """What `type` is in tests, but where they use it as a class: no object of the program may answer for its class."""
    return type(value, *more) if more else value.__class__


def run_in_process(job, source, write):
    """Program and tests in this one process: for tests that cannot be proxied. A program can forge what is written here."""
    todo = plan(job["setup"], job["tests"], job["entry"])
    recorder = Recorder(todo, None, job["runs"])
    module, error = load(source, "solution")
    result = {"loaded": error is None, "error": error, "broken": None}
    if error is None:
        names = {**module.__dict__, "__inout__": lambda function, *positions: function, "__type__": type}
        result["broken"] = execute(todo, recorder, names)
    else:
        recorder.rest(range(len(todo.snippets)), *placed(error))
    write(packed(result | recorder.told()))


def execute(todo, recorder, names):
    """Setup, then each snippet, in one namespace. Returns what is wrong with the tests themselves, or None."""
    space = names | {m: importlib.import_module(m) for m in todo.modules}
    space.update({"__name__": "tests", "__site__": recorder})
    for i, code in enumerate((todo.setup, *todo.snippets), -1):
        try:
            exec(code, space)
            recorder.spared(i)
        except BaseException as error:  # noqa: BLE001 - somebody's code
            if recorder.faulty(error):
                return f"{'setup' if i < 0 else f'test {i}'}: {type(error).__name__}: {error}"
            recorder.rest(range(len(todo.snippets)) if i < 0 else [i], *classify(error))
            if i < 0:
                return None
    missed, idle = recorder.short(), {number for number, _ in recorder.ran}
    if not (missed or recorder.records):
        missed = [(s.number, 0) for s in todo.sites if not s.constant and s.number not in idle]
    for key in missed if not recorder.unasked() else ():  # the program's answers led past them: `for x in f(3): assert ...`
        info = {"message": "this assert was never reached, or not often enough"}
        recorder.add(key, todo.sites[key[0]].snippet, "fail", info)
    return f"{len(missed)} asserts were never reached" if missed and recorder.unasked() else None
