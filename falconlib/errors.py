"""The one exception that users see: a message that names the value, the expectation and the remedy."""


class FalconError(Exception):
    """Bad input or a missing piece. The command line prints it as one line and exits with 2.

    Args:
        message: what is wrong, naming the value and what was expected.
        remedy: the command or the change that mends it.
    """

    def __init__(self, message: str, remedy: str = ""):
        self.message, self.remedy = message, remedy
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)


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
