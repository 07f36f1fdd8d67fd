"""The curve of a calibration as one SVG file that refers to no other. Pure."""

from html import escape

from ppsd_cli.calibration_records import Calibration
from ppsd_cli.ui.bench_svg import tag
from ppsd_cli.ui.calibration_data import exit_points, marks

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BASE = 56, 700, 56, 352
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b222d}.soft{fill:#565f6c;font-size:12px}"
    ".rule{stroke:#d5d9de}.one{stroke:#1b222d;stroke-dasharray:3 2}"
    ".rate{fill:none;stroke:#9c6412;stroke-width:2}.gain{fill:none;stroke:#2b5f94;stroke-width:2}"
    ".predicted{fill:#fcfcfa;stroke:#2b5f94;stroke-width:2}.measured{fill:#2b5f94}"
    ".head{fill:#9c6412}"
)
Points = list[tuple[float, float]]


def curve_svg(calibration: Calibration) -> str:
    """Acceptance (left scale, to 100%) and predicted speed-up (right scale) by exit layer.

    Circles are trained heads and what was run: open as predicted, full as measured.
    """
    points, shown = exit_points(calibration), marks(calibration)
    layers = 1 + max(point.layer for point in points)
    speedups = [p.speedup for p in points if p.speedup is not None]
    tops = [value for m in shown for value in (m.predicted, m.measured or 0.0)]
    top = 1.1 * max([1.0, *speedups, *tops])

    def x(layer: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * layer / layers

    def rate(share: float) -> float:
        return _BASE - (_BASE - _TOP) * share

    def gain(speedup: float) -> float:
        return _BASE - (_BASE - _TOP) * speedup / top

    raw = [(x(p.layer), rate(p.acceptance)) for p in points]
    raw_gain = [(x(p.layer), gain(p.speedup)) for p in points if p.speedup is not None]
    parts = [_scales(layers, top, x, rate, gain)]
    parts += [_path(raw, "rate"), _path(raw_gain, "gain")]
    for mark in shown:
        at = x(mark.layer)
        parts.append(_circle((at, rate(mark.acceptance)), "head", 4, f"{mark.label}: acceptance"))
        parts.append(
            _circle((at, gain(mark.predicted)), "predicted", 5, f"{mark.label}: predicted")
        )
        if mark.measured is not None:
            spot = at, gain(mark.measured)
            parts.append(_circle(spot, "measured", 4, f"{mark.label}: measured"))
    name = f"{calibration.model}: exit layers"
    parts.append(_text(name, _LEFT, 20, "start", ""))
    parts.append(
        _text(
            "brown: share of guesses right (line: raw exit, dots: heads); blue: speed-up over ar "
            "(line: raw exit, predicted; open: predicted; full: measured)",
            _LEFT,
            404,
            "start",
            "soft",
        )  # fmt: skip
    )
    content = tag("title", escape(name)) + tag("style", _STYLE) + "".join(parts)
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    ground = tag("rect", width=_WIDTH, height=_HEIGHT, fill="#fcfcfa")
    return tag("svg", ground + content, xmlns="http://www.w3.org/2000/svg", viewBox=box) + "\n"


def _scales(layers: int, top: float, x, rate, gain) -> str:  # type: ignore[no-untyped-def]
    parts = []
    for tenth in range(0, 11, 2):
        y = rate(tenth / 10)
        parts.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rule"))
        parts.append(_text(f"{tenth * 10}%", _LEFT - 6, y + 4, "end", "soft"))
    for at in range(int(top / 0.25) + 1):
        parts.append(_text(f"{at / 4:g}", _RIGHT + 8, gain(at / 4) + 4, "start", "soft"))
    y = gain(1)
    parts.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="one"))
    for layer in range(0, layers + 1, max(1, layers // 10)):
        parts.append(_text(str(layer), x(layer), _BASE + 18, "middle", "soft"))
    parts.append(_text("exit layer", _RIGHT, _BASE + 36, "end", "soft"))
    parts.append(_text("guesses right", _LEFT - 48, _TOP - 12, "start", "soft"))
    parts.append(_text("speed-up", _RIGHT + 40, _TOP - 12, "end", "soft"))
    return "".join(parts)


def _path(points: Points, kind: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=places, class_=kind)


def _circle(at: tuple[float, float], kind: str, radius: int, title: str) -> str:
    name = tag("title", escape(title))
    return tag("circle", name, cx=f"{at[0]:.1f}", cy=f"{at[1]:.1f}", r=radius, class_=kind)


def _text(text: str, x: float, y: float, anchor: str, kind: str) -> str:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
    return tag("text", escape(text), text_anchor=anchor, class_=kind or None, **place)
