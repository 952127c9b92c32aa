#!/usr/bin/env bash
# Run the GPU tests, the sanitizer, the soak and the kernel benchmarks on this machine's GPU; results go into OUTDIR.
#   scripts/run_gpu_tests.sh OUTDIR                  everything, in this order
#   scripts/run_gpu_tests.sh OUTDIR soak table       only these of: tests sanitizer soak table selection
# Needs torch, triton and pytest (with pytest-xdist it compiles in parallel), no installation of vidsparse and no
# network. VIDSPARSE_COMMIT names the commit where the checkout has no git metadata. SOAK_CASES, and SOAK_SECONDS,
# TABLE_SECONDS, SANITIZER_SECONDS bound a part; each keeps to its time itself and writes its results as it goes.
# Writes gpu_tests.xml (JUnit), gpu_tests.json, sanitizer.json, soak.json, block_sparse.json and .txt, and
# block_selection.json. The first part that fails ends the run: no speed of kernels that are wrong.
set -euo pipefail
known=(tests sanitizer soak table selection)
if [ $# -lt 1 ]; then
    echo "usage: $0 OUTDIR [${known[*]}]" >&2
    exit 2
fi
mkdir -p "$1"
outdir="$(cd "$1" && pwd)"
shift
parts=("$@")
if [ $# -eq 0 ]; then
    parts=("${known[@]}")
fi
for part in "${parts[@]}"; do
    if [[ " ${known[*]} " != *" $part "* ]]; then
        echo "$0: must be one of ${known[*]}, got \"$part\"" >&2
        exit 2
    fi
done
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels/torch-ext:pipelines:lora${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
if [ -z "${VIDSPARSE_COMMIT:-}" ]; then
    VIDSPARSE_COMMIT="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
fi
export VIDSPARSE_COMMIT
python="${PYTHON:-python3}"

run_tests() {
    local status=0 files workers=()
    # Only files with GPU tests are collected, so that what the others import need not be installed here.
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    if "$python" -c "import xdist" 2>/dev/null; then
        # The largest tests hold some 20 GB; processes beyond what fits would fail for want of memory.
        workers=(-n "$("$python" -c "
import os, torch
memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
print(max(1, min(len(os.sched_getaffinity(0)), memory // 20_000_000_000)))")")
    fi
    "$python" -m pytest -m gpu "${files[@]}" "${workers[@]}" -p no:cacheprovider -q --junitxml="$outdir/gpu_tests.xml" || status=$?
    "$python" - "$outdir" "$status" <<'PY'
import datetime
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
import triton

outdir, status = Path(sys.argv[1]), int(sys.argv[2])
suites = ElementTree.parse(outdir / "gpu_tests.xml").getroot().iter("testsuite")
totals = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
for suite in suites:
    for name in totals:
        totals[name] += int(suite.get(name, 0))
result = {
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "torch": torch.__version__,
    "triton": triton.__version__,
    "commit": os.environ["VIDSPARSE_COMMIT"],
    "pytest_exit_code": status,
    **totals,
}
(outdir / "gpu_tests.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result))
PY
    return "$status"
}

for part in "${parts[@]}"; do
    status=0
    case "$part" in
        tests)
            run_tests || status=$?
            ;;
        sanitizer)
            "$python" scripts/sanitize_kernels.py --seconds "${SANITIZER_SECONDS:-240}" \
                --output "$outdir/sanitizer.json" || status=$?
            ;;
        soak)
            "$python" scripts/soak_block_sparse.py --cases "${SOAK_CASES:-10000}" --seconds "${SOAK_SECONDS:-300}" \
                --workers "$(nproc)" --output "$outdir/soak.json" || status=$?
            ;;
        table)
            "$python" scripts/bench_block_sparse.py --seconds "${TABLE_SECONDS:-240}" \
                --output "$outdir/block_sparse.json" | tee "$outdir/block_sparse.txt" || status=$?
            ;;
        selection)
            "$python" scripts/bench_block_selection.py --output "$outdir/block_selection.json" || status=$?
            ;;
    esac
    if [ "$status" -ne 0 ]; then
        echo "$part failed: the run ends here." >&2
        exit "$status"
    fi
done
