#!/usr/bin/env bash
# Asks the questions of a small task about the toy world with lmms-eval, with and without the draft of the bundled pair,
# and prints the table:
#
#     examples/engines/lmms_eval_toy.sh [FOLDER]
#
# FOLDER (default: lmms-eval-toy) gets an environment (2.5 GB), the data set and the results. Nothing is downloaded but
# packages. To use an environment that exists, name its Python: MSD_HF_LMMS_PYTHON=.../bin/python.
# TORCH says what pip installs as torch, for example TORCH=torch==2.13.0, or options that choose a build for the CPU.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${1:-lmms-eval-toy}"
cd "${1:-lmms-eval-toy}"

PYTHON=${MSD_HF_LMMS_PYTHON:-$PWD/venv/bin/python}
if [ ! -x "$PYTHON" ]; then
    "${BASE_PYTHON:-python3}" -m venv venv
    # shellcheck disable=SC2086  # TORCH may hold several arguments
    "$PYTHON" -m pip install ${TORCH:-torch}
    # lmms-eval must not change the build of torch.
    "$PYTHON" -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' >torch.txt
    "$PYTHON" -m pip install -c torch.txt -e "$ROOT[lmms-eval]"
    # pip may have chosen a torchvision for another build of torch. LLaVA needs none, and a broken one stops lmms-eval.
    "$PYTHON" -c 'import torchvision' 2>/dev/null || "$PYTHON" -m pip uninstall -y torchvision
fi

export HF_HUB_OFFLINE=1
"$PYTHON" "$ROOT/examples/engines/lmms_eval_toy/make_data.py" toy_world_data
TARGET="$ROOT/msd_hf/toy/pair/target"
DRAFT="$ROOT/msd_hf/toy/pair/draft"
for ARGUMENTS in "pretrained=$TARGET" "pretrained=$TARGET,draft=$DRAFT"; do
    "$PYTHON" -m lmms_eval --model msd_llava --model_args "$ARGUMENTS" \
        --tasks toy_world --include_path "$ROOT/examples/engines/lmms_eval_toy" \
        --output_path results --log_samples
done
"$PYTHON" -m msd_hf bench --lmms-eval results
