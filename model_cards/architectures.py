"""What a card says about each architecture: facts that do not depend on a run."""

from dataclasses import dataclass

from .markdown import code
from .run_folder import Fields


@dataclass(frozen=True)
class Source:
    """A paper or repository that an architecture comes from.

    Attributes:
        role: what was taken from it, a noun phrase.
        title, authors, year: as published.
        url: where to read it.
        bibtex: a BibTeX entry.
        only_if: a field of config.json and the value it must have for the source to matter.
    """

    role: str
    title: str
    authors: str
    year: int
    url: str
    bibtex: str
    only_if: tuple[str, object] | None = None

    def applies(self, config: Fields) -> bool:
        """Whether a model with this configuration makes use of the source."""
        return self.only_if is None or config.content.get(self.only_if[0]) == self.only_if[1]


@dataclass(frozen=True)
class Architecture:
    """Facts of one `model_type`.

    Attributes:
        name: in words, with its article.
        description: what it is, in one or two sentences.
        sources: where it comes from.
        shape: labels and fields of config.json for the table of the architecture.
        limits: what a user must know of every such model, each one sentence.
        halting: for models that think in steps, the value of config.json's `halting` -> when an example stops.
        scoring: how the model was asked for its answers, one sentence.
        pipeline_tag: the Hub's task for such models.
        pipeline_tags: the same for heads of another task: end of the class name -> task.
        tags: further tags of the repository.
    """

    name: str
    description: str
    sources: tuple[Source, ...]
    shape: tuple[tuple[str, str], ...]
    limits: tuple[str, ...]
    halting: dict[str, str] | None = None
    scoring: str = "The model was scored on the answers it generates."
    # The Hub and transformers 5 have folded "text2text-generation" into this task; it is kept as a plain tag.
    pipeline_tag: str = "text-generation"
    pipeline_tags: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ("text2text-generation",)

    def hub_task(self, head: str) -> str:
        """The Hub's task for a head, by the name of its class."""
        return next((task for suffix, task in self.pipeline_tags if head.endswith(suffix)), self.pipeline_tag)

    def stopping_rule(self, config: Fields) -> str:
        """When an example stops thinking, as Markdown; the symbols τ and K are replaced by the configuration's values.

        Raises:
            CardError: if the configuration names a rule that is not known here.
        """
        rules = self.halting or {}
        rule = rules.get(config.text("halting"))
        if rule is None:
            raise config.error("halting", f"is {config.text('halting')!r}; known rules: {', '.join(rules)}")
        threshold, bound = config.number("halting_threshold"), config.count("max_reasoning_steps")
        return rule.replace("τ", code(threshold)).replace("K", code(bound))


VASWANI = """\
@inproceedings{vaswani2017attention,
  title     = {Attention Is All You Need},
  author    = {Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and
               Gomez, Aidan N. and Kaiser, {\\L}ukasz and Polosukhin, Illia},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {30},
  year      = {2017},
  eprint    = {1706.03762},
  archiveprefix = {arXiv}
}"""

XIONG = """\
@inproceedings{xiong2020layer,
  title     = {On Layer Normalization in the Transformer Architecture},
  author    = {Xiong, Ruibin and Yang, Yunchang and He, Di and Zheng, Kai and Zheng, Shuxin and Xing, Chen and
               Zhang, Huishuai and Lan, Yanyan and Wang, Liwei and Liu, Tie-Yan},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  eprint    = {2002.04745},
  archiveprefix = {arXiv}
}"""

CONN_TRANS = """\
@misc{conntrans2025,
  title        = {Connection Transformer},
  author       = {{YeoJune}},
  year         = {2025},
  howpublished = {Source code, \\url{https://github.com/YeoJune/conn_trans}}
}"""

GARG = """\
@inproceedings{garg2022what,
  title     = {What Can Transformers Learn In-Context? A Case Study of Simple Function Classes},
  author    = {Garg, Shivam and Tsipras, Dimitris and Liang, Percy and Valiant, Gregory},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  year      = {2022},
  eprint    = {2208.01066},
  archiveprefix = {arXiv}
}"""

IN_CONTEXT_SOURCE = Source(
    role="in-context learning of generated tasks, GPT-2 blocks over numbers",
    title="What Can Transformers Learn In-Context? A Case Study of Simple Function Classes",
    authors="Garg et al.",
    year=2022,
    url="https://arxiv.org/abs/2208.01066",
    bibtex=GARG,
)

DARLOW = """\
@misc{darlow2025continuous,
  title         = {Continuous Thought Machines},
  author        = {Darlow, Luke and Regan, Ciaran and Risi, Sebastian and Seely, Jeffrey and Jones, Llion},
  year          = {2025},
  eprint        = {2505.05522},
  archiveprefix = {arXiv}
}"""

THOUGHT_SOURCE = Source(
    role="architecture, losses and tasks",
    title="Continuous Thought Machines",
    authors="Darlow et al.",
    year=2025,
    url="https://arxiv.org/abs/2505.05522",
    bibtex=DARLOW,
)

THOUGHT_SHAPE = (
    ("Ticks in training", "iterations"),
    ("Neurons", "d_model"),
    ("Width of the attended input", "d_input"),
    ("Attention heads", "heads"),
    ("Neurons selected for the output's pairs", "n_synch_out"),
    ("Neurons selected for the query's pairs", "n_synch_action"),
    ("How pairs are selected", "neuron_select_type"),
    ("Depth of the synapse model", "synapse_depth"),
    ("Pre-activations that a neuron remembers", "memory_length"),
    ("Hidden width of a neuron's model", "memory_hidden_dims"),
    ("Reader of the input", "backbone_type"),
    ("Code of positions", "positional_embedding_type"),
    ("Shape of an answer", "prediction_reshaper"),
    ("Tick of the answer", "answer_tick"),
    ("Certainty at which it stops thinking", "certainty_threshold"),
    ("Positions ahead in the curriculum of routes", "curriculum_lookahead"),
    ("Dropout", "dropout"),
)

THOUGHT_LIMITS = (
    "Certainty is one minus the normalised entropy of the prediction. It says how sure the model is, not how often it "
    "is right: the calibration error above tells how far the two lie apart.",
    "It knows inputs of the size and kind it was trained on.",
)

THOUGHT_SCORING = (
    "The answer is read at the tick that the model chooses itself, never at the one that the labels would favour; it "
    "counts as right if every position is."
)

THOUGHT_TASKS = (("ForImageClassification", "image-classification"), ("ForTokenClassification", "other"))

ARCHITECTURES = {
    "vanilla_transformer": Architecture(
        name="a Transformer",
        description=(
            "An encoder-decoder Transformer: the encoder lets all positions of the input attend to each other, and the "
            "decoder writes the answer token by token, attending to what it has written and to the encoder's output. "
            "It has a fixed depth and takes no reasoning steps."
        ),
        sources=(
            Source(
                role="architecture",
                title="Attention Is All You Need",
                authors="Vaswani et al.",
                year=2017,
                url="https://arxiv.org/abs/1706.03762",
                bibtex=VASWANI,
            ),
            Source(
                role="normalisation before each sublayer",
                title="On Layer Normalization in the Transformer Architecture",
                authors="Xiong et al.",
                year=2020,
                url="https://arxiv.org/abs/2002.04745",
                bibtex=XIONG,
                only_if=("norm_position", "pre"),
            ),
        ),
        shape=(
            ("Width", "hidden_size"),
            ("Encoder layers", "num_hidden_layers"),
            ("Decoder layers", "num_decoder_layers"),
            ("Attention heads", "num_attention_heads"),
            ("Feed-forward width", "intermediate_size"),
            ("Activation", "hidden_act"),
            ("Layer normalisation", "norm_position"),
            ("Positions", "position_embedding_type"),
            ("Longest sequence, tokens", "max_position_embeddings"),
            ("Vocabulary, tokens", "vocab_size"),
            ("Input and output embeddings shared", "tie_word_embeddings"),
            ("Dropout", "dropout"),
            ("Label smoothing", "label_smoothing"),
        ),
        limits=(),
    ),
    "connection_transformer": Architecture(
        name="a Connection Transformer",
        description=(
            "An encoder-decoder that thinks in steps. The encoder reads the input into a fixed number of semantic "
            "slots. Then the slots act on each other through learned connections, step after step, until a stopping "
            "rule is met. A Transformer decoder reads the slots and writes the answer token by token."
        ),
        sources=(
            Source(
                role="architecture; there is no paper",
                title="Connection Transformer",
                authors="YeoJune",
                year=2025,
                url="https://github.com/YeoJune/conn_trans",
                bibtex=CONN_TRANS,
            ),
            Source(
                role="decoder",
                title="Attention Is All You Need",
                authors="Vaswani et al.",
                year=2017,
                url="https://arxiv.org/abs/1706.03762",
                bibtex=VASWANI,
            ),
        ),
        shape=(
            ("Width", "hidden_size"),
            ("Semantic slots", "num_slots"),
            ("Connection type", "connection_type"),
            ("Connection rank", "connection_rank"),
            ("Most reasoning steps", "max_reasoning_steps"),
            ("Stopping rule", "halting"),
            ("Stopping threshold", "halting_threshold"),
            ("One layer norm for all steps", "share_step_norm"),
            ("Input added at every step", "inject_input"),
            ("Weight of the step cost in the loss", "step_cost_weight"),
            ("Weight of the orthogonality penalty", "orthogonality_weight"),
            ("Decoder layers", "num_decoder_layers"),
            ("Attention heads", "num_attention_heads"),
            ("Decoder feed-forward width", "intermediate_size"),
            ("Activation", "hidden_act"),
            ("Longest sequence, tokens", "max_position_embeddings"),
            ("Vocabulary, tokens", "vocab_size"),
            ("Input and output embeddings shared", "tie_word_embeddings"),
            ("Dropout", "dropout"),
            ("Label smoothing", "label_smoothing"),
        ),
        limits=(
            "The decoder sees the slots only, never the input's tokens: what the slots do not hold is lost.",
            "The number of steps follows from the stopping rule. It measures neither confidence nor, by itself, how "
            "hard a question is.",
            "This run alone does not show that choosing the number of steps per example helps: that takes runs with a "
            "fixed number of steps beside it.",
        ),
        halting={
            "state_change": (
                "An example stops after the first step that changes the state of its slots by at most τ times the norm "
                "of the new state, and after K steps at the latest."
            ),
            "slot_change": (
                "An example stops after the first step that changes the state of each of its slots by at most τ times "
                "the norm of the slot's new state, and after K steps at the latest."
            ),
            "update_norm": (
                "An example stops after the first step in which the update of every slot has a norm of at most τ, and "
                "after K steps at the latest."
            ),
            "global_update_norm": (
                "All examples of a batch stop together, after the first step in which the update of every slot of "
                "every example has a norm of at most τ, and after K steps at the latest: the result for an example "
                "depends on the others in its batch."
            ),
            "learned": (
                "An example stops after the first step at which a small head, trained on the answers of all steps, "
                "takes the answer to be wrong with a probability of at most τ, and after K steps at the latest."
            ),
            "ponder": (
                "An example stops after the first step at which a small head, trained as in PonderNet, gives going on "
                "a chance of at most τ, and after K steps at the latest."
            ),
            "none": "Every example takes K steps.",
        },
    ),
    "in_context_transformer": Architecture(
        name="an In-context Transformer",
        description=(
            "A decoder-only Transformer over numbers. A prompt shows points with the values of an unknown function; at "
            "every point the model predicts the value from the pairs before it. Nothing is fitted when it is used: "
            "what it learns about the function it learns from the prompt."
        ),
        sources=(IN_CONTEXT_SOURCE,),
        shape=(
            ("Coordinates of a point", "n_dims"),
            ("Coordinates of a value", "n_outputs"),
            ("Most points in a prompt", "max_points"),
            ("Width", "hidden_size"),
            ("Layers", "num_hidden_layers"),
            ("Attention heads", "num_attention_heads"),
            ("Feed-forward width", "intermediate_size"),
            ("Activation", "hidden_act"),
            ("Loss", "objective"),
            ("Dropout", "dropout"),
        ),
        limits=(
            "It knows functions of the class it was trained on, at points like those of training; what happens to "
            "others is measured above, and is often bad.",
            "It reads at most the number of points it has positions for.",
        ),
        scoring=(
            "The score is that of the last prediction of every prompt, the one with the most examples before it; "
            "errors are against the function without noise."
        ),
        pipeline_tag="tabular-regression",
        tags=("in-context-learning",),
    ),
    "low_rank_in_context_transformer": Architecture(
        name="a low-rank In-context Transformer",
        description=(
            "A Transformer for prompts made of equal blocks, such as tables with their columns. All blocks share one "
            "block of positions; the first layers attend within a block, the later ones among key tokens, one for each "
            "block and those behind the blocks. Nothing else is computed. No weight depends on the number of blocks."
        ),
        sources=(IN_CONTEXT_SOURCE,),
        shape=(
            ("Coordinates of a token", "n_dims"),
            ("Blocks in training (V)", "num_blocks"),
            ("Tokens in a block", "block_size"),
            ("Tokens behind the blocks", "num_tail_tokens"),
            ("Layers", "num_hidden_layers"),
            ("Layers that attend within a block", "num_local_layers"),
            ("Rank of the positions, if below their number", "position_rank"),
            ("Width", "hidden_size"),
            ("Attention heads", "num_attention_heads"),
            ("Feed-forward width", "intermediate_size"),
            ("Activation", "hidden_act"),
            ("Weight of the blocks' labels in the loss", "block_loss_weight"),
            ("Dropout", "dropout"),
        ),
        limits=(
            "The names of tables and columns are fixed vectors; it knows no others.",
            "How long a path it can follow is bounded by its layers.",
            "On small graphs a rule that looks one or two steps far is right most of the time: judge it by the longer "
            "paths.",
        ),
        scoring="The answer is the sign of the number read at the last token.",
        pipeline_tag="graph-ml",
        tags=("in-context-learning",),
    ),
    "continuous_thought_machine": Architecture(
        name="a Continuous Thought Machine",
        description=(
            "Neurons that each have a model of their own recent inputs think for a number of internal ticks. At each "
            "tick a synapse model exchanges activity among them, and attention looks at the input; what it looks for "
            "and what the machine answers are read from how pairs of neurons synchronise over time. Every tick gives "
            "an answer and a certainty, so thinking can end as soon as the machine is certain enough."
        ),
        sources=(THOUGHT_SOURCE,),
        shape=THOUGHT_SHAPE,
        limits=THOUGHT_LIMITS,
        scoring=THOUGHT_SCORING,
        pipeline_tags=THOUGHT_TASKS,
        tags=("continuous-thought-machine",),
    ),
    "hyper_continuous_thought_machine": Architecture(
        name="a Continuous Thought Machine with dynamic weights",
        description=(
            "A Continuous Thought Machine, neurons that think for a number of internal ticks and answer by how pairs "
            "of them synchronise, in which some layers of the synapse model have low-rank weights that a short code of "
            "the present tick makes. At initialisation these have no effect."
        ),
        sources=(THOUGHT_SOURCE,),
        shape=(
            ("Layers with dynamic weights", "hyper_layers"),
            ("Rank of dynamic weights", "hyper_rank"),
            ("Length of the code that makes them", "hyper_context_size"),
            ("Dynamic weights in neurons' models", "hyper_nlms"),
            *THOUGHT_SHAPE,
        ),
        limits=THOUGHT_LIMITS,
        scoring=THOUGHT_SCORING,
        pipeline_tags=THOUGHT_TASKS,
        tags=("continuous-thought-machine",),
    ),
    "thought_lstm": Architecture(
        name="an LSTM that thinks in ticks",
        description=(
            "A network to compare Continuous Thought Machines with: the same reader of the input and the same "
            "attention, but an LSTM in the place of neurons and their synchronisation. At each tick it attends to the "
            "input, takes a step and gives an answer."
        ),
        sources=(THOUGHT_SOURCE,),
        shape=(("Width", "width"), ("Layers", "num_layers"), *THOUGHT_SHAPE[:1], *THOUGHT_SHAPE[10:14]),
        limits=(*THOUGHT_LIMITS, "Its code is part of `adaptive-reasoners`, which must be installed to load it."),
        scoring=THOUGHT_SCORING,
        pipeline_tags=THOUGHT_TASKS,
        tags=("baseline",),
    ),
    "thought_feed_forward": Architecture(
        name="a feed-forward network",
        description=(
            "A network to compare Continuous Thought Machines with: the same reader of the input, then one hidden "
            "layer over all positions at once. It does not think in ticks."
        ),
        sources=(THOUGHT_SOURCE,),
        shape=(("Width", "width"), ("Positions of the encoded input", "num_tokens"), *THOUGHT_SHAPE[10:13]),
        limits=("Its code is part of `adaptive-reasoners`, which must be installed to load it.", THOUGHT_LIMITS[1]),
        scoring="An answer counts as right if every position is.",
        pipeline_tags=THOUGHT_TASKS,
        tags=("baseline",),
    ),
}


def architecture_of(config: Fields) -> Architecture:
    """The facts for a config.json.

    Raises:
        CardError: if the configuration's `model_type` is not known here.
    """
    model_type = config.text("model_type")
    if model_type not in ARCHITECTURES:
        raise config.error("model_type", f"is {model_type!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
