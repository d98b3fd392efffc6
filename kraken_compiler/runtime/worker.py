"""One rank that generates text: `python -m kraken_compiler.runtime.worker DIR --prompt TEXT --max-new-tokens K`.

`kraken-run` starts it on this machine; torchrun starts it on several:
`torchrun --nnodes 2 --nproc-per-node 2 ... -m kraken_compiler.runtime.worker DIR --prompt TEXT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from kraken_compiler.artifact.manifest import Manifest
from kraken_compiler.artifact.read import Artifact
from kraken_compiler.backends.torch_dist.rank_program import RankProgram
from kraken_compiler.errors import UsageError
from kraken_compiler.runtime.generate import greedy
from kraken_compiler.runtime.logits import logits_function
from kraken_compiler.runtime.session import Session, load_rank_program, rank_session


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate as this rank; rank 0 prints the continuation, and nothing else, to standard output."""
    options = _parser().parse_args(arguments)
    with rank_session(options.timeout, options.device) as session:
        artifact, program = load_rank_program(options.artifact, session)
        if options.input_ids is not None:
            tokens = _tokens(program, artifact.manifest, session, options.input_ids, options.max_new_tokens, ())
            _print_ids(tokens, session)
            return
        tokenizer = _tokenizer(artifact)
        prompt = tokenizer(options.prompt)["input_ids"]
        if not prompt:
            raise UsageError("the prompt has no tokens")
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        tokens = _tokens(program, artifact.manifest, session, prompt, options.max_new_tokens, eos)
        _print_text(tokens, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), session)


def _tokens(
    program: RankProgram,
    manifest: Manifest,
    session: Session,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos: Sequence[int],
) -> Iterable[int]:
    def first_rank_decides(choice: Tensor) -> Tensor:
        dist.broadcast(choice, src=0)
        return choice

    logits_of = logits_function(manifest.inputs, manifest.call, program.run_flat)
    tokens = greedy(logits_of, prompt, max_new_tokens, eos=eos, agree=first_rank_decides, device=session.device)
    for done, token in enumerate(tokens, start=1):
        session.status.progress(f"generating token {done + 1}")
        yield token


def _print_ids(tokens: Iterable[int], session: Session) -> None:
    for position, token in enumerate(tokens):
        _emit(f"{',' * (position > 0)}{token}", session)
    _emit("\n", session)


def _print_text(tokens: Iterable[int], decode: Callable[[list[int]], str], session: Session) -> None:
    """Print text as it grows; characters of several tokens are held back until they are whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\ufffd"):
            _emit(text[len(shown) :], session)
            shown = text
    _emit(decode(ids)[len(shown) :] + "\n", session)


def _emit(text: str, session: Session) -> None:
    if session.rank == 0:
        print(text, end="", flush=True)


def _tokenizer(artifact: Artifact) -> Any:
    if artifact.tokenizer is None:
        raise UsageError(f"{artifact.directory} has no tokenizer; give token ids with --input-ids 1,2,3")
    artifact.verify(*artifact.tokenizer_files)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(artifact.tokenizer, local_files_only=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kraken_compiler.runtime.worker", description=__doc__)
    parser.add_argument("artifact", help="the artifact directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--input-ids", type=_ids, help="token ids to continue, e.g. 1,2,3; prints ids")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if every rank can have a device")
    parser.add_argument("--timeout", type=float, help="seconds after which a collective without answer fails")
    return parser


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of token ids like 1,2,3") from None


if __name__ == "__main__":
    main()
