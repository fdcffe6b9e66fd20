"""What a run takes, before it runs and measured: the planner's question for a config, costs of blocks, benchmarks.

    planning   a config becomes the planner's question, a plan becomes a config; `predict` what a run is told
    parts      one block of each kind, the embedding and the head, as the loop runs them
    profiling  those timed, `compiled` counted by XLA; `profile` the file
    targets    devices that are not there; `peak` the share of those that are
    bench/     `jaxpipe bench`

Read `planning` first.
"""
