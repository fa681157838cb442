"""Shows who said each token of an answer: a mark at each drafted one, colours, a legend.

The mark is the token's place among the drafts of its round, raised; a copy's has a `c` before it,
and an `f` what a grammar forced. It comes after the token's last letter, so that line breaks stay
where they are; behind a `␣` where there is no letter. A token without a mark is the target's own.
Colours only repeat what marks say.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

from mlx_drift.decode.text import Origin
from mlx_drift.errors import DriftError

COLOURS = "green", "cyan", "blue", "magenta"
"""Of drafts 1, 2, 3, and all behind; a terminal's own, so that they suit its background."""

COPIED, FORCED = "yellow", "red"
LETTERS = {"copy": "c", "forced": "f"}
RAISED = str.maketrans("cf0123456789", "ᶜᶠ⁰¹²³⁴⁵⁶⁷⁸⁹")
PICTURE_WIDTH = 92  # columns


class Said(NamedTuple):
    """A token, what text it added, and who said it."""

    text: str
    token: int
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        """Returns it for `--json`."""
        return {"text": self.text, "token": self.token, **asdict(self.origin)}


class DraftsShown:
    """Writes an answer as it comes, with who said each token.

    Args:
        stream: Where to; with colours if it is a terminal.
    """

    def __init__(self, stream: TextIO):
        console = Console(file=stream)
        self.stream = stream
        self.colours = console.is_terminal and not console.no_color
        self._raises = _takes("␣ᶜᶠ⁴", stream)

    def write(self, said: Said) -> None:
        """Writes a token."""
        body, sign, rest = marked(said.text, said.origin, self._raises)
        if self.colours and sign:
            parts = _styled(body, sign, said.origin)
            body, sign = (Style.parse(style).render(part) for part, style in parts)
        self.stream.write(body + sign + rest)
        self.stream.flush()

    def legend(self, said: Iterable[Said]) -> Text:
        """Says what the marks and colours of an answer mean."""
        return legend((one.origin for one in said), self._raises)


def marked(text: str, origin: Origin, raised: bool = True) -> tuple[str, str, str]:
    """Returns a token's text up to its last letter, its mark, and what space follows."""
    if not origin.position:
        return text, "", ""
    body = text.rstrip()
    sign = LETTERS.get(origin.by, "") + str(origin.position)
    sign = sign.translate(RAISED) if raised else f"[{sign}]"
    return body, sign if body or not raised else f"␣{sign}", text[len(body) :]


def colour(origin: Origin) -> str:
    """Returns the colour of who said a token."""
    if not origin.position:
        return ""
    of_kind = {"copy": COPIED, "forced": FORCED}
    return of_kind.get(origin.by, COLOURS[min(origin.position, len(COLOURS)) - 1])


def legend(origins: Iterable[Origin], raised: bool = True) -> Text:
    """Says what marks and colours mean: of who said something, the target always."""
    met = sorted(
        {Origin(), *origins},
        key=lambda o: ([*LETTERS].index(o.by) if o.by in LETTERS else -1, o.position),
    )
    line = Text()
    line.append("said by  ", style="dim")
    for number, origin in enumerate(met):
        line.append("   " if number else "")
        line.append(
            f"{origin} {marked(str(origin), origin, raised)[1]}".strip(), style=colour(origin)
        )
    return line


def coloured(said: Iterable[Said]) -> Text:
    """Returns an answer in marks and colours."""
    whole = Text()
    for text, _, origin in said:
        body, sign, rest = marked(text, origin)
        for part, style in _styled(body, sign, origin):
            whole.append(part, style)
        whole.append(rest)
    return whole


def check_place(path: Path) -> None:
    """Checks where a picture is to go, before there is one.

    Raises:
        DriftError: If it cannot be a file there.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise DriftError(f"{path}: a picture cannot be written there; give a file in a folder")


def save_picture(path: Path, title: str, said: Sequence[Said], below: str) -> None:
    """Draws an answer in marks and colours as SVG, with a legend and a line below it.

    Raises:
        DriftError: If the file cannot be written.
    """
    console = Console(
        record=True,
        width=PICTURE_WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )
    for part in (coloured(said), "", legend(one.origin for one in said), Text(below)):
        console.print(part, highlight=False)
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id="drafts")
    # Fonts that would come from elsewhere: the viewer's own do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise DriftError(f"{path}: cannot be written ({error.strerror})") from None


def _styled(body: str, sign: str, origin: Origin) -> list[tuple[str, str]]:
    return [(body, colour(origin)), (sign, f"dim {colour(origin)}" if origin.position else "")]


def _takes(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
