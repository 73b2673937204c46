"""The page of a comparison: quality against size, every contender with its interval, what is best where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from coterie.analysis.figures import SYMBOLS, label, sized
from coterie.analysis.page import render_page


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """The page as text.

    comparison : `Comparison.describe()`: original, contenders, domains, sweeps, bytes_read, ...
    """
    ran = [c for c in comparison["contenders"] if not c["refused"]]
    drawn = {
        "bytes": frontier(comparison, ran, "bytes", "Bytes of all weights"),
        "active": frontier(comparison, ran, "active_parameters", "Parameters a token passes through"),
    }
    active = [c["size"]["active_parameters"] for c in (*ran, comparison["original"])]
    if min(active) > 0.99 * max(active):
        del drawn["active"]  # removing experts takes some router rows at most: there is nothing to see
    budgets = list(dict.fromkeys(c["budget"] for c in ran))
    return render_page(
        "comparison.html.j2",
        comparison=comparison,
        ran=ran,
        refused=[c for c in comparison["contenders"] if c["refused"]],
        best=[min((c for c in ran if c["budget"] == budget), key=lambda c: c["delta"]["mean"]) for budget in budgets],
        figures={name: json.loads(figure.to_json()) for name, figure in drawn.items()},
    )


def frontier(comparison: Mapping[str, Any], ran: Sequence[Mapping[str, Any]], field: str, title: str) -> go.Figure:
    """Rise of the loss against a size, one colour and symbol per method, the Pareto front as a line."""
    figure = go.Figure()
    original = comparison["original"]["size"][field]
    front = sorted((c["size"][field], c["delta"]["mean"]) for c in ran if c["pareto"])
    figure.add_scatter(
        x=[x for x, _ in front] + [original],
        y=[y for _, y in front] + [0.0],
        mode="lines",
        line={"width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
        opacity=0.6,
    )
    names = list(dict.fromkeys(_method(c) for c in ran))
    step = 0.006 * (original - min(c["size"][field] for c in ran))  # side by side where sizes are the same
    for number, name in enumerate(names):
        mine = [c for c in ran if _method(c) == name]
        figure.add_scatter(
            name=label(name),
            x=[c["size"][field] + round((number - (len(names) - 1) / 2) * step) for c in mine],
            y=[c["delta"]["mean"] for c in mine],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [c["delta"]["high"] - c["delta"]["mean"] for c in mine],
                "arrayminus": [c["delta"]["mean"] - c["delta"]["low"] for c in mine],
                "thickness": 1.4,
                "width": 0,
            },
            mode="markers",
            marker={"size": 10, "symbol": SYMBOLS[number % len(SYMBOLS)], "line": {"width": 1}},
            text=[f"<b>{label(c['label'])}</b><br>{c['delta']['mean']:+.3f} nats per token" for c in mine],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_xaxes(title=title, fixedrange=True)
    figure.update_yaxes(title="Rise of the loss, nats per token", rangemode="tozero", zeroline=True, fixedrange=True)
    sized(figure, 420, legend=True)
    return figure


def _method(contender: Mapping[str, Any]) -> str:
    return str(contender["label"]).rsplit(" ", 1)[0]
