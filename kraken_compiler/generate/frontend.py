"""The work of rank 0: it takes prompts, has all ranks continue them, prints the result and nothing else."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kraken_compiler.backends.base import TextEngine
from kraken_compiler.errors import UsageError
from kraken_compiler.generate.engine import IDLE_SECONDS, GenerationRequest
from kraken_compiler.generate.lines import Lines
from kraken_compiler.generate.request import CHAT_TOKENS, CONTEXT, NEW_TOKENS, RunOptions
from kraken_compiler.generate.sampling import Sampling
from kraken_compiler.generate.tokenizer import TextCodec, noted_stop_tokens
from kraken_compiler.ir.size_checks import longest_allowed, token_rules
from kraken_compiler.standard_streams import write_out

_SIGN = "> "
_TITLE_CHARACTERS = 70
_SEED_BITS = 32
_NO_LIMIT = 1 << 30


def serve(engine: TextEngine, options: RunOptions) -> None:
    """Do all that the options, which have been checked, ask for.

    Raises:
        UsageError: It cannot be done.
        InputFileError: A file cannot be read.
    """
    if options.interactive:
        _converse(engine, options)
    else:
        _answer(engine, options)


# prompts that were given ---------------------------------------------------------------------------------------------


@dataclass
class _Timings:
    """Times at which tokens came, in seconds since the request."""

    start: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens_after_first: int = 0

    def count(self, tokens: int) -> None:
        self.last = time.perf_counter() - self.start
        if self.first is None:
            self.first = self.last
        else:
            self.tokens_after_first += tokens

    def to_dict(self) -> dict[str, float | None]:
        decoding = self.last - (self.first or 0.0)
        rate = self.tokens_after_first / decoding if self.tokens_after_first else None
        return {"time_to_first_token_s": self.first, "tokens_per_second": rate, "total_s": self.last}


def _answer(engine: TextEngine, options: RunOptions) -> None:
    codec = None if options.input_ids else TextCodec.of(engine.artifact, options.chat_template)
    texts = options.prompts()
    prompts = options.ids() if codec is None else [_encode(codec, text, options) for text in texts]
    request = _request(engine, prompts, options, codec, NEW_TOKENS if not options.chat else CHAT_TOKENS)
    notes = _notes(engine, request)
    for note in notes:
        engine.note(note)
    streaming = len(prompts) == 1 and not options.json
    stream = _Ids() if codec is None else codec.stream(_context(engine, prompts[0], options.chat))
    ids: list[list[int]] = [[] for _ in prompts]
    timings = _Timings()
    for tokens in engine.run(request):
        timings.count(sum(token is not None for token in tokens))
        for row, token in zip(ids, tokens):
            if token is not None:
                row.append(token)
        if streaming and tokens[0] is not None:
            _emit(stream.push(tokens[0]))
    if streaming:
        _emit(stream.finish() + "\n")
        return
    decoded_texts = [
        None if codec is None else _decode(codec, row, _context(engine, before, options.chat))
        for row, before in zip(ids, prompts)
    ]
    if options.json:
        results = [
            {
                "prompt": texts[index] if codec is not None else None,
                "prompt_ids": prompts[index],
                "ids": row,
                "text": decoded_texts[index],
                "finish_reason": "length" if len(row) == request.max_new_tokens else "eos",
            }
            for index, row in enumerate(ids)
        ]
        seed = request.sampling.seed if request.sampling.temperature else None
        document = {"results": results, "seed": seed, "timings": timings.to_dict(), "notes": notes}
        _emit(json.dumps(document, indent=1) + "\n")
    elif codec is None:
        _emit("".join(",".join(map(str, row)) + "\n" for row in ids))
    else:
        blocks = (
            f"--- {index}: {_title(text)}\n{out}\n" for index, (text, out) in enumerate(zip(texts, decoded_texts), 1)
        )
        _emit("\n".join(blocks))


def _encode(codec: TextCodec, text: str, options: RunOptions) -> list[int]:
    if not options.chat:
        return codec.encode(text)
    return codec.encode_chat([*_system(options), {"role": "user", "content": text}])


def _context(engine: TextEngine, prompt: Sequence[int], chat: bool | None) -> Sequence[int]:
    """The tokens that the output continues; none for an answer, which stands by itself."""
    return () if chat or engine.reads_source else prompt


def _decode(codec: TextCodec, ids: Sequence[int], before: Sequence[int]) -> str:
    stream = codec.stream(before)
    return "".join(stream.push(token) for token in ids) + stream.finish()


def _title(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 3] + "..."


class _Ids:
    """Token ids as text, separated by commas."""

    def __init__(self) -> None:
        self._begun = False

    def push(self, token: int) -> str:
        text = f"{',' * self._begun}{token}"
        self._begun = True
        return text

    def finish(self) -> str:
        return ""


# a conversation ------------------------------------------------------------------------------------------------------


def _converse(engine: TextEngine, options: RunOptions) -> None:
    """Continue, or answer, every line of standard input."""
    engine.progress("loading the tokenizer")
    codec = TextCodec.of(engine.artifact, options.chat_template)
    terminal = options.terminal or (os.isatty(0) and os.isatty(1))
    chat = _chats(engine, codec, terminal) if options.chat is None else options.chat
    manifest = engine.artifact.manifest
    rules = token_rules(manifest.call, manifest.inputs)
    capacity = options.max_context or longest_allowed(rules, min(CONTEXT, engine.positions, _max_positions(engine)))
    if capacity > _max_positions(engine):
        note = f"there is room for {capacity:,} tokens, the model was made for {_max_positions(engine):,} positions"
        _tell(engine, f"{note} (max_position_embeddings): what it writes beyond them may be nonsense", terminal)
    history = _system(options)
    lines = Lines()
    has_input = False
    while True:
        try:
            line = _next_line(engine, lines, terminal)
            if line is None or line.strip() == "/exit":
                break
            if line.strip() == "/reset":
                history = _system(options)
            if line.strip() in ("", "/reset"):
                continue
            has_input = True
            messages = [*history, {"role": "user", "content": line}]
            prompt = codec.encode_chat(messages) if chat else codec.encode(line)
            answer = _stream(engine, codec, prompt, options, chat, capacity)
        except UsageError as error:
            if not terminal:
                raise
            _emit(f"error: {error}\n")
            continue
        if chat:
            history = [*messages, {"role": "assistant", "content": answer}]
    if line is not None:
        return
    if terminal:
        _emit("\n")
    elif not has_input:
        raise UsageError("give --prompt TEXT, --input-ids 1,2,3, or lines on standard input")


def _chats(engine: TextEngine, codec: TextCodec, terminal: bool) -> bool:
    """True if lines are answered where no option says so: there is a chat template, and it works."""
    if not codec.can_chat:
        return False
    try:
        codec.encode_chat([{"role": "user", "content": "?"}])
    except UsageError as error:
        _tell(engine, f"lines are continued and not answered: {error}", terminal)
        return False
    return True


def _next_line(engine: TextEngine, lines: Lines, terminal: bool) -> str | None:
    """The next line, None at the end of the input; meanwhile the other ranks are told that there is none."""
    if terminal:
        _emit(_SIGN)
    while (line := lines.poll(IDLE_SECONDS)) is None:
        if lines.ended:
            return None
        engine.idle()
    return line


def _stream(
    engine: TextEngine, codec: TextCodec, prompt: list[int], options: RunOptions, chat: bool, capacity: int
) -> str:
    """Print an answer as it grows; returns it."""
    begins = _answer_begins(engine) if engine.reads_source else prompt
    room = capacity - len(begins)
    if room < 1:
        raise UsageError(
            f"this needs {len(prompt)} tokens and there is room for {capacity}; "
            "/reset begins a new conversation, --max-context gives more room"
        )
    new_tokens = options.max_new_tokens or (CHAT_TOKENS if chat else NEW_TOKENS)
    stream = codec.stream(_context(engine, prompt, chat))
    pieces = []
    for (token,) in engine.run(_request(engine, [prompt], options, codec, min(new_tokens, room), capacity)):
        assert token is not None
        pieces.append(stream.push(token))
        _emit(pieces[-1])
    pieces.append(stream.finish())
    _emit(pieces[-1] + "\n")
    return "".join(pieces)


# both ----------------------------------------------------------------------------------------------------------------


def _request(
    engine: TextEngine,
    prompts: Sequence[Sequence[int]],
    options: RunOptions,
    codec: TextCodec | None,
    new_tokens: int,
    capacity: int | None = None,
) -> GenerationRequest:
    if not all(prompts):
        raise UsageError("the prompt has no tokens")
    seed = options.seed if options.seed is not None else secrets.randbits(_SEED_BITS)
    new_tokens = options.max_new_tokens or new_tokens if capacity is None else new_tokens
    stop_tokens = codec.eos if codec is not None else noted_stop_tokens(engine.artifact)
    sources: Sequence[Sequence[int]] = ()
    if engine.reads_source:
        sources, prompts = prompts, [_answer_begins(engine)] * len(prompts)
    return GenerationRequest(
        prompts=prompts,
        max_new_tokens=new_tokens,
        capacity=capacity or options.max_context or max(map(len, prompts)) + new_tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, seed),
        eos=() if options.ignore_eos else sorted(stop_tokens),
        sources=sources,
    )


def _answer_begins(engine: TextEngine) -> Sequence[int]:
    """The tokens that an encoder-decoder's answer begins with."""
    begins = engine.artifact.manifest.source.answer_begins
    if not begins:
        raise UsageError("cannot generate: the source's config names no decoder_start_token_id")
    return begins


def _system(options: RunOptions) -> list[dict[str, str]]:
    return [{"role": "system", "content": options.system}] if options.system else []


def _max_positions(engine: TextEngine) -> int:
    """The longest sequence that the model was made for, by the source's config."""
    return engine.artifact.manifest.source.max_positions or _NO_LIMIT


def _notes(engine: TextEngine, request: GenerationRequest) -> list[str]:
    """Notes for a user on a request that can be carried out."""
    max_positions, longest = _max_positions(engine), max(map(len, (*request.prompts, *request.sources)))
    total = max(map(len, request.prompts)) + request.max_new_tokens
    if max(longest, total) <= max_positions:
        return []
    what = f"the prompt takes {longest:,}" if longest > max_positions else f"prompt and new tokens take {total:,}"
    return [
        f"{what} positions, the model was made for {max_positions:,} (max_position_embeddings): "
        "what it writes beyond them may be nonsense"
    ]


def _tell(engine: TextEngine, note: str, terminal: bool) -> None:
    """Write a note for a user: to a terminal at once, else beside the output."""
    if terminal:
        _emit(f"note: {note}\n")
    else:
        engine.note(note)


def _emit(text: str) -> None:
    write_out(text)
