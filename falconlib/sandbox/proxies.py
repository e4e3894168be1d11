"""The candidate as the judge sees it: its functions, its objects, its errors. Standard library only.

A call becomes a frame on the socket; what comes back is plain data, an object that stays with the candidate (Handle, only
where the tests name a class or a callable), or an Opaque value that fails on any use.
"""

import builtins

from falconlib.sandbox.codec import Encoder, ProtocolError, builtin_name, decode, receive, send

_RAISABLE = {k: v for k, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, Exception)}
for _name in ("StopIteration", "StopAsyncIteration"):  # would end a map() or a loop of the test as if nothing were wrong
    del _RAISABLE[_name]


class Died(BaseException):
    """The candidate's process is gone: by a limit, a signal, or by itself. No `except Exception` of a test catches it."""


class CandidateError(Exception):
    """An exception of a class that the judge does not know."""


class Opaque:
    """A value that did not travel. Any use of it is an error of the program, asking for its class or attributes included."""

    def __init__(self, kind):
        object.__setattr__(self, "kind", kind)

    def __fail(self, *args):
        raise TypeError(f"unsupported return type {object.__getattribute__(self, 'kind')[:100]!r}")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __fail
    __contains__ = __hash__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __abs__ = __float__ = __int__ = __str__ = __fail
    __getattribute__ = __setattr__ = __fail

    def __repr__(self):
        return f"<{object.__getattribute__(self, 'kind')[:100]} object>"


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

    @property
    def __class__(self):  # what isinstance() reads: this one has the methods of everything, and would be taken for it
        raise TypeError("the class of a program's object is known to the program only")


def _forward(name, judged):
    def method(self, *args):
        # a difference with a value of the test is most likely a comparison: abs(f(x) - 5) < 1e-6
        self._peer.candidate_eq |= judged or (name == "sub" and type(args[0]) is not Handle)
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
        request = {"id": self.count, "target": target, "keep": self.keep, "inout": list(inout)}
        request |= {"args": [self.encode(a) for a in args], "kwargs": {k: self.encode(v) for k, v in (kwargs or {}).items()}}
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
            raise self.revived(reply["error"])
        for position, value in zip(inout, map(self.decode, reply.get("inout", ())), strict=True):
            self.inout = True
            copy_back(args[position], value)
        return self.decode(reply["value"])

    def revived(self, info):
        try:
            return revive(info)
        except (ValueError, TypeError, LookupError):
            raise ProtocolError("malformed error") from None

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
        if type(value) is Handle:
            return {"t": "ref", "v": value._number}
        if type(value) is Function:
            return {"t": "name", "v": value.__name__}
        if type(value) is Opaque:
            bool(value)
        if name := builtin_name(value):
            return {"t": "builtin", "v": name}
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


def _text(value, cap):
    """Text that every JSON decoder takes: no lone surrogates."""
    return value[:cap].encode("utf-8", "replace").decode()


def revive(info):
    """The candidate's exception, of the builtin class of that name where there is one; what it says of itself is cut."""
    if type(info) is not dict or type(info.get("type")) is not str or type(info.get("message", "")) is not str:
        raise ProtocolError("malformed error")
    told = {k: v for k, v in info.items() if v is None or type(v) in (int, bool)}  # line, end_line, raised, syntax, truncated
    told |= {"type": _text(info["type"], 100), "message": _text(info.get("message", ""), 1000)}
    if type(info.get("function")) is str:
        told["function"] = _text(info["function"], 100)
    told["frames"] = [[n, _text(name, 100)] for n, name in info.get("frames", ())[:20] if type(n) is int and type(name) is str]
    kind = _RAISABLE.get(told["type"], CandidateError)
    try:
        error = kind(told["message"])
    except TypeError:  # UnicodeDecodeError and its like want more arguments
        error = CandidateError(told["message"])
    error.candidate = told
    return error


def copy_back(variable, value):
    """Brings a changed argument into the test's own variable, in place."""
    if type(variable) is list and type(value) is list:
        variable[:] = value
    elif type(variable) in (dict, set) and type(value) is type(variable):
        variable.clear()
        variable.update(value)
