"""A model and a schedule become one compiled program.

    pipeline    `Pipeline`, the entry point; `sequential` the same model without a pipeline, which tests compare with
    model       what a model must bring: `Model`, `Embed`, `Block`, `HeadLoss`; `contract` whether it does
    options     what a user may write for the options of a pipeline; `gpu` XLA's settings
    layer/      a pipeline inside somebody else's gradient
    measure/    what a program holds and does
    loop/       the compiled loop
    stage/      one stage as plain functions, which the loop calls
    layout/     where arrays lie

A folder imports those below it in this list, and all know `model`. docs/architecture.md walks one microbatch through.
"""
