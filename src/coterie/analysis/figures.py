"""The figures of the report. They carry data and geometry; every colour comes from a theme.

A figure is drawn by plotly.js with `layout.template` set to one of `THEMES`, so that the page can switch between light,
dark and print without holding anything twice. Blue against orange is told apart with every common form of colour
blindness, and the order of `SERIES` is Okabe and Ito's, made a little calmer.

Every name that comes from outside passes through `label`: plotly reads a small HTML and its own %{...} in texts.
"""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

if TYPE_CHECKING:
    from coterie.analysis.report import LayerRow, Report, Variant

FONT = (
    'Inter, -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", '
    "Arial, sans-serif"
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "star")
NAME_LENGTH = 24  # longer domain names are cut in the figure
SIDE_BY_SIDE = 128  # heat maps of more experts get the full width
UNUSED = -6.0  # log2 of load over even load; experts with less (or none) are drawn here


@dataclass(frozen=True)
class Colours:
    """What a theme is made of. `kept` and `dropped` run from the least to the most salient expert."""

    ink: str
    muted: str
    grid: str
    paper: str
    kept: tuple[str, str, str]
    dropped: tuple[str, str, str]
    series: tuple[str, ...]


LIGHT = Colours(
    ink="#1c2126",
    muted="#626b75",
    grid="#e7e7e3",
    paper="#ffffff",
    kept=("#d3e4f3", "#5b9bd0", "#0f4c81"),
    dropped=("#f6ead9", "#e0a458", "#a8500b"),
    series=("#1769aa", "#d2691e", "#12876a", "#b0508f", "#c19400", "#5aaee0", "#6b5bb0", "#5f6b76"),
)
DARK = Colours(
    ink="#e7e8e6",
    muted="#9aa3ac",
    grid="#2c3238",
    paper="#15181b",
    kept=("#17314a", "#3479b5", "#9fd1fb"),
    dropped=("#3a2a1a", "#a8641f", "#ffc27a"),
    series=("#5fb0ef", "#f0934a", "#3fc49c", "#e08cc2", "#e3bd45", "#a5d8fa", "#a99bf0", "#a7b1bb"),
)


def theme(colours: Colours) -> go.layout.Template:
    """The look of every figure in one palette."""
    axis: dict[str, Any] = {
        "gridcolor": colours.grid,
        "linecolor": colours.grid,
        "zerolinecolor": colours.muted,
        "tickcolor": colours.grid,
        "tickfont": {"color": colours.muted, "size": 12},
        "title": {"font": {"color": colours.muted, "size": 12.5}, "standoff": 12},
        "automargin": True,
        "zeroline": False,
    }
    # Squared stops: most layers have a few experts far above the rest, and the rest should still be told apart.
    scales = [[[0, s[0]], [0.25, s[1]], [1, s[2]]] for s in (colours.kept, colours.dropped)]
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": colours.ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": colours.series,
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": colours.paper,
                "bordercolor": colours.grid,
                "font": {"family": FONT, "color": colours.ink, "size": 12.5},
                "align": "left",
            },
            "annotationdefaults": {"font": {"color": colours.ink}, "showarrow": False},
            "legend": {"font": {"color": colours.ink, "size": 12.5}},
        },
        data={
            "heatmap": [{"colorscale": scale} for scale in scales],
            "scatter": [{"marker": {"line": {"color": colours.paper}}}],
            "box": [{"line": {"color": colours.kept[1], "width": 1.4}, "fillcolor": colours.kept[0]}],
        },
    )


THEMES = {"light": theme(LIGHT), "dark": theme(DARK)}


def label(text: str) -> str:
    """Text from outside, safe inside a figure: no markup, no %{...}, no formula."""
    return html.escape(text).replace("%", "&#37;").replace("$", "&#36;")


def draw(report: "Report") -> dict[str, dict[str, Any]]:
    """All figures of a report as plotly JSON, by the name of their place in the page. Missing: nothing to draw."""
    drawn = {"damage": damage(report), "load": load(report), "retained": retained(report)}
    for position, variant in enumerate(report.variants):
        drawn[f"experts-{position}"] = experts(variant, wide=not side_by_side(report))
    return {name: json.loads(figure.to_json()) for name, figure in drawn.items() if figure is not None}


def side_by_side(report: "Report") -> bool:
    """Whether the heat maps of two variants fit next to each other and stay legible."""
    widest = max((row.experts for variant in report.variants for row in variant.layers), default=0)
    return len(report.variants) > 1 and widest <= SIDE_BY_SIDE


def damage(report: "Report") -> go.Figure | None:
    """Rise of the loss per domain, a point and an interval per variant; calibrated domains first."""
    damages = [report.damage(variant) for variant in report.variants]
    calibrated = {point.domain: point.calibrated for points in damages for point in points}
    if not calibrated:
        return None
    figure = go.Figure()
    margin = 28 + round(7.2 * min(NAME_LENGTH, max(12, *map(len, calibrated))))

    def write(text: str, y: float, **look: float) -> None:
        figure.add_annotation(
            text=text, y=y, x=0, xref="paper", xshift=-margin, xanchor="left", yanchor="middle", **look
        )

    # One unit of height per domain, and room for a heading before each group.
    row_height = 26 + 11 * len(report.variants)
    room = 34 / row_height
    position: dict[str, float] = {}
    height = 0.0
    for heading, covered in (("Calibrated", True), ("Not calibrated", False)):
        group = [domain for domain in calibrated if calibrated[domain] is covered]
        if group:
            write(heading, height, font_size=12, opacity=0.65)
            position |= {domain: height + 0.5 + room / 2 + i for i, domain in enumerate(group)}
            height += len(group) + room
    for domain, y in position.items():
        short = domain if len(domain) <= NAME_LENGTH else domain[: NAME_LENGTH - 3] + "..."
        write(label(short), y, font_size=13.5)
    step = min(0.16, 0.72 / len(report.variants))
    for i, (variant, points) in enumerate(zip(report.variants, damages, strict=True)):
        symbol = SYMBOLS[i % len(SYMBOLS)]
        figure.add_scatter(
            name=label(variant.name),
            x=[_round(d.rise) for d in points],
            y=[_round(position[d.domain] + (i - (len(damages) - 1) / 2) * step) for d in points],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [_round(d.high - d.rise) for d in points],
                "arrayminus": [_round(d.rise - d.low) for d in points],
                "thickness": 1.6,
                "width": 0,
            },
            mode="markers",
            marker={
                "size": 10,
                "symbol": [symbol if d.calibrated else f"{symbol}-open" for d in points],
                "line": {"width": [1 if d.calibrated else 2 for d in points]},
            },
            text=[f"<b>{label(d.domain)}</b><br>{d.rise:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in points],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(
        title="Rise of the loss over the original, nats per token", rangemode="tozero", zeroline=True, fixedrange=True
    )
    figure.update_yaxes(range=[height - room / 2, -room / 2], showticklabels=False, showgrid=False, fixedrange=True)
    several = len(report.variants) > 1
    sized(figure, round(height * row_height) + (110 if several else 66), legend=several)
    return figure.update_layout(margin_l=margin)


def experts(variant: "Variant", wide: bool) -> go.Figure | None:
    """Saliency of every expert, layer by expert, as a share of the layer's largest; kept and dropped in two colours.

    Where a layer has more experts than a reader can tell apart, each row runs from the most to the least salient expert
    instead: what is lost is only the number, and the cut becomes a line.
    """
    if not variant.layers:
        return None
    width = max(row.experts for row in variant.layers)
    ranked = width > SIDE_BY_SIDE
    rows = []
    for row in variant.layers:
        kept = set(row.kept)
        cells = [(share, expert in kept) for expert, share in enumerate(_shares(row.saliency))]
        rows.append(sorted(cells, reverse=True) if ranked else cells)
    height = max(6.0, min(24.0, (560 if wide else 360) / len(rows)))
    figure = go.Figure()
    place = "rank" if ranked else "expert"
    for name, wanted in (("kept", True), ("dropped", False)):
        figure.add_heatmap(
            z=[[share if keep is wanted else None for share, keep in cells] for cells in rows],
            y=[str(row.index) for row in variant.layers],
            x0=1 if ranked else 0,
            zmin=0,
            zmax=100,
            xgap=1 if wide and width <= 64 else 0,
            ygap=1 if height >= 8 else 0,
            showscale=False,
            hoverongaps=False,
            hovertemplate=f"layer %{{y}}, {place} %{{x}}<br>{name}: %{{z}}&#37; of the layer's largest<extra></extra>",
        )
    title = "Experts of the layer, most salient first" if ranked else "Expert"
    figure.update_xaxes(title=title, showgrid=False, range=[ranked - 0.5, width + ranked - 0.5])
    figure.update_yaxes(title="Layer", type="category", autorange="reversed", showgrid=False, nticks=24)
    return sized(figure, round(height * len(rows)) + 64).update_layout(margin_r=0)


def load(report: "Report") -> go.Figure | None:
    """How unevenly the original spreads its tokens over the experts of each layer: extremes, quartiles, median."""
    rows = next((rows for variant in report.variants if (rows := _profiled(variant))), None)
    if rows is None:
        return None
    layers = [str(row.index) for row, _ in rows]
    spread = [_quartiles([_relative(share * row.experts) for share in shares]) for row, shares in rows]
    lowest, low, median, high, highest = (list(values) for values in zip(*spread, strict=True))
    figure = go.Figure()
    figure.add_box(
        x=layers, lowerfence=lowest, q1=low, median=median, q3=high, upperfence=highest,
        whiskerwidth=0, width=0.5, hoverinfo="skip",
    )  # fmt: skip
    # A box has no hover text of its own; an invisible point at the median has.
    figure.add_scatter(
        x=layers,
        y=median,
        mode="markers",
        marker={"opacity": 0},
        text=[_load_text(row, shares) for row, shares in rows],
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_xaxes(title="Layer", type="category", showgrid=False, nticks=32, fixedrange=True)
    ticks = {
        -6: "1/64 or less",
        -4: "1/16",
        -2: "1/4",
        -1: "1/2",
        0: "even",
        1: "2x",
        2: "4x",
        3: "8x",
        4: "16x",
        6: "64x",
        8: "256x",
    }
    figure.update_yaxes(
        title="Load relative to an even share",
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
        zeroline=True,
        fixedrange=True,
    )
    return sized(figure.update_layout(hovermode="x"), 320)


def retained(report: "Report") -> go.Figure | None:
    """Share of each layer's routed slots that went to experts a variant kept. None where nothing was dropped."""
    profiled = [_profiled(variant) for variant in report.variants]
    if all(len(row.kept) == row.experts for rows in profiled if rows for row, _ in rows):
        return None
    figure = go.Figure()
    for i, (variant, rows) in enumerate(zip(report.variants, profiled, strict=True)):
        # A variant without a profile still takes its turn, so that colours mean the same in every figure.
        figure.add_scatter(
            name=label(variant.name),
            x=[str(row.index) for row, _ in rows or []],
            y=[_round(sum(shares[expert] for expert in row.kept)) for row, shares in rows or []],
            mode="lines+markers",
            line={"width": 1.6},
            marker={"size": 9 if len(rows or []) <= 40 else 5, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            showlegend=rows is not None,
            hovertemplate="%{fullData.name}: <b>%{y:.1%}</b><extra></extra>",
        )
    figure.update_xaxes(title="Layer", type="category", showgrid=False, nticks=32, fixedrange=True)
    figure.update_yaxes(
        title="Routed slots that went<br>to kept experts",
        range=[0, 1.02],
        dtick=0.25,
        tickformat=".0%",
        fixedrange=True,
    )
    several = len(report.variants) > 1
    return sized(figure.update_layout(hovermode="x unified"), 300 if several else 260, legend=several)


def _profiled(variant: "Variant") -> list[tuple["LayerRow", list[float]]] | None:
    return [(row, row.load) for row in variant.layers if row.load is not None] or None


def _load_text(row: "LayerRow", shares: list[float]) -> str:
    ordered = sorted(share * row.experts for share in shares)
    unused = sum(share == 0 for share in shares)
    lines = [
        f"<b>layer {row.index}</b>, top {row.top_k} of {row.experts}",
        label(row.name),
        f"busiest {ordered[-1]:.1f}x an even share, least busy {ordered[0]:.2f}x",
    ]
    return "<br>".join(lines + ([f"{unused} never used"] if unused else []))


def _relative(ratio: float) -> float:
    """log2 of a load relative to an even share, with a floor for what was hardly ever used."""
    return round(max(UNUSED, math.log2(ratio)), 3) if ratio > 0 else UNUSED


def _quartiles(values: Sequence[float]) -> tuple[float, ...]:
    """Minimum, lower quartile, median, upper quartile, maximum."""
    if len(values) == 1:
        return (values[0],) * 5
    return (min(values), *quantiles(values, method="inclusive"), max(values))


def _shares(saliency: Sequence[float]) -> list[int]:
    """Saliency in whole percent of the layer's largest. A layer with negative values starts at its smallest instead."""
    low = min(0.0, *saliency)
    span = max(saliency) - low
    return [round(100 * (value - low) / span) if span else 0 for value in saliency]


def _round(value: float) -> float:
    return round(value, 5)


def sized(figure: go.Figure, height: int, legend: bool = False) -> go.Figure:
    """Fixed height, free width, no template of plotly's own."""
    return figure.update_layout(
        template=None,
        height=height,
        margin={"l": 8, "r": 16, "t": 44 if legend else 8, "b": 8},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "top", "xref": "container", "yref": "container"},
    )
