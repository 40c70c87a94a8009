"""Edge: `tandem bench`: the benchmarks; each lives in benchmarks/ and is imported when it runs."""

import argparse


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the benchmarks and their arguments."""
    from benchmarks import bench_arguments

    parser = commands.add_parser(
        "bench", help="measure", description="Measures, and prints what it measured."
    )
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    bench_arguments.add_serve(kinds)
    bench_arguments.add_router(kinds)
    bench_arguments.add_sim(kinds)
    bench_arguments.add_kv(kinds)
    bench_arguments.add_engine(kinds)
