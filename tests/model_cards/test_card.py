"""The model card: what stands in it, what is left out, what is escaped, and that its loading example runs."""

import contextlib
import copy
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2.meta
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_models.connection_transformer import ConnectionTransformerConfig, ConnectionTransformerForConditionalGeneration
from hf_models.continuous_thought_machine import ContinuousThoughtMachineConfig, HyperContinuousThoughtMachineConfig
from hf_models.in_context_transformer import InContextTransformerConfig, LowRankInContextTransformerConfig
from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from model_cards import card as card_module
from model_cards.architectures import ARCHITECTURES
from model_cards.card import TEMPLATE, compare_scores, main, render_card, write_card
from model_cards.markdown import python_string
from model_cards.run_folder import CardError, RunFolder, Score
from tests.hub_server import HubServer
from tests.model_cards.run_folders import CONFIGS, metrics_of, predictions_of, proportion, recipe_of, write_run
from trainers.tasks import TaskArguments, get_task
from trainers.thought.baselines import ThoughtFeedForwardConfig, ThoughtLSTMConfig

ROOT = Path(__file__).resolve().parents[2]
MODEL_TYPES = list(CONFIGS)
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

SECTIONS = [
    "Results at a glance",
    "Load and run",
    "Architecture",
    "How it thinks in steps",
    "Training data",
    "Training",
    "Limits and intended use",
    "Reports",
    "Versions and origin",
    "Citation",
]


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("\n---\n")[0])


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def headings(card: str) -> list[str]:
    """The second-level headings, as a Markdown parser sees them."""
    tokens = PARSER.parse(body(card))
    return [
        tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"
    ]


def section(card: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, flags=re.M | re.S)[1]


def snippet_of(card: str) -> str:
    """The Python of the loading section, as a Markdown parser sees it."""
    tokens = PARSER.parse(section(card, "Load and run"))
    (fence,) = [token for token in tokens if token.type == "fence" and token.info == "python"]
    return fence.content


@pytest.fixture(params=MODEL_TYPES)
def model_type(request) -> str:
    return request.param


class TestFrontMatter:
    def test_holds_what_the_hub_reads(self, tmp_path, model_type):
        data = front_matter(render_card(write_run(tmp_path / "my-run", model_type)))
        task = metrics_of(model_type)["task"]["name"]
        assert data["license"] == "mit"
        assert data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "text-generation"
        assert data["metrics"] == ["accuracy"]
        assert {"adaptive-reasoners", model_type, task} <= set(data["tags"])
        assert ("adaptive-computation" in data["tags"]) == (model_type == "connection_transformer")
        (index,) = data["model-index"]
        assert index["name"] == "my-run"
        (result,) = index["results"]
        assert result["task"] == {"type": "text-generation", "name": task}
        assert result["metrics"] == [{"type": "accuracy", "value": 0.5098, "name": "Accuracy"}]
        assert result["dataset"]["split"] == "test"

    def test_names_the_dataset_of_the_hub(self, tmp_path):
        data = front_matter(render_card(write_run(tmp_path, "vanilla_transformer")))
        assert data["datasets"] == ["someone/strategy-qa"]
        assert data["model-index"][0]["results"][0]["dataset"] == {
            "name": "strategyqa",
            "type": "someone/strategy-qa",
            "split": "test",
            "revision": "0123abc",
        }

    def test_names_no_dataset_for_local_files_or_generated_data(self, tmp_path):
        assert "datasets" not in front_matter(render_card(write_run(tmp_path / "a", "connection_transformer")))
        recipe = recipe_of("vanilla_transformer")
        recipe["task"]["data_dir"] = "data/strategyqa"
        assert "datasets" not in front_matter(
            render_card(write_run(tmp_path / "b", "vanilla_transformer", recipe=recipe))
        )

    def test_names_a_base_model_that_has_a_revision(self, tmp_path):
        recipe = recipe_of("vanilla_transformer")
        recipe["model"] |= {"pretrained": "someone/base", "pretrained_revision": "main"}
        card = render_card(write_run(tmp_path, "vanilla_transformer", recipe=recipe))
        assert front_matter(card)["base_model"] == "someone/base"
        assert "starting from `someone/base`" in card
        recipe["model"] |= {"pretrained": "outputs/other", "pretrained_revision": None}
        card = render_card(write_run(tmp_path, "vanilla_transformer", recipe=recipe))
        assert "base_model" not in front_matter(card)
        assert "starting from `outputs/other`" in card
        for local in ("/home/somebody/other", "./other"):
            recipe["model"]["pretrained"] = local
            card = render_card(write_run(tmp_path, "vanilla_transformer", recipe=recipe))
            assert "starting from `other`" in card
            assert "somebody" not in card

    def test_takes_another_licence(self, tmp_path):
        card = render_card(write_run(tmp_path, "vanilla_transformer"), license="cc-by-nc-sa-4.0")
        assert front_matter(card)["license"] == "cc-by-nc-sa-4.0"

    def test_is_read_back_by_the_hub_library(self, tmp_path, model_type):
        content = render_card(write_run(tmp_path, model_type))
        card = ModelCard(content)
        assert card.data.eval_results[0].metric_value == 0.5098
        assert str(card) == content


class TestSections:
    def test_stand_in_order(self, tmp_path):
        run = write_run(tmp_path, "connection_transformer")
        (run / "internals").mkdir()
        (run / "internals" / "report.html").write_text("")
        assert headings(render_card(run)) == SECTIONS

    def test_without_steps(self, tmp_path):
        card = render_card(write_run(tmp_path, "vanilla_transformer"))
        assert headings(card) == [s for s in SECTIONS if s not in ("How it thinks in steps", "Reports")]
        assert "reasoning steps:" not in card

    def test_difficulty_without_steps_has_its_own_heading(self, tmp_path):
        metrics = metrics_of("vanilla_transformer")
        metrics["test"]["by_difficulty"] = [
            {"difficulty": "easy", "n": 100, "accuracy": proportion(0.5, 100, 0.4, 0.6), "mean_steps": None}
        ]
        card = render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics))
        assert "| easy | 100 | 0.500 | 0.400 to 0.600 |" in section(card, "Results by difficulty")
        assert "Mean steps" not in card

    def test_what_is_not_there_is_left_out(self, tmp_path, model_type):
        metrics, recipe = metrics_of(model_type), recipe_of(model_type)
        for name in ("validation", "example", "loss_history"):
            del metrics[name]
        for name in ("unparseable", "mean_steps", "max_steps", "truncated_inputs", "trivial", "by_difficulty"):
            metrics["test"][name] = None
        for name in ("epochs", "final_loss", "loss_parts", "best_step", "truncated_inputs", "hyperparameters"):
            metrics["train"][name] = None
        recipe["task"] = {"name": recipe["task"]["name"]}
        del recipe["provenance"]
        card = render_card(write_run(tmp_path, model_type, metrics=metrics, recipe=recipe, predictions=[]))
        (tmp_path / "predictions.jsonl").unlink()
        assert render_card(tmp_path) == card
        for absent in (
            "trivial predictor",
            "Trivial",
            "difficulty that",
            "Steps taken",
            "Loss by",
            "differ from",
            "command",
        ):
            assert absent not in card.split("## Limits")[0]
        assert "Write the prompt here." in card

    def test_nothing_is_left_to_fill_in(self, tmp_path, model_type):
        card = render_card(write_run(tmp_path, model_type))
        for phrase in ("More information needed", "None", "null", "nan", "{{ ", "{%", "\n\n\n"):
            assert phrase not in card
        assert card.endswith("```\n")

    def test_template_and_code_name_the_same_variables(self, tmp_path):
        source = TEMPLATE.read_text(encoding="utf-8")
        asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
        run = RunFolder.read(write_run(tmp_path, "connection_transformer"))
        given = card_module._body(run, ARCHITECTURES["connection_transformer"], None, None)
        assert asked == {*given, "card_data"}


class TestContent:
    def test_results_stand_beside_the_trivial_predictor(self, tmp_path):
        results = section(render_card(write_run(tmp_path, "connection_transformer")), "Results at a glance")
        assert "| **This model** | test | 0.510 | 0.431 to 0.588 | 153 |" in results
        assert (
            'always "No" (most frequent answer of the training split) | test | 0.516 | 0.438 to 0.594 | 153 |'
            in results
        )
        assert "3 of 153 generated texts held no answer" in results
        assert "Mean number of reasoning steps: 2.70, of at most 6." in results
        assert "one run, with seed 0" in results

    @pytest.mark.parametrize(
        ("low", "high", "phrase", "useless"),
        [
            (0.7, 0.8, "**better than the trivial predictor**", False),
            (0.6, 0.8, "**not distinguishable from the trivial predictor**", True),
            (0.4, 0.5, "**not distinguishable from the trivial predictor**", True),
            (0.1, 0.2, "**worse than the trivial predictor**", True),
        ],
    )
    def test_verdict_follows_from_the_intervals(self, tmp_path, model_type, low, high, phrase, useless):
        metrics = metrics_of(model_type)
        metrics["test"]["accuracy"] = proportion((low + high) / 2, 153, low, high)
        metrics["test"]["trivial"]["accuracy"] = proportion(0.55, 153, 0.5, 0.6)
        card = render_card(write_run(tmp_path, model_type, metrics=metrics))
        assert phrase in card
        assert "Rule: two scores count as different only if their 95 % intervals share no point." in card
        assert ("The rule is strict" in card) == ("not distinguishable" in phrase)
        assert ("Do not rely on them." in section(card, "Limits and intended use")) == useless

    def test_compare_scores_at_the_boundary(self):
        def score(low, high):
            return Score("accuracy", (low + high) / 2, 10, low, high, 0.95, "Wilson score")

        assert compare_scores(score(0.61, 0.7), score(0.5, 0.6)) == "better"
        assert compare_scores(score(0.6, 0.7), score(0.5, 0.6)) == "not distinguishable"
        assert compare_scores(score(0.4, 0.5), score(0.5, 0.6)) == "not distinguishable"
        assert compare_scores(score(0.4, 0.49), score(0.5, 0.6)) == "worse"

    def test_of_an_error_less_is_better(self, tmp_path):
        def error(value, low, high):
            return {"value": value, "n": 50, "interval": [low, high], "confidence": 0.95, "method": "Student's t"}

        metrics = metrics_of("vanilla_transformer")
        metrics["task"]["metric"] = "error"
        places = [error(value, value / 2, 2 * value) for value in (4.9, 2.0, 0.00123)]
        curve = {"in_context_examples": [0, 1, 2], "model": places, "baselines": {"least squares": places[::-1]}}
        metrics["test"] |= {
            "error": places[2],
            "trivial": {"name": "always 0", "error": error(5.0, 4.5, 5.5)},
            "baselines": [{"name": "always 0", "error": error(5.0, 4.5, 5.5)}, {"name": "x|y", "error": places[1]}],
            "by_position": curve,
            "prompts": {"skewed": curve},
            "by_difficulty": None,
        }
        metrics["validation"]["error"] = places[1]
        card = render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics))
        assert "this model is **better than the trivial predictor** (0.00123 against 5)" in card
        assert "| **This model** | test | 0.00123 | 0.000615 to 0.00246 | 50 |" in card
        assert "| Without a model: x&#124;y | test | 2 | 1 to 4 | 50 |" in card
        assert "| 1 | 2 | 1 to 4 | 2 |" in card
        assert "| `skewed` | 2 | 0.00123 | 0.000615 to 0.00246 | 4.9 |" in card
        assert "known to about ±0.00092 (95 % interval)" in card
        metrics["test"]["error"] = error(7.0, 6.0, 8.0)
        assert "**worse than the trivial" in render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics))

    def test_scores_at_other_sizes(self, tmp_path):
        metrics, recipe = metrics_of("vanilla_transformer"), recipe_of("vanilla_transformer")
        score = metrics["test"]["accuracy"]
        size = {"num_tables": 20, "rho": 0.1, "accuracy": score, "baselines": [{"name": "1 hop", "accuracy": score}]}
        metrics["test"]["by_tables"] = [size, size | {"num_tables": 1000, "baselines": []}]
        recipe["task"]["options"] = {"num_tables": 8}
        card = render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics, recipe=recipe))
        assert "it was trained at 8:" in card
        assert "| Tables | rho | Questions | Accuracy | Interval | Rule: 1 hop |" in card
        assert f"| 20 | 0.1 | {score['n']} | {score['value']:.3f} |" in card
        assert "| 1,000 | 0.1 |" in card

    def test_says_when_every_answer_could_be_read(self, tmp_path):
        metrics = metrics_of("vanilla_transformer")
        metrics["test"]["unparseable"] = 0
        assert "Every generated text held an answer" in render_card(
            write_run(tmp_path, "vanilla_transformer", metrics=metrics)
        )

    def test_steps_by_difficulty_and_their_distribution(self, tmp_path):
        steps = section(render_card(write_run(tmp_path, "connection_transformer")), "How it thinks in steps")
        assert "by at most `0.1` times the norm of the new state, and after `6` steps at the latest" in steps
        assert "| 2 | 51 | 0.700 | 0.500 to 0.950 | 2.00 |" in steps
        assert "| 2 | 102 | 66.7 % | 0.500 |" in steps
        assert "| 4 | 51 | 33.3 % | 0.490 |" in steps

    def test_says_when_the_depth_did_not_adapt(self, tmp_path):
        records = [record | {"steps": 6} for record in predictions_of("connection_transformer")]
        card = render_card(write_run(tmp_path, "connection_transformer", predictions=records))
        assert "the same number of steps, 6: in this run the depth did not adapt" in card
        assert "Steps taken" not in card
        metrics = metrics_of("connection_transformer")
        metrics["test"]["mean_steps"] = 6.0
        card = render_card(write_run(tmp_path, "connection_transformer", metrics=metrics, predictions=[]))
        assert "nothing halted early" in card

    def test_says_when_the_bound_was_another_at_evaluation(self, tmp_path):
        metrics, recipe = metrics_of("connection_transformer"), recipe_of("connection_transformer")
        metrics["test"]["max_steps"] = recipe["evaluation"]["max_reasoning_steps"] = 12
        card = render_card(write_run(tmp_path, "connection_transformer", metrics=metrics, recipe=recipe))
        assert "In the evaluation the upper bound was 12 steps." in card
        assert "max_reasoning_steps=12)" in snippet_of(card)

    @pytest.mark.parametrize("halting", sorted(ARCHITECTURES["connection_transformer"].halting))
    def test_every_stopping_rule_is_told(self, tmp_path, halting):
        config = CONFIGS["connection_transformer"] | {"halting": halting}
        steps = section(
            render_card(write_run(tmp_path, "connection_transformer", config=config)), "How it thinks in steps"
        )
        assert "`6` steps" in steps
        assert ("`0.1`" in steps) == (halting != "none")

    def test_stopping_rules_and_shapes_are_those_of_the_configurations(self):
        known = {
            "vanilla_transformer": VanillaTransformerConfig(),
            "connection_transformer": ConnectionTransformerConfig(),
            "in_context_transformer": InContextTransformerConfig(),
            "low_rank_in_context_transformer": LowRankInContextTransformerConfig(),
            "continuous_thought_machine": ContinuousThoughtMachineConfig(),
            "hyper_continuous_thought_machine": HyperContinuousThoughtMachineConfig(),
            "thought_lstm": ThoughtLSTMConfig(),
            "thought_feed_forward": ThoughtFeedForwardConfig(),
        }
        assert set(known) == set(ARCHITECTURES)
        for name, config in known.items():
            assert [field for _, field in ARCHITECTURES[name].shape if not hasattr(config, field)] == []
        for halting in ARCHITECTURES["connection_transformer"].halting:
            ConnectionTransformerConfig(halting=halting, deep_supervision=1)

    def test_sources_depend_on_the_configuration(self, tmp_path):
        config = CONFIGS["vanilla_transformer"]
        assert "2002.04745" in render_card(write_run(tmp_path, "vanilla_transformer"))
        config = config | {"norm_position": "post"}
        card = render_card(write_run(tmp_path, "vanilla_transformer", config=config))
        assert "2002.04745" not in card
        assert "https://arxiv.org/abs/1706.03762" in card
        assert "@inproceedings{vaswani2017attention," in section(card, "Citation")

    def test_architecture_table_leaves_out_null_fields(self, tmp_path):
        config = CONFIGS["vanilla_transformer"] | {"num_decoder_layers": None}
        card = render_card(write_run(tmp_path, "vanilla_transformer", config=config))
        assert "| Encoder layers | 2 | `num_hidden_layers` |" in card
        assert "Decoder layers" not in card

    def test_losses_are_thinned_to_the_evaluated_steps(self, tmp_path):
        training = section(render_card(write_run(tmp_path, "connection_transformer")), "Training")
        rows = re.findall(r"^\| ([\d,]+) \|", training, flags=re.M)
        assert rows == ["50", "250", "500", "750", "1,000", "1,250", "1,500"]
        assert "| Step | Loss | Cross entropy | Validation loss | Validation accuracy |" in training
        assert "| 250 | 1.75 | 1.65 | 1.85 | 0.5 |" in training

    def test_a_run_that_diverged_has_a_card(self, tmp_path):
        metrics = metrics_of("vanilla_transformer")
        metrics["train"]["final_loss"] = float("nan")
        metrics["loss_history"] = [{"step": 1, "loss": float("inf")}]
        training = section(render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics)), "Training")
        assert "Last training loss: nan" in training
        assert "| 1 | inf |" in training

    def test_reports_are_linked(self, tmp_path):
        run = write_run(tmp_path, "vanilla_transformer")
        for name in (
            "internals/report.html",
            "internals/figures/by hop.png",
            "coupling/report.json",
            "internals/.hidden",
            "internals/maps/step-10.safetensors",
            "internals/steps.jsonl",
        ):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text("")
        (run / "coupling" / "many").mkdir()
        for index in range(40):
            (run / "coupling" / "many" / f"{index:02}.json").write_text("")
        reports = section(render_card(run), "Reports")
        assert "- [internals/figures/by hop.png](internals/figures/by%20hop.png)" in reports
        assert next(line for line in reports.splitlines() if line[:1] == "-").startswith("- [internals/report.html]")
        assert not any(name in reports for name in (".hidden", "maps", "steps.jsonl"))  # none of these leaves
        assert "- and 13 more files in the same folders" in reports


HOSTILE = [
    "</code></td></table><script>alert(1)</script>",
    "a | b | c",
    "` ``` `` ~~~",
    "\n---\nlicense: other\n---\n# Injected\n",
    "![x](javascript:alert(1)) [y](http://example.org) <img src=x onerror=alert(1)>",
    "# heading\n## heading\n\n* list\n> quote",
    "{{ 7 * 7 }} {% raw %}",
    "\u202e\u0000\ud800 \u2028 _a_ **b** &lt; \\",
]


def poison(value: Any, text: str) -> Any:
    """The same structure with every piece of text prefixed by `text`, except what selects how a card is drawn."""
    if isinstance(value, dict):
        kept = ("status", "model_type", "architecture", "halting", "norm_position", "metric", "confidence")
        return {key: item if key in kept else poison(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item, text) for item in value]
    return text + value if isinstance(value, str) else value


class TestEscaping:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_hostile_text_stays_text(self, tmp_path, model_type, text):
        metrics, recipe = poison(metrics_of(model_type), text), poison(recipe_of(model_type), text)
        recipe["task"]["options"] = {text: text}
        recipe["model"]["pretrained"] = text
        metrics["train"]["hyperparameters"] = {text: text, "nested": {text: [text]}}
        metrics["versions"][text] = text
        metrics["loss_history"][0] |= {text: text}
        if metrics["test"]["by_difficulty"]:
            metrics["test"]["by_difficulty"][0]["difficulty"] = text
        config = CONFIGS[model_type] | {"hidden_act": text, "dropout": [text]}
        metrics["task"]["metric"] = "accuracy"
        run = write_run(tmp_path / "run", model_type, metrics=metrics, recipe=recipe, config=config)
        clean = write_run(tmp_path / "clean", model_type)
        for folder in (run, clean):
            (folder / "internals").mkdir()
            (folder / "internals" / "report.json").write_text("")
        (run / "internals" / (re.sub(r"[\0/\n\ud800]", "", text) + ".json")).write_text("")
        card = render_card(run)
        card.encode("utf-8")

        data, expected = front_matter(card), front_matter(render_card(clean))
        assert set(data) - {"base_model"} <= set(expected)
        assert data["license"] == "mit"
        assert headings(card) == headings(render_card(clean))
        tokens = PARSER.parse(body(card))
        assert [t for t in tokens if t.type in ("html_block", "blockquote_open", "hr")] == []
        inline = [child for token in tokens for child in token.children or []]
        tags = {child.content for child in inline if child.type == "html_inline"}
        assert tags <= {"<code>", "</code>"}
        links = {child.attrs["href"] for child in inline if child.type == "link_open"}
        assert all(link.startswith(("https://arxiv.org/", "https://github.com/", "internals/")) for link in links)
        assert not [child for child in inline if child.type in ("image", "em", "s_open")]
        columns = None
        for token in tokens:
            if token.type == "tr_open":
                cells = 0
            elif token.type in ("th_open", "td_open"):
                cells += 1
            elif token.type == "thead_open":
                columns = None
            elif token.type == "tr_close":
                columns = columns or cells
                assert cells == columns
        compile(snippet_of(card), "snippet", "exec")

    def test_metric_names_are_escaped(self, tmp_path):
        metrics = metrics_of("vanilla_transformer")
        name = "<script>|accuracy"
        metrics["task"]["metric"] = name
        for split in ("validation", "test"):
            metrics[split][name] = metrics[split].pop("accuracy")
            metrics[split]["trivial"][name] = metrics[split]["trivial"].pop("accuracy")
        card = render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics))
        assert "<script>" not in body(card)

    def test_hostile_folder_name(self, tmp_path):
        run = write_run(tmp_path / "<b>x`*|_---", "vanilla_transformer")
        card = render_card(run)
        assert "# &#60;b&#62;x&#96;&#42;&#124;&#95;---" in card
        assert front_matter(card)["model-index"][0]["name"] == "<b>x`*|_---"

    def test_hostile_version_stays_out_of_the_bibtex(self, tmp_path):
        metrics = metrics_of("vanilla_transformer")
        metrics["versions"]["adaptive_reasoners"] = "1}, evil = {\n```"
        assert "evil" not in section(
            render_card(write_run(tmp_path, "vanilla_transformer", metrics=metrics)), "Citation"
        )


class TestSameInputSameCard:
    def test_in_other_processes_and_without_a_network(self, tmp_path, model_type):
        run = write_run(tmp_path / "run", model_type)
        expected = render_card(run)
        assert render_card(run) == expected
        for seed in ("1", "2"):
            subprocess.run(
                [sys.executable, "-m", "model_cards.card", str(run)],
                cwd=ROOT,
                env=os.environ | {"PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
            )
            assert (run / "README.md").read_text(encoding="utf-8") == expected

    def test_no_socket_is_opened(self, tmp_path, model_type, monkeypatch):
        def refuse(*arguments, **keywords):
            raise AssertionError("a card is drawn without a network")

        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setattr(socket, "create_connection", refuse)
        write_card(write_run(tmp_path, model_type), "someone/model", "0123abc")

    def test_neither_torch_nor_transformers_nor_trainers_is_loaded(self):
        code = (
            "import sys, model_cards.card, model_cards.results\n"
            "print([m for m in ('torch', 'transformers', 'trainers', 'hf_models') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        assert done.stdout == "[]\n"


class TestWriting:
    def test_writes_readme_and_nothing_else(self, tmp_path):
        run = write_run(tmp_path, "vanilla_transformer")
        before = {path.name for path in run.iterdir()}
        assert write_card(run) == run / "README.md"
        assert (run / "README.md").read_text(encoding="utf-8") == render_card(run)
        assert {path.name for path in run.iterdir()} == before | {"README.md"}

    def test_an_interrupted_write_leaves_the_old_card(self, tmp_path, monkeypatch):
        run = write_run(tmp_path, "vanilla_transformer")
        (run / "README.md").write_text("old")
        before = {path.name for path in run.iterdir()}

        def fail(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            write_card(run)
        assert (run / "README.md").read_text() == "old"
        assert {path.name for path in run.iterdir()} == before

    def test_a_failed_write_is_one_line(self, tmp_path, monkeypatch):
        run = write_run(tmp_path, "vanilla_transformer")

        def fail(source, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(CardError, match=r"README\.md: cannot be written: No space left on device"):
            write_card(run)


def edited(model_type: str = "connection_transformer", **changes: Any) -> dict[str, Any]:
    """metrics.json with fields replaced, named by dotted paths with `__`; `...` deletes one."""
    metrics = copy.deepcopy(metrics_of(model_type))
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = metrics
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return metrics


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"schema_version": 2}, "metrics.json: schema_version is 2; this version reads 1"),
            ({"status": "running"}, "metrics.json: status is 'running'; only a finished run has a card"),
            ({"test": ...}, "metrics.json: test is missing"),
            ({"test": 3}, "metrics.json: test must be a mapping"),
            ({"test__accuracy": ...}, "metrics.json: test.accuracy is missing"),
            ({"test__accuracy__value": "0.5"}, "metrics.json: test.accuracy.value must be a number"),
            ({"test__accuracy__value": float("nan")}, "metrics.json: test.accuracy.value is nan; it must be finite"),
            (
                {"test__accuracy__interval": [0.1]},
                "test.accuracy must have a value, a confidence and an interval of two",
            ),
            ({"test__accuracy__interval": [0.1, 1.5]}, "each in [0, 1]"),
            ({"test__by_difficulty": [3]}, "metrics.json: test.by_difficulty[0] must be a mapping"),
            ({"test__by_difficulty": [{"n": 1}]}, "metrics.json: test.by_difficulty[0].accuracy is missing"),
            ({"parameters__total": 1.5}, "metrics.json: parameters.total must be a whole number"),
            ({"parameters__total": True}, "metrics.json: parameters.total must be a whole number"),
            ({"train__hardware": ...}, "metrics.json: train.hardware is missing"),
            ({"task__name": 7}, "metrics.json: task.name must be text"),
            (
                {"architecture": "XForTables"},
                r"architecture is 'XForTables'; cards are drawn for ...ForConditionalGeneration, ",
            ),
            ({"loss_history": {}}, "metrics.json: loss_history must be a list"),
        ],
    )
    def test_of_metrics_name_file_field_and_rule(self, tmp_path, capsys, changes, message):
        run = write_run(tmp_path, "connection_transformer", metrics=edited(**changes))
        assert_one_line_error([str(run)], message, capsys)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "other"}, "config.json: model_type is 'other'; known: vanilla_transformer, connection_"),
            ({"model_type": None}, "config.json: model_type is missing"),
            ({"halting": "never"}, "config.json: halting is 'never'; known rules: state_change"),
            ({"halting_threshold": "x"}, "config.json: halting_threshold must be a number"),
        ],
    )
    def test_of_the_configuration(self, tmp_path, capsys, config, message):
        run = write_run(tmp_path, "connection_transformer", config=CONFIGS["connection_transformer"] | config)
        assert_one_line_error([str(run)], message, capsys)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("metrics.json", None, "metrics.json: no such file"),
            ("recipe.yaml", None, "recipe.yaml: no such file"),
            ("config.json", None, "config.json: no such file"),
            ("metrics.json", b'{"a": 1,\n}', "metrics.json: line 2: not valid JSON"),
            ("metrics.json", b"[]", "metrics.json: the content must be a mapping"),
            ("metrics.json", b"\xff", "metrics.json: must be UTF-8 text: invalid start byte at byte 0"),
            ("recipe.yaml", b"a: b\nc: : d", "recipe.yaml: line 2: not valid YAML"),
            ("recipe.yaml", b"", "recipe.yaml: the content must be a mapping"),
            ("predictions.jsonl", b'{"steps": 1}\n{"steps":', "predictions.jsonl: line 2: not valid JSON"),
            ("predictions.jsonl", b'{"steps": 1.5}\n', "predictions.jsonl: line 1: steps must be a whole number"),
        ],
    )
    def test_of_files(self, tmp_path, capsys, name, content, message):
        run = write_run(tmp_path, "connection_transformer")
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(content)
        assert_one_line_error([str(run)], message, capsys)

    def test_of_options(self, tmp_path, capsys):
        run = str(write_run(tmp_path, "vanilla_transformer"))
        assert_one_line_error([run, "--revision", "main"], "revision: names a revision of a Hub repository", capsys)
        assert_one_line_error([run, "--repo_id", "a/b/c"], "repo_id: ", capsys)
        assert_one_line_error([run, "--repo_id", "lonely"], "repo_id: is 'lonely'; it must be user/name", capsys)
        assert_one_line_error([str(tmp_path / "none")], "none: no such folder", capsys)

    def test_a_line_separator_in_a_prediction_is_no_line_break(self, tmp_path):
        run = write_run(tmp_path, "connection_transformer")
        (run / "predictions.jsonl").write_text('{"steps": 3, "prediction": "a\u2028b\u0085c"}\n\n', encoding="utf-8")
        assert RunFolder.read(run).steps == ((3, False),)


def assert_one_line_error(argv: list[str], message: str, capsys) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (Path(argv[0]) / "README.md").exists()


class TestLoadingExample:
    def test_on_the_hub_pins_the_revision(self, tmp_path, model_type):
        card = render_card(write_run(tmp_path, model_type), "someone/my-model", "0123abc")
        assert snippet_of(card).count(', revision="0123abc"') == 2
        assert 'name = "someone/my-model"' in snippet_of(card)
        assert "# my-model\n" in card
        assert "The revision pins the files" in card
        assert front_matter(card)["model-index"][0]["name"] == "my-model"

    def test_on_the_hub_without_a_revision_says_how_to_pin(self, tmp_path, model_type):
        card = render_card(write_run(tmp_path, model_type), "someone/my-model")
        assert snippet_of(card).count(', revision="main"') == 2
        assert "put the hash of their commit in the place of `main`" in card

    def test_locally_names_the_path_from_the_working_directory(self, tmp_path, model_type, monkeypatch):
        run = write_run(tmp_path / "outputs" / "run", model_type)
        monkeypatch.chdir(tmp_path)
        expected = 'name = "outputs/run"\n'
        assert expected in snippet_of(render_card(run))
        assert expected in snippet_of(render_card("outputs/run"))
        monkeypatch.chdir(run)
        assert 'name = "."\n' in snippet_of(render_card("."))
        assert render_card(run) == render_card(".")

    def test_outside_of_the_working_directory_tells_no_path_of_this_machine(self, tmp_path, model_type, monkeypatch):
        run = write_run(tmp_path / "run", model_type)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        card = render_card(run)
        assert 'name = "."\n' in snippet_of(card)
        assert "Run this inside the folder that holds this card." in card
        assert str(tmp_path) not in card

    def test_beams_are_those_of_the_evaluation(self, tmp_path, model_type):
        recipe = recipe_of(model_type)
        recipe["evaluation"]["num_beams"] = 4
        assert ", num_beams=4)" in snippet_of(render_card(write_run(tmp_path, model_type, recipe=recipe)))

    @pytest.mark.parametrize(
        ("model_type", "inside"), [("vanilla_transformer", True), ("connection_transformer", False)]
    )
    def test_runs_on_the_folder(self, tmp_path, model_type, inside, monkeypatch):
        run, prompt = save_tiny_model(tmp_path / "outputs" / "run", model_type)
        monkeypatch.chdir(run if inside else tmp_path)
        snippet = snippet_of(render_card(run))
        assert f"prompt = {python_string(prompt)}\n" in snippet
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        assert run_snippet(snippet, environment) == expected_lines(run, prompt)

    def test_runs_on_the_hub(self, tmp_path, monkeypatch):
        run, prompt = save_tiny_model(tmp_path / "run", "connection_transformer")
        expected = expected_lines(run, prompt)
        upload = (
            "from huggingface_hub import upload_folder as up\nprint(up(repo_id='ada/my-model', folder_path='run').oid)"
        )
        monkeypatch.chdir(tmp_path)
        with contextlib.closing(HubServer()) as hub:
            hub.create_repository("ada/my-model")
            token = hub.add_user("ada").token
            (revision,) = run_snippet(upload, hub.environment(tmp_path / "home", token))
            snippet = snippet_of(render_card(run, "ada/my-model", revision))
            shutil.rmtree(run)
            assert run_snippet(snippet, hub.environment(tmp_path / "other-home")) == expected


def save_tiny_model(folder: Path, model_type: str) -> tuple[Path, str]:
    """A real, untrained model with its tokenizer in a run folder. Returns the folder and the example's prompt."""
    task = get_task(TaskArguments(name="pointer_chase"))
    example = task.rows("validation")[0]
    tokenizer = task.build_tokenizer(task.rows("train"), vocab_size=8000)
    torch.manual_seed(0)
    small = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}
    if model_type == "vanilla_transformer":
        config = VanillaTransformerConfig(**small, intermediate_size=32, num_hidden_layers=1)
        model = VanillaTransformerForConditionalGeneration(config)
    else:
        config = ConnectionTransformerConfig(**small, num_slots=8, connection_rank=4, num_decoder_layers=1)
        model = ConnectionTransformerForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 4
    metrics, recipe = metrics_of(model_type), recipe_of(model_type)
    metrics["example"] = {"prompt": example.prompt, "target": example.target}
    recipe["task"] |= {"name": task.name, "max_source_length": task.arguments.max_source_length}
    write_run(folder, model_type, metrics=metrics, recipe=recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, example.prompt


def run_snippet(snippet: str, environment: dict[str, str]) -> list[str]:
    """The lines that a piece of Python prints in a fresh process, in this working directory.

    If it makes a `model`, it must be of the class whose code lies beside the weights.
    """
    check = "\nassert 'model' not in vars() or type(model).__module__.startswith('transformers_modules.')\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", snippet + check],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def expected_lines(folder: Path, prompt: str) -> list[str]:
    """What the example must print, from the same model in this process."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    inputs = tokenizer([prompt], return_tensors="pt")
    lines = [f"answer: {tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)}"]
    outputs = model(**inputs, decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]]))
    if model.config.model_type == "connection_transformer":
        lines.append(f"reasoning steps: {int(outputs.reasoning_steps[0])}")
    return lines
