"""Language modelling for an encoder-decoder: the encoder reads the beginning of a text, the decoder writes the rest."""

from collections.abc import Sequence

from trainers.tasks import Example, Row, Score, StoredTask, TrivialPredictor
from trainers.tasks.free_text import free_text_predictor, score_free_text


class PrefixLanguageModelling(StoredTask):
    """First half of a text's words -> second half (prefix language modelling: Raffel et al. 2020, arXiv:1910.10683,
    section 3.3.1, which divides at a random place; here it is the middle, so that a text is always the same example).

    Fields: `text` (two words at least). A prefix that is too long loses its beginning, a continuation its end. What
    tells how good the model is, is the validation loss, in nats per token; its exponential is the perplexity. The score
    of the generated continuation is ROUGE-L, see [`~trainers.tasks.free_text.score_free_text`]. A recipe names this
    task by the path of this file.
    """

    name = "prefix_language_modelling"
    metric = "rouge_l"
    license = "not stated"
    hub_id = "fancyzhx/ag_news"
    near_duplicate_similarity = 1
    max_source_length = 64
    max_target_length = 64

    def parse(self, row: Row) -> Example:
        words = row.text("text").split()
        if len(words) < 2:
            raise row.error("text", "must hold two words at least")
        middle = len(words) // 2
        rest = " ".join(words[middle:])
        return Example(id=row.name, prompt=" ".join(words[:middle]), target=rest, answer=rest)

    def shorten_target(self, example: Example, labels: list[int]) -> list[int]:
        return [*labels[: self.target_limit - 1], labels[-1]]

    def score(self, prediction: str, example: Example) -> Score:
        return score_free_text(prediction, example)

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        return free_text_predictor(train)
