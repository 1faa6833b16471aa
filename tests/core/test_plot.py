"""The chart: XML, to scale, and safe with any text."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from moshi_fl.plot import Chart, Line, ticks

SVG = "{http://www.w3.org/2000/svg}"


def chart(*lines: Line) -> ET.Element:
    return ET.fromstring(Chart("a <b> & \x00c", "s", "d", "Round", "Loss", lines).svg())


def test_lower_losses_are_lower_and_later_rounds_further_right():
    root = chart(Line("x", [(0, 9.0), (1, 4.0), (2, 5.0)]))
    points = [tuple(map(float, p.split(","))) for p in root[-4].get("points").split()]
    assert points == sorted(points)
    heights = [y for _, y in points]
    assert heights[1] > heights[2] > heights[0]


def test_hostile_names_and_values_stay_text():
    root = chart(Line("<script>", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]))
    assert root[0].text == "a <b> &  c"
    assert not list(root.iter(SVG + "script"))
    assert len(root.find(SVG + "polyline").get("points").split()) == 2
    with pytest.raises(ValueError, match="one or two lines"):
        chart(Line("x", [(0, math.nan)]))


def test_ticks_are_round_and_enclose_the_values():
    assert ticks([0.0, 5.0], at_most=9, whole=True) == [0, 1, 2, 3, 4, 5]
    assert ticks([0.0, 1.0], at_most=9, whole=True) == [0, 1]
    assert ticks([2.31, 4.6], at_most=7) == [2, 2.5, 3, 3.5, 4, 4.5, 5]
    generator = np.random.default_rng(0)
    for _ in range(300):
        values = (10.0 ** generator.integers(-3, 6) * generator.standard_normal(3)).tolist()
        marks = ticks(values, at_most=7)
        assert marks[0] <= min(values)
        assert max(values) <= marks[-1]
        assert 2 <= len(marks) <= 8
    assert len(ticks([3.0, 3.0], at_most=7)) >= 2
