"""The style of the report's charts, with colours that are distinct on white and on black; SVG and PNG of each chart.

Lines and letters are drawn in INK; the page's SVG replaces INK by the colour of the page's text.
"""

import io
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.report.document import Chart, Table, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK = "#010203"
GREY = "#848c94"
# Each has a contrast of 3 and more with the page's white and with its black (WCAG 2.1, 1.4.11).
PALETTE = ("#2f80d0", "#d9660a", "#2b9a58", "#c2508f", "#8a66d6", "#a47a00", "#0f92a3", "#d54a46", "#6f8f1f", "#7d7f9c")
_SCALE = ("#2f80d0", "#8a66d6", "#c2508f", "#d9660a")
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "cruijff_kit", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9.0, "axes.titlesize": 9.5, "axes.facecolor": "none", "figure.facecolor": "none", "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
    "grid.alpha": 0.13, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8.0, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.5,
}  # fmt: skip
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@contextmanager
def open_figure(width: float, height: float) -> Iterator["Figure"]:
    """Open an empty figure in the report's style, in inches; draw and call `make_chart` inside the context."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=PALETTE)}):
        yield Figure(figsize=(width, height), layout="constrained")


def make_chart(figure: "Figure", data: Table, alt: str) -> Chart:
    """Return the figure as a chart with the name and caption of its data."""
    with warnings.catch_warnings():  # about letters that matplotlib's font lacks; the page's fonts may have them
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.set_layout_engine("none")  # the layout is final; a second computation would only take time
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    width = round(figure.get_figwidth() * 96)
    return Chart(data.name, data.caption, alt, _inline_svg(svg.getvalue(), data.name, alt), png.getvalue(), width, data)


def _inline_svg(svg: str, name: str, alt: str) -> str:
    """Return an SVG to embed in a page: unique ids, the page's colour in place of INK, the text alternative."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    root = ET.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", " ", svg))  # not allowed in XML
    for parent in list(root.iter()):
        for child in list(parent):  # metadata, and a style that would apply to the whole page
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _rewrite_attribute(key, value, name))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ET.tostring(root, encoding="unicode")


def _rewrite_attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{{{_LINK}}}href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return value.replace(INK, "currentColor").replace("url(#", f"url(#{name}-")


def colour_scale() -> "Colormap":
    """Return a colour scale that is visible on white and on black."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("cruijff_kit", _SCALE)


def shorten(text: Any, length: int = 40) -> str:
    """Shorten a text to a label: one line of printable characters; an ellipsis replaces the middle of a longer text."""
    line = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in format_value(text)).split())
    half = (length - 1) // 2
    return line if len(line) <= length else f"{line[:half]}…{line[-half:]}"


def needs_log_axis(values: Sequence[float], ratio: float = 10) -> bool:
    """Return whether the largest value is at least `ratio` times the smallest, and all are positive."""
    return bool(values) and min(values) > 0 and max(values) >= ratio * min(values)


def scale_axis(axes: "Axes", name: str, values: Sequence[float], ratio: float = 10) -> None:
    """Make the axis "x" or "y" logarithmic if its values need it (`needs_log_axis`), with plain numbers as labels."""
    if not needs_log_axis(values, ratio):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
    if max(values) < 100 * min(values):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def set_ticks(axis: Any, values: Sequence[float]) -> None:
    """Put the ticks at the values themselves if there are at most eight."""
    from matplotlib.ticker import NullLocator

    if len(values) <= 8:
        axis.set_ticks(list(values), labels=[f"{v:g}" for v in values])
        axis.set_minor_locator(NullLocator())


def add_legend_below(axes: "Axes", names: int, longest: int) -> None:
    """Add a legend under the plot, in as many columns as fit.

    Args:
        names: their number.
        longest: characters of the longest name.
    """
    columns = max(1, min(names, 100 // max(1, longest + 6)))
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns)
