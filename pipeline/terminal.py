"""What is shown on a terminal: the names and texts of others' files in it cannot do more than be read."""

from __future__ import annotations

import builtins
import re
from typing import TextIO

# control characters but tab and newline; what reverses the order of letters; what is no character at all
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """As text in which control characters, which a terminal would obey, are written as Python writes them."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def print(*values: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """The built-in one, for what is `printable`."""
    builtins.print(*map(printable, values), end=end, file=file, flush=flush)
