#!/usr/bin/env bash
# Starts a run again whenever it fails, is killed or hangs, and waits longer each time that it got nowhere:
#
#   bash scripts/supervise.sh jaxpipe train configs/quickstart.toml train.steps=100000
#
# Ends when the run is done (0), its arguments are wrong (2), or it was asked to stop by a signal to this script (3).
# Words that make a run start over (train.overwrite=true, checkpoint.resume=never) count once: each start has the same
# JAXPIPE_START, and a run that has begun under that name goes on from its own checkpoints.
# SUPERVISE_FIRST_WAIT_S (10), SUPERVISE_LONGEST_WAIT_S (600) and SUPERVISE_MOST_FAILURES (20, in a row, each within
# 10 minutes) can be set.
set -u
wait_s=${SUPERVISE_FIRST_WAIT_S:-10}
longest=${SUPERVISE_LONGEST_WAIT_S:-600}
most=${SUPERVISE_MOST_FAILURES:-20}
[ $# -gt 0 ] || { echo "usage: supervise.sh COMMAND [WORD …]" >&2; exit 2; }

child=0 asked=""
forward() { asked=$1; [ "$child" -gt 0 ] && kill -s "$1" "$child" 2>/dev/null; }
trap 'forward TERM' TERM
trap 'forward INT' INT

failures=0 delay=$wait_s
export JAXPIPE_START=${JAXPIPE_START:-$(uname -n).$$.$(date +%s)}
while true; do
    started=$SECONDS
    "$@" &
    child=$!
    wait "$child"; code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal to this script ends `wait` early
    child=0
    case $code in
        0) exit 0 ;;
        2) echo "supervise: bad arguments or config, not started again" >&2; exit 2 ;;
    esac
    [ -n "$asked" ] && exit "$code"
    if [ $((SECONDS - started)) -gt 600 ]; then failures=0 delay=$wait_s; fi
    failures=$((failures + 1))
    if [ "$failures" -ge "$most" ]; then
        echo "supervise: $failures failures in a row, the last with exit code $code; giving up" >&2
        exit "$code"
    fi
    echo "supervise: exit code $code, starting again in $delay s" >&2
    sleep "$delay" &
    child=$!
    wait "$child"
    child=0
    [ -n "$asked" ] && exit 3
    delay=$(awk -v now="$delay" -v most="$longest" 'BEGIN { next_s = 2 * now; print next_s < most ? next_s : most }')
done
