"""Tasks whose answer is a text of its own, scored by its overlap with good answers."""

from collections.abc import Sequence

from .base import Example, Score, TrivialPredictor
from .rouge import rouge_l

CALIBRATION_EXAMPLES = 100


def score_free_text(prediction: str, example: Example) -> Score:
    """ROUGE-L with the example's good answers, see [`~trainers.tasks.rouge.rouge_l`]. A blank prediction scores 0."""
    text = prediction.strip()
    return Score(correct=None, parsed=text or None, degree=rouge_l(text, example.answers))


def free_text_predictor(train: Sequence[Example]) -> TrivialPredictor:
    """The better of two rules, by ROUGE-L on the first 100 training examples: repeat the prompt, or one fixed answer.

    The fixed answer is the training answer of median length, of those examples.

    Raises:
        ValueError: if there are no training examples.
    """
    if not train:
        raise ValueError("no training examples to choose a rule on")
    sample = train[:CALIBRATION_EXAMPLES]
    fixed = sorted((example.answer for example in sample), key=lambda text: (len(text), text))[len(sample) // 2]
    where = f"chosen on {len(sample)} examples of the training split"
    rules = [
        TrivialPredictor(name=f"repeats the prompt ({where})", predict=lambda example: example.prompt),
        TrivialPredictor(name=f"always the same training answer ({where})", predict=lambda example: fixed),
    ]
    # The example the fixed answer was taken from would score 1.
    others = [example for example in sample if example.answer != fixed] or sample
    return max(rules, key=lambda rule: sum(score_free_text(rule.predict(e), e).value for e in others))
