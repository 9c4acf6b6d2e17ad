"""ARC: science questions of school tests, with three to five options (Clark et al. 2018, arXiv:1803.05457)."""

from .choice import LabelledChoiceTask


class ARC(LabelledChoiceTask):
    """A science question of a school test and its options (three to five) -> the letter of the right option.

    Of the two parts, easy and challenge, the second holds what a retrieval and a co-occurrence method both got wrong.
    Local files are named `<split>`, or `ARC-Easy_<split>` and `ARC-Challenge_<split>`. Fields: see
    [`LabelledChoiceTask`].
    """

    license = "CC BY-SA 4.0"
    hub_id = "allenai/ai2_arc"
    hub_has_validation = True
    max_source_length = 256


def _arc_files(part: str) -> dict[str, tuple[str, ...]]:
    return {split: (split, f"{part}_{split}") for split in ("train", "validation", "test")}


class ARCEasy(ARC):
    """The easy part of ARC; see [`ARC`]."""

    name = "arc_easy"
    hub_config = "ARC-Easy"
    local_names = _arc_files("ARC-Easy")


class ARCChallenge(ARC):
    """The challenge part of ARC; see [`ARC`]."""

    name = "arc_challenge"
    hub_config = "ARC-Challenge"
    local_names = _arc_files("ARC-Challenge")
