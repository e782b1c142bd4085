"""DataConfig: one source of data, three shares, and flags that say so."""

import argparse

import pytest

from megatron_midus.config.data import DataConfig
from megatron_midus.config.fields import add_arguments, from_namespace


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser, DataConfig)
    return from_namespace(DataConfig, parser.parse_args(arguments))


def test_flags_are_megatrons():
    config = parse(
        "--data-path", "0.3", "a", "0.7", "b", "--split", "90,10,0", "--seq-length", "77", "--eod-mask-loss",
        "--dataloader-type", "cyclic", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "t",
    )  # fmt: skip
    assert config.data_path == ["0.3", "a", "0.7", "b"] and config.has_data
    assert (config.seq_length, config.eod_mask_loss, config.dataloader_type) == (77, True, "cyclic")
    assert parse() == DataConfig() and not DataConfig().has_data and parse("--mock-data").has_data


@pytest.mark.parametrize(
    "split, shares",
    [(None, (0.969, 0.03, 0.001)), ("9,1", (0.9, 0.1, 0)), ("5", (1, 0, 0)), (" 2, 1 ,1", (0.5, 0.25, 0.25))],
)
def test_split_fractions(split, shares):
    assert DataConfig(split=split).split_fractions() == pytest.approx(shares, abs=1e-12)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": "a,b,c"}, "is not three shares"),
        ({"split": "1,2,3,4"}, "is not three shares"),
        ({"split": "-1,2,3"}, "is not three shares"),
        ({"split": "0,0,0"}, "is not three shares"),
        ({"split": "nan,1,1"}, "is not three shares"),
        ({"split": ""}, "is not three shares"),
        ({"data_path": ["a"], "mock_data": True}, "--data-path and --mock-data were given together"),
        ({"data_path": ["a"], "valid_data_path": ["b"]}, "--data-path and --valid-data-path were given together"),
        ({"train_data_path": ["a"], "split": "1,1,1"}, "does not apply to --train-data-path"),
        ({"seq_length": 0}, "seq_length=0"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
