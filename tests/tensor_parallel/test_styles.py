"""Style texts and the shardings that they mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.tensor_parallel.given import plan_of_model, styles_of_plan
from mlsys_engine.tensor_parallel.styles import parse_style, shardings, style_texts


class Conv1D(nn.Module):
    """A projection with a transposed weight, as in the GPT-2 code."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": Conv1D(12, 4), "out": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
            for _ in range(2)
        )
        self.experts = Experts()
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tok.weight


def test_column_cuts_outputs_with_the_bias_and_row_cuts_inputs_without_it():
    found = shardings(Model(), [("layers.0.out", "column"), ("layers.1.out", "row")], 2)
    assert {name: sharding.dim for name, sharding in found.items()} == {
        "layers.0.out.weight": 0,
        "layers.0.out.bias": 0,
        "layers.1.out.weight": 1,
    }
    assert found["layers.0.out.weight"].parts == (((0, 2),), ((2, 4),))


def test_a_transposed_projection_is_cut_along_the_other_dim():
    found = shardings(Model(), [("layers.0.qkv", "column:4,4,4"), ("layers.1.qkv", "row")], 2)
    assert found["layers.0.qkv.weight"].dim == 1
    assert found["layers.0.qkv.weight"].parts == (((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12)))
    assert found["layers.0.qkv.bias"].parts == found["layers.0.qkv.weight"].parts
    assert found["layers.1.qkv.weight"].dim == 0
    assert "layers.1.qkv.bias" not in found


def test_an_uneven_vocabulary_gives_the_first_ranks_one_row_more():
    found = shardings(Model(), [("tok", "vocabulary")], 3)
    assert found["tok.weight"].parts == (((0, 3),), ((3, 5),), ((5, 7),))


def test_a_tied_head_and_table_are_one_parameter_that_is_cut_one_way():
    model = Model()
    assert set(shardings(model, [("tok", "vocabulary"), ("head", "column")], 2)) == {"tok.weight"}
    with pytest.raises(ConfigError, match=r"(?s)'tok' and 'head'.*cut one way.*column"):
        shardings(model, [("tok", "vocabulary"), ("head", "row")], 2)


def test_parameters_of_three_dims_are_cut_by_their_own_names():
    texts = [("experts.gate_up_proj", "dim1:6,6"), ("experts.down_proj", "dim2")]
    found = shardings(Model(), texts, 2)
    assert found["experts.gate_up_proj"].parts == (((0, 3), (6, 9)), ((3, 6), (9, 12)))
    assert (found["experts.down_proj"].dim, found["experts.down_proj"].parts) == (2, (((0, 3),), ((3, 6),)))


def test_shardings_written_as_texts_read_back_the_same():
    model = Model()
    texts = [
        ("tok", "vocabulary"),
        ("layers.0.qkv", "column:4,4,4"),
        ("layers.0.out", "row"),
        ("layers.1.out", "column"),
        ("layers.1.norm.weight", "dim0"),
        ("experts.gate_up_proj", "dim1:6,6"),
    ]
    found = shardings(model, texts, 3 - 1)
    written = style_texts(model, found, 2)
    assert dict(written) == dict(texts)
    assert shardings(model, written, 2) == found


def test_patterns_and_hugging_face_words_become_texts():
    plan = {
        "tok": "embedding_rowwise",
        "layers.*.qkv": "packed_colwise",
        "layers.*.out": "rowwise",
        "layers.1.out": "colwise_rep",
        "layers.*.norm": "sequence_parallel",
        "experts.gate_up_proj": "packed_colwise",
        "experts.down_proj": "rowwise",
    }
    assert dict(styles_of_plan(Model(), plan)) == {
        "tok": "vocabulary",
        "layers.0.qkv": "column:6,6",
        "layers.1.qkv": "column:6,6",
        "layers.0.out": "row",
        "layers.1.out": "column",
        "experts.gate_up_proj": "column:6,6",
        "experts.down_proj": "row",
    }


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layers.*.q_proj": "colwise"}, r"'layers\.\*\.q_proj' in a tensor-parallel plan"),
        ({"layers.0.out": "colwize"}, r"(?s)'colwize' for 'layers\.0\.out'.*Did you mean"),
        ({"layers.0.out": 3}, "A style is a text"),
    ],
)
def test_a_plan_with_an_unknown_name_or_word_is_refused(plan, message):
    with pytest.raises(ConfigError, match=message):
        styles_of_plan(Model(), plan)


@pytest.mark.parametrize(
    ("fqn", "text", "message"),
    [
        ("layers.0.norm", "column", "a LayerNorm"),
        ("layers.0.qkv", "column:4,4", r"add up to 12, these to 8"),
        ("layers.2.qkv", "column", r"'layers\.2\.qkv' in a tensor-parallel plan"),
        ("experts.down_proj", "dim3", "dims 0 to 2"),
        ("tok", "rows", "The style 'rows'"),
    ],
)
def test_a_style_that_does_not_fit_is_refused(fqn, text, message):
    with pytest.raises(ConfigError, match=message):
        shardings(Model(), [(fqn, text)], 2)


def test_more_ranks_than_elements_is_refused_with_a_size_that_works():
    with pytest.raises(ConfigError, match="at most 4"):
        shardings(Model(), [("layers.0.out", "column")], 5)


def test_a_model_without_a_plan_of_its_own_says_so():
    with pytest.raises(ConfigError, match='plan="auto"'):
        plan_of_model(Model())


def test_style_texts_are_read_and_written_alike():
    for text in ("column", "row", "vocabulary", "features", "dim2:3,4", "column:768,768,768"):
        assert str(parse_style(text)) == text
