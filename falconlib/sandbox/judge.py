"""The judge's process: holds the tests and expected values, runs the asserts, calls the candidate through a socket.

It is forked before it is given the tests, and writes one JSON record at the end. Standard library only.
"""

import builtins
import importlib
import json
import operator
import reprlib

from falconlib.sandbox.candidate import describe, load
from falconlib.sandbox.codec import Encoder, ProtocolError, builtin_name, decode, receive, send
from falconlib.sandbox.rewrite import plan

MAX_RECORDS = 5000  # assertions recorded one by one
_OPS = {"Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
        "Is": operator.is_, "IsNot": operator.is_not, "In": lambda a, b: a in b, "NotIn": lambda a, b: a not in b}  # fmt: skip
_RAISABLE = {k: v for k, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, Exception)}
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 200
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 20


class Died(Exception):
    """The candidate's process is gone: by a limit, a signal, or by itself."""


class CandidateError(Exception):
    """An exception of a class that the judge does not know."""


class Refused(Exception):
    """These tests cannot be proxied."""


def show(value):
    """A short text for people."""
    try:
        return _repr.repr(value)[:500]
    except (ValueError, RecursionError, MemoryError):
        return f"<{type(value).__name__}>"


class Opaque:
    """A value that did not travel. Any use of it is an error of the program."""

    def __init__(self, kind):
        self.__kind = kind

    def __fail(self, *args):
        raise TypeError(f"unsupported return type {self.__kind!r}")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __fail
    __contains__ = __hash__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __abs__ = __float__ = __int__ = __str__ = __fail
    __getattr__ = __fail

    def __repr__(self):
        return f"<{self.__kind} object>"


class Handle:
    """An object that stays with the candidate; what is done to it happens there."""

    def __init__(self, peer, number, kind):
        self.__dict__.update(_peer=peer, _number=number, _kind=kind)

    def __getattr__(self, name):
        return self._peer.ask(["op", "getattr"], (self, name))

    def __setattr__(self, name, value):
        self._peer.ask(["op", "setattr"], (self, name, value))

    def __call__(self, *args, **kwargs):
        return self._peer.ask(["op", "call"], (self, *args), kwargs)

    def __repr__(self):
        return f"<{self._kind} object>"


def _forward(name, judged):
    def method(self, *args):
        self._peer.candidate_eq |= judged
        return self._peer.ask(["op", name], (self, *args))

    return method


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "contains", "hash"):
    setattr(Handle, f"__{_name}__", _forward(_name, True))
Handle.__bool__ = _forward("truth", True)
for _name in ("len", "iter", "str", "getitem", "setitem", "add", "sub", "mul"):
    setattr(Handle, f"__{_name}__", _forward(_name, False))


class Function:
    """A name of the candidate: its function, class or global value."""

    def __init__(self, peer, name):
        self.__dict__.update(_peer=peer, __name__=name)

    def __call__(self, *args, **kwargs):
        return self._peer.ask(["name", self.__name__], args, kwargs)

    def __getattr__(self, name):
        return getattr(self._peer.ask(["value", self.__name__], ()), name)


class Peer:
    """The candidate as seen from here. `mark()` is called once, when its first value has arrived."""

    def __init__(self, fd, keep, mark):
        self.fd, self.keep, self.mark, self.answered = fd, keep, mark, False
        self.count, self.dead, self.violation, self.functions = 0, False, None, []
        self.candidate_eq = self.inout = False

    def receive(self):
        if self.violation:
            raise ProtocolError(self.violation)
        if self.dead:
            raise Died
        try:
            message = receive(self.fd)
        except ProtocolError as error:
            self.violation = str(error)
            raise
        if message is None:
            self.dead = True
            raise Died
        return message

    def ask(self, target, args, kwargs=None, inout=()):
        self.count += 1
        request = {"id": self.count, "target": target, "keep": self.keep, "inout": list(inout), "args": [self.encode(a) for a in args],
                   "kwargs": {k: self.encode(v) for k, v in (kwargs or {}).items()}}  # fmt: skip
        try:
            if not (self.dead or self.violation):
                send(self.fd, request)
        except OSError:
            pass  # the next read says that it is gone
        while "callback" in (reply := self.receive()):
            self.callback(reply)
        if not self.answered:
            self.answered = True
            self.mark()
        if type(reply.get("id")) is not int or reply["id"] != self.count or not ("error" in reply) ^ ("value" in reply):
            self.violation = "answer to another question"
            raise ProtocolError(self.violation)
        if "error" in reply:
            raise revive(reply["error"])
        for position, value in zip(inout, map(self.decode, reply.get("inout", ())), strict=True):
            self.inout = True
            copy_back(args[position], value)
        return self.decode(reply["value"])

    def callback(self, reply):
        """A function of the test that the candidate calls."""
        try:
            value = self.functions[reply["callback"]](*[self.decode(a) for a in reply["args"]])
            answer = {"value": self.encode(value)}
        except (ProtocolError, LookupError):
            raise ProtocolError("malformed callback") from None
        except Exception as error:  # noqa: BLE001 - the test's function failed; its caller is told
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        send(self.fd, answer)

    def encode(self, value):
        return Encoder(self.reference)(value)

    def reference(self, value):
        if isinstance(value, Handle):
            return {"t": "ref", "v": value._number}
        if isinstance(value, Function):
            return {"t": "name", "v": value.__name__}
        if name := builtin_name(value):
            return {"t": "builtin", "v": name}
        if isinstance(value, Opaque):
            bool(value)
        if callable(value):
            self.functions.append(value)
            return {"t": "fn", "v": len(self.functions) - 1}
        return None

    def decode(self, data):
        return decode(data, self.special)

    def special(self, tag, v):
        if tag == "opaque" and type(v) is str:
            return Opaque(v)
        if tag == "ref" and type(v) is int and self.keep:
            return Handle(self, v, "candidate")
        raise ValueError(tag)


def revive(info):
    """The candidate's exception, of the builtin class of that name where there is one."""
    if type(info) is not dict or type(info.get("type")) is not str or type(info.get("message", "")) is not str:
        raise ProtocolError("malformed error")
    kind = _RAISABLE.get(info["type"], CandidateError)
    try:
        error = kind(info.get("message", ""))
    except TypeError:  # UnicodeDecodeError and its like want more arguments
        error = CandidateError(info.get("message", ""))
    error.candidate = info
    return error


def copy_back(variable, value):
    """Brings a changed argument into the test's own variable, in place."""
    if type(variable) is not type(value):
        return
    if isinstance(variable, list):
        variable[:] = value
    elif isinstance(variable, (dict, set)):
        variable.clear()
        variable.update(value)


class Recorder:
    """Collects one record per executed assert. It is the `__site__` of the rewritten tests."""

    def __init__(self, sites):
        self.sites, self.records, self.seen, self.passed_more = sites, [], set(), 0

    def __call__(self, number):
        return Attempt(self, self.sites[number])

    def add(self, site, snippet, status, info=None, texts=(None, None)):
        self.seen.add(site)
        if len(self.records) >= MAX_RECORDS and status == "pass":
            return
        info = info or {}
        self.records.append({"snippet": snippet, "status": status, "error": info or None, "expected": texts[1], "got": texts[0]})

    def rest(self, snippet, status, info):
        """What a snippet did not reach gets the status of what ended it."""
        missing = [s.number for s in self.sites if s.snippet == snippet and s.straight and not s.constant and s.number not in self.seen]
        for number in missing or [None]:
            self.add(number, snippet, status, info)


class Attempt:
    """One execution of one assert."""

    def __init__(self, recorder, site):
        self.recorder, self.site = recorder, site
        self.good, self.message, self.texts = False, None, (None, None)

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
        if error is None:
            if not (site.constant and self.good):  # a constant that holds is no test
                info = None if self.message is None else {"message": show(self.message)}
                self.recorder.add(site.number, site.snippet, "pass" if self.good else "fail", info, self.texts)
            return True
        self.recorder.add(site.number, site.snippet, *classify(error))
        return True


def classify(error):
    """(status, error data) of an exception that ended an assert or a snippet."""
    if isinstance(error, Died):
        return "died", None
    if isinstance(error, ProtocolError):
        return "runtime_error", {"type": "ProtocolError", "message": str(error)}
    info = getattr(error, "candidate", None)
    if info is not None:
        return ("memory" if info["type"] == "MemoryError" and not info.get("raised") else "runtime_error"), info
    info = describe(error)  # lines are known only where program and tests share a process
    return ("memory" if info["type"] == "MemoryError" and not info["raised"] else "runtime_error"), info


def run(job, fd, write):
    """Judges one program. job: {tests, setup, entry}; fd: socket of the candidate; write(bytes): where the record goes.
    Returns whether this process is as clean as before."""
    try:
        todo = plan(job["setup"], job["tests"], job["entry"])
        if todo.in_process:
            raise Refused(todo.in_process)
    except (SyntaxError, ValueError, RecursionError, MemoryError, Refused) as error:
        told = {"refused": str(error)} if isinstance(error, Refused) else {"broken": f"{type(error).__name__}: {error}"}
        write(json.dumps(told).encode())
        return True
    peer, recorder = Peer(fd, todo.keep, lambda: write(b"*")), Recorder(todo.sites)
    result = {"expected": todo.expected, "loaded": False, "error": None, "broken": None}
    try:
        first = peer.receive()
        result["loaded"], result["error"] = first.get("loaded") is True, first.get("error")
        ended = None if result["loaded"] else classify(revive(result["error"]))
    except (Died, ProtocolError) as error:
        ended = classify(error)
    if result["loaded"]:
        names = {n: Function(peer, n) for n in todo.names} | {"__inout__": inout}
        result["broken"] = execute(todo, recorder, names, peer)
    else:
        for i in range(len(todo.snippets)):
            recorder.rest(i, *ended)
    result.update(records=recorder.records, candidate_eq=peer.candidate_eq, inout=peer.inout, keep=todo.keep)
    write(json.dumps(result).encode())
    return todo.harmless and not peer.violation and not any(r["status"] == "memory" for r in recorder.records)


def inout(function, *positions):
    """The callable of a bare statement `f(xs)` whose argument is read again."""
    if not isinstance(function, Function):
        return function
    return lambda *args, **kwargs: function._peer.ask(["name", function.__name__], args, kwargs, positions)


def run_in_process(job, source, write):
    """Program and tests in this one process: for tests that cannot be proxied. A program can forge what is written here."""
    todo = plan(job["setup"], job["tests"], job["entry"])
    recorder = Recorder(todo.sites)
    module, error = load(source, "solution")
    result = {"expected": todo.expected, "loaded": error is None, "error": error, "broken": None}
    if error is None:
        names = {**module.__dict__, "__inout__": lambda function, *positions: function}
        result["broken"] = execute(todo, recorder, names, None)
    else:
        info = "memory" if error["type"] == "MemoryError" and not error["raised"] else "runtime_error", error
        for i in range(len(todo.snippets)):
            recorder.rest(i, *info)
    write(json.dumps({**result, "records": recorder.records}).encode())


def execute(todo, recorder, names, peer):
    """Setup, then each snippet, in one namespace. Returns what is wrong with the tests themselves, or None."""
    space = names | {m: importlib.import_module(m) for m in todo.modules}
    space.update({"__name__": "tests", "__site__": recorder})
    try:
        exec(todo.setup, space)
    except Exception as error:  # noqa: BLE001 - setup is somebody's code
        for i in range(len(todo.snippets)):
            recorder.rest(i, *classify(error))
        own = peer is not None and not peer.answered and not isinstance(error, (Died, ProtocolError)) and not hasattr(error, "candidate")
        return f"setup: {type(error).__name__}: {error}" if own else None
    for i, code in enumerate(todo.snippets):
        try:
            exec(code, space)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001
            recorder.rest(i, *classify(error))
    unseen = [s.number for s in todo.sites if s.straight and not s.constant and s.number not in recorder.seen]
    return f"{len(unseen)} asserts were never reached" if unseen else None
