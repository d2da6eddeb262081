#!/usr/bin/env bash
# One GPU session on an offline host: what log, gate, always and SGLang's deterministic mode cost at the 8B shape.
#   bash tests/gpu/cost_session.sh STAGE...    stages: stock identity log window column deterministic canonical canonical256
#                                              tiny tiny-gate bench kernels attention table
# Needs .gpu/ (built by gpu/build_site.sh of the workplace) and $OUT. Weights are random (tests/gpu/random_model.py).
# Where only 64 MiB travel, tree included, the site must shrink: without cudnn, llguidance and torchao/_C*.so, packed by xz -9e, it has 44 MB.
# One session of 30 minutes holds: attention stock canonical canonical256 tiny table, then tiny-gate, then bench.
set -u
. .gpu/host.sh; site_up
export PYTHONPATH=$PWD:$PWD/kernels:$PYTHONPATH
model=/dev/shm/llama-8b kept=/tmp/cost; mkdir -p $kept
[ -f $model/model.safetensors.index.json ] || python3 tests/gpu/random_model.py .gpu/shapes/llama-3.1-8b $model || exit 1
common=(--model-path $model --skip-tokenizer-init --context-length 40960 --max-total-tokens 90000 --max-running-requests 80
  --cuda-graph-max-bs-decode 64 --stream-interval 4)
ours=sglang_margingate.launch_server
gates=gate@0.01,gate@0.05,gate@0.1505,gate@0.1856,gate@0.495
up() {  # like serve, but patient: the first start of a session without saved caches compiles for five minutes
  serve "$@" && return
  for _ in $(seq 150); do grep -q 'fired up' "$OUT/$1.log" && return; kill -0 "$PID" 2>/dev/null || return 1; sleep 1; done; return 1
}
measure() {  # measure TAG ARGS...
  local tag=$1; shift
  timeout 400 python3 -m sglang_margingate.bench.decode_cost --base-url "http://127.0.0.1:$PORT" --tag "$tag" --new 96 \
    --out "$kept/$tag.json" "$@" >>"$OUT/$tag.txt" 2>&1 || tail -3 "$OUT/$tag.txt"
  grep -E 'identical|prefill' "$OUT/$tag.txt"; cp "$kept"/*.json "$OUT/"
}
long() {  # long TAG ARM: the same at long contexts
  measure "$1-8k" --arms "$2" --context 8192 --batches 1,8 --new 48; measure "$1-32k" --arms "$2" --context 32000 --batches 1 --new 48
}
for stage in "$@"; do
  t0=$SECONDS
  case $stage in
    stock) MODULE=sglang.launch_server up stock "${common[@]}" --disable-radix-cache &&
      measure stock --arms stock --prefill-arms stock && long stock stock ;;
    identity) MODULE=sglang.launch_server up stock "${common[@]}" --disable-radix-cache &&
      measure stock-identity --repeats 0 --identity-arms stock ;;
    log) MODULE=$ours up log "${common[@]}" --margingate-policy log --disable-radix-cache --margingate-trace-dir /tmp/traces &&
      measure log --arms log ;;
    window) MARGINGATE_TEST_SHARE=1 MODULE=$ours up window "${common[@]}" --margingate-fast-path stock --margingate-radix off --margingate-trace-dir /tmp/traces &&
      measure window --arms "$gates,always" --identity-arms always ;;
    column) MARGINGATE_TEST_SHARE=1 MODULE=$ours up column "${common[@]}" --margingate-fast-path stock --margingate-radix off --margingate-repair column \
      --margingate-trace-dir /tmp/traces && measure column --arms "$gates" ;;
    canonical) MODULE=$ours up canonical "${common[@]}" --margingate-fast-path canonical --margingate-trace-dir /tmp/traces &&
      measure canonical --arms gate --prefill-arms gate --identity-arms gate && long canonical gate
      grep -h "margingate:" "$OUT/canonical.log" | cut -c1-400 ;;
    canonical256) MODULE=$ours up canonical256 "${common[@]}" --margingate-fast-path canonical --chunked-prefill-size 256 --margingate-chunk 256 \
        --margingate-trace off && measure canonical256 --repeats 0 --identity-arms gate --identity-sizes 8,64 ;;
    tiny) MODULE=$ours up tiny --model-path sglang_margingate/demo/model --context-length 2048 --max-total-tokens 60000 \
        --cuda-graph-max-bs-decode 40 --margingate-fast-path canonical --margingate-trace off &&
      timeout 250 python3 tests/gpu/compare.py "http://127.0.0.1:$PORT" tiny 200 8,33 2>&1 | tee "$OUT/tiny.txt" ;;
    tiny-gate)  # the gate alone: calibrated on arith, carried to code and story; check passes, and fails under log
      tiny=(--model-path sglang_margingate/demo/model --context-length 2048 --max-total-tokens 60000 --cuda-graph-max-bs-decode 40
        --margingate-fast-path stock --margingate-trace off)
      limit=${LIMIT:-200} url=http://127.0.0.1:$PORT
      MODULE=$ours up calibrate "${tiny[@]}" --margingate-audit-rate 1.0 &&
        python3 -m sglang_margingate.cli calibrate --base-url $url --dataset arith --transfer code,story --limit "$limit" \
          -o "$OUT/profile.json" 2>&1 | tee "$OUT/calibrate.txt" | tail -15
      stop
      MODULE=$ours up tiny-gate "${tiny[@]}" --margingate-profile "$OUT/profile.json" && {
        python3 tests/gpu/compare.py $url gate "$limit" 8,33 gate 2>&1 | tee "$OUT/tiny-gate.txt"
        python3 -m sglang_margingate.cli check --base-url $url --limit "$limit" --phases alone,together,staggered,traffic --repeats 1 \
          --json "$OUT/check.json" 2>&1 | tee "$OUT/check.txt" | tail -12; }
      stop
      MODULE=$ours up tiny-log --model-path sglang_margingate/demo/model --context-length 2048 --max-total-tokens 60000 \
        --cuda-graph-max-bs-decode 40 --margingate-policy log --margingate-trace off &&
        python3 -m sglang_margingate.cli check --base-url $url --limit 20 --phases alone,together --repeats 1 --expect-fail 2>&1 | tail -12 ;;
    bench)  # margingate bench starts its own servers
      timeout "${BENCH_SECONDS:-560}" python3 -m sglang_margingate.cli bench --dataset random:512:96 --limit 24 --concurrency 16 \
        --repeats "${REPEATS:-2}" --share "${SHARE:-100}" --modes "${MODES:-stock,canonical}" --trace-dir "$OUT/traces" -o "$OUT/bench.json" \
        --mode-flags 'stock,log=--disable-radix-cache' -- "${common[@]}" --attention-backend flashinfer --dtype bfloat16 \
        --grammar-backend none --sampling-backend pytorch --cuda-graph-backend-prefill disabled --mem-fraction-static 0.75 \
        >"$OUT/bench.txt" 2>&1; tail -60 "$OUT/bench.txt"; continue ;;
    attention) timeout 200 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_kernels_gpu.py -k decode_attention 2>&1 | tail -3
      timeout 150 python3 kernels/benchmarks/bench_decode_attention.py >"$OUT/attention.txt" 2>&1; tail -12 "$OUT/attention.txt"; continue ;;
    deterministic) MODULE=sglang.launch_server up deterministic "${common[@]}" --enable-deterministic-inference &&
      measure deterministic --arms stock ;;
    kernels) timeout 200 python3 -m pytest -q -p no:cacheprovider tests/gpu/test_kernels_gpu.py 2>&1 | tail -3
      timeout 100 python3 kernels/benchmarks/bench_top2_margin.py >"$OUT/top2.txt" 2>&1; tail -12 "$OUT/top2.txt"; continue ;;
    table) python3 -m sglang_margingate.bench.decode_cost --table "$kept"/*.json | tee "$OUT/table.txt"; continue ;;
  esac
  stop; echo "$stage: $((SECONDS - t0)) s"
done
rm -rf ~/.triton; jit_save "$OUT/jit.tar.xz" >/dev/null
