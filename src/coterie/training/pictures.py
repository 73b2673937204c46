"""The picture of a training: losses, and what the experts of each layer did meanwhile. One self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from coterie.analysis.figures import LIGHT, label
from coterie.training.pretrain import History

if TYPE_CHECKING:
    from coterie.training.race import Race

_PANELS = (
    ("max_vio", "violation of balance (largest load over the mean, minus 1)"),
    ("experts_per_token", "experts per token"),
    ("entropy", "entropy of the gate, nats"),
)


def write_page(history: History, file: Path, title: str) -> None:
    """Loss, balance, experts per token and gate entropy by step and layer, and the load of every expert at the end."""
    logged = [entry for entry in history.entries if "layers" in entry]
    layers = sorted({int(i) for entry in logged for i in entry["layers"]})
    figure = make_subplots(rows=5, cols=1, subplot_titles=["loss", *(text for _, text in _PANELS), "load, last steps"])
    steps = [entry["step"] for entry in logged]
    colours = LIGHT.series
    figure.add_scatter(x=steps, y=[e["loss"] for e in logged], name="training", line_color=LIGHT.muted, row=1, col=1)
    held = [entry for entry in history.entries if "held_out" in entry]
    for number, domain in enumerate(sorted({name for entry in held for name in entry["held_out"]})):
        told = [(e["step"], e["held_out"][domain]) for e in held if domain in e["held_out"]]
        figure.add_scatter(
            x=[s for s, _ in told],
            y=[loss for _, loss in told],
            name=f"held out: {label(domain)}",
            line_color=colours[number % len(colours)],
            row=1,
            col=1,
        )
    for row, (name, _) in enumerate(_PANELS, 2):
        for number, layer in enumerate(layers):
            values = [entry["layers"].get(str(layer), {}).get(name) for entry in logged]
            figure.add_scatter(
                x=steps,
                y=values,
                name=f"layer {layer}",
                legendgroup=f"layer {layer}",
                showlegend=row == 2,
                line_color=colours[number % len(colours)],
                row=row,
                col=1,
            )
    if logged:
        figure.add_trace(_heat(logged[-1], layers), row=5, col=1)
    figure.update_layout(height=1700, title=label(title), template="plotly_white")
    figure.write_html(file, include_plotlyjs=True)


def _heat(entry: dict[str, Any], layers: list[int]) -> go.Heatmap:
    loads = [entry["load"].get(str(layer), []) for layer in layers]
    shares = [[value / max(sum(load), 1) * len(load) for value in load] for load in loads]
    return go.Heatmap(z=shares, y=[f"layer {i}" for i in layers], colorscale="Blues", zmin=0, showscale=False)


def write_race(race: Race, file: Path) -> None:
    """Held-out loss of every config by tokens and by operations: means over seeds, with the range of the seeds."""
    figure = make_subplots(rows=2, cols=1, subplot_titles=["by tokens", "by floating-point operations"])
    for number, name in enumerate(race.names):
        runs, colour = race.of(name), LIGHT.series[number % len(LIGHT.series)]
        points = list(zip(*(run.curve for run in runs)))
        for row, axis in ((1, 0), (2, 1)):
            x = [sum(p[axis] for p in point) / len(point) for point in points]
            losses = [[p[2] for p in point] for point in points]
            figure.add_scatter(
                x=[*x, *x[::-1]],
                y=[*map(max, losses), *[min(one) for one in losses[::-1]]],
                fill="toself",
                line_width=0,
                fillcolor=colour,
                opacity=0.15,
                showlegend=False,
                hoverinfo="skip",
                row=row,
                col=1,
            )
            figure.add_scatter(
                x=x,
                y=[sum(one) / len(one) for one in losses],
                name=label(name),
                legendgroup=name,
                showlegend=row == 1,
                line_color=colour,
                row=row,
                col=1,
            )
    figure.update_layout(height=1000, title="held-out loss, nats per token", template="plotly_white")
    figure.write_html(file, include_plotlyjs=True)
