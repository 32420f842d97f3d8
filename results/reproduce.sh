#!/usr/bin/env bash
# Run the rows of the README's tables: results/reproduce.sh [--size tiny|base] [--seeds N] [ROW...]
#
# Without ROW, all of them. Each run leaves its log as results/SIZE/ROW-SEED.jsonl, and its weights in runs/. A log that
# is there already is not made again, and a run that was stopped goes on, so this can be stopped and started at will.
# The seeds of a row run side by side on a GPU, so that its seconds are of a shared one, and one after another on a CPU. $DATA_DIR says where CIFAR-10 lies.
set -euo pipefail
cd "$(dirname "$0")/.."

rows() {
    cat <<'ROWS'
vit-basic          train.py --model vit --recipe basic --pool cls
vit                train.py --model vit
hybrid-builtin     train.py --model hybrid --encoder builtin
hybrid             train.py --model hybrid
resnet18           train.py --model resnet18
vit-distilled      distill.py --student vit
hybrid-distilled   distill.py --student hybrid
vit-1-distilled    distill.py --student vit --epochs 1
vit-1-control      distill.py --student vit --epochs 1 --alpha 0
ROWS
}

size=tiny seeds=1 wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --size) size=${2:?}; shift 2 ;;
        --seeds) seeds=${2:?}; shift 2 ;;
        -*) echo "error: unknown option $1; usage: results/reproduce.sh [--size tiny|base] [--seeds N] [ROW...]" >&2; exit 2 ;;
        *) wanted+=("$1"); shift ;;
    esac
done
case $size in tiny | base) ;; *) echo "error: --size is tiny or base, not $size" >&2; exit 2 ;; esac
for row in ${wanted[@]+"${wanted[@]}"}; do  # an empty array is an error to older shells
    rows | cut -d' ' -f1 | grep -qxF -- "$row" || { echo "error: no row $row; choose from: $(rows | cut -d' ' -f1 | xargs)" >&2; exit 2; }
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
rows | while read -r row command; do
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]-} " == *" $row "* ]] || continue
    started=() failed=0
    for ((seed = 0; seed < seeds; seed++)); do
        if [ "$gpu" = 1 ]; then
            run "$row" "$seed" $command < /dev/null &
            started+=($!)
        else
            run "$row" "$seed" $command < /dev/null
        fi
    done
    for process in ${started[@]+"${started[@]}"}; do wait "$process" || failed=1; done
    [ $failed = 0 ]
done
