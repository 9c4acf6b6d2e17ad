"""One self-contained HTML page with all pictures and the main numbers of a tracked run; it works offline."""

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

# name of the picture -> heading and what to look for
SECTIONS = {
    "training_curves": ("Training curves", "Loss of training and validation, and the validation score."),
    "attention_steps": (
        "Attention, step by step",
        "Rows are queries, columns keys, of the first probe example without its padding; mean over heads. "
        "Move the slider to go through the tracked steps.",
    ),
    "attention_evolution": (
        "Attention over training",
        "One head of each module at several steps, on one colour scale. Hn is the normalised entropy: 0 attends to one "
        "key, 1 to all alike.",
    ),
    "multi_head_comparison": (
        "All heads",
        "Sorted by class. Local heads look near their own position; of the others, focused ones at few keys, diffuse "
        "ones at nearly all, global ones lie between.",
    ),
    "attention_statistics": (
        "Attention statistics",
        "Every head over the tracked steps, and how many there are of each class.",
    ),
    "qkv_evolution": (
        "Queries, keys and values",
        "As they enter the attention kernel, real tokens of the training batch.",
    ),
    "layer_contributions": (
        "Layer contributions",
        "The last state of each stack is exactly the sum of these components. Blue adds along the final direction, red "
        "against it; diamonds show the first tracked step.",
    ),
    "gradient_flow": (
        "Gradient flow",
        "Gradients before clipping. A line that falls steeply from right to left means that the gradient vanishes on "
        "its way to the input.",
    ),
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c; }
img { max-width: 100%; height: auto; }
nav a { margin-right: 1rem; white-space: nowrap; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
td, th { text-align: left; padding: .15rem .9rem .15rem 0; vertical-align: top; border-top: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: #555; max-width: 60rem; }
.warning { border-left: 4px solid #b2182b; padding-left: .8rem; }
.scroll { overflow-x: auto; }
input[type=range] { width: min(40rem, 90%); vertical-align: middle; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
{% if nonfinite %}
<div class="warning"><h2>NaN or infinity</h2><ul>
{% for entry in nonfinite %}
<li>step {{ entry.step }}: {{ entry.kind }} in the {{ entry.what }} of {{ entry.module }}</li>
{% endfor %}</ul></div>
{% endif %}
{% if not_reproduced %}
<div class="warning"><h2>Attention that cannot be shown</h2><ul>
{% for name, why in not_reproduced.items() %}<li>{{ name }}: {{ why }}</li>
{% endfor %}</ul></div>
{% endif %}
<nav>{% for section in sections %}<a href="#{{ section.name }}">{{ section.heading }}</a>{% endfor %}
<a href="#heads">Numbers of every head</a></nav>
{% for section in sections %}
<section id="{{ section.name }}">
<h2>{{ section.heading }}</h2>
<p class="note">{{ section.note }}</p>
{% if section.steps %}
{% set newest = section.steps | length - 1 %}
<p><label>tracked step <input type="range" min="0" max="{{ newest }}" value="{{ newest }}"
 data-slider="{{ section.name }}"> <output>{{ section.steps[-1].step }}</output></label></p>
{% for picture in section.steps %}
<img data-of="{{ section.name }}" data-step="{{ picture.step }}" alt="Attention before update {{ picture.step }}"
 src="data:image/png;base64,{{ picture.data }}"{% if not loop.last %} hidden{% endif %}>
{% endfor %}
{% else %}
<img alt="{{ section.heading }}" src="data:image/png;base64,{{ section.data }}">
{% endif %}
</section>
{% endfor %}
<section id="heads">
<h2>Numbers of every head</h2>
<p class="note">Before update {{ last_step }}, averaged over the rows of real queries that see four keys or more.
Entropy in nats; distance in tokens, in cross-attention as a fraction of the length.</p>
<div class="scroll"><table>
<tr><th>module</th><th>head</th><th>class</th>{% for key in keys %}<th>{{ key.replace("_", " ") }}</th>{% endfor %}</tr>
{% for row in heads %}<tr><td>{{ row.module }}</td><td class="number">{{ row.head }}</td><td>{{ row.kind }}</td>
{% for value in row.numbers %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if flags %}<h2>Gradient flags</h2>
<table><tr><th>step</th><th>layer</th><th>flag</th></tr>
{% for flag in flags %}<tr><td class="number">{{ flag.step }}</td><td>{{ flag.layer }}</td><td>{{ flag.flag }}</td></tr>
{% endfor %}</table>{% endif %}
</section>
<script>
"use strict";
for (const slider of document.querySelectorAll("[data-slider]")) {
  const pictures = [...document.querySelectorAll(`[data-of="${slider.dataset.slider}"]`)];
  slider.addEventListener("input", () => {
    pictures.forEach((picture, place) => { picture.hidden = place !== Number(slider.value); });
    slider.parentElement.querySelector("output").textContent = pictures[Number(slider.value)].dataset.step;
  });
}
</script>
</body>
</html>
"""

_SHOWN = (
    "entropy",
    "normalised_entropy",
    "effective_keys",
    "mean_distance",
    "relative_distance",
    "confidence",
    "sink_mass",
    "previous_token",
    "diagonal",
)
_MOST_FLAGS = 50


def make_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page of a report.

    Args:
        report: the content of `analysis_report.json`.
        pictures: name -> PNG; those called `attention_step_<number>` are shown one at a time, with a slider.
    """
    steps = [
        {"step": int(name.rpartition("_")[2]), "data": base64.b64encode(data).decode()}
        for name, data in sorted(pictures.items())
        if name.startswith("attention_step_")
    ]
    sections = []
    for name, (heading, note) in SECTIONS.items():
        if name == "attention_steps" and steps:
            sections.append({"name": name, "heading": heading, "note": note, "steps": steps})
        elif name in pictures:
            data = base64.b64encode(pictures[name]).decode()
            sections.append({"name": name, "heading": heading, "note": note, "data": data})
    model, tracking, last = report["model"], report["tracking"], report["last"]
    heads = [
        {
            "module": name,
            "head": head,
            "kind": kind or "-",
            "numbers": [_shown(summary[key][head]) for key in _SHOWN],
        }
        for name, summary in last["attention"].items()
        for head, kind in enumerate(summary["class"])
    ]
    share = tracking["share_of_training_time"]
    cost = (
        ""
        if share is None
        else f" Tracking took {tracking['seconds']:.1f} s, {100 * share:.1f} % of the training time."
    )
    subtitle = (
        f"{model['class']}, {model['parameters']:,} parameters, {model['kernel']} attention; "
        f"{len(tracking['steps'])} tracked steps from {tracking['steps'][0]} to {tracking['steps'][-1]}.{cost} "
        "Numbers of step s belong to the weights before update s."
    )
    # Autoescape: token texts, module names and labels come from data.
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=f"Inside {model['model_type']}",
            subtitle=subtitle,
            sections=sections,
            nonfinite=report["nonfinite"],
            not_reproduced=report["not_reproduced"],
            keys=_SHOWN,
            heads=heads,
            flags=report["flags"][:_MOST_FLAGS],
            last_step=last["step"],
        )
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
