"""Moved to `jaxpipe.models.build`; these names stay."""

from jaxpipe.models.build import encdec_model as encdec_model, gpt_model as gpt_model
