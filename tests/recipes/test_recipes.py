"""What every recipe in the table promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsys_engine.data import stdlib_corpus, write_token_file
from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.evaluation import ngram_baselines
from mlsys_engine.models import GPTConfig
from mlsys_engine.recipes import (
    DEFAULT_RECIPE,
    RECIPES,
    TrainingSettings,
    recipe_class,
    recipe_from_record,
    recorded_settings,
)
from mlsys_engine.tracking import json_files

_MODEL = GPTConfig(num_layers=1, num_heads=2, width=16, context_length=32)
_TRAINING = TrainingSettings(steps=3, batch_size=4, eval_samples=8, max_grad_norm=None, seed=5)


@pytest.fixture(params=sorted(RECIPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.tokens"
    write_token_file(path, np.arange(8000) % 251)
    return path


def _small(name: str, token_file: Path, **overrides: Any) -> Any:
    own: dict[str, dict[str, Any]] = {
        "gpt-bytes": {"corpus_bytes": 200_000},
        "gpt-file": {"tokens": token_file},
    }
    return recipe_class(name)(training=_TRAINING, model=_MODEL, **{**own[name], **overrides})


def test_the_default_recipe_is_in_the_table() -> None:
    assert DEFAULT_RECIPE in RECIPES


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gpt-bytes'"):
        recipe_class("gpt-byte")


def test_a_recipe_is_frozen_and_says_what_it_is(name: str) -> None:
    kind = recipe_class(name)
    assert kind.__dataclass_params__.frozen and kind.__doc__ and "\n" not in kind.__doc__


def test_a_recipe_survives_the_journey_through_its_record(name: str, token_file: Path) -> None:
    recipe = _small(name, token_file)
    manifest = {"config": json.loads(json_files.dumps(recorded_settings(name, recipe)))}
    assert recipe_from_record(manifest) == (name, recipe)


def test_a_recipe_builds_the_same_training_every_time(name: str, token_file: Path) -> None:
    recipe = _small(name, token_file)
    recipe.check(2)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = recipe.build(), recipe.build(with_baselines=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.data_manifest == second.data_manifest
    assert {"fingerprint", "description", "unit"} <= set(first.data_manifest)
    assert second.baselines == {}
    assert first.train_loader.batch_size == 4 and len(first.eval_loader.dataset) == 8  # type: ignore[arg-type]


def test_the_model_takes_the_batches_of_both_loaders(name: str, token_file: Path) -> None:
    run = _small(name, token_file).build(with_baselines=False)
    for loader in (run.train_loader, run.eval_loader):
        batch = next(iter(loader))
        assert batch["input_ids"].shape[1] == _MODEL.context_length
        assert torch.isfinite(run.model(**batch).loss)


def test_byte_baselines_are_measured_on_the_windows_that_the_model_is_evaluated_on(token_file: Path) -> None:
    run = _small("gpt-bytes", token_file).build()
    windows = torch.cat([batch["input_ids"] for batch in run.eval_loader]).numpy()
    assert windows.shape == (8, _MODEL.context_length)
    assert run.baselines == ngram_baselines(stdlib_corpus(200_000).train, windows)
    assert run.data_manifest["unit"] == "byte"


def test_validation_windows_are_spread_over_the_whole_file(token_file: Path) -> None:
    loader = _small("gpt-file", token_file, validation_share=0.5).build().eval_loader
    chosen = list(loader.dataset.indices)  # type: ignore[attr-defined]
    assert chosen[0] == 0 and chosen[-1] == len(loader.dataset.dataset) - 1  # type: ignore[attr-defined]
    assert len(set(chosen)) == 8


def test_training_and_validation_of_one_token_file_do_not_overlap(token_file: Path) -> None:
    run = _small("gpt-file", token_file).build()
    manifest = run.data_manifest
    assert manifest["train_tokens"] + manifest["validation_tokens"] == 8000
    assert manifest["validation_tokens"] == 400


def test_a_missing_token_file_is_refused_before_training(tmp_path: Path) -> None:
    recipe = _small("gpt-file", tmp_path / "nothing.tokens")
    with pytest.raises(DataError, match="does not exist"):
        recipe.check(1)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.tokens"
    write_token_file(path, np.arange(4000))
    with pytest.raises(DataError, match=r"vocab-size is 256\. .* Set --model.vocab-size to 3800 or more"):
        _small("gpt-file", path).build()


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_that_leaves_no_data_is_refused(share: float, token_file: Path) -> None:
    with pytest.raises(ConfigError, match="--validation-share"):
        _small("gpt-file", token_file, validation_share=share)


def test_a_vocabulary_smaller_than_a_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 256"):
        recipe_class("gpt-bytes")(model=dataclasses.replace(_MODEL, vocab_size=128))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no recipe"),
        ({"recipe": "gpt-bytes"}, "names no recipe"),
        ({"recipe": "gpt-bytes", "settings": {"modle": {}}}, "the field 'modle'.*Did you mean 'model'"),
        ({"recipe": "gone", "settings": {}}, "no recipe named 'gone'"),
    ],
)
def test_a_record_that_cannot_be_started_again_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_record({"config": config})
