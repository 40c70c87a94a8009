"""Pure: from cluster.yaml to the controller's rules, and to what the cluster can carry out."""

from cluster.config import ClusterConfig
from cluster.controller.config import RoleLimits
from planner.control.controller import ControllerRules, RoleRange


def controller_rules(config: ClusterConfig, attainment: float) -> ControllerRules:
    """The rules, with the cluster's abilities; `attainment` is the share of requests that must be good."""
    section, pools = config.controller, config.pools
    start = pools.prefill.replicas + pools.decode.replicas
    fewest, most = section.min_workers or start, section.max_workers or start
    return ControllerRules(
        fewest=fewest,
        most=most,
        headroom=section.headroom,
        attainment=attainment,
        gain=section.gain,
        patience=section.patience,
        dwell_s=section.dwell_s,
        spare=section.spare,
        calm_windows=section.calm_windows,
        can_flip=section.flip and interchangeable(config) and not pinned(config),
        can_scale=fewest < most and not pinned(config),
        prefill=_range(section.prefill),
        decode=_range(section.decode),
    )


def interchangeable(config: ClusterConfig) -> bool:
    """Whether a worker of one role can run on the resources that are set aside for one of the other."""
    prefill, decode = config.pools.prefill, config.pools.decode
    return (prefill.device, prefill.num_cpus, prefill.num_gpus) == (
        decode.device,
        decode.num_cpus,
        decode.num_gpus,
    )


def pinned(config: ClusterConfig) -> bool:
    """Whether workers keep to shares of cores, which are cut for the workers of the start."""
    return config.pools.prefill.cores is not None or config.pools.decode.cores is not None


def _range(limits: RoleLimits) -> RoleRange:
    return RoleRange(limits.min, limits.max)
