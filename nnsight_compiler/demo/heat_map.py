"""A heat map of a layer × position sweep, in the terminal and as a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import final

from PIL import Image, ImageDraw, ImageFont
from rich.style import Style
from rich.text import Text

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# A diverging scale: blue where a value is negative, white at zero, red at one.
STOPS: tuple[tuple[float, Colour], ...] = (
    (-1.0, (33, 102, 172)),
    (0.0, (247, 247, 247)),
    (0.5, (244, 165, 130)),
    (1.0, (178, 24, 43)),
)
INK: Colour = (30, 30, 30)
PAPER: Colour = (255, 255, 255)


@final
@dataclass(frozen=True, slots=True)
class HeatMap:
    """Values in [-1, 1], `[rows][columns]`, and a label for each row and column; values beyond show as the end."""

    title: str
    row_title: str
    column_title: str
    scale_title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"{len(self.rows)} × {len(self.columns)} labels do not fit the values")

    def text(self, width: int) -> Text:
        """Coloured blocks with the value in percent, at most `width` characters wide where the columns allow it."""
        margin = max(len(label) for label in (*self.rows, self.row_title)) + 1
        cell = max(4, min(max(map(len, self.columns)) + 1, (width - margin) // len(self.columns)))
        text = Text(self.row_title.ljust(margin), style="bold", no_wrap=True, overflow="crop")
        for label in self.columns:
            text.append(_shorten(label, cell - 1).center(cell))
        for label, row in zip(self.rows, self.values, strict=True):
            text.append("\n" + label.rjust(margin - 1) + " ", style="default")
            for value in row:
                background = colour(value)
                style = Style(color=_rgb(_ink_on(background)), bgcolor=_rgb(background), bold=False)
                text.append(str(round(100 * value)).center(cell), style=style)
        return text

    def image(self) -> Image.Image:
        """The map with labelled axes and a colour scale."""
        cell_width, cell_height, gap, bar = 56, 24, 12, 18
        font, large = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
        labels = [_rotated(label, font) for label in self.columns]
        left = gap + 30 + max(int(font.getlength(label)) for label in self.rows) + gap
        top = gap + 30 + max(label.height for label in labels) + gap
        width, height = cell_width * len(self.columns), cell_height * len(self.rows)
        size = (left + width + 3 * gap + bar + 70, top + height + 2 * gap + 24)
        size = max(size[0], int(large.getlength(self.title)) + 2 * gap), size[1]
        image = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(image)
        draw.text((gap, gap), self.title, INK, large)
        for column, label in enumerate(labels):
            x = left + cell_width * column + (cell_width - label.width) // 2
            image.paste(INK, (x, top - gap // 2 - label.height), label)
        for row, label_text in enumerate(self.rows):
            y = top + cell_height * row
            draw.text((left - gap // 2, y + cell_height // 2), label_text, INK, font, anchor="rm")
            for column, value in enumerate(self.values[row]):
                x = left + cell_width * column
                fill = colour(value)
                draw.rectangle((x, y, x + cell_width - 2, y + cell_height - 2), fill)
                centre = (x + cell_width // 2 - 1, y + cell_height // 2 - 1)
                draw.text(
                    centre, f"{round(value, 2) + 0.0:.2f}", _ink_on(fill), ImageFont.load_default(size=12), anchor="mm"
                )
        draw.text((left + width // 2, top + height + gap), self.column_title, INK, font, anchor="mt")
        row_title = _rotated(self.row_title, font)
        image.paste(INK, (gap, top + (height - row_title.height) // 2), row_title)
        self._draw_scale(image, (left + width + 2 * gap, top), (bar, height), font)
        return image

    def _draw_scale(self, image: Image.Image, origin: tuple[int, int], size: tuple[int, int], font: Font) -> None:
        """The colour scale over the values that occur, rounded outwards to half units."""
        draw = ImageDraw.Draw(image)
        flat = [value for row in self.values for value in row]
        low = 0.0 if min(flat) >= -0.05 else -0.5 if min(flat) >= -0.5 else -1.0
        (x, y), (width, height) = origin, size
        for step in range(height):
            value = 1.0 - (1.0 - low) * step / (height - 1)
            draw.line((x, y + step, x + width, y + step), colour(value))
        for tick in (1.0, 0.5, 0.0, -0.5, -1.0):
            if tick >= low:
                tick_y = y + round((1.0 - tick) / (1.0 - low) * (height - 1))
                draw.text((x + width + 6, tick_y), f"{tick:g}", INK, font, anchor="lm")
        title = _rotated(self.scale_title, font)
        image.paste(INK, (x + width + 38, y + max(0, (height - title.height) // 2)), title)

    def _repr_png_(self) -> bytes:
        """How a notebook shows it."""
        held = BytesIO()
        self.image().save(held, format="PNG")
        return held.getvalue()

    def write_png(self, path: Path) -> None:
        """Writes `image()` to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image().save(path, format="PNG")


def colour(value: float) -> Colour:
    """The colour of a value: linear between `STOPS`, their ends outside."""
    value = min(max(value, STOPS[0][0]), STOPS[-1][0])
    for (low, start), (high, end) in pairwise(STOPS):
        if value <= high:
            share = (value - low) / (high - low)
            red, green, blue = (round(a + share * (b - a)) for a, b in zip(start, end, strict=True))
            return red, green, blue
    return STOPS[-1][1]


def _ink_on(background: Colour) -> Colour:
    """Dark or light, whichever stands out on `background` (Rec. 709 luma)."""
    red, green, blue = background
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 130 else PAPER


def _rgb(colour: Colour) -> str:
    return "rgb({},{},{})".format(*colour)


def _shorten(label: str, width: int) -> str:
    return label if len(label) <= width else label[: width - 1] + "…"


def _rotated(label: str, font: Font) -> Image.Image:
    """The label written upwards, as a mask to paste a colour through."""
    _, _, right, bottom = font.getbbox(label)
    mask = Image.new("L", (max(1, int(right) + 2), max(1, int(bottom) + 4)), 0)
    ImageDraw.Draw(mask).text((1, 1), label, 255, font)
    return mask.rotate(90, expand=True)
