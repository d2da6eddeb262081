#!/bin/bash
# Both tasks at one and at sixteen requests in flight: the same outputs and scores, sample by sample.
#   pip install 'lm-eval[api]==0.4.13'; bash examples/lm_eval/run.sh http://127.0.0.1:30000 out [MODEL FOLDER with the tokenizer]
set -e
url=$1; out=$2; model=${3:-sglang_margingate/demo/model}
[ -f examples/lm_eval/generate.jsonl ] || python examples/lm_eval/make_data.py
for flight in 1 16; do
  python -m lm_eval --model local-completions --include_path examples/lm_eval --tasks margingate_generate,margingate_loglikelihood \
    --model_args "model=default,base_url=$url/v1/completions,num_concurrent=$flight,max_retries=1,tokenizer=$model,max_length=2048" \
    --batch_size 1 --log_samples --output_path "$out/$flight" >"$out-$flight.log" 2>&1
  curl -s -X POST "$url/flush_cache" >/dev/null
done
python examples/lm_eval/compare.py "$out/1" "$out/16"
