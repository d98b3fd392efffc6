"""One device that generates text with ONNX Runtime: `python -m kraken_compiler.runtime.onnx_worker DIR --prompt TEXT`.

`kraken-run --backend onnx` starts it on this machine. So can anything that starts a process per device, on one or on
several machines, with `RANK` and `WORLD_SIZE`, and with `KRAKEN_MEET` as HOST:PORT where rank 0 is to listen (or, where
nobody else listens there, `MASTER_ADDR` and `MASTER_PORT`).

Imports no torch. For text, rank 0 loads the tokenizer with transformers, which imports torch where it is installed.
"""

from kraken_compiler.runtime.import_path import leave_working_directory_out


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    # Imported here, when the working directory can no longer get in the way.
    from kraken_compiler.runtime.onnx_rank import run_rank
    from kraken_compiler.runtime.worker_command import run_worker

    run_worker(run_rank, "kraken_compiler.runtime.onnx_worker", __doc__ or "", arguments)


if __name__ == "__main__":
    leave_working_directory_out()
    main()
