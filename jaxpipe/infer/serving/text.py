"""Text to tokens and back, for those who generate; the tokenizers are the ones that runs train with."""

from jaxpipe.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "FileTokenizer", "Tokenizer", "load_tokenizer"]
