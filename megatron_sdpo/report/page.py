"""Pages from the templates in data/report/; everything that a model wrote is escaped by them."""

from pathlib import Path
from typing import Any

import jinja2

TEXT_LIMIT = 6000
"""Characters of one text that a page shows; what is cut is counted there."""


def render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_sdpo", "data/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = _cut
    return environment.get_template(template).render(**values)


def write(path: Path, text: str) -> Path:
    """Write a whole file or none."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


def _cut(text: str) -> str:
    """The text as the page shows it, with the number of characters left out."""
    beyond = len(text) - TEXT_LIMIT
    return text if beyond <= 0 else f"{text[:TEXT_LIMIT]}\n… {beyond:,} more characters"
