"""Moved to `jaxpipe.ops.attention`; this name stays."""

from jaxpipe.ops.attention import attend as attend
