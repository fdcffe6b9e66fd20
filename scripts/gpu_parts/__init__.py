"""The parts of `scripts/gpu_check.py`, each run in a process of its own.

report    a row of the table, and the table: needs no jax
setting   what a part is told: sizes, devices, time left; compiling, memory and timing
llama     the model of the checks, in plain functions, and its step with no pipeline
right     numbers: every schedule against the unpipelined model, fused against plain attention
tick      a step on one device against the plain one: time, share of the peak, memory
stops     what a conditional costs
head      the cross entropy over a large vocabulary
one_of_four   the program of one device of four, its collectives left out
generate  tokens per second of the ring against a plain loop
trace     idle time of one step by cause
gaps      the same from a trace's file: needs no jax
newer     what flax misses in some versions of JAX
"""
