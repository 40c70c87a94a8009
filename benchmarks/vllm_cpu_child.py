"""Edge: vLLM's CPU engine, asked over pipes; runs in vLLM's own environment, so it imports nothing of ours.

Its argument is a JSON object: model folder, dtype, `max_model_len`, `max_num_seqs`, `eager`. It prints a line
of JSON with vLLM's version when it is ready. Then each line of stdin is an object with `prompts` (lists of
token ids) and `output_tokens`; the answer is a line with `seconds` and the `outputs`' token ids. Ends with
stdin.
"""

import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    """Serves until stdin ends."""
    # vLLM logs to stdout: it gets stderr, and the answers go where stdout was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])

    import vllm

    engine = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_num_seqs"],
        enforce_eager=settings["eager"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    _say(answers, {"vllm": vllm.__version__})
    for line in sys.stdin:
        order = json.loads(line)
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=order["output_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        began_s = time.perf_counter()
        results = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began_s
        outputs = [list(result.outputs[0].token_ids) for result in results]
        _say(answers, {"seconds": seconds, "outputs": outputs})


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
