"""A judge's model on this machine: any instruct model through transformers, handed in, greedy, its answers constrained.

Decoding is constrained to the possible answers: of the next tokens only those are allowed that continue one of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from falconlib.judge.model import Answer, Keep, forget, read_answer


class LocalChat:
    """A Chat. model: anything with `model`, `tokenizer`, `device`, `name` and `fingerprint`, such as a Policy.

    One question at a time: an answer does not depend on the questions beside it, to the last bit.
    """

    name = "local"

    def __init__(self, model: Any):
        self.model = model
        self.identity = {"model": model.name, "revision": model.fingerprint, "sampling": "greedy, constrained"}
        self.counts = {"asked": 0, "repaired": 0, "unanswered": 0}

    def choose(self, prompts: Sequence[str], fields: Sequence[str], options: Sequence[str], keep: Keep = forget) -> list[Answer]:
        """One answer per prompt; None when the prompt leaves no room in the model's context."""
        import torch

        combinations = itertools.product(options, repeat=len(fields))
        texts = [json.dumps(dict(zip(fields, values, strict=True))) for values in combinations]
        answers = [
            [*self.model.tokenizer.encode(text, add_special_tokens=False), self.model.tokenizer.eos_token_id] for text in texts
        ]
        found = []
        for prompt in prompts:
            with torch.no_grad():
                found.append(read_answer(self.answer(prompt, answers), fields, options))
            keep(prompt, found[-1])
        self.counts["asked"] += len(found)
        self.counts["unanswered"] += found.count(None)
        return found

    def answer(self, prompt: str, answers: Sequence[Sequence[int]]) -> str:
        """The greedily chosen one of `answers` (token ids, each with eos); "" when the context is too small."""
        from torch import tensor

        model, ids = self.model.model, self.encode(prompt)
        room = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        if len(ids) + max(map(len, answers)) > room:
            return ""
        follow: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for place, token in enumerate(answer):
                follow.setdefault(tuple(answer[:place]), set()).add(token)
        chosen = model.generate(
            tensor([ids], device=self.model.device),
            attention_mask=tensor([[1] * len(ids)], device=self.model.device),
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            eos_token_id=self.model.tokenizer.eos_token_id,
            pad_token_id=self.model.tokenizer.pad_token_id,
            prefix_allowed_tokens_fn=lambda _, seen: sorted(follow[tuple(seen[len(ids) :].tolist())]),
        )
        return self.model.tokenizer.decode(chosen[0, len(ids) :], skip_special_tokens=True)

    def encode(self, prompt: str) -> list[int]:
        """The prompt in the model's chat template; a template marker spelt in the prompt stays plain text."""
        tokenizer, mark = self.model.tokenizer, "\0"
        frame = mark
        if getattr(tokenizer, "chat_template", None):
            frame = tokenizer.apply_chat_template([{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False)
        before, after = (tokenizer.encode(part, add_special_tokens=False) for part in frame.split(mark, 1))
        return [*before, *tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True), *after]
