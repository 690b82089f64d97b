"""The visual decoder: chunked top-k, token tables, saving, and refusing foreign models."""

import copy
import json
import unicodedata

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dualstream.modeling.decoder_tables import token_tables
from dualstream.modeling.visual_decoder import VisualDecoder
from dualstream.modeling.vocabulary_scores import top_k_tokens


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["<s>", "dog", "Ġdog", ",", "Ġ,", "...", "Ġ", "9", "Â©", "Ċ", "Ã", "ãĢĤ", "cat", "a,"]
    model = models.WordLevel({text: index for index, text in enumerate(texts)}, unk_token="<s>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", additional_special_tokens=["<image>"])


def test_token_tables_follow_the_unicode_rule(tokenizer):
    size = len(tokenizer) + 3
    meaningless, text_class = token_tables(tokenizer, size)
    for index in range(len(tokenizer)):
        text = tokenizer.decode([index]).strip()
        expected = index in tokenizer.all_special_ids or all(unicodedata.category(c)[0] in "PSZC" for c in text)
        assert bool(meaningless[index]) == expected, text
        first = min(i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() == text)
        assert int(text_class[index]) == first
    assert meaningless[len(tokenizer) :].all()
    assert text_class[len(tokenizer) :].tolist() == [size - 3, size - 2, size - 1]
    words = [index for index in range(size) if not meaningless[index]]
    assert [tokenizer.decode([index]) for index in words] == ["dog", " dog", "9", "cat", "a,"]


def test_a_tokenizer_is_asked_for_its_texts_once(tokenizer, monkeypatch):
    mine = copy.deepcopy(tokenizer)
    calls, stock = [], mine.batch_decode
    monkeypatch.setattr(mine, "batch_decode", lambda ids: calls.append(len(ids)) or stock(ids))
    first = token_tables(mine, len(mine))
    first[0][:] = False  # the caller's to change
    assert torch.equal(token_tables(mine, len(mine))[0], token_tables(tokenizer, len(mine))[0]) and len(calls) == 1
    assert len(token_tables(mine, len(mine) + 2)[0]) == len(mine) + 2 and len(calls) == 2
    mine.add_tokens(["bird"])
    assert token_tables(mine, len(mine))[0][-1] and len(calls) == 3, "an added token means nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 4096])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_the_full_computation(dtype, chunk_size, k):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 16, generator=generator).to(dtype)
    decoder = VisualDecoder.from_unembedding(torch.randn(50, 16, generator=generator).to(dtype))
    scores = features.float() @ decoder.weight.float().T
    ids = decoder.top_k(features, k, chunk_size=chunk_size)
    assert torch.equal(ids, scores.topk(k).indices)
    _, log_probs = top_k_tokens(features, decoder.weight, k, chunk_size=chunk_size)
    assert torch.allclose(log_probs, scores.log_softmax(-1).topk(k).values, atol=1e-5)
    assert torch.allclose(decoder(features).float(), scores, atol=0.2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("kind", "classes"), [("linear", None), ("factored", None), ("pruned", 500)])
def test_top_k_never_holds_all_scores(kind, classes, monkeypatch):
    decoder, unembedding = VisualDecoder(1000, 8, kind, classes), torch.randn(1000, 8)
    widths = []
    stock = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: widths.append(b.shape[-1]) or stock(a, b))
    decoder.top_k(torch.randn(3, 8), 2, unembedding, chunk_size=64)
    assert max(widths) == 64 and sum(widths) == (classes or 1000) + (8 if kind == "factored" else 0)


def test_top_k_with_bias_empty_input_and_errors():
    weight, bias = torch.randn(9, 4), torch.randn(9)
    features = torch.randn(5, 4)
    assert torch.equal(
        top_k_tokens(features, weight, 2, bias=bias, chunk_size=2)[0], (features @ weight.T + bias).topk(2).indices
    )
    decoder = VisualDecoder.from_unembedding(weight)
    assert decoder.top_k(torch.empty(0, 4), 2).shape == (0, 2)
    with pytest.raises(ValueError, match=r"quantized .torch\.int8."):
        top_k_tokens(features, weight.to(torch.int8))
    with pytest.raises(ValueError, match="offloaded"):
        top_k_tokens(features, weight.to("meta"))
    with pytest.raises(ValueError, match=r"expected .cells, 4."):
        decoder.top_k(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"k=10 must lie within 1\.\.9"):
        decoder.top_k(features, 10)


def test_from_unembedding_shares_memory_and_knows_its_tables(tokenizer):
    weight = torch.randn(len(tokenizer), 4)
    bare = VisualDecoder.from_unembedding(weight)
    assert bare.weight.data_ptr() == weight.data_ptr()
    assert not bare.has_token_tables
    decoder = VisualDecoder.from_unembedding(weight, tokenizer)
    assert decoder.has_token_tables
    assert "vocab_size" in repr(decoder)
    decoder.reset_parameters()
    assert not decoder.has_token_tables


def test_save_and_load(tokenizer, tmp_path):
    decoder = VisualDecoder.from_unembedding(torch.randn(len(tokenizer), 4).bfloat16(), tokenizer)
    decoder.save_pretrained(tmp_path / "decoder")
    loaded = VisualDecoder.from_pretrained(tmp_path / "decoder")
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert tensor.dtype == loaded.state_dict()[name].dtype
    assert loaded.has_token_tables


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"visual_decoder.json is missing"):
        VisualDecoder.from_pretrained(tmp_path)
    VisualDecoder(7, 3).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "visual_decoder.json").read_text())
    (tmp_path / "visual_decoder.json").write_text(json.dumps({**description, "vocab_size": 8}))
    with pytest.raises(ValueError, match="does not hold a readable visual decoder"):
        VisualDecoder.from_pretrained(tmp_path)
    (tmp_path / "visual_decoder.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold a readable visual decoder"):
        VisualDecoder.from_pretrained(tmp_path)
    (tmp_path / "visual_decoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"visual_decoder.safetensors is missing"):
        VisualDecoder.from_pretrained(tmp_path)


def test_decoder_of_another_model_is_refused(tiny_model):
    model = tiny_model("llava").model
    VisualDecoder(200, 64).check_compatible(model)
    for shape in ((200, 32), (150, 64)):
        with pytest.raises(ValueError, match=rf"{shape[0]}, {shape[1]}.*belongs to another model"):
            VisualDecoder(*shape).check_compatible(model)
