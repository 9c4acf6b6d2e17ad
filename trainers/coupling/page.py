"""One self-contained HTML page: hover a cell of the matrix to read the two pieces, click to list a piece's neighbours.

Everything is inside the file, so it works offline and from a folder on a disk.
"""

import base64
import html
import json
from typing import Any

import numpy as np

from .coupling import Coupling
from .figures import cluster_order
from .report import representatives

# Couplings as 16-bit integers: a hundredth of the colour scale's resolution is not visible.
_SCALE = 10_000
_UNDEFINED = -32768

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #1c1c1c; background: #fff; }}
main {{ display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }}
figure {{ margin: 0; position: relative; }}
@media (min-width: 75rem) {{ figure {{ position: sticky; top: 1rem; }} }}
canvas {{ image-rendering: pixelated; border: 1px solid #999; cursor: crosshair; touch-action: none; display: block; }}
#mark {{ position: absolute; box-sizing: content-box; border: 2px solid #000; outline: 1px solid #fff;
  pointer-events: none; display: none; }}
figcaption {{ display: flex; gap: .5rem; align-items: center; margin-top: .4rem; }}
.scale {{ width: 12rem; height: .8rem; border: 1px solid #999; background: linear-gradient(90deg, #00f, #fff, #f00); }}
section {{ flex: 1 1 24rem; max-width: 46rem; }}
dl {{ margin: 0 0 1rem; }}
dt {{ font-weight: 600; }}
dd {{ margin: 0 0 .5rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; padding: .15rem .5rem .15rem 0; vertical-align: top; border-top: 1px solid #ddd; }}
#neighbours tr {{ cursor: pointer; }}
#neighbours tr:hover {{ background: #f2f2f2; }}
.clamp {{ display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }}
.value {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.note {{ color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{subtitle}</p>
<main>
<figure>
<canvas id="map" tabindex="0" role="img" aria-label="Heat map of couplings; arrow keys move, Enter lists neighbours">
</canvas>
<div id="mark"></div>
<figcaption class="note">&minus;1 <span class="scale"></span> 1 <span>coupling; grey: undefined</span></figcaption>
</figure>
<section>
<p><label>Matrix <select id="which"></select></label></p>
<p class="note">Point at a cell, or move with the arrow keys, to read its two pieces. Click, or press Enter, to list the
neighbours of the row's piece.</p>
<div id="cell" aria-live="polite"></div>
<div id="neighbours"></div>
</section>
</main>
<script type="application/json" id="data">{data}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const count = data.pieces.length;
const matrices = Object.fromEntries(Object.entries(data.matrices).map(([name, text]) => {{
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return [name, new Int16Array(bytes.buffer)];
}}));
const canvas = document.getElementById("map");
const which = document.getElementById("which");
for (const name of Object.keys(matrices)) which.add(new Option(name, name));
const cellSize = Math.max(1, Math.floor(720 / count));
canvas.width = canvas.height = count * cellSize;

function coupling(row, column) {{
  const stored = matrices[which.value][row * count + column];
  return stored === {undefined} ? null : stored / {scale};
}}
function colour(value) {{
  if (value === null) return "#999";
  const fade = Math.round(255 * (1 - Math.min(1, Math.abs(value))));
  return value > 0 ? `rgb(255,${{fade}},${{fade}})` : `rgb(${{fade}},${{fade}},255)`;
}}
function draw() {{
  const context = canvas.getContext("2d");
  for (let row = 0; row < count; row++) for (let column = 0; column < count; column++) {{
    context.fillStyle = colour(coupling(row, column));
    context.fillRect(column * cellSize, row * cellSize, cellSize, cellSize);
  }}
}}
function shown(value) {{ return value === null ? "undefined" : value.toFixed(3); }}
function element(name, text) {{
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}}
function describe(index) {{
  const piece = data.pieces[index];
  const list = document.createElement("dl");
  list.append(element("dt", piece.piece_id), element("dd", piece.prompt ?? ""));
  if (piece.answer !== undefined) list.append(element("dd", "→ " + piece.answer));
  const facts = ["category", "group", "role"].filter((key) => piece[key]).map((key) => `${{key}} ${{piece[key]}}`);
  if (facts.length) {{
    const line = element("dd", facts.join(" · "));
    line.className = "note";
    list.append(line);
  }}
  return list;
}}
function place(event) {{
  const box = canvas.getBoundingClientRect();
  const at = (offset, size) => Math.min(count - 1, Math.max(0, Math.floor(offset / size * count)));
  return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
}}
let current = [0, 0];
function show(row, column) {{
  current = [row, column];
  const one = data.pieces[row], other = data.pieces[column];
  const where = row === column ? " (a piece with itself)" : one.pot && one.pot === other.pot ? " (one question)" : "";
  const heading = element("h2", "coupling " + shown(coupling(row, column)) + where);
  const both = row === column ? [describe(row)] : [describe(row), describe(column)];
  document.getElementById("cell").replaceChildren(heading, ...both);
  const mark = document.getElementById("mark"), size = canvas.clientWidth / count;
  Object.assign(mark.style, {{
    display: "block", width: size + "px", height: size + "px",
    left: canvas.clientLeft + column * size - 2 + "px", top: canvas.clientTop + row * size - 2 + "px",
  }});
}}
function list(row) {{
  const others = [...Array(count).keys()].filter((other) => other !== row && coupling(row, other) !== null);
  others.sort((one, other) => coupling(row, other) - coupling(row, one));
  const table = document.createElement("table");
  for (const other of others.slice(0, 15)) {{
    const line = document.createElement("tr");
    const value = element("td", shown(coupling(row, other)));
    value.className = "value";
    const piece = data.pieces[other];
    const asked = document.createElement("td");
    const text = element("div", piece.prompt ?? piece.piece_id);
    text.className = "clamp";
    text.title = text.textContent;
    asked.append(text);
    line.append(value, asked, element("td", piece.answer ?? ""));
    line.addEventListener("click", () => show(row, other));
    table.append(line);
  }}
  const heading = element("h2", "Neighbours of " + data.pieces[row].piece_id);
  document.getElementById("neighbours").replaceChildren(heading, table);
}}
const arrows = {{ ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }};
function press(event) {{
  const step = arrows[event.key];
  if (step) show(...current.map((at, axis) => Math.min(count - 1, Math.max(0, at + step[axis]))));
  else if (event.key === "Enter") list(current[0]);
  else return;
  event.preventDefault();
}}
canvas.addEventListener("pointermove", (event) => show(...place(event)));
canvas.addEventListener("pointerdown", (event) => {{ show(...place(event)); list(current[0]); }});
canvas.addEventListener("keydown", press);
which.addEventListener("change", () => {{
  const listed = document.getElementById("neighbours").hasChildNodes();
  draw();
  show(...current);
  if (listed) list(current[0]);
}});
draw();
</script>
</body>
</html>
"""


def make_page(coupling: Coupling, report: dict[str, Any]) -> str:
    """The page of a coupling matrix and its balanced variant, pieces in clustered order.

    Args:
        coupling: the matrices; of very many pieces, a sample is shown.
        report: as `make_report` gives it for these; pieces and metadata are taken from it.
    """
    coupling = representatives(coupling, report["metadata"].get("seed", 0))
    order = cluster_order(coupling.matrix)
    matrices = {"all layers": coupling.matrix}
    if coupling.balanced is not None:
        matrices["balanced over layers"] = coupling.balanced
    analysis = report["coupling_analysis"]
    pieces = report["knowledge_pieces"]["pieces"]
    data = {
        "matrices": {name: _packed(matrix[np.ix_(order, order)]) for name, matrix in matrices.items()},
        "pieces": [pieces[index] for index in order],
    }
    name = report["metadata"].get("model")
    drawn = f" ({len(order)} drawn)" if len(order) < report["metadata"]["pieces"] else ""
    subtitle = (
        f"{report['metadata']['pieces']} pieces{drawn}, {analysis['total_pairs']} pairs; {analysis['high_pairs']} high"
        f" ({analysis['thresholds']['high']}), {analysis['moderate_pairs']} moderate, {analysis['low_pairs']} low."
    )
    return _PAGE.format(
        title=html.escape("Knowledge coupling" + (f" of {name}" if name else "")),
        subtitle=html.escape(subtitle),
        # Inside a script element only "</" and "<!--" could end it early.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
        scale=_SCALE,
        undefined=_UNDEFINED,
    )


def _packed(matrix: np.ndarray) -> str:
    scaled = np.where(np.isnan(matrix), _UNDEFINED, np.round(np.clip(np.nan_to_num(matrix), -1, 1) * _SCALE))
    return base64.b64encode(scaled.astype("<i2").tobytes()).decode()
