import json

import pytest

from remoe.data import DataConfig, embedded, open_corpus


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    path, manifest = embedded.embedded_corpus(cache)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return cache, path, manifest, rows


def test_every_domain_that_python_and_torch_ship_is_found(gathered):
    _, _, manifest, rows = gathered
    found = {row["domain"] for row in manifest if row["documents"]}
    assert found >= {"Python code", "English docs", "C++ headers", "Type stubs", "Character names", "Licences"}
    assert found == {row["meta"]["pile_set_name"] for row in rows}


def test_domains_weigh_about_the_same(gathered):
    sizes = {row["domain"]: row["bytes"] for row in gathered[2]}
    assert max(sizes.values()) < embedded.DOMAIN_BYTES + embedded.DOCUMENT_BYTES[1]
    assert min(sizes[name] for name in sizes if name != "Licences") > 0.5 * embedded.DOMAIN_BYTES


def test_no_document_comes_twice_and_no_python_file_is_both_code_and_prose(gathered):
    rows = gathered[3]
    assert len({row["text"] for row in rows}) == len(rows)
    files = [
        {r["meta"]["file"] for r in rows if r["meta"]["pile_set_name"] == d} for d in ("Python code", "English docs")
    ]
    assert not files[0] & files[1]


def test_gathering_again_gives_the_same_bytes(gathered, tmp_path):
    again, _ = embedded.embedded_corpus(tmp_path)
    assert again.read_bytes() == gathered[1].read_bytes()
    assert again.name == gathered[1].name


def test_it_is_gathered_once(gathered, monkeypatch):
    monkeypatch.setattr(embedded, "_gather", lambda: pytest.fail("gathered again"))
    path, manifest = embedded.embedded_corpus(gathered[0])
    assert path == gathered[1]
    assert manifest == gathered[2]


def test_a_domain_that_is_missing_is_said_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        embedded, "SOURCES", {"Character names": embedded._character_names, "Man pages": lambda: iter(())}
    )
    embedded.embedded_corpus(tmp_path)
    assert "Man pages        not installed" in capsys.readouterr().out


def test_it_opens_as_a_corpus_with_every_domain_on_both_sides(gathered):
    corpus = open_corpus(DataConfig(train="embedded", cache=gathered[0]))
    assert corpus.train.domains == corpus.validation.domains == tuple(embedded.SOURCES)
    assert all(min(counts.values()) > 5000 for counts in corpus.manifest["domains"].values())
    assert corpus.manifest["embedded"] == gathered[2]
