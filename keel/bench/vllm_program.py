"""vLLM, run by its own interpreter as a program of its own: requests as lines of JSON in, token ids and log-probs out.

Nothing of Keel can be imported here. The first line that comes out says that the model is loaded; whatever the library
writes to the standard output goes to the standard error instead.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, max_model_len: int, max_num_seqs: int) -> None:
    """Serve `{"prompts": [[..]], "max_tokens": n, "stop": [..]}` until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        settings = SamplingParams(
            temperature=1.0,
            max_tokens=asked["max_tokens"],
            ignore_eos=True,
            stop_token_ids=asked["stop"],
            logprobs=0,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        outputs = [each.outputs[0] for each in llm.generate(prompts, settings, use_tqdm=False)]
        answers.write(json.dumps([[list(each.token_ids), _logprobs(each)] for each in outputs]) + "\n")
        answers.flush()


def _logprobs(output: Any) -> list[float]:
    """The log-prob of each token that was drawn."""
    return [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
