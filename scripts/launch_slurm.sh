#!/usr/bin/env bash
# Submits a verb of dlmscope to SLURM: one process a node with all its GPUs. A preempted job saves, exits with 75 and is queued again.
# The processes find each other through SLURM's environment; the run folder (root) must be on a file system that all nodes share.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/launch_slurm.sh [--nodes N] [--gpus N] [--time D-HH:MM] [--partition NAME] [--account NAME] [--name NAME] [--dry-run]
                               VERB CONFIG.yaml [--section.field=value ...]

  --nodes N          nodes, one process on each (default: 1)
  --gpus N           GPUs of a node (default: 8)
  --time D-HH:MM     limit of one start (default: 1-00:00); five minutes before it the job saves and is queued again
  --partition, --account, --name   as sbatch takes them (name: the verb)
  --dry-run          prints the job and submits nothing

Example:  scripts/launch_slurm.sh --gpus 8 train configs/dream_8gpu.yaml --root=/scratch/runs
END
}

stop() {
    echo "launch_slurm.sh: $1" >&2
    exit 2
}

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
nodes=1 gpus=8 limit=1-00:00 name="" dry=no
more=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --nodes) nodes=${2:?launch_slurm.sh: --nodes needs a number}; shift 2 ;;
        --gpus) gpus=${2:?launch_slurm.sh: --gpus needs a number}; shift 2 ;;
        --time) limit=${2:?launch_slurm.sh: --time needs a limit}; shift 2 ;;
        --partition | --account) more+=("#SBATCH $1=${2:?launch_slurm.sh: $1 needs a name}"); shift 2 ;;
        --name) name=${2:?launch_slurm.sh: --name needs a name}; shift 2 ;;
        --dry-run) dry=yes; shift ;;
        -*) stop "$1 is no option; --help lists them, and the verb comes before its own" ;;
        *) break ;;
    esac
done
[ $# -ge 2 ] || stop "which verb, and which config? --help says more"
for number in "$nodes" "$gpus"; do
    case $number in '' | 0 | *[!0-9]*) stop "$number is no number of nodes or GPUs" ;; esac
done

# SLURM's SIGTERM reaches the processes of the step; --signal asks for it before the limit as well.
job() {
    cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=${name:-dlmscope-$1}
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$limit
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
END
    [ ${#more[@]} -eq 0 ] || printf '%s\n' "${more[@]}"
    cat <<END
cd $(printf '%q' "$root")
status=0
srun --kill-on-bad-exit=0 .venv/bin/dlmscope $(printf '%q ' "$@")|| status=\$?
if [ \$status -eq 75 ]; then
    scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
END
}

if [ $dry = yes ]; then
    job "$@"
else
    job "$@" | sbatch
fi
