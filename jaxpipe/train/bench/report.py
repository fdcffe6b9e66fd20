"""The table of measurements as text."""

from jaxpipe.train.bench.measure import Row


def head(cores: int) -> str:
    """What stands above the lines."""
    return (
        f"T1 on one core, the rest on {cores}; seconds are medians; limit adds the bubble to T_dev where P <= {cores}\n"
        "moved MB: what a tick copies, stashes and fetches, at most\n"
        f"{'schedule':17} {'P':>2} {'V':>2} {'M':>3} {'remat':>5} {'idle':>4} {'T1':>7} {'T_dev':>7} {'limit':>7} "
        f"{'step':>7} {'step/limit':>10} {'T_dev*n/T1':>10} {'T1/step':>7} {'cpu s':>6} {'temp MB':>8} {'plan MB':>8} "
        f"{'moved MB':>8} {'arith':>6} {'compile':>8}"
    )


def line(r: Row) -> str:
    """One case."""
    return (
        f"{r.schedule:17} {r.P:2} {r.V:2} {r.M:3} {r.remat:>5} {r.idle:>4} {r.t1_s:7.3f} {r.t_dev_s:7.3f} "
        f"{r.limit_s:7.3f} {r.step_s:7.3f} {r.ratio_to_limit:10.2f} {r.t_dev_ratio:10.2f} {r.speedup:7.2f} "
        f"{r.cpu_s:6.2f} {r.temp_bytes / 1e6:8.1f} {r.planned_bytes / 1e6:8.1f} "
        f"{r.moved_bytes / 1e6:8.1f} {r.arithmetic:6.2f} {r.compile_s:8.1f}"
    )
