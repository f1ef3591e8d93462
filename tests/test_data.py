"""Readers, splits and sources: every format, and one-line errors for bad input."""

from __future__ import annotations

import json
import mailbox
import os
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from sartor import sources
from sartor.data import readers
from sartor.data.generic import generic_corpus
from sartor.data.mails import own_words
from sartor.data.markup import html_to_text
from sartor.data.readers import read_folder
from sartor.data.split import split
from sartor.errors import BudgetError, DataError, OutputError, SourceError
from sartor.files import whole_file, whole_folder
from sartor.memory import cores
from sartor.plan import Budget, from_mask, parse_budget, to_mask
from sartor.sources import resolve
from sartor.storage import Checkpoint, claim_folder, give_up
from tests.conftest import texts


def read_one(tmp_path: Path, name: str, content: str | bytes) -> list[str]:
    file = tmp_path / "data" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [d.text for d in read_folder(file.parent).documents]


CHATS: dict[str, tuple[str, str]] = {
    "chatgpt": (
        "conversations.json",
        json.dumps(
            [
                {
                    "create_time": 1.0,
                    "mapping": {
                        "a": {
                            "message": {
                                "author": {"role": "user"},
                                "create_time": 1,
                                "content": {"parts": ["hello there"]},
                            }
                        },
                        "b": {"message": None},
                    },
                }
            ]
        ),
    ),
    "telegram": (
        "result.json",
        json.dumps(
            {
                "name": "x",
                "messages": [
                    {
                        "type": "message",
                        "date": "2024-01-02T10:00:00",
                        "from": "Ann",
                        "text": ["hello ", {"type": "bold", "text": "there"}],
                    }
                ],
            }
        ),
    ),
    "roles": ("chat.jsonl", json.dumps([{"role": "user", "content": "hello there"}])),
    "messages": ("m.json", json.dumps({"messages": [{"role": "user", "content": "hello there"}]})),
    "whatsapp": ("_chat.txt", "[01/02/2024, 10:11:12] Ann: hello there\n[01/02/2024, 10:12:12] Bob: <Media omitted>\n"),
    "whatsapp android": ("chat.txt", "01/02/24, 10:11 - Ann: hello there\n"),
    "html": (
        "a.html",
        "<html><head><title>no</title></head><body><p>hello <b>there</b></p><script>no()</script></body>",
    ),
    "csv": ("t.csv", "id,text\n1,hello there and a long text that goes on and on for more than forty characters\n"),
    "jsonl": ("t.jsonl", '{"text": "hello there"}\n'),
    "code": ("a.py", "def hello():\n    return 'hello there'\n"),
    "latin-1": ("l.txt", "hello there, caf\xe9".encode("latin-1")),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", CHATS)
def test_every_format_gives_its_text(kind: str, tmp_path: Path) -> None:
    found = read_one(tmp_path, *CHATS[kind])
    assert len(found) == 1
    assert "hello" in found[0]
    assert "there" in found[0]
    assert "omitted" not in found[0]
    assert "no()" not in found[0]


def message(i: int) -> EmailMessage:
    m = EmailMessage()
    m["Subject"], m["From"], m["Date"] = f"Trip {i}", "ann@example.org", f"Mon, {1 + i:02d} Jan 2024 10:00:00 +0000"
    m.set_content(
        f"My own words number {i}, write to bob@example.org.\n\nOn Monday Bob wrote:\n> quoted words\n-- \nAnn's signature\n"
    )
    return m


def test_mails_are_read_from_mbox_eml_and_maildir(tmp_path: Path) -> None:
    box = mailbox.mbox(tmp_path / "in.mbox")
    folder = mailbox.Maildir(tmp_path / "maildir")
    for i in range(3):
        box.add(message(i))
        folder.add(message(10 + i))
    box.flush()
    (tmp_path / "one.eml").write_bytes(bytes(message(20)))
    found = read_folder(tmp_path).documents
    assert len(found) == 7
    assert all(d.when for d in found)
    for d in found:
        assert "My own words" in d.text
        for foreign in ("quoted", "signature", "@example.org", "wrote:"):
            assert foreign not in d.text


def test_own_words_and_html_are_stable() -> None:
    assert own_words("a\n> b\nc") == "a\nc"
    assert html_to_text("<p>a</p><p>b</p>") == "a\n\nb"


def write_texts(folder: Path, documents: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:04d}.txt").write_text(text)
    return folder


def test_duplicates_never_cross_a_split(tmp_path: Path) -> None:
    base = texts("cook", 120, 3)
    near = [t.replace("butter", "margarine", 1) for t in base[:40]]
    corpus = split(read_folder(write_texts(tmp_path / "d", base + base[:30] + near)))
    parts = [*corpus.probe, *corpus.train, *corpus.validation, *corpus.test]
    assert corpus.dropped["exact duplicates"] >= 30
    assert corpus.dropped["near duplicates"] >= 35
    assert len(set(parts)) == len(parts) <= 121
    assert sum(corpus.counts().values()) == len(parts)


def test_a_split_is_the_same_for_a_seed_and_by_time_where_there_is_time(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "d", texts("cook", 120, 3))
    assert split(read_folder(folder), 1) == split(read_folder(folder), 1)
    lines = [
        json.dumps({"date": f"2024-01-{1 + i % 28:02d}T{i // 28:02d}:00:00", "text": t})
        for i, t in enumerate(texts("cook", 120, 4))
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert split(read_folder(tmp_path / "t.jsonl")).ordered_by_time


def one_line(error: pytest.ExceptionInfo[Any], *needed: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in needed:
        assert word in text, text


def test_bad_data_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as e:
        read_folder(tmp_path / "nowhere")
    one_line(e, "nowhere", "give")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as e:
        read_folder(tmp_path / "empty")
    one_line(e, "empty")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError) as e:
        read_folder(pictures)
    one_line(e, "1 pictures")
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "a.txt").write_bytes(bytes(range(256)) * 50)
    with pytest.raises(DataError) as e:
        read_folder(garbage)
    one_line(e, "binary")
    with pytest.raises(DataError) as e:
        split(read_folder(write_texts(tmp_path / "few", ["word " * 50])))
    one_line(e, "50 words", "7,000 words")


def test_bad_models_get_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SourceError) as e:
        resolve("/no/such/model")
    one_line(e, "no model", "pypi:NAME==VERSION")
    pickle = tmp_path / "m.bin"
    pickle.write_bytes(b"\x80\x04")
    with pytest.raises(SourceError) as e:
        resolve(str(pickle))
    one_line(e, "pickle", "safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SourceError) as e:
        resolve(str(tmp_path / "hf"))
    one_line(e, "pickle")
    broken = tmp_path / "m.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x05" * 40)
    with pytest.raises(SourceError) as e:
        resolve(str(broken))
    one_line(e, "damaged")
    with pytest.raises(SourceError) as e:
        resolve("pypi:name")
    one_line(e, "pypi:NAME==VERSION")


def test_sizes_are_read_or_explained() -> None:
    assert parse_budget("25%").share == 0.25
    assert parse_budget("67MB").size == 67_000_000
    assert parse_budget("64 MiB").size == 64 << 20
    for bad, word in (("64", "64MB or 64%"), ("64 apples", "apples"), ("big", "25%"), ("130%", "0% and 100%")):
        with pytest.raises(BudgetError) as e:
            parse_budget(bad)
        one_line(e, word)
    with pytest.raises(BudgetError):
        Budget(size=1, share=0.5)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputError) as e:
        claim_folder(tmp_path)
    one_line(e, "not empty", "--out")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_only_an_unfinished_job_of_ours_is_resumed_and_only_what_is_ours_removed(tmp_path: Path) -> None:
    theirs = tmp_path / "training" / "checkpoint"
    theirs.mkdir(parents=True)
    for name, content in (("step-1000.bin", "precious"), ("job.json", '{"name": "another program\'s"}')):
        (theirs / name).write_text(content)
    for resume in (False, True):
        with pytest.raises(OutputError) as e:
            claim_folder(theirs.parent, resume)
        one_line(e, "overwrites nothing", "another --out")
        assert "--resume" not in str(e.value)
    job = {"model": "m", "data": "d", "size": "25%", "seed": 0}
    point = Checkpoint(claim_folder(tmp_path / "ours"), job)
    with pytest.raises(OutputError) as e:
        claim_folder(tmp_path / "ours")
    one_line(e, "--resume")
    (point.folder / "note.txt").write_text("precious")
    Checkpoint(claim_folder(tmp_path / "ours", resume=True), job).clear()
    assert [f.name for f in point.folder.iterdir()] == ["note.txt"]
    with pytest.raises(OutputError) as e:
        Checkpoint(claim_folder(tmp_path / "other"), job) and Checkpoint(tmp_path / "other", job | {"seed": 1})
    one_line(e, "other options")
    assert claim_folder(tmp_path / "new", resume=True).is_dir()
    give_up(tmp_path / "new")
    give_up(tmp_path / "ours")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "ours", "training"]


def test_a_folder_of_two_jobs_is_the_first_ones_unless_it_lacks_something(tmp_path: Path) -> None:
    place = tmp_path / "models" / "m"
    with whole_folder(place) as mine, whole_folder(place) as theirs:
        (mine / "a").write_text("mine")
        (theirs / "a").write_text("theirs")
    assert (place / "a").read_text() == "theirs"  # the inner one was there first
    with whole_folder(place) as more:
        (more / "a").write_text("more")
        (more / "b").write_text("more")
    assert (place / "a").read_text() == "more"

    def broken_off() -> None:
        with whole_folder(place) as part:
            (part / "a").write_text("broken")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        broken_off()
    assert (place / "a").read_text() == "more"
    assert list(place.parent.iterdir()) == [place]


def test_whatsapp_messages_are_whole_and_in_one_order_of_days(tmp_path: Path) -> None:
    text = """1/2/24, 9:00 AM - Messages and calls are end-to-end encrypted
1/2/24, 9:01 AM - Anna: Shopping list:
- milk
- bread: dark
1/2/24, 9:05 AM - Ben: I omitted the eggs
1/14/24, 9:06 AM - Anna: <Media omitted>
1/14/24, 9:07 AM - Ben: thanks
"""
    file = tmp_path / "chat.txt"
    file.write_text(text)
    first, second = read_folder(file).documents
    assert first.text == "Anna: Shopping list:\n- milk\n- bread: dark\nBen: I omitted the eggs"
    assert second.text == "Ben: thanks"
    assert first.when is not None
    assert second.when is not None
    assert round((second.when - first.when) / 86400) == 12
    file.write_text(text.replace("1/14/24", "14/1/24"))
    first, second = read_folder(file).documents
    assert (first.when or 0) > (second.when or 0)  # the first of February, said out of order
    file.write_text(text.replace("1/14/24", "2/2/24"))
    first, second = read_folder(file).documents
    assert round(((second.when or 0) - (first.when or 0)) / 86400) in (1, 31)


def test_mail_in_folders_with_a_dot_and_large_boxes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("Mail/cur", "Mail/.Sent/cur", "Mail/.Sent/tmp", "Mail/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1").write_text(f"Subject: {folder}\n\nfrom {folder}\n")
    assert [d.text for d in read_folder(tmp_path / "Mail").documents] == [
        "Mail/.Sent/cur\n\nfrom Mail/.Sent/cur",
        "Mail/cur\n\nfrom Mail/cur",
    ]
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 10)
    box = mailbox.mbox(str(tmp_path / "all.mbox"))
    box.add("Subject: long\n\nlonger than ten bytes\n")
    box.flush()
    assert [d.text for d in read_folder(tmp_path / "all.mbox").documents] == ["long\n\nlonger than ten bytes"]


def a_mail(body: bytes, charset: str, kind: str = "plain") -> bytes:
    head = f"Subject: news\nContent-Type: text/{kind}; charset={charset}\nContent-Transfer-Encoding: 8bit\n\n"
    return head.encode() + body


def test_mails_are_read_in_the_code_that_they_name(tmp_path: Path) -> None:
    wanted = "Привет, Анна! It’s fine “now”"
    for n, (text, code, named) in enumerate(
        (
            (wanted, "utf-8", "utf-8"),
            (wanted[:13], "koi8-r", "koi8-r"),
            (wanted[15:], "cp1252", "windows-1252"),
            (wanted[15:], "cp1252", "iso-8859-1"),
            (wanted, "utf-8", "unheard-of"),
        )
    ):
        (tmp_path / f"{n}.eml").write_bytes(a_mail(text.encode(code), named))
        assert read_folder(tmp_path / f"{n}.eml").documents[0].text == f"news\n\n{text}"


def test_what_a_mail_quotes_is_left_out(tmp_path: Path) -> None:
    html = "<head><title>t</title><body><div>My answer</div><blockquote>Old words<div>and more</div></blockquote>Bye"
    (tmp_path / "a.eml").write_bytes(a_mail(html.encode(), "utf-8", "html"))
    plain = "My answer\n\nFrom: Anna\nSent: Monday\nTo: Ben\nSubject: news\n\nOld words\n"
    (tmp_path / "b.eml").write_bytes(a_mail(plain.encode(), "utf-8"))
    first, second = (d.text for d in read_folder(tmp_path).documents)
    assert "My answer" in first
    assert "Bye" in first
    assert second == "news\n\nMy answer"
    assert "Old" not in first
    assert "and more" not in first
    assert "Old words" in html_to_text(html)


def test_one_broken_record_does_not_take_the_others_along(tmp_path: Path) -> None:
    box = mailbox.mbox(str(tmp_path / "all.mbox"))
    for body in ("first words", "last words"):
        box.add(f"Subject: s\n\n{body}\n")
    box.add(
        "Subject: b\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n--x\nContent-Type: multipart/related\n\nz\n--x--\n"
    )
    box.flush()
    found = read_folder(tmp_path / "all.mbox")
    assert len(found.documents) == 2
    assert sum(found.dropped.values()) == 1
    lines = ['{"text": "one two"}', '{"text": "a\u2028b"}', '{"text": "half of a emoji \\ud83d"}', '{"text": "cut o']
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    found = read_folder(tmp_path / "n.jsonl")
    assert [d.text for d in found.documents][0] == "one two"
    assert found.dropped["malformed lines"] == 1
    assert all(d.text.encode() for d in found.documents)
    roles = [{"role": "user", "content": "hello there", "date": "2024-01-01"}]
    (tmp_path / "c.json").write_text(json.dumps({"messages": roles}))
    assert read_folder(tmp_path / "c.json").documents[0].text == "user: hello there"
    diary = "Preface.\n2024-01-05 10:30 Went for a walk\n2024-01-06 11:00 Dinner with Anna: fish\nTalked long\n"
    (tmp_path / "diary.txt").write_text(diary)
    assert read_folder(tmp_path / "diary.txt").documents[0].text == diary


def test_a_damaged_letter_does_not_make_a_text_latin(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("für die schöne Müllerin, grüße " * 9).encode() + b"\xff")
    (tmp_path / "b.txt").write_bytes("für die schöne “Müllerin”".encode("cp1252"))
    first, second = (d.text for d in read_folder(tmp_path).documents)
    assert first == "für die schöne Müllerin, grüße " * 9 + "\ufffd"
    assert second == "für die schöne “Müllerin”"


def test_a_copy_within_a_larger_document_does_not_cross_a_split(tmp_path: Path) -> None:
    notes = texts("cook", 60, 31)
    long = [" ".join(f"{w}{i}-{n}" for i, w in enumerate(t.split())) for n, t in enumerate(notes)]  # no two alike
    folder = write_texts(tmp_path / "merged", [*long, *(["\n\n".join(long)])])
    corpus = split(read_folder(folder))
    assert corpus.dropped["documents that mostly stand in others"] == 1
    assert_apart(corpus)
    one = "\n\n".join(long)
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "a.txt").write_text(f"{one}\n\n{one}")
    assert_apart(split(read_folder(tmp_path / "twice")))


def assert_apart(corpus: Any) -> None:
    """Hardly any eight words of the test stand in what shaped the model."""
    runs = lambda of: {tuple(w[i : i + 8]) for t in of for w in [t.split()] for i in range(len(w) - 7)}  # noqa: E731
    seen, test = runs([*corpus.train, *corpus.probe, *corpus.validation]), runs(corpus.test)
    assert len(test & seen) < 0.05 * len(test)


def test_undated_documents_are_trained_on_and_a_maildirs_own_files_are_not_read(tmp_path: Path) -> None:
    for name in ("cur", "new", "tmp"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(texts("cook", 60, 41)):
        head = f"Subject: s{i}\nDate: Mon, {1 + i % 28} Jan 20{10 + i // 28} 10:00:00 +0000\n\n"
        (tmp_path / "cur" / f"{i}").write_text(head + " ".join(f"{w}{i}" for w in text.split()))
    (tmp_path / "dovecot-uidlist").write_text("1 :17000.M159485P1\n" * 800)
    (tmp_path / "cur" / "undated").write_text("Subject: when\n\n" + "nobody knows when this was " * 40)
    corpus = split(read_folder(tmp_path))
    assert corpus.ordered_by_time
    everything = [*corpus.probe, *corpus.train, *corpus.validation, *corpus.test]
    assert not any("M159485P1" in t for t in everything)
    assert any("nobody knows" in t for t in corpus.train)


def test_what_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words of mine")
    read = Path.read_bytes

    def refused(file: Path) -> bytes:
        if file.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", refused)
    found = read_folder(tmp_path)
    assert len(found.documents) == 1
    assert found.dropped == {"unreadable files": 1}


def test_a_name_of_a_file_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sources, "_from_hub", lambda spec: asked.append(spec))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for spec in ("nowhere/model.gguf", "nowhere/net.onnx", "models/mine", "./a", "~/a"):
        with pytest.raises(SourceError) as e:
            resolve(spec)
        one_line(e, "no model at")
    assert not asked
    resolve("org/Model-2.5")
    assert asked == ["org/Model-2.5"]


def test_a_generic_folder_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello there")
    with pytest.raises(DataError) as e:
        generic_corpus(tmp_path, may_fetch=False)
    one_line(e, "--generic: the data hold 2 words")
    monkeypatch.setenv("SARTOR_GENERIC", str(tmp_path))
    with pytest.raises(DataError) as e:
        generic_corpus(None, may_fetch=False)
    one_line(e, "$SARTOR_GENERIC: ")


def test_masks_come_back() -> None:
    for kept in ([], [0], [3, 4, 9], list(range(10))):
        assert from_mask(to_mask(kept, 10)) == kept


def test_a_file_is_whole_or_as_it_was_also_where_two_jobs_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kept.json"
    file.write_text("old")

    def broken_off() -> None:
        with whole_file(file) as part:
            part.write_text("ha")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        broken_off()
    assert file.read_text() == "old"
    with whole_file(file) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with whole_file(file) as theirs:
            theirs.write_text("theirs")
        assert file.read_text() == "theirs"
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_threads_are_as_many_as_the_cores_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda of: {3}, raising=False)
    assert cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == (os.cpu_count() or 1)
