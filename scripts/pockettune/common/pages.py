"""Fills in the templates of report/."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def render_page(
    template: Path, content: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]
) -> str:
    """Return a template filled in; what goes into HTML is escaped, in Markdown the template does it."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(content)
