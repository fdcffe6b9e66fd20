"""What is asked, and its answer: schemas, prompts, work on the engine.

    schemas   requests as OpenAI's API has them; `fields` their checks; `problem` refusals
    prompts   messages to tokens; `protocol` answers' shapes
    service   what all requests share; `desk` who waits, `mailbox` what comes back, `work` one request
    limits    the bounds; `metrics` the counters; `form` the page with a form

Read `schemas` first.
"""
