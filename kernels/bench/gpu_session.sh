#!/usr/bin/env bash
# One part of the proof on a GPU machine without a network; kernels/bench/README.md says how to call it.
#
#   gpu_session.sh kernels      integers of all shapes, times of one linear, SASS   -> bench.json
#   gpu_session.sh end_to_end   DiT-XL/2 against torch.compile                      -> end_to_end.json
#   gpu_session.sh rest         tests/gpu; whether TensorRT-RTX's engines load      -> rtx.json
#
# Results go to $OUT. What is finished stays in build/gpu_session while the machine is warm, and is
# not done again. Every part ends inside ten minutes: MINUTES (default 9) is its budget.
set -uo pipefail
cd "$(dirname "$0")/../.."
part=${1:?kernels, end_to_end or rest}
out=${OUT:-build/gpu_session/out}
parts=$PWD/build/gpu_session/parts
budget=$((${MINUTES:-9} * 60))
python=${PYTHON:-python3}
mkdir -p "$out" "$parts"
exec > >(tee "$out/$part.log") 2>&1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD:$PWD/kernels/gpu:/tmp/site:/tmp/rtx

# The wheels that kernels/bench/gpu_prepare.py downloaded; nothing can be fetched here.
if compgen -G ".whl/*.whl" >/dev/null; then
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --root-user-action=ignore --target /tmp/site .whl/*.whl || exit 1
fi
# TensorRT-RTX comes in two halves, with two calls.
mkdir -p /tmp/rtx/parts
for half in .rtx/0 .rtx/1; do
  [ -d "$half" ] && cp -r "$half"/. /tmp/rtx/parts/
done
nvidia-smi || true

case $part in
kernels)
  $python kernels/bench/gpu_qlinear.py --out "$out" --parts "$parts" --budget-s $((budget - 60))
  ;;
end_to_end)
  $python kernels/bench/gpu_end_to_end.py --out "$out" --parts "$parts" \
    --budget-s $((budget - 90))
  ;;
rest)
  TREEQ_REQUIRE=gpu $python -m pytest tests/gpu -q -p no:cacheprovider -o filterwarnings=default \
    -o addopts="--import-mode=importlib"
  status=$?
  if [ -f /tmp/rtx/parts/libtensorrt_rtx.so.1.xz.1 ] && [ -d .rtx/engines ]; then
    libs=/tmp/rtx/tensorrt_rtx_libs
    cp -r /tmp/rtx/parts/tensorrt_rtx /tmp/rtx/parts/tensorrt_rtx_libs /tmp/rtx/
    [ -f "$libs/libtensorrt_rtx.so.1" ] ||
      cat /tmp/rtx/parts/libtensorrt_rtx.so.1.xz.* |
      $python -c 'import lzma, sys; [sys.stdout.buffer.write(b) for b in lzma.open(sys.stdin.buffer)]' \
        >"$libs/libtensorrt_rtx.so.1"
    # The engines with plugins launch cubins for this GPU.
    export TREEQ_GPU_KERNELS=$PWD/build/gpu_session/cubins
    $python -m treeq_gpu.ahead --out "$TREEQ_GPU_KERNELS" --arch "${ARCH:-sm_90}"
    engines=()
    for folder in .rtx/engines/*/; do engines+=(--engine "${folder%/}"); done
    $python kernels/bench/gpu_rtx.py --out "$out" "${engines[@]}"
  else
    echo "TensorRT-RTX: not carried, so its engines were not tried"
  fi
  exit $status
  ;;
*)
  echo "gpu_session.sh: unknown part $part" >&2
  exit 2
  ;;
esac
