"""Pure: the rows of DistServe's profile that tests need.

Source: LLMServe/DistServe (Apache-2.0), simdistserve/estimators/profile_data, A100-80GB; milliseconds.
"""

from typing import Any

from planner.step_times.distserve_fit import DistServeFit, read_fits

PROFILE: dict[str, Any] = {
    "facebook/opt-13b": {
        "1": {
            "decoding_large_small_bs_threshold": 95,
            "prefill": [18.10254647486372, 0.1019122572698738, 7.122264314252114e-06],
            "decoding_smallbs": [19.934702624895458, 0.0006269356524350583, 0.03850697740828398],
            "decoding_largebs": [7.1661889468253595, 0.0005798000403396046, 0.15831096191764046],
        },
        "2": {
            "decoding_large_small_bs_threshold": 95,
            "prefill": [14.742973695171262, 0.06857720739764, 2.4495727400243586e-06],
            "decoding_smallbs": [13.294796350285385, 0.00034109219700723494, 0.06296393225243659],
            "decoding_largebs": [10.638741913126715, 0.00031183369638295723, 0.08562913604102729],
        },
    }
}


def opt_13b(tp: int = 1, pp: int = 1) -> DistServeFit:
    """DistServe's OPT-13B on A100-80GB."""
    return DistServeFit(read_fits(PROFILE)["facebook/opt-13b"][tp], pp)
