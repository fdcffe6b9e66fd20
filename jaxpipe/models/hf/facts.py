"""Reading a config.json strictly: what decides about numbers is understood or refused, what is not known is named."""

import difflib
from collections.abc import Mapping
from typing import Any

from jaxpipe.errors import ConfigError

_MISSING = object()

_HARMLESS = """
    architectures transformers_version model_type torch_dtype dtype use_cache auto_map
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id tokenizer_class prefix
    initializer_range initializer_factor gradient_checkpointing attn_implementation pretraining_tp
    attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout_rate classifier_dropout
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    return_dict return_dict_in_generate output_hidden_states output_attentions output_scores output_past torchscript
    use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    exponential_decay_length_penalty begin_suppress_tokens finetuning_task id2label label2id num_labels
    task_specific_params problem_type n_ctx n_special predict_special_tokens reorder_and_upcast_attn n_positions
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that change no number of the model (dropout is the training's own, see ``model.dropout``)."""

CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Keys that our configs do not have and that go from a folder to the one written back."""


class Facts:
    """A config.json whose keys are taken one by one.

    Args:
        table: The keys.
        where: What messages call the file.
    """

    def __init__(self, table: Mapping[str, Any], where: str):
        self._table, self._where, self._seen = table, where, set()

    def take(self, key: str, kind: type, otherwise: Any = _MISSING) -> Any:
        """The value of a key; null and a missing key are `otherwise`.

        Raises:
            ConfigError: There is none, or it is of another type.
        """
        self._seen.add(key)
        value = self._table.get(key)
        if value is None:
            if otherwise is _MISSING:
                raise ConfigError(f"{self._where} has no {key!r}, which its architecture needs")
            return otherwise
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self._where}: {key}={value!r} must be of type {kind.__name__}")
        return value

    def choose(self, key: str, choices: Mapping[str, Any], otherwise: str) -> Any:
        """What one of the supported values of a key stands for.

        Raises:
            ConfigError: The value is none of them.
        """
        value = self.take(key, str, otherwise)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)
            raise ConfigError(
                f"{self._where}: {key}={value!r} is not supported; it must be one of {', '.join(map(repr, choices))}, "
                f"such as {near[0]!r}"
            )
        return choices[value]

    def must(self, key: str, value: Any) -> None:
        """Refuses any value of a key but this one; null and a missing key are it.

        Raises:
            ConfigError: It has another.
        """
        self._seen.add(key)
        found = self._table.get(key)
        if found is not None and found != value:
            raise ConfigError(f"{self._where}: {key}={found!r} is not supported; it must be {value!r}")

    def skip(self, *keys: str) -> None:
        """Says that keys have been looked at."""
        self._seen |= set(keys)

    def end(self) -> None:
        """Refuses keys that nobody took.

        Raises:
            ConfigError: There is one that might change numbers.
        """
        for key, value in self._table.items():
            if key in self._seen or key in HARMLESS or key.startswith("_") or value is None:
                continue
            if key == "quantization_config":
                raise ConfigError(f"{self._where}: {key} is not supported; try the weights that are not quantized")
            raise ConfigError(
                f"{self._where}: unknown key {key}={value!r}; if it changes no number of the model, delete it there"
            )

    def error(self, text: str) -> ConfigError:
        """An error about the file."""
        return ConfigError(f"{self._where}: {text}")
