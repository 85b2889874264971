#!/usr/bin/env bash
# Starts a verb of dlmscope on every host of a TPU slice (one process a host), and starts it again where the slice was preempted.
# The hosts find each other by themselves; the run folder (root) must be one place for all of them: a mounted bucket, Filestore, NFS.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/launch_tpu_pod.sh --tpu NAME --zone ZONE [--project PROJECT] [--folder FOLDER] [--again N] [--dry-run]
                                 VERB CONFIG.yaml [--section.field=value ...]

  --tpu, --zone, --project   the TPU VM, as gcloud knows it
  --folder FOLDER            the clone of this repository on each host, with its .venv (default: dlmscope_jax, below the home folder)
  --again N                  how often a preempted or lost job is started again (default: 20)
  --dry-run                  prints the command and runs nothing

Once for a slice:  gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all \
                       --command 'git clone URL dlmscope_jax && cd dlmscope_jax && python3 -m venv .venv && .venv/bin/pip install -e ".[tpu]"'
Example:           scripts/launch_tpu_pod.sh --tpu pod --zone us-west4-a harvest configs/dream_v5e_256.yaml --root=/mnt/runs
END
}

stop() {
    echo "launch_tpu_pod.sh: $1" >&2
    exit 2
}

tpu="" zone="" project="" folder=dlmscope_jax again=20 dry=no
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --tpu) tpu=${2:?launch_tpu_pod.sh: --tpu needs a name}; shift 2 ;;
        --zone) zone=${2:?launch_tpu_pod.sh: --zone needs a zone}; shift 2 ;;
        --project) project=${2:?launch_tpu_pod.sh: --project needs a name}; shift 2 ;;
        --folder) folder=${2:?launch_tpu_pod.sh: --folder needs a path}; shift 2 ;;
        --again) again=${2:?launch_tpu_pod.sh: --again needs a number}; shift 2 ;;
        --dry-run) dry=yes; shift ;;
        -*) stop "$1 is no option; --help lists them, and the verb comes before its own" ;;
        *) break ;;
    esac
done
[ -n "$tpu" ] || stop "--tpu is missing; --help says more"
[ -n "$zone" ] || stop "--zone is missing; --help says more"
[ $# -ge 2 ] || stop "which verb, and which config? --help says more"
case $again in '' | *[!0-9]*) stop "--again $again is no number" ;; esac

remote="cd $(printf '%q' "$folder") && .venv/bin/dlmscope $(printf '%q ' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker all --command "$remote")
[ -z "$project" ] || command+=(--project "$project")
if [ $dry = yes ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
for ((tried = 0; ; tried++)); do
    status=0 began=$SECONDS
    "${command[@]}" || status=$?
    # 75: preempted, all is saved; 1 and 255: a host or the connection to it is lost, unless it was at once, which is a mistake
    case $status in
        75) ;;
        1 | 255) [ $((SECONDS - began)) -ge 120 ] || exit $status ;;
        *) exit $status ;;
    esac
    [ "$tried" -lt "$again" ] || exit $status
    echo "launch_tpu_pod.sh: exit code $status, start $((tried + 2)) in 60 s; the run goes on where it was" >&2
    sleep 60
done
