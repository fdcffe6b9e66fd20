"""The compiled loop.

In: tick tables and stages. Out: one program, the same on every device. Read `compile`, then `tick`, then `stage_lanes`.

    compile      tables to the program: gathers, phases, loops, reductions
    tick         one turn: receive, run lanes, send
    device       what one device knows while it runs
    lane         running a lane or being idle
    stage_lanes  F, B, I, W; `end_lanes` embedding and head; `vocab_lanes` the same for a vocabulary that is cut
    slots        buffers by number
    transfer     hops, and what keeps them in flight
    windows      weights gathered for a few ticks only
    clock        when lanes start and end, noted by the host
"""
