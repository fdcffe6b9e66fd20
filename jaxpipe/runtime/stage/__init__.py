"""One stage as plain functions: forward, and backward whole or in halves.

In: a `Model` and shapes. Out: what the loop's lanes call. Read `stage` first, then `build`.

    build      from a model to its stages, and every check that needs shapes
    stage      the functions of one stage; `stages` all of them, as branches of one program
    carry      what travels between blocks; `residuals` what a backward needs from its forward
    split      a backward cut into I and W; `wide` weight gradients in the dtype of their sums
    ends       embedding and head; `heads` a head's loss and gradients; `vocab` a vocabulary cut over the pipe
    initial    parameters made where they live
    keys       random keys, a function of the place in the model alone
    pool       buffers that unlike stages share; `wall` barriers between blocks on CPUs
"""
