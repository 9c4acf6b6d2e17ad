"""CommonGen: a sentence that uses some given concepts (Lin et al. 2020, arXiv:1911.03705)."""

import dataclasses
from collections.abc import Sequence

from .base import Example, Score, TrivialPredictor
from .choice import one_line
from .free_text import free_text_predictor, score_free_text
from .loading import Row, StoredTask


class CommonGen(StoredTask):
    """Three to five concepts, separated by spaces -> a sentence about an everyday scene with all of them.

    The sentences of the test split are not public: the validation split is taken as the test, and a share of train is
    held out for validation. A row is one sentence; in train every row is an example, in validation and test the rows of
    one set of concepts are one example with several references. The number of concepts is the difficulty.

    Fields: `concepts` (list of texts), `target` (text), optional `concept_set_idx`. Two rows with the same concepts,
    in any order, count as the same question; near duplicates are not looked for, since different sets share words by
    design. The metric is ROUGE-L, see [`~trainers.tasks.free_text.score_free_text`].
    """

    name = "commongen"
    metric = "rouge_l"
    license = "MIT"
    hub_id = "allenai/common_gen"
    hub_splits = {"train": "train", "test": "validation"}
    local_names = {"train": ("train",), "validation": (), "test": ("validation", "dev")}
    near_duplicate_similarity = 1
    max_source_length = 32
    max_target_length = 64

    def parse(self, row: Row) -> Example:
        concepts = row.get("concepts", list, "a list")
        if not concepts:
            raise row.error("concepts", "must not be empty")
        words = [one_line(row.check_text(f"concepts[{index}]", word)) for index, word in enumerate(concepts)]
        sentence = one_line(row.text("target"))
        return Example(
            id=row.name, prompt=" ".join(words), target=sentence, answer=sentence, difficulty=len(set(words))
        )

    def question(self, example: Example) -> str:
        return " ".join(sorted(example.prompt.casefold().split()))

    def gather(self, split: str, examples: list[Example]) -> list[Example]:
        if split == "train":
            return examples
        groups: dict[str, list[Example]] = {}
        for example in examples:
            groups.setdefault(self.question(example), []).append(example)
        return [
            dataclasses.replace(group[0], references=tuple(dict.fromkeys(e.answer for e in group)))
            for group in groups.values()
        ]

    def score(self, prediction: str, example: Example) -> Score:
        return score_free_text(prediction, example)

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        return free_text_predictor(train)
