"""One rank that generates text: `python -m kraken_compiler.generate.worker DIR --prompt TEXT`.

`kraken-run` starts it on this machine. On several, torchrun does, with the same options on all of them:
`PYTHONSAFEPATH=1 torchrun --nnodes 2 --nproc-per-node 2 ... -m kraken_compiler.generate.worker DIR --prompt TEXT`.
So can anything that starts a process per lane with `RANK` and `WORLD_SIZE`, and with `KRAKEN_MEET` as HOST:PORT where
rank 0 is to listen (or, where nobody else listens there, `MASTER_ADDR` and `MASTER_PORT`).

Imports what the artifact's backend needs and nothing else; for text, rank 0 also loads the tokenizer with transformers.
"""

from kraken_compiler.ranks.import_path import leave_working_directory_out


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    # Imported here, when the working directory can no longer get in the way.
    from kraken_compiler.generate.run_rank import run_worker

    run_worker(__doc__ or "", arguments)


if __name__ == "__main__":
    leave_working_directory_out()
    main()
