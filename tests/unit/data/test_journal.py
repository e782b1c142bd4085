"""The journal: what was committed is found again and nothing else, one process at a time, whole or absent."""

import json

import pytest

from megatron_midus.data.journal import Journal

SETTINGS = {"tokenizer": {"class": "x"}, "inputs": ["a 1", "b 2"]}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "journal"


def write_and_stop(directory, committed, lost, **options):
    """A run that commits some bytes, writes more and ends."""
    with pytest.raises(KeyboardInterrupt), Journal(directory, SETTINGS, **options) as journal:
        journal.stream("data").write(committed)
        journal.commit({"done": len(committed)})
        journal.stream("data").write(lost)
        raise KeyboardInterrupt


def test_only_what_was_committed_counts(directory, tmp_path):
    write_and_stop(directory, b"abc", b"lost")
    write_and_stop(directory, b"defg", b"lost too")
    with Journal(directory, SETTINGS) as journal:
        assert journal.state == {"done": 4}
        journal.stream("data").write(b"!")
        journal.commit({})
        journal.finish({"data": str(tmp_path / "target")})
    assert (tmp_path / "target").read_bytes() == b"abcdefg!"
    assert not directory.exists()


def test_a_run_that_committed_nothing_leaves_nothing(directory):
    with pytest.raises(KeyboardInterrupt), Journal(directory, SETTINGS) as journal:
        journal.stream("data").write(b"abc")
        raise KeyboardInterrupt
    assert not directory.exists()


def test_other_settings(directory):
    write_and_stop(directory, b"abc", b"")
    for other, difference in [
        ({**SETTINGS, "tokenizer": {"class": "y"}}, 'tokenizer {"class": "x"} there, {"class": "y"} here'),
        ({**SETTINGS, "inputs": ["a 1", "b 3"]}, 'inputs "b 2" there, "b 3" here'),
        ({**SETTINGS, "inputs": ["a 1"]}, 'inputs "b 2" there, null here'),
        ({**SETTINGS, "more": 1}, "more null there, 1 here"),
    ]:
        with pytest.raises(ValueError, match="is an unfinished run that differs") as error, Journal(directory, other):
            pass
        assert difference in str(error.value) and "\n" not in str(error.value)
    with Journal(directory, {**SETTINGS, "more": 1}, restart=True) as journal:
        assert journal.state is None and journal.stream("data").tell() == 0


def test_one_process_at_a_time(directory):
    with Journal(directory, SETTINGS) as journal:
        with pytest.raises(ValueError, match="another process is working in"), Journal(directory, SETTINGS):
            pass
        journal.stream("data").write(b"still there")
        journal.commit({})
    with Journal(directory, SETTINGS) as journal:
        assert journal.state == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}'])
def test_damaged_state(directory, content):
    write_and_stop(directory, b"abc", b"")
    (directory / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged; delete"), Journal(directory, SETTINGS):
        pass


def test_data_that_vanished(directory):
    write_and_stop(directory, b"abc", b"")
    (directory / "data").write_bytes(b"ab")
    with pytest.raises(ValueError, match="data is shorter than its run left it"), Journal(directory, SETTINGS):
        pass
    assert json.loads((directory / "state.json").read_text())["sizes"] == {"data": 3}


def test_finishing_can_be_repeated(directory, tmp_path):
    write_and_stop(directory, b"abc", b"")
    (directory / "data").rename(tmp_path / "target")
    with Journal(directory, SETTINGS) as journal:
        journal.finish({"data": str(tmp_path / "target")})
    assert (tmp_path / "target").read_bytes() == b"abc" and not directory.exists()
