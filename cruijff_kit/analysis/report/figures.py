"""How the report's charts look: one style, colours that can be told apart on white and on black, SVG and PNG of each.

Lines and letters are drawn in INK, for which the page's SVG has the colour of the text around it.
"""

import io
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.report.document import Chart, Table, shown

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
def figure(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure in the report's style; draw and call `chart` inside the context. Sizes in inches."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=PALETTE)}):
        yield Figure(figsize=(width, height), layout="constrained")


def chart(drawn: "Figure", data: Table, alt: str) -> Chart:
    """The figure as a chart that goes by its data's name and caption."""
    with warnings.catch_warnings():  # of letters that its font lacks; the page's fonts may have them
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        svg, png = io.StringIO(), io.BytesIO()
        drawn.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        drawn.set_layout_engine("none")  # it is laid out now; once more would only take time
        drawn.savefig(png, format="png", dpi=150, facecolor="white")
    width = round(drawn.get_figwidth() * 96)
    return Chart(data.name, data.caption, alt, _inline(svg.getvalue(), data.name, alt), png.getvalue(), width, data)


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG as a part of a page: ids of its own, the page's colour for ink, what it shows in words."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    root = ET.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", " ", svg))  # which XML cannot hold
    for parent in list(root.iter()):
        for child in list(parent):  # metadata, and a style that would hold for the whole page
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _rewritten(key, value, name))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return ET.tostring(root, encoding="unicode")


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{{{_LINK}}}href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    return value.replace(INK, "currentColor").replace("url(#", f"url(#{name}-")


def scale() -> "Colormap":
    """A colour scale all of which can be seen on white and on black."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("cruijff_kit", _SCALE)


def fitted(text: Any, length: int = 40) -> str:
    """A text as a label: one line of printable characters, its middle left out where it is too long."""
    line = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in shown(text)).split())
    half = (length - 1) // 2
    return line if len(line) <= length else f"{line[:half]}…{line[-half:]}"


def logarithmic(values: Sequence[float], ratio: float = 10) -> bool:
    """Whether values spread so far that a logarithmic axis shows them better."""
    return bool(values) and min(values) > 0 and max(values) >= ratio * min(values)


def scale_axis(axes: "Axes", which: str, values: Sequence[float], ratio: float = 10) -> None:
    """Make the axis "x" or "y" logarithmic where its values ask for it, with plain numbers as labels."""
    if not logarithmic(values, ratio):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
    if max(values) < 100 * min(values):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def tick_values(axis: Any, values: Sequence[float]) -> None:
    """Ticks at the values themselves, where they are few."""
    from matplotlib.ticker import NullLocator

    if len(values) <= 8:
        axis.set_ticks(list(values), labels=[f"{v:g}" for v in values])
        axis.set_minor_locator(NullLocator())


def legend_below(axes: "Axes", names: int, widest: int) -> None:
    """A legend under the plot, in as many columns as its names leave room for."""
    columns = max(1, min(names, 100 // max(1, widest + 6)))
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns)
