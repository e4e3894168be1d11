"""The candidate's process: compiles and runs one program, then answers calls. Everything in it is untrusted.

It holds the program's source and the inputs of the calls, never a test or an expected value. Standard library only.
"""

import atexit
import codeop
import contextlib
import copy
import dis
import io
import operator
import sys
import threading
import types

from falconlib.sandbox.codec import Encoder, Rest, decode, receive, send

FILENAME = "solution.py"
_INCOMPLETE = codeop.PyCF_ALLOW_INCOMPLETE_INPUT | codeop.PyCF_DONT_IMPLY_DEDENT  # type: ignore[attr-defined]
_RAISE = dis.opmap["RAISE_VARARGS"]
_ballast = [bytearray(1 << 20)]  # freed when memory is exhausted, so that the error can still be told
_PLAIN = (len, iter, next, reversed, getattr, setattr, delattr, str, repr, format, hash, float, int, round, divmod, copy.copy)
_OPERATIONS: dict = {f.__name__: f for f in (*_PLAIN, copy.deepcopy)} | {"rest": Rest.__call__}
_OPERATIONS["call"] = lambda f, *a, **k: f(*a, **k)
_OPERATIONS |= {"enter": operator.methodcaller("__enter__"), "exit": operator.methodcaller("__exit__", None, None, None)}
_stdout, _stderr = sys.stdout, sys.stderr


def describe(error):
    """An exception as plain data: type, message, frames of the program (outermost first), place of the innermost."""
    if isinstance(error, MemoryError):
        _ballast.clear()
    frames, place, raised = [], None, False
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == FILENAME:
            frames.append([trace.tb_lineno, code.co_name])
            place = trace
        raised = code.co_code[trace.tb_lasti] == _RAISE
        trace = trace.tb_next
    info = {
        "type": type(error).__name__[:100],
        "base": next(k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins"),
        "frames": frames[:10] + frames[-10:] if len(frames) > 20 else frames,
        "raised": raised,
    }
    if place is not None:
        ends = [p[1] for p in place.tb_frame.f_code.co_positions()]
        info.update(line=place.tb_lineno, end_line=ends[place.tb_lasti // 2], function=place.tb_frame.f_code.co_name)
    try:
        info["message"] = str(error)[:1000]
    except BaseException as other:  # noqa: BLE001 - a program's own __str__ may do anything
        info["message"] = f"<{type(other).__name__} in str()>"
    return info


def syntax_info(error, source):
    """A compile error as plain data; `truncated` when the source ends before the statement does."""
    lines = io.StringIO(source.rstrip(), newline=None).readlines() or [""]  # what Python counts as a line
    line = getattr(error, "lineno", None)
    truncated = line is not None and line >= len(lines) and (getattr(error, "offset", 0) or 0) > len(lines[-1].rstrip())
    truncated = truncated or (line == len(lines) and "unterminated" in str(error))
    try:
        compile(source, FILENAME, "exec", _INCOMPLETE)
    except SyntaxError as again:
        truncated = truncated or "incomplete input" in str(again) or type(again).__name__ == "_IncompleteInputError"
    except (ValueError, RecursionError, MemoryError):
        pass
    name = type(error).__name__ if isinstance(error, SyntaxError) else "SyntaxError"
    message = getattr(error, "msg", None) or str(error) or type(error).__name__
    info = {"type": name, "message": str(message)[:1000], "frames": [], "raised": False, "syntax": True, "truncated": truncated}
    if line is not None:
        info.update(line=min(line, len(lines)), end_line=getattr(error, "end_lineno", None) or line)
    return info


def load(source, name):
    """Compiles and runs the program as module `name`. Returns (module, None) or (module, error data)."""
    module = types.ModuleType(name)
    module.__dict__.update(__file__=FILENAME, __builtins__=sys.modules["builtins"])
    sys.modules[name] = sys.modules["__main__"] = module
    sys.argv = [FILENAME]
    try:
        code = compile(source, FILENAME, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, UnicodeError, RecursionError, MemoryError, OverflowError) as error:
        return module, syntax_info(error, source)
    try:
        exec(code, module.__dict__)
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its result
        return module, describe(error)
    return module, None


def flush():
    """Brings what was printed to the descriptors; a program may have closed or replaced its streams."""
    for stream in {_stdout, _stderr, sys.stdout, sys.stderr}:
        with contextlib.suppress(BaseException):  # output is a by-product
            stream.flush()


class Server:
    """Answers the judge's requests about one loaded module."""

    def __init__(self, fd, module):
        self.fd, self.module, self.objects, self.keep = fd, module, [], False

    def run(self):
        while (request := receive(self.fd)) is not None:
            self.serve(request)

    def serve(self, request):
        try:
            reply = self.answer(request)
        except BaseException as error:  # noqa: BLE001
            reply = {"error": describe(error)}
        flush()
        send(self.fd, {"id": request["id"], **reply})

    def answer(self, request):
        self.keep = request["keep"]
        function = self.target(request["target"])
        args = [decode(a, self.special) for a in request["args"]]
        kwargs = {k: decode(v, self.special) for k, v in request["kwargs"].items()}
        value = function(*args, **kwargs)
        reply = {"value": self.encode(value)}
        if request["inout"]:
            reply["inout"] = [self.encode(args[i]) for i in request["inout"]]
        return reply

    def target(self, target):
        kind, name = target
        if kind == "name":
            try:
                return self.module.__dict__[name]
            except KeyError:
                raise NameError(f"name {name!r} is not defined") from None
        if kind == "value":  # the object itself
            return lambda: self.target(["name", name])
        return _OPERATIONS.get(name) or getattr(operator, name)

    def encode(self, value):
        return Encoder(self.reference)(value)

    def reference(self, value):
        if not self.keep and type(value) is not Rest:
            return None
        self.objects.append(value)
        return {"t": "rest" if type(value) is Rest else "ref", "v": len(self.objects) - 1, "type": type(value).__name__[:100]}

    def special(self, tag, v):
        if tag == "ref":
            return self.objects[v]
        if tag == "name":
            return self.target(["name", v])
        if tag == "builtin":
            return getattr(sys.modules["builtins"], v)
        if tag == "fn":
            return lambda *args: self.callback(v, args)
        raise ValueError(tag)

    def callback(self, number, args):
        """A function of the test, called from here: the judge runs it and sends the value. Until then it may ask."""
        keep = self.keep
        send(self.fd, {"callback": number, "args": [self.encode(a) for a in args]})
        while "target" in (reply := receive(self.fd)):
            self.serve(reply)
        self.keep = keep
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return decode(reply["value"], self.special)


def serve(fd, source):
    """Value mode: load, report it, answer until the judge hangs up."""
    module, error = load(source, "solution")
    flush()
    send(fd, {"loaded": error is None, "error": error})
    if error is None:
        Server(fd, module).run()


def script(fd, source):
    """stdio mode: run as a script, with its threads and exit handlers; the frame says how it ended."""
    _, error = load(source, "__main__")
    for end in (threading._shutdown, atexit._run_exitfuncs):
        with contextlib.suppress(BaseException):  # they change no exit status
            end()
    flush()
    if error is not None and error["type"] == "SystemExit" and error["message"] in ("None", "0", ""):
        error = None
    send(fd, {"loaded": error is None, "error": error})
