"""What a tracked run leaves: a report with a schema, pictures that can be redrawn, and one page that is safe."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from tests.trainers.tracking.tools import make_batch, make_model
from trainers.errors import UserError
from trainers.tasks.tokenization import word_level
from trainers.tracking import InternalsTracker, TrackingArguments, figures, make_tracker, write_internals
from trainers.tracking.report import draw

PICTURES = {
    "attention_evolution",
    "attention_statistics",
    "attention_step_00000001",
    "attention_step_00000002",
    "gradient_flow",
    "layer_contributions",
    "multi_head_comparison",
    "qkv_evolution",
    "training_curves",
}
EVIL = "<script>alert(1)</script>$x^2$"
HISTORY = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 2.0, "eval_loss": 2.5, "eval_accuracy": 0.25},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two tracked steps whose tokens look like markup and formulas."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model("pre_norm").train()
    tokenizer = word_level([EVIL] + [f"w{index}$" for index in range(35)], 32)
    probe = make_batch(model, 2)
    probe["input_ids"][0, 0] = 4
    tracker = make_tracker(TrackingArguments(every=1), model, probe, tokenizer, folder)
    assert not (folder / "internals").exists()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with tracker:
        for step in (1, 2):
            with tracker.step(step, optimizer):
                model(**make_batch(model)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    write_internals(tracker, folder, HISTORY)
    return folder / "internals", tracker


def test_report(run):
    folder, tracker = run
    text = (folder / "analysis_report.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the report"))
    assert report["schema_version"] == 1
    assert report["model"]["class"] == "VanillaTransformerForConditionalGeneration"
    assert report["model"]["kernel"] == "sdpa"
    assert report["tracking"]["steps"] == [1, 2]
    assert 0 < report["tracking"]["share_of_training_time"] <= 1
    assert report["last"] == tracker.records[-1]
    assert report["last"]["tokens"]["source"][0] == EVIL
    assert sum(report["evolution"][0]["classes"].values()) == 24
    assert report["evolution"][1]["decomposition_error"]["decoder.layers"] < 1e-5
    assert report["training"][1]["eval_accuracy"] == 0.25
    assert report["nonfinite"] == []
    assert report["not_reproduced"] == {}


def test_pictures_are_files_and_can_be_redrawn(run, tmp_path):
    folder, tracker = run
    assert {path.stem for path in folder.glob("*.png")} == PICTURES
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(folder / "analysis_report.json", again)
    (again / "attention_step_00000009.png").write_bytes(b"of an earlier run")
    draw(again, tracker.records[-1:], {})
    wanted = {name for name in PICTURES if not name.startswith(("attention_step", "attention_evo", "multi"))}
    assert {path.stem: path.read_bytes()[:4] for path in again.glob("*.png")} == dict.fromkeys(wanted, b"\x89PNG")


def test_figures_have_labels_units_and_colour_scales(run):
    _, tracker = run
    records, maps = tracker.records, tracker.stored_maps()
    heat = figures.attention_heat_maps(maps[2], records[-1])
    first = heat.axes[0]
    assert (first.get_xlabel(), first.get_ylabel()) == ("key", "query")
    labels = [tick.get_text() for axes in heat.axes[:6] for tick in axes.get_xticklabels()]
    assert any(label.startswith("<script>") for label in labels)
    assert any(label.endswith(r"\$") for label in labels)
    assert heat.axes[-1].get_ylabel() == "attention weight, mean over heads (0 to 1)"
    flow = figures.gradient_flow_chart(records)
    assert all(axes.get_yscale() == "log" for axes in flow.axes)
    assert figures.training_curves(HISTORY).axes[0].get_ylabel() == "loss (nats per target)"
    shares = figures.layer_contributions(records)
    assert "sums to 1" in shares.axes[0].get_xlabel()
    with pytest.raises(ValueError, match="no record holds a decomposition"):
        figures.layer_contributions([{"step": 1, "residual": {}}])


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.external = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.sources.append(values["src"])
        self.external += [v for k, v in values.items() if k in ("src", "href") and not v.startswith(("data:", "#"))]


def test_page_is_one_safe_file(run):
    folder, _ = run
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.external == []
    assert page.tags.count("script") == 1
    assert len(page.sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(re.findall(r"<td>(local|diffuse|focused|global)</td>", text)) == 24


def test_everything_from_data_is_escaped_in_the_page(run):
    from trainers.tracking.page import make_page

    folder, _ = run
    report = json.loads((folder / "analysis_report.json").read_text())
    report["not_reproduced"] = {EVIL: EVIL}
    report["nonfinite"] = [{"step": 1, "kind": EVIL, "what": EVIL, "module": EVIL}]
    report["flags"] = [{"step": 1, "layer": EVIL, "flag": EVIL}]
    report["model"]["class"] = report["model"]["model_type"] = EVIL
    text = make_page(report, {})
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") >= 7


def test_a_run_with_nan_still_has_its_page(tmp_path):
    model = make_model("gpt2").train()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = float("nan")
    tracker = InternalsTracker(model, folder=tmp_path / "internals")
    with tracker, tracker.step(1):
        model(**make_batch(model)).loss.backward()
    write_internals(tracker, tmp_path)
    report = json.loads((tmp_path / "internals" / "analysis_report.json").read_text())
    assert report["nonfinite"][0]["module"] == "h.0.mlp"
    text = (tmp_path / "internals" / "index.html").read_text(encoding="utf-8")
    assert "step 1: NaN in the output of h.0.mlp" in " ".join(text.split())


def test_nothing_tracked_and_nothing_to_draw(tmp_path):
    model = make_model("gpt2")
    tracker = InternalsTracker(model, folder=tmp_path / "internals")
    write_internals(tracker, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be read"):
        draw(tmp_path, [], {})
    (tmp_path / "analysis_report.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema_version is 99, not 1"):
        draw(tmp_path, [], {})
