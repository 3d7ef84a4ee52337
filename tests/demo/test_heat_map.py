"""The heat map: what it shows, where, in which colour."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nnsight_compiler.demo.heat_map import HeatMap, colour


def heat_map(values: tuple[tuple[float, ...], ...] = ((0.0, 1.0), (-1.0, 0.5))) -> HeatMap:
    rows = tuple(str(row) for row in range(len(values)))
    columns = tuple(f" token{column}" for column in range(len(values[0])))
    return HeatMap("Title", "layer", "position", "share", rows, columns, values)


def test_the_terminal_shows_every_value_in_percent_under_its_label() -> None:
    lines = heat_map().text(width=80).plain.splitlines()
    assert lines[0].split() == ["layer", "token0", "token1"]
    assert [line.split() for line in lines[1:]] == [["0", "0", "100"], ["1", "-100", "50"]]


def test_the_terminal_map_fits_the_width_and_shortens_labels() -> None:
    wide = HeatMap("", "layer", "", "", ("0",), tuple("extraordinary" for _ in range(14)), ((0.5,) * 14,))
    lines = wide.text(width=80).plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert "ext…" in lines[0]


def test_colours_are_exact_at_the_stops_and_clamped_outside() -> None:
    assert colour(1.0) == colour(7.0) == (178, 24, 43)
    assert colour(0.0) == (247, 247, 247)
    assert colour(-1.0) == colour(-3.0) == (33, 102, 172)
    red, green, blue = colour(0.25)
    assert (red, green, blue) == ((247 + 244) // 2 + 1, 206, 188)


def test_the_png_has_each_cell_in_the_colour_of_its_value(tmp_path: Path) -> None:
    path = tmp_path / "new" / "map.png"
    heat_map().write_png(path)
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    pixels = {image.getpixel((x, y)) for x in range(image.width) for y in range(image.height)}
    assert {colour(value) for value in (0.0, 1.0, -1.0, 0.5)} <= pixels


def test_labels_that_do_not_fit_the_values_are_refused() -> None:
    with pytest.raises(ValueError, match="1 × 3 labels"):
        HeatMap("", "", "", "", ("0",), ("a", "b", "c"), ((0.0, 1.0),))
