"""One HTML page that shows a causal trace: what was traced, the table, the pictures beside it."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from lalm_lens.results import CausalTrace

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Causal trace of {{ model }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } table { border-collapse: collapse } th, td { padding: .25rem .9rem; text-align: right }
th { border-bottom: 1px solid #999 } figcaption { color: #555 } figure { margin: 2rem 0 }
</style>
</head>
<body>
<h1>Causal trace of {{ model }}</h1>
<p>Clean states are patched into a run that hears silence. The recovery rate says how much of the true label's
probability comes back: 0 is none, 1 is all. Only kept clips are averaged: the clean run is right, the silent run is
wrong and less sure (arXiv 2603.13768). <code>fusion_layer</code> is the first layer whose text states bring back
half.</p>
{{ table | safe }}
{% for picture in pictures %}
<figure><img src="{{ picture.name }}" alt="{{ picture.stem }}"><figcaption>{{ picture.name }}</figcaption></figure>
{% endfor %}
<p>All {{ n_rows }} patched runs are in <a href="{{ data.name }}">{{ data.name }}</a>.</p>
</body>
</html>
"""


def write_report(trace: CausalTrace, data: Path, pictures: Sequence[Path]) -> Path:
    """`report.html` beside the table and the pictures that it shows."""
    path = data.with_name("report.html")
    page = Environment(autoescape=True).from_string(PAGE)
    table = trace.summary().to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="-")
    text = page.render(
        model=trace.frame.model.iloc[0],
        table=table,
        pictures=pictures,
        data=data,
        n_rows=len(trace.frame),
    )
    path.write_text(text, encoding="utf-8")
    return path
