"""A JSON object (RFC 8259) that comes piece by piece.

What is passed on is at any time the beginning of some JSON object, so that clients which read
arguments as they come never meet what they cannot read.
"""

import re

SPACE = re.compile(r"[ \t\n\r]*")
INNER = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?$")
SCALAR = re.compile(
    r"(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=[\s,\]}])"
)
CUT_SCALAR = re.compile(r"[-+.0-9a-zA-Z]+$")

DEEPEST = 128
"""Objects and lists within each other; `json.loads` gives up at some thousand."""

LONGEST_SCALAR = 400


class JsonObject:
    """Reads one object.

    Attributes:
        is_whole: It has ended.
        is_broken: What came cannot go on as JSON.
        rest: What came and was not passed on yet; after the end, what follows the object.
    """

    def __init__(self) -> None:
        self.is_whole = False
        self.is_broken = False
        self.rest = ""
        self._open: list[str] = []  # the brackets that would close what is open
        self._next = "object"
        self._in_string = False

    @property
    def is_in_string(self) -> bool:
        """Whether it is within a string, where any text may stand."""
        return self._in_string and not self.is_broken

    def add(self, text: str) -> str:
        """Takes a piece; returns what of the object is certain by now."""
        self.rest += text
        at = 0
        while not (self.is_whole or self.is_broken):
            after = self._string(at) if self._in_string else self._token(at)
            if after == at:
                break
            at = after
        certain, self.rest = self.rest[:at], self.rest[at:]
        return certain

    def _string(self, at: int) -> int:
        """Reads on within a string; returns where it got to."""
        found = INNER.match(self.rest, at)
        end = found.end() if found else at
        if end == len(self.rest) or CUT_ESCAPE.match(self.rest, end):
            return end
        if self.rest[end] != '"':
            self.is_broken = True
            return end
        self._in_string = False
        self._next = "colon" if self._next == "key" else "comma"
        return end + 1

    def _token(self, at: int) -> int:
        """Reads white space and what follows; returns where it got to."""
        space = SPACE.match(self.rest, at)
        start = space.end() if space else at
        if start == len(self.rest):
            return start
        char = self.rest[start]
        wanted = self._next
        if char == "{" and wanted in ("object", "value", "value or end"):
            return self._enter("}", "key or end", start)
        if char == "[" and wanted in ("value", "value or end"):
            return self._enter("]", "value or end", start)
        if self._open and char == self._open[-1] and wanted in END_OF[char]:
            self._open.pop()
            self._next = "comma"
            self.is_whole = not self._open
        elif char == '"' and wanted in ("key", "key or end", "value", "value or end"):
            self._next = "key" if wanted.startswith("key") else "value"
            self._in_string = True
        elif char == ":" and wanted == "colon":
            self._next = "value"
        elif char == "," and wanted == "comma":
            self._next = "key" if self._open[-1] == "}" else "value"
        elif wanted in ("value", "value or end") and (found := SCALAR.match(self.rest, start)):
            self._next = "comma"
            return found.end()
        elif wanted in ("value", "value or end") and CUT_SCALAR.match(self.rest, start):
            self.is_broken = len(self.rest) - start > LONGEST_SCALAR
            return start
        else:
            self.is_broken = True
            return start
        return start + 1

    def _enter(self, close: str, following: str, at: int) -> int:
        self._open.append(close)
        self._next = following
        self.is_broken = len(self._open) > DEEPEST
        return at + 1


END_OF = {"}": ("comma", "key or end"), "]": ("comma", "value or end")}
"""What may be expected where a bracket closes."""
