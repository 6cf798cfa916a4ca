# shellcheck shell=bash
# Sourced by the job scripts beside it: run a command as a job step, and let the job come again where time runs out.
#
# SLURM sends SIGUSR2 five minutes before the limit (--signal=B:USR2@300), and to this shell alone. The shell passes it
# on to srun, and srun to its tasks: the run saves its last step and ends. Then the job is put back into the queue, and
# goes on from that checkpoint. A run that fails, or that is finished, is not put back.

cd "$SLURM_SUBMIT_DIR" || exit
if [ -d .venv/bin ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
# srun reads no SLURM_CPUS_PER_TASK since SLURM 22.05, and would give its task one core
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
# torchrun kills its processes 30 seconds after it has passed a signal on; here there are five minutes (torch 2.12)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

run_and_requeue() { # the command, with srun and its options before it
    local told=0 status=0 step
    trap 'if [ "$told" = 0 ]; then told=1; kill -USR2 "$step"; fi' USR2
    "$@" &
    step=$!
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # a signal ends wait, but not the step
        status=0
        wait "$step" || status=$?
    done
    if [ "$told" = 1 ] && [ "$status" != 0 ]; then
        echo "time is nearly up: job $SLURM_JOB_ID comes again, and goes on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
