"""A model and a schedule become one compiled program.

    pipeline    `Pipeline`, the entry point; `sequential` the same model without a pipeline, which tests compare with
    model       what a model must bring: `Model`, `Embed`, `Block`, `HeadLoss`; `contract` whether it does
    options     what a user may write for the options of a pipeline; `gpu` XLA's settings
    layout/     where arrays lie
    stage/      one stage as plain functions
    loop/       the compiled loop that calls them
    layer/      a pipeline inside somebody else's gradient
    measure/    what a program holds and does

Imports go down this list from `pipeline` to `layout`. docs/architecture.md walks one microbatch through it.
"""
