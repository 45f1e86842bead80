"""Charts of the report as inline SVG: no script, no network, readable in light and dark."""
