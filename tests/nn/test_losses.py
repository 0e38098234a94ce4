"""Every loss module gives what its function gives, with its options passed on."""

import inspect

import pytest
import torch

from leafkern import ops
from leafkern.errors import InputError
from leafkern.nn import losses

FUNCTIONS = {
    losses.AlignmentLoss: ops.alignment_loss,
    losses.SimilarityLoss: ops.similarity_loss,
    losses.RelativeSimilarityLoss: ops.relative_similarity_loss,
    losses.DistillLoss: ops.distill_loss,
    losses.InfoNCELoss: ops.info_nce,
    losses.SoftLabelLoss: ops.soft_label_loss,
}
PASSED_AT_THE_CALL = {"mixed", "ids", "weight"}
MIXING = {"listwise", "pairwise", "mix_temperature"}


@pytest.mark.parametrize("module", FUNCTIONS, ids=lambda module: module.__name__)
def test_options_and_their_defaults_are_the_functions(module):
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    expected = options(FUNCTIONS[module])
    found = options(module.__init__)
    assert {name: found[name] for name in found.keys() - MIXING} == {
        name: expected[name] for name in expected.keys() - PASSED_AT_THE_CALL
    }


def test_modules_equal_functions():
    student, other = torch.randn(6, 8), torch.randn(6, 8)
    negatives, teacher = torch.randn(6, 3, 8), [torch.randn(6, 5), torch.randn(6, 3)]
    options = {"dims": [8, 4], "teacher_weights": [1, 2]}
    assert torch.equal(losses.AlignmentLoss(kind="l2")(student, other), ops.alignment_loss(student, other, kind="l2"))
    head = torch.randn(8, 8)
    aligned = losses.AlignmentLoss(normalize=True)(student, other, head)
    assert torch.equal(aligned, ops.alignment_loss(student, other, normalize=True, weight=head))
    for module, function in list(FUNCTIONS.items())[1:3]:
        assert torch.equal(module(**options)(student, teacher), function(student, teacher, **options))
    distilled = losses.DistillLoss(weights=(1, 2, 3), ties="reference", **options)(student, teacher)
    assert distilled == ops.distill_loss(student, teacher, weights=(1, 2, 3), ties="reference", **options)
    focal = {"temperature": 0.1, "gamma": 0.5}
    found = losses.InfoNCELoss(**focal)(student, other, negatives, ids=(torch.arange(6), torch.zeros(6, 3).long()))
    ids = (torch.arange(6), torch.zeros(6, 3).long())
    assert torch.equal(found, ops.info_nce(student, other, negatives, ids=ids, **focal))
    scores = torch.randn(6, 3)
    soft = losses.SoftLabelLoss(temperature=0.2)(student, negatives, scores)
    assert torch.equal(soft, ops.soft_label_loss(student, negatives, scores, temperature=0.2))


def test_mixing_draws_negatives_of_its_own():
    queries, positives, negatives = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 3, 8, requires_grad=True)
    loss = losses.InfoNCELoss(temperature=0.1, listwise=1, pairwise=None)
    torch.manual_seed(4)
    found = loss(queries, positives, negatives)
    torch.manual_seed(4)
    mixed = ops.mix_negatives(queries, negatives, pairwise=None, listwise=1)
    assert mixed.shape == (6, 4, 8)
    assert torch.equal(found, ops.info_nce(queries, positives, negatives, mixed=mixed, temperature=0.1))
    assert found > losses.InfoNCELoss(temperature=0.1)(queries, positives, negatives)
    assert torch.equal(loss(queries, positives), losses.InfoNCELoss(temperature=0.1)(queries, positives))


def test_what_is_printed_and_what_is_refused():
    assert repr(losses.AlignmentLoss()) == "AlignmentLoss(kind='l2sq', normalize=False, gather='none')"
    assert "mixing={'listwise': 1" in repr(losses.InfoNCELoss(listwise=1))
    with pytest.raises(InputError, match="dims: expected prefix widths from 1 to 8"):
        losses.SimilarityLoss(dims=[9])(torch.randn(2, 8), torch.randn(2, 8))
