"""What makes a family of models: one value per architecture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxpipe.models.encdec_config import EncDecConfig
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.models.hf.facts import Facts
from jaxpipe.models.hf.leaves import Leaf

ModelConfig = GPTConfig | EncDecConfig


@dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's.

    Attributes:
        model_type: As in config.json.
        architecture: The class that has the logits.
        prefix: Of the keys; folders saved from the class without logits lack it.
        read: A config.json as the fields of a config of ours.
        lacks: What keeps a config of ours from being of this family, in words; None where it is.
        write: A config of ours as a config.json.
        table: Which tensors are which leaves.
        ignored: Patterns of keys that are no weights: masks and tables that follow from the config.
        twins: Keys that may repeat another tensor, by that tensor's key.
        fallback: Keys that may be missing, and whose tensor then stands for theirs.
        config: What configs of ours it has.
    """

    model_type: str
    architecture: str
    prefix: str
    read: Callable[[Facts], dict[str, Any]]
    lacks: Callable[[Any], str | None]
    write: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], tuple[Leaf, ...]]
    ignored: tuple[str, ...] = ()
    twins: Callable[[Any], Mapping[str, str]] = lambda cfg: {}
    fallback: Mapping[str, str] = field(default_factory=dict)
    config: type[GPTConfig] | type[EncDecConfig] = GPTConfig
