"""One HTML page that shows a causal trace: what was traced, the table, the pictures beside it."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment

from lalm_lens.aggregates import corruption_kinds
from lalm_lens.results import CausalTrace, to_read

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
<p>{{ "Clean" if direction == "denoise" else "Corrupted" }} states are patched into the
{{ "corrupted" if direction == "denoise" else "clean" }} run; the corrupted run hears: {{ corruption }}.
{% for row in read %}Transcript: {{ row.transcript }}, counted as {{ row.transcript_is }}. {% endfor %}The recovery
rate says how much of the gap between the two runs a patch closes, in {{ metric }} of the true label: 0 is none, 1 is
all. Only kept clips are averaged: the clean run is right, the corrupted run is wrong and lower (arXiv 2603.13768).
<code>fusion_layer</code> is the first layer whose text states close half of it, <code>noise_floor</code> what rounding
alone does to a rate.</p>
{{ table | safe }}
<ul>
{% for row in asked %}
<li>{{ row.attribute }}: {{ row.form }}{% if row.question %}, "{{ row.question }}"{% endif %}, answered from
"{{ row.prefix }}" with one of:
{{ row.labels }}{{ "" if row.label_space else " (scored without the space before)" }}</li>
{% endfor %}
</ul>
{% if moments %}
<h2>Which moment decided</h2>
<p>Of the finest windows that the search tried, the one with the largest recovery; <code>widest</code> is the largest
recovery of the windows that it began with: where it is much larger, no single moment decided.</p>
{{ moments | safe }}
{% endif %}
{% for picture in pictures %}
<figure><img src="{{ picture.name }}" alt="{{ picture.stem }}"><figcaption>{{ picture.name }}</figcaption></figure>
{% endfor %}
<p>All {{ n_rows }} patched runs are in <a href="{{ data.name }}">{{ data.name }}</a>.</p>
</body>
</html>
"""


def write_trace_page(trace: CausalTrace, data: Path, pictures: Sequence[Path]) -> Path:
    """`trace.html` beside the table and the pictures that it shows."""
    path = data.with_name("trace.html")
    page = Environment(autoescape=True).from_string(PAGE)
    how: dict = {"index": False, "border": 0, "float_format": "{:.3f}".format, "na_rep": "-"}
    table = to_read(trace.summary()).to_html(**how)
    has_moments = "moments" in trace.views and len(trace.kept)
    text = page.render(
        model=trace.frame.model.iloc[0],
        direction=trace.frame.direction.iloc[0],
        corruption=corruption_kinds(trace.frame).iloc[0].replace("_", " "),
        read=trace.frame[["transcript", "transcript_is"]].dropna().drop_duplicates().to_dict("records"),
        metric=trace.frame.metric.iloc[0].replace("_", " "),
        table=table,
        moments=trace.moments().to_html(**how) if has_moments else "",
        asked=trace.frame.drop_duplicates("attribute").to_dict("records"),
        pictures=pictures,
        data=data,
        n_rows=len(trace.frame),
    )
    path.write_text(text, encoding="utf-8")
    return path
