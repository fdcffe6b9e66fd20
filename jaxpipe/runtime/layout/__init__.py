"""Where arrays lie, and how they get there.

    mesh      the axes, and simulated devices
    rest      which dims of a leaf are cut over which axes
    tree      trees of arrays: shapes, paths, ties
    relayout  the canonical tree (stacked by kind, as checkpoints hold it) to the pipeline's and back
    logical   optimizers that see separate layers
    state     the optimizer's state in both layouts
    collect   gathers before the loop and reductions after it
    casts     weights in the compute dtype
    inputs    batches, keys and parameters, checked where they enter; `batch` what a batch may hold
    checksum  a sum that does not depend on the sharding

Read `mesh` and `rest` first.
"""
