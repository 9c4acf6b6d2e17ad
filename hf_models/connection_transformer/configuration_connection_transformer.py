"""Configuration of the Connection Transformer."""

import copy
import difflib
import math
from dataclasses import fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.type_validators import interval, positive_int_field, probability

logger = logging.get_logger(__name__)

# Keywords that are not fields and that the library itself writes into config.json or passes while loading.
LIBRARY_KEYWORDS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tokenizer_class",
    "torch_dtype",
}


def check_finite(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a number that is not finite, or that no tensor can hold."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, float | int) and not abs(value) < 2**63:
            raise ValueError(f"{entry.name}={value} must be a finite number, below 2**63 in size")


@strict
class ConnectionTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`ConnectionTransformerModel`] and its heads: an encoder that reads a sequence into a fixed number
    of semantic slots and lets the slots act on each other through learned connections for as many steps as the sample
    needs, and a Transformer decoder that attends to the slots, or an expansion that reads them out at the positions of
    the sequence. Both forms of the public implementation `YeoJune/conn_trans`, with scalar and with per-pair
    connections; the defaults differ from it where a comment below says so.

    Symbols: N slots, D hidden size, r connection rank, K bound on the reasoning steps, τ halting threshold.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of tokens of the source vocabulary.
        decoder_vocab_size (`int`, *optional*):
            Number of tokens of the target vocabulary. `None` means `vocab_size`.
        hidden_size (`int`, *optional*, defaults to 256):
            Width of slots, embeddings and decoder (D). A multiple of `num_attention_heads`.
        num_slots (`int`, *optional*, defaults to 128):
            Number of slots (N), at least 2.
        connection_rank (`int`, *optional*, defaults to 32):
            Largest rank of the matrix by which one slot acts on another (r). With scalar connections: length of the two
            vectors whose inner product is one connection, which changes the parametrisation and the orthogonality
            penalty, not what can be expressed.
        connection_type (`str`, *optional*, defaults to `"scalar"`):
            How one slot acts on another. `"scalar"`: slot i adds `c_ij` times its state to slot j. The others let slot
            i add its state times a matrix `M_ij` of rank r. `"per_pair"`: `M_ij = S_ij T_ij`, both free for every pair,
            2N²Dr weights. `"block"`: `M_ij = U_i C_ij V_j` with cores of shape (r, r), 2NDr + N²r² weights.
            `"diagonal"`: the same with diagonal cores, 2NDr + N²r weights, which makes many slots affordable.
        initial_update_ratio (`float`, *optional*):
            If given, connections start so small that the first update of a normalised state has about this share of
            the state's norm; 0.5 is calm. `None`: as in the original implementation, where matrices of a large rank
            between many slots start with updates of several times the state (about 5 at 256 dimensions, 128 slots and
            rank 32), see `expected_update_ratio`.
        max_reasoning_steps (`int`, *optional*, defaults to 6):
            Bound on the number of reasoning steps (K). A call can pass its own bound.
        halting (`str`, *optional*, defaults to `"state_change"`):
            What is compared with `halting_threshold` after each step. `"state_change"`: per sample, the norm of the
            state's change relative to the norm of the new state, over all slots and channels. `"slot_change"`: the same
            of each slot alone, the largest over the sample's slots, so that it stays large as long as a single slot
            still changes, however many there are. `"update_norm"`: per sample, the largest norm over its slots of the
            update before the LayerNorm. `"global_update_norm"`: the same, largest over the whole batch, so that **a
            sample's result depends on its batch**; it exists for parity with the original implementation.
            `"learned"`: per sample, the probability that the answer read out after the step is wrong, as a small head
            estimates it from the slots and their change; it learns this from the answers of all steps, so it needs
            `deep_supervision`. A head that learns whether the answer is right stops the hierarchical reasoning model
            too (Wang et al. 2025, arXiv:2506.21734, section 2). `"ponder"`: per sample, the chance 1 - λ to go on that
            the same head learns from the loss itself, as PonderNet does (Banino et al. 2021, arXiv:2107.05407): the
            task's loss of every step counts by the chance to stop there. PonderNet draws whether to stop; here a sample
            stops where 1 - λ is at most the threshold. Needs `deep_supervision` too, 1 for PonderNet's loss. `"none"`:
            every sample takes K steps.
        halting_threshold (`float`, *optional*, defaults to 0.1):
            A sample stops after the first step whose measure is at most this (τ). A ratio for the rules of change, a
            probability for `"learned"` and `"ponder"` (0.5 stops where stopping is the likelier), a norm for the update
            rules.
        halting_temperature (`float`, *optional*, defaults to 1.0):
            Width of the soft step count, in units of the logarithm of the measure (Θ); towards 0 it becomes the hard
            count.
        share_step_norm (`bool`, *optional*, defaults to `True`):
            Whether all steps use one LayerNorm. If `False` each step has its own, as in the original implementation,
            and no call can take more than `max_reasoning_steps` steps.
        inject_input (`bool`, *optional*, defaults to `True`):
            Whether the slots' state before the first step is added at every step. The original implementation does not.
        initial_compression_gain (`float`, *optional*, defaults to 1.0):
            Factor on the query matrix of the compression as it starts. At 1 every token starts spread almost evenly
            over the slots, as in the original implementation; at 8 it starts in few slots of its own, and what tokens
            at different positions say can be told apart from the first update on.
        compression_norm (`str`, *optional*, defaults to `"mean"`):
            How a slot gathers the tokens assigned to it. `"mean"`: weighted mean, whether or not a mask is given.
            `"sum_without_mask"`: the original implementation, which takes a sum when no mask is given, so that an
            all-ones mask and no mask differ.
        update_scale (`float`, *optional*, defaults to 1.0):
            Factor of the update in each step (α).
        slot_seed (`int`, *optional*, defaults to 0):
            Seed of the fixed orthonormal slot vectors. They are also stored with the weights.
        num_decoder_layers (`int`, *optional*, defaults to 6):
            Number of decoder layers. `num_hidden_layers` is an alias.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of heads of every decoder attention.
        intermediate_size (`int`, *optional*):
            Width of the decoder's feed-forward layers. `None` means `4 * hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward layers, `"gelu"` (exact) or `"relu"`.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout probability of embeddings, of every decoder sublayer's output and of the decoder's final states.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the decoder's attention weights.
        activation_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability after the activation of the feed-forward layers.
        max_position_embeddings (`int`, *optional*, defaults to 512):
            Number of learned positions of source and of target, in tokens.
        scale_embedding (`bool`, *optional*, defaults to `True`):
            Whether the sum of token and position embedding is multiplied by `sqrt(hidden_size)`, which puts what the
            tokens say on the scale of the orthonormal slots. The original implementation does not, and then needs
            embeddings that are large from the start to learn.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Term added to the variance in every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution of the decoder's and the heads' weights at initialisation.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the target distribution spread evenly over the vocabulary, in [0, 1).
        orthogonality_weight (`float`, *optional*, defaults to 0.0):
            Weight of the orthogonality penalty in the loss: with scalar connections on the connection vectors' lengths
            and mutual inner products, else on the distance of the factors' Gram matrices from the identity.
        step_cost_weight (`float`, *optional*, defaults to 0.0):
            Weight of the soft step count in the loss. Best raised only after the task has been learnt.
        step_cost_target (`float`, *optional*):
            If given, the step cost is the mean squared excess of the soft step count over this number of steps;
            otherwise it is the mean soft step count itself.
        deep_supervision (`float`, *optional*, defaults to 0.0):
            Share of the task's loss, in [0, 1], that is its mean over the answers read out after every step; the rest
            is the loss of the final answer. In training all K steps are then taken, also after a sample has met the
            halting rule, so that it settles. For [`ConnectionTransformerForMaskedLM`] alone. As in deeply supervised
            nets (Lee et al. 2015, arXiv:1409.5185) and at every step of recurrent relational networks (Palm et al.
            2018, arXiv:1711.08028, section 3.2).
        halting_loss_weight (`float`, *optional*, defaults to 0.5):
            With `halting="learned"`: weight of the halting head's own loss. The head reads the slots without changing
            what they learn. With `halting="ponder"`: weight of the divergence of the chances to stop from their prior
            (β; 0.01 in PonderNet).
        ponder_prior (`float`, *optional*, defaults to 0.2):
            With `halting="ponder"`: chance to stop after each step of the geometric prior, whose mean is 1 over this
            many steps (λ_p).
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the decoder returns its keys and values for the next generation step.
        pad_token_id (`int`, *optional*, defaults to 0):
            Padding token. Its embedding is zero at initialisation, unless it is an `eos_token_id` too.
        bos_token_id (`int`, *optional*, defaults to 1):
            Token before a sequence.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2):
            Token after a sequence.
        decoder_start_token_id (`int`, *optional*, defaults to 1):
            First token of every decoder input.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether source embedding, target embedding and output projection are one matrix, which needs one shared
            vocabulary; with a reader, target embedding and output projection. If `False`, each has its own, as in the
            original implementation.
        reader_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration, with its `model_type`, of a model of the library that reads the source in the place of the
            source's token and position embeddings: what `AutoModel` makes of it, an encoder or a decoder without
            cross-attention. Compression reads its last hidden states, mapped to `hidden_size` where the widths differ.
            Its weights are part of the model. Token ids then go to the reader, so that its vocabulary must hold the
            model's, and the target has an embedding of its own. `None`: no reader.
        freeze_reader (`bool`, *optional*, defaults to `True`):
            Whether the reader stays as it is: its weights take no gradient, and it never drops out. The map from its
            width is trained.
        is_encoder_decoder (`bool`, *optional*, defaults to `True`):
            `False` describes the encoder alone, without any decoder parameter: the classification, choice and masked
            language modelling heads save their configuration so.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type or lies outside its range, or fields
            contradict each other; the message names the fields, their values and the rule.

    Example:

    ```python
    >>> from hf_models.connection_transformer import ConnectionTransformerConfig, ConnectionTransformerModel

    >>> config = ConnectionTransformerConfig(vocab_size=100, hidden_size=16, num_slots=8, num_attention_heads=2)
    >>> model = ConnectionTransformerModel(config)
    >>> config.intermediate_size
    64
    ```
    """

    model_type = "connection_transformer"
    attribute_map = {"num_hidden_layers": "num_decoder_layers"}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "hidden_states",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        "reasoning_steps",
        "expected_steps",
        "slot_updates",
        "halting_measures",
        "compression_weights",
        "cross_entropy_loss",
        "orthogonality_loss",
        "step_cost_loss",
        "halting_loss",
    ]
    sub_configs = {"reader_config": AutoConfig}
    base_model_fsdp_plan = {"decoder.layers.*": "free_full_weight"}

    vocab_size: int = positive_int_field(default=32000)
    decoder_vocab_size: int | None = positive_int_field(default=None)
    hidden_size: int = positive_int_field(default=256)
    num_slots: int = interval(min=2)(default=128)
    connection_rank: int = positive_int_field(default=32)
    connection_type: Literal["scalar", "per_pair", "block", "diagonal"] = "scalar"
    initial_update_ratio: float | int | None = None
    max_reasoning_steps: int = positive_int_field(default=6)
    halting: Literal[
        "state_change", "slot_change", "update_norm", "global_update_norm", "learned", "ponder", "none"
    ] = "state_change"
    halting_threshold: float | int = interval(min=0)(default=0.1)
    halting_temperature: float | int = interval(min=0, exclude_min=True)(default=1.0)
    share_step_norm: bool = True
    inject_input: bool = True
    initial_compression_gain: float | int = interval(min=0, exclude_min=True)(default=1.0)
    compression_norm: Literal["mean", "sum_without_mask"] = "mean"
    update_scale: float | int = 1.0
    slot_seed: int = 0
    num_decoder_layers: int = positive_int_field(default=6)
    num_attention_heads: int = positive_int_field(default=8)
    intermediate_size: int | None = positive_int_field(default=None)
    hidden_act: Literal["gelu", "relu"] = "gelu"
    dropout: float | int = probability(default=0.1)
    attention_dropout: float | int = probability(default=0.0)
    activation_dropout: float | int = probability(default=0.0)
    max_position_embeddings: int = positive_int_field(default=512)
    scale_embedding: bool = True
    layer_norm_eps: float | int = interval(min=0, exclude_min=True)(default=1e-5)
    initializer_range: float | int = interval(min=0, exclude_min=True)(default=0.02)
    label_smoothing: float | int = interval(min=0, max=1, exclude_max=True)(default=0.0)
    orthogonality_weight: float | int = interval(min=0)(default=0.0)
    step_cost_weight: float | int = interval(min=0)(default=0.0)
    step_cost_target: float | int | None = None
    deep_supervision: float | int = probability(default=0.0)
    halting_loss_weight: float | int = interval(min=0)(default=0.5)
    ponder_prior: float | int = interval(min=0, max=1, exclude_min=True, exclude_max=True)(default=0.2)
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    tie_word_embeddings: bool = True
    reader_config: dict | PreTrainedConfig | None = None
    freeze_reader: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        known = [*(field.name for field in fields(self)), *self.attribute_map]
        for name in kwargs.keys() - LIBRARY_KEYWORDS - self.attribute_map.keys():
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
            logger.warning_once(f"{type(self).__name__} has no field `{name}`, the model will not use it{hint}")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if isinstance(self.reader_config, dict):
            if "model_type" not in self.reader_config:
                raise ValueError("reader_config has no model_type, which says what the reader is")
            self.reader_config = AutoConfig.for_model(**self.reader_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the rules that involve several fields; runs after construction and before saving."""
        check_finite(self)
        # The alias of a field reaches it without the field's own check.
        if not isinstance(self.num_decoder_layers, int) or self.num_decoder_layers <= 0:
            raise ValueError(f"num_decoder_layers={self.num_decoder_layers!r} must be a positive int")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        target_size = self.decoder_vocab_size or self.vocab_size
        reader = self.reader_config
        if self.tie_word_embeddings and self.is_encoder_decoder and target_size != self.vocab_size and reader is None:
            raise ValueError(
                f"tie_word_embeddings=True needs one vocabulary, but vocab_size={self.vocab_size} and "
                f"decoder_vocab_size={self.decoder_vocab_size} differ"
            )
        if self.initial_update_ratio is not None and not self.initial_update_ratio > 0:
            raise ValueError(f"initial_update_ratio={self.initial_update_ratio} must be greater than 0")
        if self.step_cost_target is not None and self.step_cost_target < 1:
            raise ValueError(f"step_cost_target={self.step_cost_target} must be at least 1, every sample takes a step")
        if reader is not None:
            self._validate_reader(reader)
        if self.halting in ("learned", "ponder") and self.deep_supervision == 0:
            raise ValueError(
                f"halting={self.halting!r} learns from the answer after every step: deep_supervision must be above 0"
            )
        eos_token_ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        named_tokens = [
            ("pad_token_id", self.pad_token_id),
            ("bos_token_id", self.bos_token_id),
            ("decoder_start_token_id", self.decoder_start_token_id),
            *(("eos_token_id", token_id) for token_id in eos_token_ids),
        ]
        smallest = min(self.vocab_size, target_size)
        for name, token_id in named_tokens:
            if token_id is not None and not 0 <= token_id < smallest:
                raise ValueError(
                    f"{name}={token_id} must lie in [0, {smallest}), inside every vocabulary "
                    f"(vocab_size={self.vocab_size}, decoder_vocab_size={self.decoder_vocab_size})"
                )

    def _validate_reader(self, reader: PreTrainedConfig):
        if reader.is_encoder_decoder:
            raise ValueError(
                f"reader_config: a {reader.model_type} has a decoder that wants inputs of its own; a reader is an "
                "encoder, or a decoder without cross-attention"
            )
        for name in ("vocab_size", "hidden_size"):
            if not isinstance(getattr(reader, name, None), int):
                raise ValueError(f"reader_config: a {reader.model_type} has no {name}; a reader reads tokens")
        if reader.vocab_size < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} must not exceed reader_config.vocab_size={reader.vocab_size}, since the "
                "reader reads the same tokens"
            )
        positions = getattr(reader, "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < self.max_position_embeddings:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} must not exceed "
                f"reader_config.max_position_embeddings={positions}"
            )

    @property
    def expected_update_ratio(self) -> float:
        """
        Expected norm of the first update of a normalised state, relative to the state, as connections start.

        With D the hidden size, N slots and rank r, a message's entry is the sum of N - 1 products; rectifying halves
        the square. Matrices start with variance `2 / (D + r)` in both factors, scalars as products of unit vectors of
        length r.
        """
        if self.initial_update_ratio is not None:
            return float(self.initial_update_ratio)
        others, rank = self.num_slots - 1, self.connection_rank
        if self.connection_type == "scalar":
            return math.sqrt(others / (2 * rank))
        return 2 / (self.hidden_size + rank) * math.sqrt(others * self.hidden_size * rank / 2)

    def num_trainable_parameters(self, head: str | None = None) -> int:
        """
        Number of trainable parameters of a model with this configuration, without building it; tied matrices count
        once. The slots are fixed and count nothing, as does a frozen reader.

        Args:
            head (`str`, *optional*):
                What follows `ConnectionTransformerFor` in the name of the class. `None` means
                `"ConditionalGeneration"`, or with `is_encoder_decoder=False` the encoder alone.

        Raises:
            ValueError: there is no such head, or there is a reader that is trained, whose parameters only the real
                module can tell.
        """
        reader = self.reader_config
        if reader is not None and not self.freeze_reader:
            raise ValueError("freeze_reader=False: the parameters of the reader are counted on the real module")
        width, slots, rank = self.hidden_size, self.num_slots, self.connection_rank
        connections = {
            "scalar": 2 * slots**2 * rank,
            "per_pair": 2 * slots**2 * width * rank,
            "block": 2 * slots * width * rank + slots**2 * rank**2,
            "diagonal": 2 * slots * width * rank + slots**2 * rank,
        }[self.connection_type]
        norms = 1 if self.share_step_norm else self.max_reasoning_steps
        if reader is None:
            source = (self.vocab_size + self.max_position_embeddings) * width
        else:
            source = 0 if reader.hidden_size == width else reader.hidden_size * width
        count = source + 3 * width**2 + connections + 2 * width * norms
        if self.halting in ("learned", "ponder"):
            count += 2 * width**2 + 2 * width + 1
        if head is None and not self.is_encoder_decoder:
            return count
        if head in (None, "ConditionalGeneration"):
            assert self.intermediate_size is not None  # filled in
            inner = self.intermediate_size
            layer = 8 * width**2 + 2 * width * inner + 15 * width + inner
            count += self.max_position_embeddings * width + self.num_decoder_layers * layer + 2 * width
            own_matrices = (0 if self.tie_word_embeddings else 2) if reader is None else 2 - self.tie_word_embeddings
            return count + own_matrices * (self.decoder_vocab_size or self.vocab_size) * width
        if head == "MaskedLM":
            own_matrix = reader is not None or not self.tie_word_embeddings
            return count + 3 * width**2 + (self.vocab_size * width if own_matrix else 0)
        if head == "SequenceClassification":
            return count + (width + 1) * len(self.id2label or ())
        if head == "MultipleChoice":
            return count + width
        raise ValueError(
            f"head={head!r} must be 'ConditionalGeneration', 'MaskedLM', 'SequenceClassification' or 'MultipleChoice'"
        )

    def get_text_config(self, decoder=None, encoder=None):
        """
        As in the library: the configuration itself, except that the decoder's view has the target's `vocab_size`. The
        library's own view cannot take a `decoder_vocab_size` of `None`.
        """
        if not decoder or encoder or self.decoder_vocab_size in (None, self.vocab_size):
            return self
        view = copy.deepcopy(self)
        view.vocab_size = self.decoder_vocab_size
        return view


__all__ = ["ConnectionTransformerConfig"]
