#!/usr/bin/env bash
# Run the rows and the ablations of the README's tables:
#
#     results/reproduce.sh [--size tiny|base] [--seeds N] [--jobs N] [ROW...]
#
# Without ROW, all of them. Each run leaves its log as results/SIZE/ROW-SEED.jsonl, and its weights in runs/. A log that
# is there already is not made again, and a run that was stopped goes on, so this can be stopped and started at will.
# --jobs N runs N side by side, on a CPU in less time together, but the seconds of each are then those of a shared
# machine. Each gets an equal part of the cores, or $OMP_NUM_THREADS of them. $DATA_DIR says where CIFAR-10 lies.
set -euo pipefail
cd "$(dirname "$0")/.."

# name, the sizes it is run at, command
rows() {
    cat <<'ROWS'
vit-plain                  both  train.py --model vit --recipe basic --pool cls --optimizer adamw --lr 1e-3 --whiten off --pos-init noise
vit-basic                  both  train.py --model vit --recipe basic --pool cls
vit                        both  train.py --model vit
hybrid-builtin             both  train.py --model hybrid --encoder builtin
hybrid                     both  train.py --model hybrid
hybrid-20-epochs           base  train.py --model hybrid --epochs 20 --compile on
hybrid-12-epochs           tiny  train.py --model hybrid --epochs 12
hybrid-mixed               tiny  train.py --model hybrid --mixup 0.8 --cutmix 1
resnet18                   both  train.py --model resnet18
vit-distilled              both  distill.py --student vit
hybrid-distilled           both  distill.py --student hybrid
hybrid-builtin-50-epochs   base  train.py --model hybrid --encoder builtin --epochs 50
hybrid-50-epochs           base  train.py --model hybrid --epochs 50
resnet18-50-epochs         base  train.py --model resnet18 --epochs 50
hybrid-distilled-50-epochs base  distill.py --student hybrid --epochs 50
ROWS
}

# name, sizes, the row that it is compared with, command
ablations() {
    cat <<'ABLATIONS'
patch-2           both  vit                      train.py --model vit --patch-size 2
patch-8           both  vit                      train.py --model vit --patch-size 8
patch-8-15-epochs tiny  vit                      train.py --model vit --patch-size 8 --epochs 15
cls               both  vit                      train.py --model vit --pool cls
not-whitened      both  vit                      train.py --model vit --whiten off
pos-noise         both  vit                      train.py --model vit --pos-init noise
gamma-none        both  vit                      train.py --model vit --gamma-init none
gamma-1e-5        both  vit                      train.py --model vit --gamma-init 1e-5
gamma-1e-4        both  vit                      train.py --model vit --gamma-init 1e-4
gamma-1e-2        both  vit                      train.py --model vit --gamma-init 1e-2
gamma-0.1         both  vit                      train.py --model vit --gamma-init 0.1
adamw-5e-4        both  vit                      train.py --model vit --optimizer adamw --lr 5e-4
adamw-1e-3        both  vit                      train.py --model vit --optimizer adamw --lr 1e-3
adamw-2e-3        both  vit                      train.py --model vit --optimizer adamw --lr 2e-3
adamw-4e-3        both  vit                      train.py --model vit --optimizer adamw --lr 4e-3
muon-0.00125      base  vit                      train.py --model vit --optimizer muon --muon-lr 0.00125
muon-0.0025       tiny  vit                      train.py --model vit --optimizer muon --muon-lr 0.0025
muon-0.005        base  vit                      train.py --model vit --optimizer muon --muon-lr 0.005
muon-0.01         both  vit                      train.py --model vit --optimizer muon --muon-lr 0.01
muon-0.02         base  vit                      train.py --model vit --optimizer muon --muon-lr 0.02
basic             both  vit                      train.py --model vit --recipe basic
basic-trivial     both  basic                    train.py --model vit --recipe basic --trivial 0.5
basic-jitter      both  basic                    train.py --model vit --recipe basic --jitter 0.1
basic-erasing     both  basic                    train.py --model vit --recipe basic --erasing 0.25
basic-smoothing   base  basic                    train.py --model vit --recipe basic --label-smoothing 0.1
basic-mixup       both  basic                    train.py --model vit --recipe basic --mixup 0.2
basic-cutmix      both  basic                    train.py --model vit --recipe basic --cutmix 1
basic-drop-path   both  basic                    train.py --model vit --recipe basic --drop-path 0.1
basic-ema         base  basic                    train.py --model vit --recipe basic --ema 0.998
hybrid-gamma-0.1  base  hybrid-50-epochs         train.py --model hybrid --epochs 50 --gamma-init 0.1
hybrid-plain      base  hybrid-builtin-50-epochs train.py --model hybrid --epochs 50 --drop-path 0 --gamma-init none
no-trivial        base  vit                      train.py --model vit --trivial 0
no-jitter         base  vit                      train.py --model vit --jitter 0
no-erasing        base  vit                      train.py --model vit --erasing 0
no-smoothing      base  vit                      train.py --model vit --label-smoothing 0
no-mixup          base  vit                      train.py --model vit --mixup 0
no-cutmix         base  vit                      train.py --model vit --cutmix 0
no-drop-path      base  vit                      train.py --model vit --drop-path 0
drop-path-0.2     base  vit                      train.py --model vit --drop-path 0.2
no-ema            base  vit                      train.py --model vit --ema 0
epochs-50         base  vit                      train.py --model vit --epochs 50
epochs-200        base  vit                      train.py --model vit --epochs 200
temperature-1     both  vit-distilled            distill.py --student vit --temperature 1
temperature-4     both  vit-distilled            distill.py --student vit --temperature 4
alpha-0.5         both  vit-distilled            distill.py --student vit --alpha 0.5
alpha-1           both  vit-distilled            distill.py --student vit --alpha 1
hard              both  vit-distilled            distill.py --student vit --hard
distill-token     both  vit-distilled            distill.py --student vit --distill-token
ABLATIONS
}

planned() {  # name and command of all that is run at the size
    rows | awk -v size="$size" '$2 == size || $2 == "both" { $2 = ""; print }'
    ablations | awk -v size="$size" '$2 == size || $2 == "both" { $2 = $3 = ""; print }'
}

fail() { echo "error: $1" >&2; exit 2; }
size=tiny seeds=1 jobs=1 wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --size | --seeds | --jobs) [ $# -gt 1 ] || fail "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' results/reproduce.sh; exit ;;
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

teacher_row=resnet18  # its seed 0 teaches all students; that of base's logs has 50 epochs, not the preset's 100
[ "$size" = tiny ] || teacher_row=resnet18-50-epochs
out=runs/reproduce-$size teacher=runs/reproduce-$size/$teacher_row-0/model.pt
started=() names=()
trap 'kill ${started[@]+"${started[@]}"} 2> /dev/null || :; wait; exit 130' INT TERM  # each saves what it has

start() {  # NAME SEED SCRIPT FLAGS...: in the background
    local name=$1 seed=$2 more=()
    shift 2
    if [ "$1" = distill.py ]; then more+=(--teacher "$teacher"); fi
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
# Runs side by side would all download CIFAR-10, into the same files.
[ "$jobs" -eq 1 ] || [ -e "${DATA_DIR:-data}/cifar-10-batches-py" ] ||
    python -c 'import data; data.load_dataset("cifar10")' 2> /dev/null ||
    fail "CIFAR-10 is not there and cannot be downloaded: name the folder that holds cifar-10-batches-py in DATA_DIR"
while read -r row command; do
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]-} " == *" $row "* ]] || continue
    for ((seed = 0; seed < seeds; seed++)); do
        if [ -e "results/$size/$row-$seed.jsonl" ]; then
            echo "$row-$seed: results/$size/$row-$seed.jsonl is there"
            continue
        fi
        if [[ $command == distill.py* && ! -e $teacher ]]; then
            finish 0  # it may be among them
            [ -e "$teacher" ] ||
                start "$teacher_row-0" 0 $(planned | awk -v row="$teacher_row" '$1 == row { $1 = ""; print }')
            finish 0
        fi
        finish $((jobs - 1))
        start "$row-$seed" "$seed" $command
    done
done <<< "$(planned)"
finish 0
