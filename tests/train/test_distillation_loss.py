"""The chunked loss against a naive float64 reference written with autograd, closed forms, and its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from dualstream.modeling import VisualDecoder
from dualstream.train.distillation import DistillationObjective
from dualstream.train.distillation_loss import TeacherHead, distillation_loss

WIDTH, VOCAB = 6, 11


def random(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def naive(student_scores, teacher_scores, alpha, tau, classes=None):
    """The formula of the paper, all scores at once, every step left to autograd."""
    wanted = (teacher_scores / tau).softmax(1)
    best = teacher_scores.argmax(1)
    if classes is not None:
        membership = torch.nn.functional.one_hot(classes.long(), student_scores.shape[1]).to(wanted)
        wanted, best = wanted @ membership, classes.long()[best]
    soft = kl_div((student_scores / tau).log_softmax(1), wanted, reduction="sum")
    hard = torch.nn.functional.cross_entropy(student_scores, best, reduction="sum")
    return alpha * tau**2 * soft + (1 - alpha) * hard


def class_tables(seed=0):
    """Four classes for eleven tokens; each token of a class of its own, the last class the rest."""
    token_classes = torch.tensor([0, 1, 2, 0, 3, 3, 1, 3, 2, 3, 3], dtype=torch.int32)
    return token_classes, torch.tensor([3, 1, 2, 4])


def decoder_of(kind, unembedding):
    tables = class_tables() if kind == "pruned" else (None, None)
    decoder = VisualDecoder.initialized(kind, unembedding.float(), *tables).double()
    with torch.no_grad():  # away from the start, where student and teacher may agree
        decoder.own_parameter.add_(random(*decoder.own_parameter.shape, seed=5), alpha=0.3)
    return decoder


@pytest.mark.parametrize("kind", ["linear", "factored", "pruned"])
@pytest.mark.parametrize(("alpha", "tau"), [(0.7, 2.5), (0.8, 5.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_naive_reference_with_gradients(kind, alpha, tau, bias):
    unembedding = random(VOCAB, WIDTH, seed=1)
    head = TeacherHead(unembedding, random(VOCAB, seed=9) if bias else None)
    features, states = random(7, WIDTH, seed=2), random(7, WIDTH, seed=3, scale=2.0)
    decoder = decoder_of(kind, unembedding)
    loss, parts = DistillationObjective(decoder, alpha, tau, chunk_size=3)(features, states, head)
    (gradient,) = torch.autograd.grad(loss, [decoder.own_parameter])

    teacher_scores = states @ unembedding.T + (0 if head.bias is None else head.bias)
    if kind == "factored":
        scores = features @ decoder.transform.T @ unembedding.T
    else:
        scores = features @ decoder.weight.T
    classes = class_tables()[0] if kind == "pruned" else None
    expected = naive(scores, teacher_scores, alpha, tau, classes)
    (expected_gradient,) = torch.autograd.grad(expected, [decoder.own_parameter])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    best = teacher_scores.argmax(1)
    agree = scores.argmax(1) == (best if classes is None else classes.long()[best])
    assert parts[2] == agree.sum()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    chunk=st.integers(1, 10),
    alpha=st.floats(0, 1),
    tau=st.floats(0.3, 6),
    seed=st.integers(0, 10_000),
)
def test_chunk_size_does_not_matter(rows, chunk, alpha, tau, seed):
    weight, head = random(VOCAB, WIDTH, seed=seed), TeacherHead(random(VOCAB, WIDTH, seed=seed + 1))
    inputs, states = random(rows, WIDTH, seed=seed + 2), random(rows, WIDTH, seed=seed + 3)
    results = []
    for size in (chunk, 1000):
        leaves = [inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _ = distillation_loss(*leaves, states, head, alpha=alpha, temperature=tau, chunk_size=size)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_closed_forms():
    """One cell, two classes: every term by hand."""
    weight, states = torch.tensor([[0.0], [math.log(3.0)]]), torch.tensor([[1.0]])
    head = TeacherHead(torch.tensor([[math.log(4.0)], [0.0]]))  # teacher (4/5, 1/5), student (1/4, 3/4)
    options = {"inputs": torch.ones(1, 1), "weight": weight, "states": states, "head": head}
    hard, _ = distillation_loss(**options, alpha=0.0, temperature=1.0)
    soft, parts = distillation_loss(**options, alpha=1.0, temperature=1.0)
    kl = 0.8 * math.log(0.8 / 0.25) + 0.2 * math.log(0.2 / 0.75)
    assert hard.item() == pytest.approx(math.log(4.0))
    assert soft.item() == pytest.approx(kl)
    assert parts.kl.item() == pytest.approx(kl)
    assert parts.ce.item() == pytest.approx(math.log(4.0))
    assert parts.agreement.item() == 0
    # temperature 2 halves the scores: teacher (2/3, 1/3), student (1, sqrt 3) / (1 + sqrt 3)
    softer, _ = distillation_loss(**options, alpha=1.0, temperature=2.0)
    student = [1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))]
    expected = 4 * (2 / 3 * math.log(2 / 3 / student[0]) + 1 / 3 * math.log(1 / 3 / student[1]))
    assert softer.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "factored"])
def test_a_student_that_scores_like_the_teacher_is_at_the_minimum(kind):
    unembedding = random(VOCAB, WIDTH, seed=1, dtype=torch.float32)
    features = random(5, WIDTH, seed=2, dtype=torch.float32)
    decoder = VisualDecoder.initialized(kind, unembedding)
    loss, parts = DistillationObjective(decoder, 1.0, 2.0, 4)(features, features, TeacherHead(unembedding))
    (gradient,) = torch.autograd.grad(loss, [decoder.own_parameter])
    assert abs(loss.item()) < 1e-5
    assert gradient.abs().max() < 1e-5
    assert parts[2] == 5


def test_half_precision_teacher_is_widened_not_rounded():
    """Scores of a bfloat16 head are those of its values in float32."""
    weight = random(VOCAB, WIDTH, seed=1, dtype=torch.float32)
    head = random(VOCAB, WIDTH, seed=2, dtype=torch.float32).bfloat16()
    inputs, states = random(4, WIDTH, seed=3).bfloat16(), random(4, WIDTH, seed=4).bfloat16()
    options = {"alpha": 0.6, "temperature": 2.0}
    loss, _ = distillation_loss(inputs, weight, states, TeacherHead(head), **options)
    expected, _ = distillation_loss(inputs.float(), weight, states.float(), TeacherHead(head.float()), **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_gradient_keeps_the_weight_dtype_and_scales_with_the_loss():
    weight = random(VOCAB, WIDTH, seed=1, dtype=torch.float32).requires_grad_()
    states = random(4, WIDTH, seed=4, dtype=torch.float32)
    head = TeacherHead(random(VOCAB, WIDTH, seed=2, dtype=torch.float32))
    loss, _ = distillation_loss(states, weight, states, head, alpha=0.5, temperature=1.0)
    (once,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, [weight])
    assert once.dtype == torch.float32
    torch.testing.assert_close(thrice, 3 * once)


def test_no_more_than_a_chunk_of_scores_is_alive():
    """Largest tensor made on the way: the chunk's scores, never positions x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, vocab, chunk = 64, 500, 8
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    weight = random(vocab, WIDTH, dtype=torch.float32).requires_grad_()
    inputs = random(rows, WIDTH, dtype=torch.float32)
    with Watch():
        loss, _ = distillation_loss(
            inputs, weight, inputs, TeacherHead(weight.detach()), alpha=0.5, temperature=2.0, chunk_size=chunk
        )
        loss.backward()
    assert largest == chunk * vocab


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"states": torch.zeros(3, WIDTH)}, "paired"),
        ({"weight": torch.zeros(4, WIDTH)}, "token_classes"),
        ({"token_classes": torch.zeros(5, dtype=torch.int32)}, "token_classes has 5"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    options = {
        "inputs": torch.zeros(2, WIDTH),
        "weight": torch.zeros(VOCAB, WIDTH),
        "states": torch.zeros(2, WIDTH),
        "head": TeacherHead(torch.zeros(VOCAB, WIDTH)),
        "alpha": 0.5,
        "temperature": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{**options, **changes})
