#!/usr/bin/env bash
# Run the rows of the README's tables: results/reproduce.sh [--size tiny|base] [--seeds N] [--jobs N] [ROW...]
#
# Without ROW, all of them. Each run leaves its log as results/SIZE/ROW-SEED.jsonl, and its weights in runs/. A log that
# is there already is not made again, and a run that was stopped goes on, so this can be stopped and started at will.
# --jobs runs so many side by side, whose seconds are then those of a shared machine (default: the seeds of a row on a
# GPU, one on a CPU; there, give each its threads: OMP_NUM_THREADS=1 ... --jobs 2). $DATA_DIR says where CIFAR-10 lies.
set -euo pipefail
cd "$(dirname "$0")/.."

# name, the sizes it is run at, command
rows() {
    cat <<'ROWS'
vit-basic          both  train.py --model vit --recipe basic --pool cls
vit                both  train.py --model vit
hybrid-builtin     both  train.py --model hybrid --encoder builtin
hybrid             both  train.py --model hybrid
resnet18           both  train.py --model resnet18
vit-distilled      both  distill.py --student vit
hybrid-distilled   both  distill.py --student hybrid
vit-1              tiny  train.py --model vit --epochs 1
vit-1-distilled    tiny  distill.py --student vit --epochs 1
ROWS
}

# One change to a base run each: the row vit, and in tiny vit-1, whose `--epochs 1` these get as well.
ablations() {
    cat <<'ABLATIONS'
patch-2            both  train.py --model vit --patch-size 2
patch-8            both  train.py --model vit --patch-size 8
cls                both  train.py --model vit --pool cls
gamma-none         both  train.py --model vit --gamma-init none
gamma-1e-5         both  train.py --model vit --gamma-init 1e-5
gamma-1e-2         both  train.py --model vit --gamma-init 1e-2
gamma-0.1          both  train.py --model vit --gamma-init 0.1
gamma-1e-4         tiny  train.py --model vit --gamma-init 1e-4
gamma-1            base  train.py --model vit --gamma-init 1
adamw-5e-4         both  train.py --model vit --optimizer adamw --lr 5e-4
adamw-1e-3         tiny  train.py --model vit --optimizer adamw --lr 1e-3
adamw-2e-3         both  train.py --model vit --optimizer adamw --lr 2e-3
adamw-4e-3         both  train.py --model vit --optimizer adamw --lr 4e-3
muon-0.005         both  train.py --model vit --optimizer muon --muon-lr 0.005
muon-0.01          base  train.py --model vit --optimizer muon --muon-lr 0.01
muon-0.02          both  train.py --model vit --optimizer muon --muon-lr 0.02
basic              both  train.py --model vit --recipe basic
basic-trivial      both  train.py --model vit --recipe basic --trivial 0.5
basic-jitter       both  train.py --model vit --recipe basic --jitter 0.2
basic-erasing      both  train.py --model vit --recipe basic --erasing 0.25
basic-smoothing    base  train.py --model vit --recipe basic --label-smoothing 0.1
basic-mixup        both  train.py --model vit --recipe basic --mixup 0.8
basic-cutmix       both  train.py --model vit --recipe basic --cutmix 1
basic-drop-path    both  train.py --model vit --recipe basic --drop-path 0.1
basic-ema          base  train.py --model vit --recipe basic --ema 0.9995
no-trivial         base  train.py --model vit --trivial 0
no-jitter          base  train.py --model vit --jitter 0
no-erasing         base  train.py --model vit --erasing 0
no-smoothing       base  train.py --model vit --label-smoothing 0
no-mixup           base  train.py --model vit --mixup 0
no-cutmix          base  train.py --model vit --cutmix 0
no-drop-path       base  train.py --model vit --drop-path 0
drop-path-0.2      base  train.py --model vit --drop-path 0.2
no-ema             base  train.py --model vit --ema 0
epochs-50          base  train.py --model vit --epochs 50
epochs-100         base  train.py --model vit --epochs 100
temperature-1      both  distill.py --student vit --temperature 1
temperature-4      both  distill.py --student vit --temperature 4
alpha-0.5          both  distill.py --student vit --alpha 0.5
alpha-1            both  distill.py --student vit --alpha 1
hard               both  distill.py --student vit --hard
distill-token      both  distill.py --student vit --distill-token
ABLATIONS
}

usage="usage: results/reproduce.sh [--size tiny|base] [--seeds N] [--jobs N] [ROW...]"
size=tiny seeds=1 jobs= wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --size) size=${2:?$usage}; shift 2 ;;
        --seeds) seeds=${2:?$usage}; shift 2 ;;
        --jobs) jobs=${2:?$usage}; shift 2 ;;
        -*) echo "error: unknown option $1; $usage" >&2; exit 2 ;;
        *) wanted+=("$1"); shift ;;
    esac
done
case $size in tiny | base) ;; *) echo "error: --size is tiny or base, not $size" >&2; exit 2 ;; esac
all=$({ rows; if [ $size = tiny ]; then ablations | sed 's/$/ --epochs 1/'; else ablations; fi; } |
    awk -v size=$size '$2 == size || $2 == "both" { $2 = ""; print }')
for row in ${wanted[@]+"${wanted[@]}"}; do  # an empty array is an error to older shells
    echo "$all" | cut -d' ' -f1 | grep -qxF -- "$row" || {
        echo "error: no row $row; choose from: $(echo "$all" | cut -d' ' -f1 | xargs)" >&2; exit 2; }
done

run() {  # ROW SEED SCRIPT FLAGS...
    local name=$1-$2 seed=$2 out=runs/reproduce-$size options=(--dataset cifar10)
    local teacher=$out/resnet18-$seed/model.pt
    shift 2
    if [ -e "results/$size/$name.jsonl" ]; then
        echo "$name: results/$size/$name.jsonl is there"
        return
    fi
    if [ "$1" = distill.py ] && [ -e "$teacher" ]; then options+=(--teacher "$teacher"); fi
    if [ -e "$out/$name/last.pt" ]; then options+=(--resume); elif [ -e "$out/$name" ]; then options+=(--overwrite); fi
    python "$@" --size "$size" --seed "$seed" --name "$name" --out "$out" "${options[@]}"
    cp "$out/$name/log.jsonl" "results/$size/$name.jsonl"
}

mkdir -p "results/$size"
gpu=$(python -c "import torch; print(int(torch.cuda.is_available()))")
if [ -z "$jobs" ]; then if [ "$gpu" = 1 ]; then jobs=$seeds; else jobs=1; fi; fi
started=()
trap 'kill "${started[@]}" 2> /dev/null; wait; exit 130' INT TERM  # each saves what it has
finish() {  # wait until at most $1 runs are left
    while [ ${#started[@]} -gt "$1" ]; do
        wait "${started[0]}" || { wait; echo "error: a run failed" >&2; exit 1; }
        started=(${started[@]+"${started[@]:1}"})
    done
}
while read -r row command; do
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]-} " == *" $row "* ]] || continue
    [[ $command != distill.py* ]] || finish 0  # its teacher may be among them
    for ((seed = 0; seed < seeds; seed++)); do
        finish $((jobs - 1))
        run "$row" "$seed" $command < /dev/null &
        started+=($!)
    done
done <<< "$all"
finish 0
