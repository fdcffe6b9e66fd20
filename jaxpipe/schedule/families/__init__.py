"""The catalogue's schedules, one file a family.

In: numbers of devices, microbatches and repeats. Out: a `Family` each, whose ``build`` makes the `Schedule`. Read
`gpipe` first, then `one_f_one_b` and `interleaved`. A new family is one file here and its line in
`jaxpipe.schedule.catalog`.

    forward and backward   gpipe one_f_one_b eager interleaved circular breadth_first
    backward in two halves zb_h1 zb_h2 zb_v v_half v_min interleaved_zb dualpipe_v
    forward only           inference
    craft/                 how orders are made: filling gaps, list scheduling, stable patterns
"""
