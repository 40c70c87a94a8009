"""Pure: seven rows of microsoft/vidur's profile (MIT) of Llama-2-7b's ops on A100, tp 1; medians in ms."""

from planner.step_times.operator_tables import LAYER_OPS

_MEDIANS = (
    (1, 0.003, 0.005, 0.065, 0.005, 0.025, 0.005, 0.116, 0.007, 0.06, 0.002),
    (8, 0.008, 0.004, 0.063, 0.005, 0.025, 0.004, 0.111, 0.008, 0.061, 0.002),
    (32, 0.004, 0.004, 0.066, 0.006, 0.027, 0.005, 0.115, 0.008, 0.065, 0.002),
    (128, 0.009, 0.005, 0.0745, 0.007, 0.032, 0.005, 0.157, 0.011, 0.088, 0.003),
    (512, 0.029, 0.012, 0.234, 0.022, 0.088, 0.012, 0.402, 0.0365, 0.229, 0.007),
    (2048, 0.119, 0.053, 0.979, 0.076, 0.301, 0.055, 1.694, 0.135, 0.851, 0.028),
    (4096, 0.234, 0.105, 1.911, 0.149, 0.611, 0.104, 3.365, 0.266, 1.604, 0.055),
)

ROWS = [
    {"num_tensor_parallel_workers": "1", "num_tokens": str(tokens)}
    | {
        f"time_stats.{op}.median": str(median)
        for op, median in zip(("emb", *LAYER_OPS), medians, strict=True)
    }
    for tokens, *medians in _MEDIANS
]
"""As csv.DictReader gives them, unused columns left out."""
