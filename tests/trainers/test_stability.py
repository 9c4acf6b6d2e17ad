"""A loss that explodes ends the run with one line that says what to change."""

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_models.connection_transformer import (
    ConnectionTransformerConfig,
    ConnectionTransformerForSequenceClassification,
)
from trainers.errors import UserError
from trainers.stability import ExplodingLoss


def log(callback, losses, config=None, **settings):
    arguments = TrainingArguments(output_dir="unused", report_to=[], learning_rate=0.25, **settings)
    model = type("Model", (), {"config": config})()
    for step, values in enumerate(losses):
        logs = values if isinstance(values, dict) else {"loss": values}
        state = TrainerState(global_step=step)
        callback.on_log(arguments, state, TrainerControl(), logs=logs, model=model)


def test_ordinary_losses_pass():
    log(ExplodingLoss(), [5.0, 7.0, {"eval_loss": float("nan")}, 4.0, 0.01, 4.9, {"loss": 1.0, "grad_norm": 1e4}])
    # A first loss near nothing is no measure.
    log(ExplodingLoss(), [0.01, 1.0])


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (float("nan"), "loss nan"),
        (float("inf"), "loss inf"),
        (26.0, "loss 26"),
        ({"loss": 2.0, "grad_norm": float("nan")}, "gradient norm nan"),
    ],
)
def test_exploding_losses_end_the_run(last, found):
    with pytest.raises(UserError, match=rf"exploded by update 2 \({found}; 3 at update 1\)") as caught:
        log(ExplodingLoss(), [5.0, 3.0, last])
    assert "\n" not in str(caught.value)
    assert "learning_rate below 0.25" in str(caught.value)


def test_advice_names_large_ranks():
    large = ConnectionTransformerConfig(connection_type="per_pair")
    with pytest.raises(
        UserError, match=r"rank 32 between 128 slots .* 5\.0 times .*initial_update_ratio 0\.5"
    ) as caught:
        log(ExplodingLoss(), [float("nan")], large, max_grad_norm=0.0)
    assert "max_grad_norm 1.0" in str(caught.value)
    calm = ConnectionTransformerConfig(connection_type="per_pair", initial_update_ratio=0.5)
    with pytest.raises(UserError) as caught:
        log(ExplodingLoss(), [float("nan")], calm)
    assert "initial_update_ratio" not in str(caught.value)


def test_a_training_that_explodes(tmp_path):
    torch.manual_seed(0)
    config = ConnectionTransformerConfig(
        vocab_size=20, hidden_size=16, num_slots=8, connection_rank=8, connection_type="per_pair", num_labels=3
    )
    model = ConnectionTransformerForSequenceClassification(config)
    data = [{"input_ids": torch.tensor([3 + row, 4, 5]), "labels": row % 3} for row in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        logging_steps=1,
        learning_rate=30.0,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[ExplodingLoss()])
    with pytest.raises(UserError, match="the loss exploded by update"):
        trainer.train()
