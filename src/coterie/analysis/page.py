"""What all pages share: one HTML file without other files or network, its numbers written for people."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from coterie.analysis import figures
from coterie.errors import OutputError


def write_page(page: str, path: Path) -> None:
    """Write `page` to `path`, whole or not at all. Raises OutputError where it cannot be written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write the report to {path}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def render_page(template: str, **values: Any) -> str:
    """A template of `templates/` that extends page.html.j2, as text; `figures` are plotly JSON by place."""
    page = Environment(
        loader=PackageLoader("coterie.analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"signed": _signed, "percent": _percent, "duration": _duration, "number": _number}
    page.filters |= {"yaml": _yaml, "paper": _paper, "perplexity": _perplexity}
    page.filters["size"] = lambda count: _scaled(count, " B, kB, MB, GB, TB")
    page.filters["count"] = lambda count: _scaled(count, ",K,M,B,T")
    page.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    themes = {name: theme.to_plotly_json() for name, theme in figures.THEMES.items()}
    return page.get_template(template).render(themes=themes, plotly=Markup(get_plotlyjs()), **values)


def _scaled(count: float, units: str) -> str:
    """A count in the unit that leaves three digits before the point; `units` go up in thousands."""
    *smaller, largest = units.split(",")
    for unit in smaller:
        if count < 999.5:
            return f"{_number(count)}{unit}"
        count /= 1000
    return f"{_number(count)}{largest}"


def _number(value: Any) -> str:
    """Three significant digits, never in powers of ten; whole numbers in full; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _signed(value: float, digits: int = 3) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def _perplexity(rise: float) -> str:
    """The relative change of the perplexity that a rise of the loss means."""
    return _percent(math.expm1(min(rise, 700.0)))  # beyond: past the largest float


def _percent(change: float) -> str:
    """A relative change: one decimal below ten percent, a factor from tenfold on."""
    if change >= 9:
        return f"{1 + change:.3g} times"
    return f"{_signed(100 * change, 0 if abs(change) >= 0.0995 else 1)}%"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _paper(paper: str) -> Markup:
    """A paper's name; a link where it is an arXiv number."""
    if number := re.fullmatch(r"(?:arXiv:)?(\d{4}\.\d{4,5})", paper, flags=re.IGNORECASE):
        return Markup('<a href="https://arxiv.org/abs/{0}">arXiv:{0}</a>').format(number[1])
    return Markup("{}").format(paper)
