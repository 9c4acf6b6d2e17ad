"""The trainer's loss over unequal micro-batches, its log, its step-cost schedule, and its evaluation by generation."""

import math

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from hf_models.connection_transformer import (
    ConnectionTransformerConfig,
    ConnectionTransformerForConditionalGeneration,
    ConnectionTransformerForMaskedLM,
)
from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from trainers.adaptive_reasoning_trainer import AdaptiveReasoningTrainer, ReasoningTrainingArguments
from trainers.errors import UserError
from trainers.run_trainer import last_complete_checkpoint
from trainers.tasks import TaskArguments, get_task

WEIGHTS = {"orthogonality_weight": 0.3, "step_cost_weight": 0.5}


@pytest.fixture(scope="module")
def tokenizer():
    task = get_task(TaskArguments(name="pointer_chase", options={"num_symbols": 6, "max_hops": 2, "num_train": 16}))
    return task.build_tokenizer(task.rows("train"), vocab_size=50)


def features(number: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random sources and targets whose lengths differ, so that micro-batches hold unequal numbers of targets."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(4, 13, (length,), generator=generator).tolist()

    lengths = torch.randint(1, 7, (number, 2), generator=generator).tolist()
    return [
        {"input_ids": (ids := tokens(source)), "attention_mask": [1] * len(ids), "labels": tokens(target)}
        for source, target in lengths
    ]


def connection_model(tokenizer, **overrides) -> ConnectionTransformerForConditionalGeneration:
    set_seed(0)
    values = {
        "hidden_size": 16,
        "num_slots": 8,
        "connection_rank": 4,
        "max_reasoning_steps": 4,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "dropout": 0.0,
    }
    config = ConnectionTransformerConfig(vocab_size=len(tokenizer), **{**values, **overrides})
    return ConnectionTransformerForConditionalGeneration(config)


def vanilla_model(tokenizer) -> VanillaTransformerForConditionalGeneration:
    set_seed(0)
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, dropout=0.0,
    )  # fmt: skip
    return VanillaTransformerForConditionalGeneration(config)


def make_trainer(folder, model, tokenizer, data=None, **options) -> AdaptiveReasoningTrainer:
    values = {"max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", "seed": 3}
    arguments = ReasoningTrainingArguments(
        output_dir=str(folder), disable_tqdm=True, use_cpu=True, save_strategy="no", **{**values, **options}
    )
    return AdaptiveReasoningTrainer(
        model=model,
        args=arguments,
        train_dataset=features() if data is None else data,
        eval_dataset=features(6, seed=1),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        generation_kwargs={"max_new_tokens": 5, "do_sample": False},
    )


@pytest.mark.parametrize("architecture", ["connection", "vanilla"])
def test_accumulation_is_exact_for_every_part(tmp_path, tokenizer, architecture):
    """One batch of 8 and four of 2 with unequal target counts: the same losses, parts and gradient norms."""
    logs = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        model = connection_model(tokenizer, **WEIGHTS) if architecture == "connection" else vanilla_model(tokenizer)
        trainer = make_trainer(
            tmp_path, model, tokenizer,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, learning_rate=1e-2,
        )  # fmt: skip
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    names = ["loss", "grad_norm"]
    if architecture == "connection":
        names += ["cross_entropy", "orthogonality", "step_cost", "step_cost_weight"]
    for other in logs[1:]:
        assert len(other) == len(logs[0]) == 2
        for one, entry in zip(logs[0], other, strict=True):
            for name in names:
                assert entry[name] == pytest.approx(one[name], rel=2e-5), name


def test_loss_is_the_weighted_sum_of_its_logged_parts(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, connection_model(tokenizer, **WEIGHTS), tokenizer, logging_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    total = entry["cross_entropy"] + 0.3 * entry["orthogonality"] + 0.5 * entry["step_cost"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert 1 <= entry["step_cost"] <= 4


def test_logged_parts_after_a_resumption(tmp_path, tokenizer):
    """The first log after it averages the updates since it, not those since the last log before it."""
    options = {"max_steps": 4, "logging_steps": 4, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, connection_model(tokenizer, **WEIGHTS), tokenizer, **options)
    trainer.args.save_strategy, trainer.args.save_steps, trainer.state.save_steps = "steps", 2, 2
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    resumed = make_trainer(tmp_path, connection_model(tokenizer, **WEIGHTS), tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    entry = next(entry for entry in resumed.state.log_history if "loss" in entry)
    total = entry["cross_entropy"] + 0.3 * entry["orthogonality"] + 0.5 * entry["step_cost"]
    assert entry["step"] == 4
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_every_parameter_moves(tmp_path, tokenizer):
    model = connection_model(tokenizer, **WEIGHTS)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    make_trainer(tmp_path, model, tokenizer, max_steps=3, learning_rate=1e-2, warmup_steps=0).train()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still


@pytest.mark.parametrize(
    ("start", "ramp", "expected"),
    [
        (0.0, 0.0, [0.5, 0.5, 0.5, 0.5]),
        (0.5, 0.0, [0.0, 0.0, 0.5, 0.5]),
        (0.25, 0.5, [0.0, 0.0, 0.25, 0.5]),
    ],
)
def test_step_cost_schedule(tmp_path, tokenizer, start, ramp, expected):
    trainer = make_trainer(
        tmp_path, connection_model(tokenizer, **WEIGHTS), tokenizer, step_cost_start=start, step_cost_ramp=ramp
    )
    trainer.state.max_steps = 4
    seen = []
    for step in range(4):
        trainer.state.global_step = step
        seen.append(trainer.step_cost_weight())
    assert seen == pytest.approx(expected)


def test_step_cost_lowers_the_number_of_steps(tmp_path, tokenizer):
    """The same training with and without the cost: it must change what the model does, not only what it logs."""
    steps = []
    for weight in (0.0, 5.0):
        model = connection_model(tokenizer, step_cost_weight=weight, halting_threshold=0.3)
        trainer = make_trainer(tmp_path, model, tokenizer, max_steps=80, learning_rate=1e-2, logging_steps=80)
        trainer.train()
        _, used = trainer.predict(features(32, seed=2)).predictions
        steps.append(used.mean())
    assert steps[1] < steps[0] - 0.5


@pytest.mark.parametrize("architecture", ["connection", "vanilla"])
def test_prediction_is_generation(tmp_path, tokenizer, architecture):
    """Tokens equal those of `generate` example by example; steps equal those of the encoder; -1 without steps."""
    model = connection_model(tokenizer) if architecture == "connection" else vanilla_model(tokenizer)
    data = features(7, seed=5)
    trainer = make_trainer(tmp_path, model, tokenizer, per_device_eval_batch_size=3)
    tokens, steps = trainer.predict(data).predictions
    model.eval()
    for row, example in enumerate(data):
        source = torch.tensor([example["input_ids"]])
        alone = model.generate(source, max_new_tokens=5, do_sample=False)[0, 1:]
        expected = alone[alone != tokenizer.pad_token_id].tolist()
        assert [token for token in tokens[row].tolist() if token != -100] == expected
        if architecture == "connection":
            assert steps[row] == model.get_encoder()(source).reasoning_steps.item()
        else:
            assert steps[row] == -1


def test_reasoning_bound_at_evaluation(tmp_path, tokenizer):
    model = connection_model(tokenizer, halting="none")
    trainer = make_trainer(tmp_path, model, tokenizer)
    trainer.generation_kwargs["max_reasoning_steps"] = 2
    _, steps = trainer.predict(features(4, seed=6)).predictions
    assert steps.tolist() == [2, 2, 2, 2]


def test_eval_loss_is_the_models(tmp_path, tokenizer):
    model = connection_model(tokenizer)
    data = features(4, seed=7)
    metrics = make_trainer(tmp_path, model, tokenizer).evaluate(data)
    batch = DataCollatorForSeq2Seq(tokenizer)(data)
    with torch.no_grad():
        expected = model.eval()(**batch).cross_entropy_loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(expected)


def test_eval_loss_does_not_depend_on_the_batches(tmp_path, tokenizer):
    """Seven examples with targets of unequal lengths: a mean over targets, in batches of any size."""
    model, data = connection_model(tokenizer), features(7, seed=8)
    losses = [
        make_trainer(tmp_path, model, tokenizer, per_device_eval_batch_size=size).evaluate(data)["eval_loss"]
        for size in (1, 3, 7)
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_missing_best_checkpoint_is_named(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, connection_model(tokenizer), tokenizer)
    trainer.state.best_model_checkpoint = "elsewhere/checkpoint-3"
    with pytest.raises(UserError, match="checkpoint-3: the best checkpoint of the run is gone"):
        trainer._load_best_model()


def test_bf16_and_activation_checkpointing_train(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, connection_model(tokenizer), tokenizer)
    plain.train()
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    name = "activation_checkpointing"
    if name not in ReasoningTrainingArguments.__dataclass_fields__:
        name = "gradient_checkpointing"  # the only name in older versions of transformers
    for option, tolerance in (({name: True}, 1e-5), ({"bf16": True}, 2e-2)):
        trainer = make_trainer(tmp_path, connection_model(tokenizer), tokenizer, **option)
        trainer.train()
        seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert seen == pytest.approx(losses, rel=tolerance)


def test_last_complete_checkpoint_drops_unfinished_ones(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-3").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_a_model_without_a_decoder_answers_in_one_pass(tmp_path, tokenizer):
    """Predictions are the most likely tokens up to the end, the loss a mean over targets, steps those of the model."""
    config = connection_model(tokenizer, halting="learned", deep_supervision=1, halting_threshold=0.5).config
    set_seed(1)
    model = ConnectionTransformerForMaskedLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=3)
    # Positions of the input are those of the answer, so targets are no longer than sources.
    data = [row | {"labels": row["labels"][: len(row["input_ids"])]} for row in features(9, seed=2)]
    trainer = make_trainer(tmp_path, model, tokenizer, data=data, per_device_eval_batch_size=4)
    output = trainer.predict(data)
    tokens, steps = output.predictions
    total = count = 0
    for index, row in enumerate(data):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row["input_ids"]]))
        expected = []
        for token in alone.logits[0].argmax(-1).tolist():
            expected.append(token)
            if token == config.eos_token_id:
                break
        own = [token for token in tokens[index][: len(row["input_ids"])].tolist() if token != -100]
        assert own == [token for token in expected if token != config.pad_token_id]
        assert steps[index] == alone.reasoning_steps.item()
        labels = torch.tensor(row["labels"])
        total += torch.nn.functional.cross_entropy(alone.logits[0, : len(labels)], labels, reduction="sum").item()
        count += len(labels)
    assert output.metrics["test_loss"] == pytest.approx(total / count, rel=1e-5)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.5 * entry["halting"], rel=1e-5)
