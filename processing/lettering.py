"""Fonts for drawing words of any script with Pillow alone, and colours that colour-blind readers can tell apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont
Colour = tuple[int, int, int]

# Okabe and Ito's palette without black, then Tol's "light" scheme for further words.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (119, 170, 221), (238, 136, 102), (170, 170, 0), (153, 221, 255), (255, 170, 187), (68, 187, 153), (187, 204, 51),
)  # fmt: skip
NEUTRAL: Colour = (150, 150, 150)
# Words that name a colour are shown in it, in shades that stay apart for colour-blind readers.
NAMED: dict[str, Colour] = {
    "red": (200, 40, 40), "orange": (230, 159, 0), "yellow": (240, 228, 66), "green": (0, 158, 115),
    "cyan": (86, 180, 233), "blue": (0, 114, 178), "purple": (140, 90, 170), "pink": (255, 170, 187),
    "brown": (140, 96, 60), "black": (35, 35, 35), "white": (245, 245, 245), "gray": NEUTRAL, "grey": NEUTRAL,
}  # fmt: skip

# Searched in the system's font folders for letters that the bundled font lacks; none of them is needed.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc",
    "Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "segoeui.ttf",
)  # fmt: skip
_PLAIN_SIGNS = {"␣": "_", "∅": "-", "−": "-", "–": "-", "→": "->", "×": "x"}


def colours_of(words: Sequence[str]) -> dict[str, Colour]:
    """Give every word a colour: its own if it names one, else the palette in the order of `words`, then `NEUTRAL`."""
    colours = {word: NAMED[word.casefold()] for word in words if word.casefold() in NAMED}
    free = [colour for colour in PALETTE if colour not in colours.values()]
    others = [word for word in words if word not in colours]
    return colours | {word: free[place] if place < len(free) else NEUTRAL for place, word in enumerate(others)}


class Lettering:
    """Finds a font, a size and, if need be, a spelling with which a text can be drawn.

    Args:
        font: path of a TrueType font to prefer; by default the one bundled with Pillow.

    Raises:
        ValueError: if `font` cannot be read.
    """

    def __init__(self, font: str | Path | None = None) -> None:
        self.preferred = None if font is None else str(font)
        try:
            _font(self.preferred, 10)
        except OSError as error:
            raise ValueError(f"font '{font}' cannot be read ({error}); give a TrueType file or None.") from error

    def spell(self, text: str) -> tuple[str, str | None]:
        """The text as it can be drawn, and the font that draws it.

        Letters that no font has lose their accent, or become their code point such as U+4F60.
        """
        for name in (self.preferred, *_SYSTEM_FONTS):
            if all(_has_glyph(name, letter) for letter in text):
                return text, name
        return "".join(self._spell_letter(letter) for letter in text), self.preferred

    def fit(self, text: str, width: float, height: float, largest: int, smallest: int = 7) -> tuple[str, Font] | None:
        """Shrink, then shorten a text until it fits a rectangle.

        Args:
            text: what to draw.
            width: room in pixels.
            height: room in pixels.
            largest: font size to start from.
            smallest: font size below which the text is cut instead.

        Returns:
            The text and its font, or None where not even one letter fits.
        """
        text, name = self.spell(text)
        for size in range(max(largest, smallest), smallest - 1, -1):
            font = _font(name, size)
            if sum(font.getmetrics()) * 0.8 <= height and font.getlength(text) <= width:
                return text, font
        font = _font(name, smallest)
        if sum(font.getmetrics()) * 0.8 > height:
            return None
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        return (text + "…", font) if text else None

    def font(self, size: int) -> Font:
        """The preferred font in a size."""
        return _font(self.preferred, size)

    def _spell_letter(self, letter: str) -> str:
        """One letter in the preferred font."""
        if _has_glyph(self.preferred, letter):
            return letter
        plain = _PLAIN_SIGNS.get(letter) or unicodedata.normalize("NFKD", letter)[0]
        return plain if all(_has_glyph(self.preferred, part) for part in plain) else f"U+{ord(letter):04X}"


@lru_cache(maxsize=512)
def _font(name: str | None, size: int) -> Font:
    """A font by file name, or the bundled one."""
    if name is not None:
        return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)  # type: ignore[return-value]  # a bitmap font only where FreeType is absent


@lru_cache(maxsize=65536)
def _has_glyph(name: str | None, letter: str) -> bool:
    """Whether a font draws a letter as something else than its sign for missing letters."""
    if letter == " ":
        return True
    try:
        font = _font(name, 24)
    except OSError:
        return False
    return bytes(font.getmask(letter)) != _missing_sign(name)


@lru_cache(maxsize=32)
def _missing_sign(name: str | None) -> bytes:
    """How a font draws a letter it lacks (U+FFFF is never assigned)."""
    return bytes(_font(name, 24).getmask("\uffff"))
