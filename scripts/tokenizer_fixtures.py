"""Makes the tokenizers of tests/data/tokenizers, none with a tokenizer.json, and what transformers makes of texts.

    pip install '.[parity]'
    python scripts/tokenizer_fixtures.py

Each folder has the files that a published model of its class comes with, small ones, and ``expected.json``: texts,
their tokens, and the text of those.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "data" / "tokenizers"
TEXTS = (
    "the cat sat",
    "日本 and 中国",
    "  two  spaces  ",
    " lead",
    "naïve\tcafé\n\nnew line 123",
    "Don't!",
    "<extra_id_0> cat <extra_id_1> sat",
    "hi</s> the<|im_start|> x<tool>y",
    "😀 wow",
    "ﬁne ① Ⅷ half",
)
QWEN2 = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|endoftext|>",
    "added_tokens_decoder": {
        "320": {"content": "<|im_start|>", "special": True},
        "321": {"content": "<tool>", "special": False, "normalized": False},
    },
}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gpt2": ("gpt2", ("vocab.json", "merges.txt"), {}),
    "gpt2-bos": ("gpt2", ("vocab.json", "merges.txt"), {"add_bos_token": True}),
    "qwen2": ("qwen2", ("vocab.json", "merges.txt"), QWEN2),
    "llama": ("llama", ("tokenizer.model",), LLAMA),
    "llama-legacy": ("llama", ("tokenizer.model",), {**LLAMA, "legacy": True, "add_eos_token": True}),
    "t5": ("t5", ("spiece.model",), {}),
    "byt5": ("t5", (), {"tokenizer_class": "ByT5Tokenizer"}),
}
"""By name the model_type, the files, and the settings."""


def train(folder: Path) -> None:
    """Writes the vocabularies."""
    import sentencepiece  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    files = [ROOT / name for name in ("README.md", "docs/theory.md", "docs/weights.md")]
    lines = [line for file in files for line in file.read_text().splitlines() if line] + list(TEXTS[:6])
    (folder / "text").write_text("\n".join(lines))
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>"]
    options = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    own.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=320, **options))
    own.model.save(str(folder))
    for name, options in {
        "spiece": {"model_type": "unigram", "vocab_size": 220, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "tokenizer": {
            "model_type": "bpe",
            "vocab_size": 480,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
        },
    }.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"),
            model_prefix=str(folder / name),
            minloglevel=2,
            character_coverage=0.99,
            normalization_rule_name=options.pop("normalization_rule_name", "nmt_nfkc"),
            **options,
        )


def main() -> int:
    import transformers  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as made:
        train(Path(made))
        for name, (model_type, files, settings) in CASES.items():
            folder = FOLDER / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(Path(made) / file, folder / file)
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}) + "\n")
            if settings:
                (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
            theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
            ids = {text: theirs(text)["input_ids"] for text in TEXTS}
            expected = {
                "transformers": transformers.__version__,
                "size": len(theirs),
                "eos": theirs.eos_token_id,
                "texts": [
                    [text, tokens, theirs.decode(tokens, skip_special_tokens=True)] for text, tokens in ids.items()
                ],
            }
            (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")
            print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
