"""CommonsenseQA: everyday questions with five options (Talmor et al. 2019, arXiv:1811.00937)."""

from .choice import LabelledChoiceTask


class CommonsenseQA(LabelledChoiceTask):
    """Question and options (A) to (E) -> the letter of the right option.

    The answers of the test split are not public: the validation split is taken as the test, and a share of train is
    held out for validation. Fields: see [`LabelledChoiceTask`]; `question_concept` is not used. Two rows count as the
    same question if question and options are equal.
    """

    name = "commonsenseqa"
    license = "MIT"
    hub_id = "tau/commonsense_qa"
    hub_splits = {"train": "train", "test": "validation"}
    local_names = {"train": ("train",), "validation": (), "test": ("validation", "dev")}
    max_source_length = 192
