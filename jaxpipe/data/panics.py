"""What libraries for tokens raise, as errors of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxpipe.errors import ConfigError, JaxpipeError


@contextmanager
def no_panics() -> Iterator[None]:
    """While entered, what a tokenizer raises is a `ConfigError`. Also a decorator.

    Libraries in Rust raise a bare Exception, and for a panic a BaseException that ends whole threads; its class cannot
    be imported, each library has its own, so that it is known by its name.
    """
    try:
        yield
    except JaxpipeError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"the tokenizer failed: {said}") from error
