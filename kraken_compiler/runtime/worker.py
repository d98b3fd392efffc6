"""One rank that generates text: `python -m kraken_compiler.runtime.worker DIR --prompt TEXT`.

`kraken-run` starts it on this machine; torchrun starts it on several, with the same options:
`PYTHONSAFEPATH=1 torchrun --nnodes 2 --nproc-per-node 2 ... -m kraken_compiler.runtime.worker DIR --prompt TEXT`.
"""

from kraken_compiler.runtime.import_path import leave_working_directory_out


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    # Imported here, when the working directory can no longer get in the way.
    from kraken_compiler.runtime.torch_rank import run_rank
    from kraken_compiler.runtime.worker_command import run_worker

    run_worker(run_rank, "kraken_compiler.runtime.worker", __doc__ or "", arguments)


if __name__ == "__main__":
    leave_working_directory_out()
    main()
