"""Prompts before a text, against the same model given longer embeddings, HF PEFT, and generation by hand."""

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import DePT, PromptTuning, PTuning, inject
from lightning_peft.engine import AdapterError, Method, TargetError, adapters_of
from lightning_peft.parts.tokens import text_targets
from tests.methods.backbones import moved

SIZES: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
CALM: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
P = 3
quiet = pytest.mark.filterwarnings("ignore::FutureWarning")  # what PEFT asks of transformers


@functools.cache
def built(name: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(1)
    if name == "llama":
        config: Any = t.LlamaConfig(vocab_size=31, **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model: Any = t.LlamaForCausalLM(config)
    elif name == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        few = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16}
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=31, **few, **quiet, bos_token_id=1, eos_token_id=2))
    elif name == "bloom":  # its attentions do not say that they are causal
        few = {"hidden_size": 12, "n_layer": 2, "n_head": 3, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        model = t.BloomForCausalLM(t.BloomConfig(vocab_size=31, **few, bos_token_id=1, eos_token_id=2))
    elif name in ("bert", "roberta"):
        kind = {"bert": "Bert", "roberta": "Roberta"}[name]
        config = getattr(t, f"{kind}Config")(vocab_size=31, **SIZES, **CALM, max_position_embeddings=16, num_labels=4)
        model = getattr(t, f"{kind}ForSequenceClassification")(config)
    else:
        few = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0}
        model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=31, **few, decoder_start_token_id=0))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def base(name: str) -> Any:
    return copy.deepcopy(built(name))


def adapted(name: str, method: Method | None = None, seed: int = 2) -> tuple[Any, Any]:
    """The model with a prompt off its start, and the prompt."""
    model = moved(inject(base(name), method or PromptTuning(num_virtual_tokens=P)), seed)
    return model, next(a.prompt for _, _, a in adapters_of(model) if a.prompt is not None)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape)


def longer(model: Any, table: Tensor, tokens: Tensor, start: int = 0) -> Tensor:
    """The embeddings of ``tokens`` with ``table`` among them."""
    text = model.get_input_embeddings()(tokens)
    return torch.cat([text[:, :start], table.expand(len(text), -1, -1), text[:, start:]], dim=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_causal_model_answers_as_if_the_embeddings_were_longer(name: str) -> None:
    model, prompt = adapted(name)
    tokens = ids(2, 7)
    expected = base(name)(inputs_embeds=longer(model, prompt(), tokens)).logits[:, P:]
    assert model(tokens).logits.shape == (2, 7, 31)
    torch.testing.assert_close(model(tokens).logits, expected)
    torch.testing.assert_close(model(attention_mask=torch.ones(2, 7), input_ids=tokens).logits, expected)
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)
    torch.testing.assert_close(model(tokens, labels=tokens).loss, base_loss(expected, tokens))


def base_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize(("name", "start"), [("bert", None), ("bert", 0), ("bert", 2), ("roberta", None)])
def test_a_model_with_a_class_token_keeps_it_in_front(name: str, start: int | None) -> None:
    model, prompt = adapted(name, PromptTuning(num_virtual_tokens=P, class_tokens=start))
    tokens, types = ids(2, 7), torch.tensor([[0] * 3 + [1] * 4] * 2)
    at = 1 if start is None else start
    embeds = longer(model, prompt(), tokens, start=at)
    longer_types = torch.cat([types[:, :at], torch.zeros(2, P, dtype=torch.long), types[:, at:]], dim=1)
    given = {"token_type_ids": longer_types} if name == "bert" else {}
    expected = base(name)(inputs_embeds=embeds, **given).logits
    torch.testing.assert_close(model(tokens, token_type_ids=types if name == "bert" else None).logits, expected)
    if name == "bert":
        positions = torch.arange(7).expand(2, -1)
        torch.testing.assert_close(model(tokens, token_type_ids=types, position_ids=positions).logits, expected)


@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("gpt2", "right")])
@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=P), DePT(num_virtual_tokens=P, r=2, max_length=8)])
def test_a_padded_sample_answers_as_alone(name: str, side: str, method: Method) -> None:
    model, _ = adapted(name, method)
    tokens = ids(3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    for row, length in enumerate((7, 4, 2)):
        mask[row, slice(0, 7 - length) if side == "left" else slice(length, 7)] = 0
    together = model(tokens, attention_mask=mask).logits
    for row in range(3):
        alone = model(tokens[row : row + 1, mask[row].bool()]).logits
        torch.testing.assert_close(together[row, mask[row].bool()], alone[0])


def test_a_padded_sample_answers_as_alone_where_heads_read_the_first_token() -> None:
    model, _ = adapted("bert")
    tokens, mask = ids(2, 7), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    together = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(together[1:], model(tokens[1:, :4]).logits)


def by_hand(name: str, prompt: Any, tokens: Tensor, steps: int) -> Tensor:
    """Greedy, without a cache, one sample at a time, on the model without adapters."""
    model = base(name)
    for _ in range(steps):
        text = model.get_input_embeddings()(tokens)
        text = prompt.shift(text, torch.arange(text.shape[1]), text.shape[1])
        embeds = torch.cat([prompt().expand(len(text), -1, -1), text], dim=1)
        tokens = torch.cat([tokens, model(inputs_embeds=embeds).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=P), DePT(num_virtual_tokens=P, r=2, max_length=12)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_a_loop_by_hand(name: str, method: Method, use_cache: bool) -> None:
    model, prompt = adapted(name, method)
    tokens, mask = ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = model.generate(tokens, attention_mask=mask, use_cache=use_cache, eos_token_id=None, **options)
    for row in range(2):
        expected = by_hand(name, prompt, tokens[row : row + 1, mask[row].bool()], 4)
        assert made[row, -4:].tolist() == expected[0, -4:].tolist()


def test_beams_with_and_without_a_cache_agree() -> None:
    model, _ = adapted("llama")
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    tokens = ids(2, 5)
    with_cache, without = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


def cached(cache: Any) -> dict[str, Any]:
    """As the argument that this version of transformers has for it."""
    from transformers import LlamaForCausalLM

    names = inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=P), DePT(num_virtual_tokens=P, r=2, max_length=8)])
def test_a_cache_that_was_filled_step_by_step_answers_the_same(method: Method, masked: bool) -> None:
    model, _ = adapted("llama", method)
    inject(model, PromptTuning(num_virtual_tokens=2), name="second")
    tokens = ids(2, 6)
    at_once = model(tokens).logits
    first = model(tokens[:, :3], use_cache=True)
    cache = first.past_key_values
    rest = []
    for i in (3, 4, 5):
        mask = {"attention_mask": torch.ones(2, i + 1)} if masked else {}
        rest.append(model(tokens[:, i : i + 1], **cached(cache), **mask))
    torch.testing.assert_close(torch.cat([first.logits, *[r.logits for r in rest]], dim=1), at_once)


def test_a_mask_of_scores_grows_by_columns_alone_behind_a_cache() -> None:
    model, _ = adapted("llama")
    tokens = ids(2, 6)
    cache = model(tokens[:, :3], use_cache=True).past_key_values
    sees = torch.ones(6, 6).tril().bool()[None, None, 3:].expand(2, -1, -1, -1)
    rest = model(tokens[:, 3:], attention_mask=sees, **cached(cache)).logits
    torch.testing.assert_close(rest, model(tokens).logits[:, 3:])


def test_two_prompts_stand_side_by_side() -> None:
    model, first = adapted("llama")
    inject(model, PromptTuning(num_virtual_tokens=2), name="second")
    second = next(a.prompt for _, _, a in adapters_of(model, "second"))
    tokens = ids(2, 5)
    both = torch.cat([first(), second()])
    expected = base("llama")(inputs_embeds=longer(model, both, tokens)).logits[:, 5:]
    torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=P), DePT(num_virtual_tokens=P, r=2, max_length=9)])
def test_documents_packed_into_one_row_see_the_prompt_and_not_each_other(method: Method) -> None:
    model, _ = adapted("llama", method)
    tokens, lengths = ids(1, 9), (4, 5)
    alone = torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    torch.testing.assert_close(model(tokens, position_ids=positions).logits, alone)
    sees = torch.block_diag(*[torch.ones(n, n) for n in lengths]).tril().bool()[None, None]
    torch.testing.assert_close(model(tokens, position_ids=positions, attention_mask=sees).logits, alone)
    lowest = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    torch.testing.assert_close(model(tokens, position_ids=positions, attention_mask=lowest).logits, alone)


def test_hidden_states_and_attentions_are_of_the_text_alone() -> None:
    model, _ = adapted("llama")
    model.set_attn_implementation("eager")
    answer = model(ids(2, 5), output_hidden_states=True, output_attentions=True)
    assert {tuple(h.shape) for h in answer.hidden_states} == {(2, 5, 12)}
    assert {tuple(a.shape) for a in answer.attentions} == {(2, 3, 5, 5)}
    as_tuple = model(ids(2, 5), return_dict=False)
    assert as_tuple[0].shape == (2, 5, 31)


def test_an_encoder_hands_the_prompt_to_its_decoder() -> None:
    model, prompt = adapted("t5")
    tokens, mask, labels = ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), ids(2, 3)
    long_mask = torch.cat([torch.ones(2, P, dtype=torch.long), mask], dim=1)
    embeds = longer(model, prompt(), tokens)
    expected = base("t5")(inputs_embeds=embeds, attention_mask=long_mask, labels=labels)
    seen = model(tokens, attention_mask=mask, labels=labels)
    torch.testing.assert_close(seen.logits, expected.logits)
    torch.testing.assert_close(
        model(tokens, attention_mask=mask, decoder_input_ids=labels).logits,
        base("t5")(inputs_embeds=embeds, attention_mask=long_mask, decoder_input_ids=labels).logits,
    )
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(made, base("t5").generate(inputs_embeds=embeds, attention_mask=long_mask, **options))


def test_an_encoder_alone_answers_with_its_own_tokens() -> None:
    encoder = copy.deepcopy(built("t5")).encoder
    inject(encoder, PromptTuning(num_virtual_tokens=P))
    assert encoder(ids(2, 6)).last_hidden_state.shape == (2, 6, 12)


@quiet
def test_hf_peft_answers_the_same() -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(base("llama"), config).double()
    model, prompt = adapted("llama")
    theirs.prompt_encoder["default"].embedding.weight.data = prompt().detach()
    tokens, mask = ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    expected = theirs(input_ids=tokens, attention_mask=mask).logits[:, P:]
    seen = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(seen[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_positions_have_an_end(name: str) -> None:
    with pytest.raises(TargetError, match=r"num_virtual_tokens=16, but \w+ has 16 positions"):
        inject(base(name), PromptTuning(num_virtual_tokens=16))
    model, _ = adapted(name)
    assert model(ids(1, 13)).logits is not None
    with pytest.raises(AdapterError, match="PromptTuning: 14 tokens and a prompt of 3 need more than the 16 positions"):
        model(ids(1, 14))


def test_rows_of_a_table_that_are_never_used_do_not_count() -> None:
    (target,) = text_targets(base("roberta"), 3, "test")
    assert target.limit == 14


def test_what_embeds_the_text_of_a_compiled_model_is_inside_of_it() -> None:
    (plain,) = text_targets(base("llama"), 3, "test")
    (target,) = text_targets(torch.compile(base("llama"), backend="eager"), 3, "test")
    assert (target.name, target.owner) == (plain.name, f"_orig_mod.{plain.owner}")


def test_a_mask_that_does_not_fit_is_an_error() -> None:
    model, _ = adapted("llama")
    with pytest.raises(AdapterError, match="PromptTuning: attention_mask is of 4 tokens"):
        model(ids(1, 5), attention_mask=torch.ones(1, 4))
    filled = base("llama")(ids(1, 5)).past_key_values  # without a prompt
    with pytest.raises(AdapterError, match="Fill the cache with the prompt"):
        model(ids(1, 1), **cached(filled), attention_mask=torch.ones(1, 6))
    with pytest.raises(AdapterError, match="generate with a dynamic cache"):
        model(ids(1, 5), attention_mask={"full_attention": torch.ones(1, 1, 5, 5)})
    with pytest.raises(AdapterError, match="generate with a dynamic cache"):
        model(ids(1, 5), cu_seq_lens_q=torch.tensor([0, 5]))
    with pytest.raises(AdapterError, match="neither of input_ids and inputs_embeds"):
        model(attention_mask=torch.ones(1, 4))
    with pytest.raises(AdapterError, match=r"static|dynamic"):
        model.generate(ids(1, 5), max_new_tokens=2, cache_implementation="static")


def test_one_of_several_texts_is_named() -> None:
    pair = nn.ModuleDict({"query": base("bert").bert, "passage": base("bert").bert})
    with pytest.raises(TargetError, match=r"PromptTuning: 2 parts embed text \(query, passage\)"):
        inject(pair, PromptTuning())
    with pytest.raises(TargetError, match="Did you mean 'query'"):
        inject(pair, PromptTuning(module="qury"))
    inject(pair, PromptTuning(num_virtual_tokens=P, module="query"))
    assert [path for path, _, _ in adapters_of(pair)] == ["query"]


def test_a_prompt_starts_at_rows_of_the_embedding() -> None:
    table = base("llama").get_input_embeddings().weight
    given = inject(base("llama"), PromptTuning(num_virtual_tokens=5, init_token_ids=(7, 4)))
    assert torch.equal(next(a.prompt() for _, _, a in adapters_of(given)), table[[7, 4, 7, 4, 7]])
    one, again = (inject(base("llama"), PromptTuning(num_virtual_tokens=5, init="vocabulary")) for _ in range(2))
    rows = next(a.prompt() for _, _, a in adapters_of(one))
    assert torch.equal(rows, next(a.prompt() for _, _, a in adapters_of(again)))
    assert (rows[:, None] == table[None]).all(-1).any(1).all()
    random = inject(base("llama"), PromptTuning(num_virtual_tokens=200))
    numbers = next(a.prompt() for _, _, a in adapters_of(random))
    assert 0.45 < numbers.max() <= 0.5
    assert -0.5 <= numbers.min() < -0.45
    with pytest.raises(TargetError, match="the model has 31 ids"):
        inject(base("llama"), PromptTuning(init_token_ids=(31,)))
    with pytest.raises(AdapterError, match="init_token_ids must be integers >= 0"):
        PromptTuning(init_token_ids=("a",))  # type: ignore[arg-type]


def test_dept_changes_the_text_by_position() -> None:
    model, prompt = adapted("llama", DePT(num_virtual_tokens=P, r=2, max_length=8))
    tokens = ids(2, 6)
    text = model.get_input_embeddings()(tokens) + (prompt.A @ prompt.B)[:6]
    embeds = torch.cat([prompt.table.expand(2, -1, -1), text], dim=1)
    torch.testing.assert_close(model(tokens).logits, base("llama")(inputs_embeds=embeds).logits[:, P:])
    with pytest.raises(AdapterError, match="DePT: the text has 9 tokens, but max_length=8"):
        model(ids(1, 9))
    cache = model(ids(1, 8), use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="DePT: the text has 9 tokens"):
        model(ids(1, 1), **cached(cache))


def test_dept_starts_as_prompt_tuning_and_trains_at_two_rates() -> None:
    method = DePT(num_virtual_tokens=P, r=2, max_length=8, low_rank_learning_rate_ratio=0.05)
    model = inject(base("llama"), method)
    ((_, _, adapter),) = adapters_of(model)
    tokens = ids(2, 6)
    expected = base("llama")(inputs_embeds=longer(model, adapter.prompt.table, tokens)).logits[:, P:]
    torch.testing.assert_close(model(tokens).logits, expected)
    rates = {name: method.learning_rate_ratio(adapter, name) for name, _ in adapter.named_parameters()}
    assert rates == {"prompt.table": 1.0, "prompt.A": 0.05, "prompt.B": 0.05}
    assert adapter.prompt.A.abs().max() <= 2**-0.5
    assert adapter.prompt.A.abs().max() > 0.8 * 2**-0.5


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_a_prompt_encoder_follows_torch(encoder: Any) -> None:
    method = PTuning(num_virtual_tokens=P, encoder=encoder, encoder_hidden_size=5)
    model, prompt = adapted("llama", method)
    x = prompt.table
    if encoder == "lstm":
        lstm = nn.LSTM(12, 5, 2, bidirectional=True).double()
        lstm.load_state_dict(prompt.lstm.state_dict())
        x = lstm(x)[0]
        assert x.shape == (P, 10)
    for i, layer in enumerate(prompt.mlp):
        x = (x if i == 0 else torch.relu(x)) @ layer.weight.T + layer.bias
    torch.testing.assert_close(prompt(), x)
    tokens = ids(2, 6)
    baked, bare = adapted("llama")
    bare.table.data = prompt().detach()
    torch.testing.assert_close(model(tokens).logits, baked(tokens).logits)
    torch.testing.assert_close(model.eval()(tokens).logits, model.train()(tokens).logits)


@quiet
def test_a_prompt_encoder_is_that_of_hf_peft() -> None:
    import peft

    kind = peft.PromptEncoderReparameterizationType.LSTM
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=5,
        encoder_dropout=0.0,
    )
    theirs = peft.get_peft_model(base("llama"), config).double()
    encoder = theirs.prompt_encoder["default"]
    model, prompt = adapted("llama", PTuning(num_virtual_tokens=P, encoder="lstm", encoder_hidden_size=5))
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in prompt.parameters())
    encoder.embedding.weight.data = prompt.table.detach()
    encoder.lstm_head.load_state_dict(prompt.lstm.state_dict())
    for theirs_layer, ours in zip([encoder.mlp_head[0], encoder.mlp_head[2]], prompt.mlp, strict=True):
        theirs_layer.load_state_dict(ours.state_dict())
    tokens = ids(2, 6)
    torch.testing.assert_close(model(tokens).logits, theirs(input_ids=tokens).logits[:, P:])


def test_a_compiled_language_model_computes_the_same() -> None:
    torch._dynamo.reset()
    model, _ = adapted("llama")
    tokens, mask = ids(2, 6), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = compiled(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(seen[mask.bool()], model(tokens, attention_mask=mask).logits[mask.bool()])
