"""What the truth sweep asks: a seeded plan of requests of many kinds, made to find a label that says too much.

A :class:`Case` is one request, a :class:`Chain` cases that belong together: turns of a session, two uses of one request
id, a prompt that was only prefilled and is then answered. Chains run beside each other, in the order of the plan.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

NATIVE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"

FAST_KEY = "margingate:fast"
"""The name space of ungated requests in the radix cache, which a client must not reach by naming it."""

ODD_KEYS = ("", FAST_KEY, f"{FAST_KEY}:team", "margingate", "team", "\u00e9\u4e16 \n", "k" * 300)


@dataclass(frozen=True)
class Case:
    """One request of the plan."""

    id: str
    kind: str
    body: dict[str, Any]
    path: str = NATIVE
    action: str = ""
    """``abort`` or ``disconnect`` after :attr:`cut` chunks of the stream."""
    cut: int = 0
    follows: bool = False
    """Its ``input_ids`` stand behind prompt and answer of the case before it in the chain."""
    may_refuse: bool = False
    """HTTP 400 is a right answer, too."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters, wherever this API keeps them."""
        return self.body["sampling_params"] if self.path == NATIVE else self.body

    @property
    def repeatable(self) -> bool:
        """Whether the request decodes at temperature 0 or draws with a seed, so that its run alone must be the same."""
        return (
            self.sampling.get("temperature") == 0
            or self.sampling.get("sampling_seed", self.body.get("seed")) is not None
        )

    @property
    def asked_policy(self) -> str | None:
        """The policy that the request names, if any."""
        return (self.sampling.get("custom_params") or {}).get("margingate_policy")

    @property
    def key(self) -> str | None:
        """The client's key of the prefix cache."""
        return self.body.get("extra_key", self.body.get("cache_salt"))


class Chain(NamedTuple):
    """Cases that belong together, one after another or all at once."""

    cases: tuple[Case, ...]
    at_once: bool = False


class Words(Protocol):
    """Where prompts come from."""

    def ids(self, rng: random.Random, least: int = 0) -> list[int]:
        """Return a prompt of at least ``least`` token ids."""
        ...

    def text(self, rng: random.Random) -> str:
        """Return plain user text; empty where the model has no tokenizer."""
        ...


class EmbeddedWords:
    """Prompts of the embedded model's datasets; some behind shared examples, so that the prefix cache has work.

    Parameters
    ----------
    shared
        Numbers of leading examples to choose from.
    """

    def __init__(self, shared: Sequence[int] = (0, 3, 6)) -> None:
        from tokenizers import Tokenizer

        from sglang_margingate.demo.chat import render_prompt
        from sglang_margingate.demo.paths import model_path
        from sglang_margingate.demo.prompts import interleaved_prompts

        tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
        self.shared = tuple(shared)
        self._texts = [p.prompt for p in interleaved_prompts("arith", "code", "story")]
        self._ids = [tokenizer.encode(render_prompt(text)).ids for text in self._texts]

    def ids(self, rng: random.Random, least: int = 0) -> list[int]:
        """Return a prompt, behind as many examples as the length asks for."""
        examples = rng.choice(self.shared)
        out = [token for ids in self._ids[:examples] for token in ids]
        while len(out) < least:
            out += rng.choice(self._ids)
        return out + rng.choice(self._ids)

    def text(self, rng: random.Random) -> str:
        """Return the user text of one prompt."""
        return rng.choice(self._texts)


class RandomWords:
    """Uniform token ids, for a model without a tokenizer; some prompts share their beginning.

    Parameters
    ----------
    vocab
        Ids to draw from.
    """

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self._shared = [random.Random(n).choices(range(vocab), k=192) for n in range(3)]

    def ids(self, rng: random.Random, least: int = 0) -> list[int]:
        """Return 24 to 400 ids, or ``least`` and some more."""
        shared = rng.choice([[], *self._shared])
        return shared + rng.choices(range(self.vocab), k=max(least, rng.randint(24, 400)))

    def text(self, rng: random.Random) -> str:
        """No tokenizer, no text."""
        return ""


Maker = Callable[[], Chain]


class Planner:
    """Draws chains kind by kind.

    Parameters
    ----------
    words
        Where prompts come from.
    seed
        The plan depends on it and on the other arguments alone.
    gates
        Whether the server takes requests that ask for ``gate`` or ``always``.
    without
        Kinds to leave out.
    longest
        Most tokens to generate.
    scored
        Prompt tokens of a scoring neighbour: least and most.
    grammar
        Whether the server has a grammar back end.
    """

    def __init__(
        self,
        words: Words,
        seed: int = 0,
        gates: bool = True,
        without: Sequence[str] = (),
        longest: int = 160,
        scored: tuple[int, int] = (300, 1500),
        grammar: bool = True,
    ) -> None:
        self.words, self.gates, self.longest, self.scored, self.grammar = words, gates, longest, scored, grammar
        self._rng, self._count = random.Random(seed), 0
        every: dict[str, tuple[int, Maker]] = {
            "plain": (20, self.plain), "parallel": (6, self.parallel), "scoring": (8, self.scoring),
            "prefill-only": (5, self.prefill_only), "one-token": (6, self.one_token), "session": (10, self.session),
            "abort": (4, self.abort), "disconnect": (4, self.disconnect), "reused-id": (3, self.reused),
            "client-key": (8, self.client_key), "sampled": (8, self.sampled), "policy": (5, self.policy),
            "processed": (10, self.processed), "stream": (4, self.stream), "openai": (6, self.openai),
        }  # fmt: skip
        unknown = set(without) - set(every)
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is no kind of request; kinds are {', '.join(every)}")
        if not words.text(random.Random(0)):
            without = (*without, "openai")
        self.kinds = {kind: entry for kind, entry in every.items() if kind not in without}

    def plan(self, requests: int) -> list[Chain]:
        """Return chains of at least ``requests`` cases in all, every kind in its share."""
        deck, out = self._deck(), list[Chain]()
        while self._count < requests:
            out.append(next(deck)())
        return out

    def _deck(self) -> Iterator[Maker]:
        while True:
            cards = [make for weight, make in self.kinds.values() for _ in range(weight)]
            self._rng.shuffle(cards)
            yield from cards

    # ---- pieces ---------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        self._count += 1
        return f"{self._count - 1:04d}"

    def _new(self) -> int:
        """Return a number of tokens to generate: long ones too, as most differences come late."""
        return min(self.longest, self._rng.choice((8, 24, 48, 96, 160)))

    def _body(
        self, new: int | None = None, least: int = 0, policy: str | None = None, **sampling: Any
    ) -> dict[str, Any]:
        """Return the body of a greedy native request."""
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": self._new() if new is None else new}
        params["ignore_eos"] = self._rng.random() < 0.5
        if policy is not None:
            params["custom_params"] = {"margingate_policy": policy}
        return {"input_ids": self.words.ids(self._rng, least), "sampling_params": params | sampling}

    def _one(self, kind: str, body: dict[str, Any], **more: Any) -> Chain:
        return Chain((Case(self._name(), kind, body, **more),))

    def _pair(self, kind: str, first: dict[str, Any], second: dict[str, Any], **more: Any) -> Chain:
        """Return a first request and one that ``follows`` its answer."""
        return Chain((Case(self._name(), f"{kind} 1", first), Case(self._name(), f"{kind} 2", second, **more)))

    # ---- kinds ----------------------------------------------------------------------------------------------------

    def plain(self) -> Chain:
        """Greedy, of any length."""
        return self._one("plain", self._body())

    def parallel(self) -> Chain:
        """Several answers to one prompt: SGLang sends a request that only prefills before them."""
        return self._one("parallel", self._body(n=self._rng.randint(2, 4)))

    def scoring(self) -> Chain:
        """Log-probabilities of a long prompt: the head then runs over all its rows."""
        least = self._rng.randint(*self.scored)
        new, policy = self._rng.choice((0, 1, 16)), self._rng.choice((None, "off"))
        body = self._body(new, least, policy) | {"return_logprob": True, "logprob_start_len": 0}
        return self._one("scoring", body)

    def prefill_only(self) -> Chain:
        """No token at all, often ungated; then an answer to the same prompt, which may find its columns."""
        policy = self._rng.choice((None, None, "off"))
        first = self._body(0, self._rng.choice((0, 150)), policy)
        second = self._body()
        second["input_ids"] = first["input_ids"] + (second["input_ids"] if self._rng.random() < 0.5 else [])
        return self._pair("prefill-only", first, second)

    def one_token(self) -> Chain:
        """One token: nothing but the prefill stands behind it."""
        return self._one("one-token", self._body(1, self._rng.choice((0, 0, 200))))

    def session(self) -> Chain:
        """Turns that go on from prompt and answer, after a gated or an ungated turn."""
        policy = self._rng.choice((None, None, "off", "log"))
        first = self._body(min(self.longest, self._rng.choice((48, 130, 160))), policy=policy, ignore_eos=True)
        kind = "session" if policy is None else "session ungated"
        return self._pair(kind, first, self._body(), follows=True)

    def abort(self) -> Chain:
        """Ended in the middle through ``/abort_request``."""
        return self._cut("abort")

    def disconnect(self) -> Chain:
        """The client goes away in the middle."""
        return self._cut("disconnect")

    def _cut(self, action: str) -> Chain:
        body = self._body(self.longest, ignore_eos=True) | {"stream": True, "rid": f"{action}-{self._count}"}
        return self._one(action, body, action=action, cut=self._rng.randint(1, 12))

    def reused(self) -> Chain:
        """One request id twice: one after the other, or both at once (SGLang refuses the second)."""
        at_once = self._rng.random() < 0.5
        rid = f"again-{self._count}"
        cases = [Case(self._name(), "reused-id", self._body() | {"rid": rid}, may_refuse=at_once) for _ in range(2)]
        return Chain(tuple(cases), at_once)

    def client_key(self) -> Chain:
        """A session whose gated turn names an odd key of the prefix cache, its ungated first turn another."""
        key = self._rng.choice(ODD_KEYS)
        before = self._rng.choice((None, key.removeprefix(f"{FAST_KEY}:"), key))
        first = self._body(min(self.longest, 140), policy="off", ignore_eos=True)
        if before is not None:
            first["extra_key"] = before
        cases = (
            Case(self._name(), "client-key 1", first, may_refuse=True),
            Case(self._name(), "client-key 2", self._body() | {"extra_key": key}, follows=True, may_refuse=True),
        )
        return Chain(cases)

    def sampled(self) -> Chain:
        """A neighbour that samples, nearly greedy too: nothing is claimed of it, unless it has a seed."""
        odd: dict[str, Any] = self._rng.choice(
            ({"temperature": 1.0}, {"temperature": 0.0001}, {"temperature": 0.8, "sampling_seed": 7})
        )
        return self._one("sampled", self._body(**odd))

    def policy(self) -> Chain:
        """A policy of the request's own."""
        policies = ("off", "log", "gate", "always") if self.gates else ("off", "log")
        return self._one("policy", self._body(policy=self._rng.choice(policies)))

    def processed(self) -> Chain:
        """Penalties, a bias, a grammar, a stop string: whatever changes the logits or the end."""
        ways: list[dict[str, Any]] = [
            {"frequency_penalty": 0.7}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "min_new_tokens": 8},
            {"logit_bias": {"300": 2.0, "301": -3.0}}, {"stop": ["."]}, {"stop_token_ids": [13]},
        ]  # fmt: skip
        if self.grammar:
            ways.append({"regex": r"[a-z ]{30,60}"})
        return self._one("processed", self._body(**self._rng.choice(ways)))

    def stream(self) -> Chain:
        """Streamed."""
        return self._one("stream", self._body() | {"stream": True})

    def openai(self) -> Chain:
        """Chat and completions of the OpenAI API, with its own key of the prefix cache now and then."""
        body: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": max(1, self._new())}
        if self._rng.random() < 0.3:
            body["cache_salt"] = self._rng.choice(ODD_KEYS)
        chat = self._rng.random() < 0.5
        text = self.words.text(self._rng)
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        if self._rng.random() < 0.3:
            body["n"] = 2
        more = {"path": CHAT if chat else COMPLETIONS, "may_refuse": "cache_salt" in body}
        return self._one("openai", body, **more)
