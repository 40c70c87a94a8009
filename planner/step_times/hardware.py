"""Pure: what hardware can do at most, and how much of that was seen; the figures name their source.

Peaks are the makers' dense (not sparse) figures. The shares reached are from microsoft/vidur's tables
(../shared/data/profiles/vidur, Llama-2-70b): compute from mlp_up_proj at 4,096 tokens, memory from the
same at one token, the layer's overhead from its element-wise ops at one token (Llama-2-7b).
"""

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or a CPU): rates a second, bytes, seconds.

    `link_bytes_s` is one direction to a neighbour in the same node; `source` says where the figures are from.
    """

    name: str
    flops_s: float
    memory_bytes_s: float
    memory_bytes: float
    link_bytes_s: float
    source: str
    compute_share: float = 0.7
    memory_share: float = 0.8
    layer_overhead_s: float = 25e-6
    link_latency_s: float = 20e-6


_UNMEASURED = "shares reached: assumed like A100's, no table at hand"

DEVICES = {
    device.name: device
    for device in (
        Device(
            "a100-80g",
            312e12,
            2.039e12,
            80 * 2**30,
            300e9,
            "NVIDIA A100 80GB SXM datasheet: bf16 dense 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways",
            compute_share=0.77,
            memory_share=0.79,
        ),
        Device(
            "h100",
            989e12,
            3.35e12,
            80 * 2**30,
            450e9,
            "NVIDIA H100 SXM datasheet: bf16 dense 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways",
            compute_share=0.69,
            memory_share=0.90,
            layer_overhead_s=20e-6,
        ),
        Device(
            "h200",
            989e12,
            4.8e12,
            141e9,
            450e9,
            "NVIDIA H200 SXM datasheet: as H100 with 141 GB at 4.8 TB/s; shares reached: assumed like H100's",
            compute_share=0.69,
            memory_share=0.90,
            layer_overhead_s=20e-6,
        ),
        Device(
            "a10",
            125e12,
            600e9,
            24e9,
            32e9,
            f"NVIDIA A10 datasheet: bf16 dense 125 TFLOP/s, 600 GB/s, PCIe 4.0 x16; {_UNMEASURED}",
        ),
        Device(
            "l4",
            121e12,
            300e9,
            24e9,
            32e9,
            f"NVIDIA L4 datasheet: bf16 dense 121 TFLOP/s, 300 GB/s, PCIe 4.0 x16; {_UNMEASURED}",
        ),
        Device(
            "cpu-2-cores",
            256e9,
            23e9,
            24 * 2**30,
            4.96e9,
            "this project's machine class, measured: sgemm 256 GFLOP/s, 23 GB/s read, loopback TCP 4.96 GB/s",
            compute_share=1.0,
            memory_share=1.0,
            layer_overhead_s=0.0,
        ),
    )
}
"""The catalogue, by name."""


def device_named(name: str) -> Device:
    """A device of the catalogue. Raises ConfigError that lists it."""
    if name not in DEVICES:
        raise ConfigError(f"no hardware is called {name!r}; known: {', '.join(DEVICES)}")
    return DEVICES[name]
