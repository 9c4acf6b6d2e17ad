"""LogiQA: logical reading comprehension with four options (Liu et al. 2020, arXiv:2007.08124)."""

from .base import Example
from .choice import ChoiceTask
from .loading import Row


class LogiQA(ChoiceTask):
    """Context, question and options (A) to (D), each on a line of its own -> the letter of the right option.

    Fields: `context`, `query` (text), `options` (list of 2 to 4 texts), `correct_option` (position counted from 0, as a
    number or as text). Two rows with the same context and query count as the same question.
    """

    name = "logiqa"
    license = "not stated"
    hub_id = "lucasmccabe/logiqa"
    hub_revision = "refs/convert/parquet"  # the main branch is a loading script, which `datasets` no longer runs
    hub_has_validation = True
    most_options = 4
    max_source_length = 512

    def parse(self, row: Row) -> Example:
        lines = [row.text("context"), row.text("query")]
        options = self.check_options(row, "options", row.get("options", list, "a list"))
        correct = row.values.get("correct_option")
        if correct in ("0", "1", "2", "3"):
            correct = int(correct)
        else:
            correct = row.get("correct_option", int, "the position of the right option")
        if not 0 <= correct < len(options):
            raise row.error("correct_option", f"must lie between 0 and {len(options) - 1}, got {correct}")
        return self.choice_example(row, row.name, lines, options, correct)

    def question(self, example: Example) -> str:
        return "\n".join(example.prompt.split("\n")[:2])
