"""Ask through OpenAI's own client: a seed, log-probabilities, and what the answer claims.

python examples/openai_client.py http://127.0.0.1:30000
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none")
ask = {"model": "default", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24,
       "temperature": 0.8, "seed": 7, "logprobs": True, "top_logprobs": 3}  # fmt: skip
one, two = (client.chat.completions.create(**ask) for _ in range(2))
assert one.choices[0].message.content == two.choices[0].message.content, "the same seed, other tokens"
assert one.choices[0].logprobs == two.choices[0].logprobs, "the same tokens, other log-probabilities"
claims = one.model_extra["margingate"]  # the official client keeps fields that it does not know
print(f"{one.system_fingerprint}: {claims['guarantee']}, log-probabilities {claims['logprobs']}, seed {claims['seed']}")
print(f"{claims['guarantee_note']} ({claims['steps']} steps, {claims['flips']} flips)")
for chunk in client.chat.completions.create(**ask, stream=True):
    if chunk.choices and chunk.choices[0].finish_reason:  # a stream's last chunk carries it
        assert chunk.model_extra["margingate"]["guarantee"] == claims["guarantee"]
