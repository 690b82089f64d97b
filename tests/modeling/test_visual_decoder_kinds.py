"""The three kinds of visual decoder against brute force, and against the unembedding they start from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualstream.modeling import read_visual_tokens
from dualstream.modeling.compression_context import compressing
from dualstream.modeling.decoder_tables import resized_tables
from dualstream.modeling.lens import visual_features
from dualstream.modeling.visual_decoder import KINDS, VisualDecoder

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_classes(vocab_size, num_classes, generator):
    """Tables in which every class has a token, and reads as one of its own."""
    token_classes = torch.randint(num_classes, (vocab_size,), generator=generator)
    token_classes[torch.randperm(vocab_size, generator=generator)[:num_classes]] = torch.arange(num_classes)
    class_tokens = []
    for index in range(num_classes):
        members = (token_classes == index).nonzero().flatten()
        class_tokens.append(int(members[torch.randint(len(members), (), generator=generator)]))
    return token_classes.int(), torch.tensor(class_tokens)


def make_decoder(kind, vocab_size, width, seed=0, num_classes=None):
    """A decoder of random weights."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    if kind == "pruned":
        tables = dict(
            zip(
                ("token_classes", "class_tokens"),
                random_classes(vocab_size, num_classes or vocab_size // 3 + 1, generator),
                strict=True,
            )
        )
    decoder = VisualDecoder.initialized(kind, torch.randn(vocab_size, width, generator=generator), **tables)
    with torch.no_grad():
        decoder.own_parameter.copy_(torch.randn(decoder.own_parameter.shape, generator=generator))
    return decoder


def expected_scores(decoder, features, unembedding):
    """Scores of all classes in float64, the definition written out."""
    if decoder.kind == "factored":
        return features.double() @ decoder.transform.double().T @ unembedding.double().T
    return features.double() @ decoder.weight.double().T


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.integers(3, 40),
    width=st.integers(1, 8),
    cells=st.integers(0, 6),
    chunk_size=st.integers(1, 50),
    k=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_readings_equal_brute_force(kind, vocab_size, width, cells, chunk_size, k, seed):
    decoder = make_decoder(kind, vocab_size, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    features = torch.randn(cells, width, generator=generator)
    unembedding = torch.randn(vocab_size, width, generator=generator)
    k = min(k, decoder.num_classes)
    scores = expected_scores(decoder, features, unembedding)
    assert torch.allclose(decoder(features, unembedding=unembedding).double(), scores, atol=1e-4)
    ids, log_probs = decoder.read(features, k, unembedding, chunk_size)
    assert ids.shape == log_probs.shape == (cells, k)
    # The chosen tokens' classes have the best scores; compared by score, since equal scores may swap.
    classes = decoder.classes_of_tokens(ids)
    best = scores.log_softmax(-1).topk(k).values
    assert torch.allclose(scores.log_softmax(-1).gather(1, classes), best, atol=1e-4)
    assert torch.allclose(log_probs.double(), best, atol=1e-4)
    assert torch.equal(decoder.tokens_of_classes[classes], ids)
    assert torch.equal(decoder.top_k(features, k, unembedding=unembedding, chunk_size=chunk_size), ids)
    assert torch.equal(decoder(features, k, unembedding, chunk_size), ids)


def test_a_factored_decoder_is_the_linear_one_with_the_product():
    decoder, unembedding = make_decoder("factored", 50, 16), torch.randn(50, 16)
    features = torch.randn(30, 16)
    linear = VisualDecoder.from_unembedding(unembedding @ decoder.transform.detach())
    assert torch.equal(decoder.top_k(features, 3, unembedding), linear.top_k(features, 3))
    assert torch.allclose(decoder(features, unembedding=unembedding), linear(features), atol=1e-4)


def test_a_new_decoder_reads_as_the_unembedding():
    unembedding, features = torch.randn(60, 16), torch.randn(200, 16)
    plain = VisualDecoder.from_unembedding(unembedding).read(features, 4)
    for kind in ("linear", "factored"):
        decoder = VisualDecoder.initialized(kind, unembedding.bfloat16().float())
        assert decoder.own_parameter.requires_grad and decoder.own_parameter.dtype == torch.float32
        found = VisualDecoder.initialized(kind, unembedding).read(features, 4, unembedding)
        assert torch.equal(found[0], plain[0]) and torch.allclose(found[1], plain[1], atol=1e-5)
    # One class for every token but the last three: the tokens of the classes are read as before.
    token_classes, class_tokens = torch.arange(60).clamp(max=57), torch.arange(58)
    pruned = VisualDecoder.initialized("pruned", unembedding, token_classes, class_tokens)
    assert torch.equal(pruned.weight[:-1], unembedding[:57])
    assert torch.allclose(pruned.weight[-1], unembedding[57:].mean(0), atol=1e-6)
    scores = features @ torch.cat([unembedding[:57], unembedding[57:].mean(0, keepdim=True)]).T
    assert torch.equal(pruned.top_k(features, 4), scores.topk(4).indices)
    of_a_class = (plain[0][:, 0] < 57) & (scores[:, 57] < scores[:, :57].max(1).values)
    assert of_a_class.any()
    assert torch.equal(pruned.top_k(features)[of_a_class], plain[0][of_a_class, :1])


def test_initialized_leaves_the_unembedding_alone_and_takes_bfloat16():
    unembedding = torch.randn(20, 8).bfloat16()
    before = unembedding.clone()
    linear = VisualDecoder.initialized("linear", unembedding)
    with torch.no_grad():
        linear.weight.add_(1)
    assert torch.equal(unembedding, before)
    pruned = VisualDecoder.initialized("pruned", unembedding, torch.arange(20).clamp(max=4), torch.arange(5))
    assert pruned.weight.dtype == torch.float32
    assert torch.allclose(pruned.weight[4], before[4:].float().mean(0), atol=1e-5)
    covering = VisualDecoder.initialized("pruned", unembedding, torch.arange(20), torch.arange(21).clamp(max=19))
    assert torch.equal(covering.weight[20], before[19].float()), "an empty rest starts as the row of its token"


@pytest.mark.parametrize(
    ("kind", "own", "multiply_adds", "classes"),
    [("linear", 50 * 8, 50 * 8, 50), ("factored", 8 * 8, 8 * 8 + 50 * 8, 50), ("pruned", 6 * 8, 6 * 8, 6)],
)
def test_sizes(kind, own, multiply_adds, classes):
    decoder = make_decoder(kind, 50, 8, num_classes=6)
    assert (decoder.kind, decoder.vocab_size, decoder.hidden_size, decoder.num_classes) == (kind, 50, 8, classes)
    assert decoder.num_own_parameters == own == sum(p.numel() for p in decoder.parameters())
    assert decoder.multiply_adds == multiply_adds
    assert f"kind={kind}" in repr(decoder)
    assert len(decoder.tokens_of_classes) == classes
    shapes = {tuple(tensor.shape) for tensor in decoder.state_dict().values()}
    assert ((50, 8) in shapes) == (kind == "linear")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_own_parameter_only(kind):
    decoder, unembedding = make_decoder(kind, 30, 8), torch.randn(30, 8, dtype=torch.bfloat16)
    features = torch.randn(4, 8, dtype=torch.bfloat16)
    scores = decoder(features, unembedding=unembedding)
    assert scores.dtype == torch.float32
    scores.logsumexp(-1).sum().backward()
    assert decoder.own_parameter.grad.abs().sum() > 0
    assert [name for name, _ in decoder.named_parameters()] == ["transform" if kind == "factored" else "weight"]
    assert not decoder.top_k(features, 1, unembedding).requires_grad


def test_token_tables_may_be_shared_out_without_touching_the_decoder(words):
    for kind in KINDS:
        bare = make_decoder(kind, 20, 8)
        told = bare.with_token_tables(words(20))
        assert told.has_token_tables and not bare.has_token_tables
        assert told.own_parameter is bare.own_parameter and told.kind == kind
        features, unembedding = torch.randn(5, 8), torch.randn(20, 8)
        assert torch.equal(told.top_k(features, 2, unembedding), bare.top_k(features, 2, unembedding))


@pytest.fixture
def words():
    """Function V -> a stand-in for a tokenizer whose even entries are punctuation."""

    class Words:
        all_special_ids = ()

        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

        def get_added_vocab(self):
            return {}

        def batch_decode(self, rows):
            return [f"w{row[0]}" if row[0] % 2 else "." for row in rows]

    return Words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_compresses_a_stock_model(kind, family, tiny_model, words):
    tiny = tiny_model(family)
    inputs, unembedding = tiny.inputs(["titt", "itt"]), tiny.model.lm_head.weight
    decoder = make_decoder(kind, 200, 64, seed=3, num_classes=3 if kind == "pruned" else None)
    features = torch.cat(visual_features(tiny.model, inputs))
    expected = expected_scores(decoder, features, unembedding).topk(2).indices
    expected = decoder.tokens_of_classes[expected]
    reading = read_visual_tokens(tiny.model, inputs, top_k=2, decoder=decoder)
    assert torch.equal(reading.ids, expected)
    for method in ("rle", "rle_drop_top1", "rle_drop_top2"):
        with compressing(tiny.model, method, decoder, tokenizer=words(200)) as model:
            ids = model.generate(**inputs, max_new_tokens=1)
            report = model.last_compression
            assert torch.equal(report.ids, expected[:, : report.config.top_k])
            logits = model(**inputs).logits
        assert ids.shape[0] == logits.shape[0] == 2
        assert report.kept_tokens <= report.visual_tokens
        if kind == "pruned":
            assert report.kept_tokens < report.visual_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_of_other_models_are_refused(kind, tiny_model):
    model = tiny_model("llava").model
    make_decoder(kind, 200, 64).check_compatible(model)
    for shape in ((200, 32), (150, 64)):
        foreign = make_decoder(kind, *shape)
        with pytest.raises(ValueError, match=rf"{shape[0]}, {shape[1]}.*belongs to another model"):
            foreign.check_compatible(model)
        with pytest.raises(ValueError, match="another model"), compressing(model, decoder=foreign):
            pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(kind, dtype, tmp_path, words):
    decoder = make_decoder(kind, 20, 8).to(dtype)
    decoder.set_token_tables(words(20))
    decoder.training_facts = {"epochs": 3, "loss": [1.5, 0.5], "teacher": {"depth": 2}, "für": "π"}
    decoder.save_pretrained(tmp_path / "made" / "on demand")
    loaded = VisualDecoder.from_pretrained(tmp_path / "made" / "on demand")
    assert loaded.kind == kind and loaded.training_facts == decoder.training_facts
    assert loaded.state_dict().keys() == decoder.state_dict().keys()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert tensor.dtype == loaded.state_dict()[name].dtype
    assert loaded.origin.endswith("on demand")
    assert sorted(path.name for path in (tmp_path / "made" / "on demand").iterdir()) == [
        "visual_decoder.json",
        "visual_decoder.safetensors",
    ]


def test_errors():
    with pytest.raises(ValueError, match=r"kind='deep' is no visual decoder; choose one of linear, factored, pruned"):
        VisualDecoder(7, 3, "deep")
    with pytest.raises(ValueError, match="num_classes=4 is for a pruned decoder"):
        VisualDecoder(7, 3, "linear", 4)
    for wrong in (None, 0, True, 2.0):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            VisualDecoder(7, 3, "pruned", wrong)
    factored = VisualDecoder(7, 3, "factored")
    with pytest.raises(ValueError, match=r"unembedding is None, but a factored .* \(7, 3\)"):
        factored.top_k(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"unembedding is of shape \(7, 4\)"):
        factored(torch.randn(2, 3), unembedding=torch.randn(7, 4))
    with pytest.raises(ValueError, match="offloaded"):
        factored.top_k(torch.randn(2, 3), unembedding=torch.empty(7, 3, device="meta"))
    with pytest.raises(ValueError, match=r"expected .cells, 3."):
        factored.top_k(torch.randn(2, 4), unembedding=torch.randn(7, 3))
    with pytest.raises(ValueError, match=r"k=3 must lie within 1\.\.2"):
        make_decoder("pruned", 7, 3, num_classes=2).top_k(torch.randn(2, 3), 3)
    unembedding, classes, tokens = torch.randn(5, 3), torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 2, 4])
    for kind, some in (("pruned", {}), ("pruned", {"class_tokens": tokens}), ("linear", {"class_tokens": tokens})):
        with pytest.raises(ValueError, match="go with a pruned decoder, and only there"):
            VisualDecoder.initialized(kind, unembedding, **some)
    for wrong_classes, wrong_tokens, message in (
        (classes[:4], tokens, r"token_classes has shape \(4,\); expected \(5,\)"),
        (classes + 1, tokens, r"token_classes must lie within 0\.\.2"),
        (classes, tokens + 1, r"vocabulary ids, 0\.\.4"),
        (classes, torch.tensor([0, 1, 4]), r"class_tokens\[1\]=1 belongs to class 0"),
        (classes, torch.tensor([0, 2, 3]), r"class_tokens\[2\]=3 belongs to class 1"),
    ):
        with pytest.raises(ValueError, match=message):
            VisualDecoder.initialized("pruned", unembedding, wrong_classes, wrong_tokens)
    with pytest.raises(ValueError, match="names 3 classes; the decoder has kind=linear"):
        VisualDecoder(5, 3).set_classes(classes, tokens)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    old=st.integers(3, 20),
    new=st.integers(2, 25),
    known=st.booleans(),
    seed=st.integers(0, 999),
)
def test_resized(kind, old, new, known, seed):
    decoder = make_decoder(kind, old, 4, seed)
    if known:
        decoder.meaningless[0] = True
        decoder.text_class.copy_(torch.arange(old))
    rows = torch.randn(new, 4, generator=torch.Generator().manual_seed(seed))
    resized = decoder.resized(rows)
    kept = min(old, new)
    assert (resized.kind, resized.vocab_size, resized.has_token_tables) == (kind, new, known)
    assert torch.equal(resized.meaningless[:kept], decoder.meaningless[:kept])
    assert resized.meaningless[kept:].all() == (known or new <= old)
    if kind == "linear":
        assert torch.equal(resized.weight, torch.cat([decoder.weight[:kept], rows[kept:]]))
        return
    assert torch.equal(resized.own_parameter, decoder.own_parameter)
    if kind == "factored":
        assert torch.equal(resized.top_k(torch.eye(4), 1, rows), (decoder.transform.T @ rows.T).topk(1).indices)
        return
    assert torch.equal(resized.token_classes[:kept], decoder.token_classes[:kept])
    assert (resized.token_classes[kept:] == resized.num_classes - 1).all()
    assert int(resized.class_tokens.max()) < new
    for index, (before, after) in enumerate(zip(decoder.class_tokens, resized.class_tokens, strict=True)):
        left = (resized.token_classes == index).nonzero().flatten().tolist()
        if before < new:
            assert after == before
        elif left:
            assert int(after) == left[0]


def test_a_class_without_tokens_reads_as_other():
    tables = {
        "meaningless": torch.zeros(4, dtype=torch.bool),
        "text_class": torch.arange(4),
        "token_classes": torch.tensor([0, 2, 2, 1], dtype=torch.int32),
        "class_tokens": torch.tensor([0, 3, 2]),
    }
    assert resized_tables(tables, 3)["class_tokens"].tolist() == [0, 2, 2]
    assert resized_tables(tables, 2)["class_tokens"].tolist() == [0, 1, 1]
    assert resized_tables(tables, 1)["class_tokens"].tolist() == [0, 0, 0]
