#!/usr/bin/env bash
# Run the rows and the ablations of the README's tables, which results/runs.txt lists:
#
#     results/reproduce.sh [--size tiny|base] [--seeds N] [--jobs N] [ROW...]
#
# Without ROW, all of them; --seeds N: seeds 0 to N - 1. Without options tiny, and seed 0 alone. Each run leaves its log
# as results/SIZE/ROW-SEED.jsonl, and its weights in runs/. A log that is there is not made again, and a run that was
# stopped goes on, so this can be stopped and started at will. --jobs N runs N side by side, on a CPU in less time
# together, but the seconds of each are then those of a shared machine. Each gets an equal part of the cores, or
# $OMP_NUM_THREADS of them. $DATA_DIR says where CIFAR-10 lies.
set -euo pipefail
[[ ${DATA_DIR:-/} == /* ]] || DATA_DIR=$PWD/$DATA_DIR  # from where it was called
cd "$(dirname "$0")/.."

planned() {  # name and command of all that is run at the size
    awk -v size="$size" '!/^#/ && ($2 == size || $2 == "both") { $2 = $3 = ""; print }' results/runs.txt
}

fail() { echo "error: $1" >&2; exit 2; }
size=tiny seeds=1 jobs=1 wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --size | --seeds | --jobs) [ $# -gt 1 ] || fail "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' results/reproduce.sh; exit ;;
        -*) fail "unknown option $1; usage: results/reproduce.sh [--size tiny|base] [--seeds N] [--jobs N] [ROW...]" ;;
        *) wanted+=("$1"); shift ;;
    esac
done
case $size in tiny | base) ;; *) fail "--size is tiny or base, not $size" ;; esac
[[ $seeds =~ ^[1-9][0-9]*$ && $jobs =~ ^[1-9][0-9]*$ ]] || fail "--seeds and --jobs are whole numbers above 0"
for row in ${wanted[@]+"${wanted[@]}"}; do  # an empty array is an error to older shells
    planned | cut -d' ' -f1 | grep -qxF -- "$row" || fail "no row $row; choose from: $(planned | cut -d' ' -f1 | xargs)"
done
# More threads than cores wait for one another most of the time.
cores=$(getconf _NPROCESSORS_ONLN)
[ "$jobs" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}

teacher_row=resnet18  # teaches the students of its seed; that of base's logs has 50 epochs, not the preset's 100
[ "$size" = tiny ] || teacher_row=resnet18-50-epochs
out=runs/reproduce-$size
started=() names=()
trap 'kill ${started[@]+"${started[@]}"} 2> /dev/null || :; wait; exit 130' INT TERM  # each saves what it has

download() {  # in one process: runs side by side would all write into the same files
    python -c 'import sys, datasets as d; sys.excepthook = lambda *e: print("error:", e[1]); d.load_dataset("cifar10")'
} >&2

start() {  # NAME SEED SCRIPT FLAGS...: in the background
    local name=$1 seed=$2 more=()
    shift 2
    [ "$jobs" -eq 1 ] || [ -e "${DATA_DIR:-data}/cifar-10-batches-py" ] || download || exit 2
    if [ "$1" = distill.py ]; then more+=(--teacher "$out/$teacher_row-$seed/model.pt"); fi
    if [ -e "$out/$name/last.pt" ]; then more+=(--resume); elif [ -e "$out/$name" ]; then more+=(--overwrite); fi
    python "$@" --size "$size" --seed "$seed" --name "$name" --out "$out" --dataset cifar10 ${more[@]+"${more[@]}"} \
        < /dev/null &
    started+=($!) names+=("$name")
}

finish() {  # wait until at most $1 runs are left, and keep the logs of the others
    while [ ${#started[@]} -gt "$1" ]; do
        wait "${started[0]}" || { wait; fail "the run ${names[0]} failed"; }
        [ -e "results/$size/${names[0]}.jsonl" ] || cp "$out/${names[0]}/log.jsonl" "results/$size/${names[0]}.jsonl"
        started=(${started[@]+"${started[@]:1}"}) names=(${names[@]+"${names[@]:1}"})
    done
}

mkdir -p "results/$size"
while read -r row command; do
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]-} " == *" $row "* ]] || continue
    for ((seed = 0; seed < seeds; seed++)); do
        if [ -e "results/$size/$row-$seed.jsonl" ]; then
            echo "$row-$seed: results/$size/$row-$seed.jsonl is there"
            continue
        fi
        teacher=$teacher_row-$seed
        if [[ $command == distill.py* && ! -e $out/$teacher/model.pt ]]; then
            finish 0  # it may be among them
            [ -e "$out/$teacher/model.pt" ] ||
                start "$teacher" "$seed" $(planned | awk -v row="$teacher_row" '$1 == row { $1 = ""; print }')
            finish 0
        fi
        finish $((jobs - 1))
        start "$row-$seed" "$seed" $command
    done
done <<< "$(planned)"
finish 0
