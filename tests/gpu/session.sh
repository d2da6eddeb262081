#!/usr/bin/env bash
# One GPU session on an offline host: serve the embedded model with FlashInfer and compare alone with batch.
# Needs .gpu/ (built by gpu/build_site.sh of the workplace) and $OUT. Prints a short table last.
set -u
. .gpu/host.sh; site_up
export PYTHONPATH=$PWD:$PWD/kernels:$PYTHONPATH
common=(--margingate-trace off --cuda-graph-max-bs-decode 32 --context-length 2048 --max-total-tokens 60000)
MODULE=sglang_margingate.launch_server
run() {  # run TAG POLICY ARGS...
  local tag=$1; shift
  if serve "$tag" "${common[@]}" "$@"; then
    python3 tests/gpu/compare.py "http://127.0.0.1:$PORT" "$tag" "${PROMPTS:-24}" 2>&1 | tee -a "$OUT/table.txt"
  else
    grep -E 'margingate: refusing|Error|error' "$OUT/$tag.log" | tail -5 | cut -c1-300
  fi
  stop
}
run log --margingate-policy log --model-path sglang_margingate/demo/model
[ -f .gpu/jit.tar.xz ] || jit_save "$OUT/jit.tar.xz"
run gate --margingate-policy gate --margingate-fast-path stock --margingate-threshold 0.25 --model-path sglang_margingate/demo/model
run always --margingate-policy always --model-path sglang_margingate/demo/model
MARGINGATE_TEST_BREAK=layers.1.mlp.gate_up_proj run broken --margingate-policy gate --margingate-fast-path stock --model-path sglang_margingate/demo/model
jit_save "$OUT/jit.tar.xz" >/dev/null
echo; cat "$OUT/table.txt"
