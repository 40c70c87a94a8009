"""Pure: the arguments that every command which asks a cluster shares."""

import argparse

DEFAULT_ADDRESS = "localhost:50051"


def add_address(parser: argparse.ArgumentParser) -> None:
    """Where the router is."""
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"gRPC address ({DEFAULT_ADDRESS})"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How to sample; what is not given is the server's choice."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, help="same seed, same answer")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable"
    )
    parser.add_argument("--slo-class", default="", metavar="NAME", help="class from cluster.yaml")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--system", metavar="TEXT", help="system message before the question")
