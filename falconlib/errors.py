"""The one exception that users see: a message that names the value, the expectation and the remedy."""

import json

# what users call the types of settings, parameters and fields
WORDS = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list"}
WORDS |= {"dict": "a group of settings", "tuple[int, ...]": "a list of whole numbers", "tuple[str, ...]": "a list of texts"}


class FalconError(Exception):
    """Bad input or a missing piece. The command line prints it as one line and exits with 2.

    Args:
        message: what is wrong, naming the value and what was expected.
        remedy: the command or the change that mends it.
    """

    def __init__(self, message: str, remedy: str = ""):
        self.message, self.remedy = message, remedy
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)


def shown(value: object) -> str:
    """A value as people write it, in YAML or JSON, and not too long of it: true, null, "text", [0, 1]."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def did_you_mean(kind: str, value: object, allowed) -> FalconError:
    """An unknown name: says what is known and what comes closest."""
    import difflib

    known, asked = [str(a) for a in allowed], str(value).rpartition(": ")[2]  # what stands behind a file and its line
    group = asked.rpartition(".")[0] + "."
    if family := [name for name in known if name.startswith(group)]:  # of train.x, the names of train
        known, asked = family, asked.removeprefix(group)
    names = {name: name for name in known} | {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(asked, names, n=1)
    remedy = f"use {names[close[0]]!r}" if close else f"use one of them as the {kind}"
    return FalconError(f"unknown {kind} {value!r}; known: {', '.join(known)}", remedy)
