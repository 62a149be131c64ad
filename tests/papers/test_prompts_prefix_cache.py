"""A prefix in the cache, against caches that are filled by hand, and through the checks of every method."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import PrefixTuning, PromptTuning, disabled, inject
from lightning_peft.engine import AdapterError, Method, TargetError, adapters_of
from tests.methods import backbones, test_invariants
from tests.methods.backbones import backbone, moved

P = 3


class TinyText(nn.Module):
    """A Llama over tokens that are embedded already, in the place of the blocks of the examples."""

    checkpointed = False  # whether it is computed again in the backward pass

    def __init__(self) -> None:
        super().__init__()
        import transformers as t

        sizes: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
        heads: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1}
        self.embed = nn.Linear(7, 12)
        self.text = t.LlamaModel(t.LlamaConfig(vocab_size=5, **sizes, **heads, pad_token_id=0))
        self.head = nn.Linear(12, 3)
        self.embed.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        given = {"inputs_embeds": self.embed(x)}
        answer = checkpoint(self.text, **given, use_reentrant=False) if self.checkpointed else self.text(**given)
        return self.head(answer.last_hidden_state)


CASES = [
    PrefixTuning(num_virtual_tokens=3, place="cache"),
    PrefixTuning(num_virtual_tokens=2, place="cache", reparameterize=5),
]
CHECKS = [check for name, check in vars(test_invariants).items() if name.startswith("test_")]
OF_ONE = [check for check in CHECKS if "method" in inspect.signature(check).parameters]


@pytest.mark.filterwarnings("ignore:.* is written in our own format:UserWarning")  # HF PEFT knows no such model
@pytest.mark.parametrize("method", CASES, ids=["direct", "network"])
@pytest.mark.parametrize("check", OF_ONE, ids=lambda check: check.__name__.removeprefix("test_"))
def test_what_every_method_must_satisfy(
    check: Callable[..., None], method: PrefixTuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backbones._NETS, "blocks", TinyText)
    given = {"method": method, "x": torch.randn(2, 13, 7), "tmp_path": tmp_path, "k": 3}
    check(**{name: given[name] for name in inspect.signature(check).parameters})


def test_a_compiled_model_computes_the_same() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = moved(inject(TinyText().eval(), CASES[0])), torch.randn(2, 13, 7)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


SIZES: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
SPECIAL: dict[str, Any] = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACK: dict[str, Any] = {"d_model": 12, "decoder_start_token_id": 1}
BUILT: dict[str, Callable[[Any], nn.Module]] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=1)),
    "mistral": lambda t: t.MistralForCausalLM(
        t.MistralConfig(**SIZES, **SPECIAL, num_key_value_heads=3, sliding_window=4)
    ),
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(n_embd=12, n_layer=2, n_head=3, n_positions=16, **SPECIAL)),
    "bloom": lambda t: t.BloomForCausalLM(t.BloomConfig(hidden_size=12, n_layer=2, n_head=3, **SPECIAL)),
    "bert": lambda t: t.BertModel(t.BertConfig(**SIZES, **SPECIAL)),
    "t5": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(d_ff=20, d_kv=4, num_layers=3, num_heads=3, **STACK, **SPECIAL)
    ),
    "bart": lambda t: t.BartForConditionalGeneration(
        t.BartConfig(
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=3,
            encoder_ffn_dim=20,
            decoder_ffn_dim=20,
            **STACK,
            **SPECIAL,
        )
    ),
}
CAUSAL, BOTH = ("llama", "mistral", "gpt2", "bloom"), ("t5", "bart")
MASK = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}


def base(name: str) -> Any:
    import transformers

    torch.manual_seed(1)
    model = BUILT[name](transformers).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    torch.manual_seed(0)
    return model


def adapted(name: str, **options: Any) -> Any:
    return moved(inject(base(name), PrefixTuning(num_virtual_tokens=P, place="cache", **options)))


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape)


def filled(model: Any, heads: int, batch: int) -> Any:
    """A cache of transformers that holds the prefix."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache()
    ((_, _, adapter),) = adapters_of(model)
    table = adapter.prompt()
    width = table.shape[1] // 2 // len(adapter.layers)
    for i in range(len(adapter.layers)):
        both = [table[:, (2 * i + j) * width : (2 * i + j + 1) * width] for j in (0, 1)]
        cache.update(*(t.view(P, heads, width // heads).transpose(0, 1).expand(batch, -1, -1, -1) for t in both), i)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def longer(mask: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(mask), P, dtype=torch.long), mask], dim=1)


@pytest.mark.parametrize("network", [None, 5], ids=["direct", "network"])
@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_it_answers_as_the_base_with_a_cache_that_is_filled(name: str, network: int | None) -> None:
    model, plain, tokens = adapted(name, reparameterize=network), base(name), ids(2, 5)
    for mask in (None, MASK, MASK.flip(1)):
        given = {} if mask is None else {"attention_mask": mask}
        cache = filled(model, 1 if name == "llama" else 3, 2)
        expected = plain(tokens, cache=cache, **{key: longer(mask) for key, mask in given.items()})[0]
        torch.testing.assert_close(model(tokens, **given)[0], expected)
    assert not torch.allclose(model(tokens)[0], plain(tokens)[0], atol=1e-3)
    with disabled(model):
        assert torch.equal(model(tokens)[0], plain(tokens)[0])


@pytest.mark.parametrize("name", BOTH)
def test_of_an_encoder_and_a_decoder_it_is_in_front_of_what_the_decoder_reads(name: str) -> None:
    model, plain, tokens, read = adapted(name), base(name), ids(2, 5), ids(2, 4)
    given = {"input_ids": tokens, "attention_mask": MASK, "decoder_input_ids": read}
    expected = plain(**given, cache=filled(model, 3, 2)).logits
    torch.testing.assert_close(model(**given).logits, expected)
    masked = {"decoder_attention_mask": MASK[:, :4].flip(1)}
    long_mask = {"decoder_attention_mask": longer(MASK[:, :4].flip(1))}
    expected = plain(**given, **long_mask, cache=filled(model, 3, 2)).logits
    torch.testing.assert_close(model(**given, **masked).logits, expected)
    loss = model(input_ids=tokens, labels=read).loss
    loss.backward()
    assert adapters_of(model)[0][2].prompt.table.grad.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_are_given_count_on(name: str) -> None:
    model, plain, tokens = adapted(name), base(name), ids(2, 5)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    cache = filled(model, 1 if name == "llama" else 3, 2)
    expected = plain(tokens, attention_mask=longer(MASK), position_ids=positions + P, cache=cache).logits
    torch.testing.assert_close(model(tokens, attention_mask=MASK, position_ids=positions).logits, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("method", [CASES[0], PromptTuning(num_virtual_tokens=2)], ids=["prefix", "prompt"])
def test_what_a_model_looks_over_is_no_matter_of_positions(method: Method, name: str) -> None:
    model, tokens = moved(inject(base(name), method)), ids(2, 9)
    expected = model(tokens).logits
    torch.testing.assert_close(model(tokens, position_ids=torch.arange(9)[None]).logits, expected)


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_generation_with_and_without_a_cache_agree(name: str) -> None:
    model, tokens = adapted(name), ids(2, 5)
    # an encoder is padded on the right: BART counts positions from the padding on
    mask = MASK.flip(1) if name in BOTH else MASK
    made = [model.generate(tokens, attention_mask=mask, use_cache=use, **OPTIONS)[:, -4:] for use in (True, False)]
    assert torch.equal(*made)
    for row in range(1 if name == "mistral" else 2):  # padding stands in the window that its tokens look over
        given = {"input_ids": tokens[row : row + 1, mask[row].bool()]}
        grows = "decoder_input_ids" if name in BOTH else "input_ids"
        given[grows] = torch.ones(1, 1, dtype=torch.long) if name in BOTH else given[grows]
        for _ in range(4):
            given[grows] = torch.cat([given[grows], model(**given).logits[:, -1:].argmax(-1)], dim=1)
        assert made[0][row].tolist() == given[grows][0, -4:].tolist()
    beams = [
        model.generate(tokens, attention_mask=mask, num_beams=3, use_cache=use, **OPTIONS) for use in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_cache_that_is_handed_in_goes_on_where_it_was() -> None:
    from transformers import DynamicCache

    model, tokens, cache = adapted("llama"), ids(2, 5), DynamicCache()
    first = model(tokens[:, :3], cache=cache).logits
    assert cache.get_seq_length() == P + 3
    second = model(tokens[:, 3:], cache=cache, attention_mask=torch.ones(2, 5, dtype=torch.long)).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), model(tokens).logits)


def test_documents_packed_into_one_row_do_not_see_each_other() -> None:
    model = adapted("llama")
    one, two = ids(1, 3), ids(1, 4)
    both = model(torch.cat([one, two], dim=1), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]])).logits
    torch.testing.assert_close(both, torch.cat([model(one).logits, model(two).logits], dim=1))


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_nobody_gets_a_cache_that_did_not_ask_for_one(name: str, asked: bool | None) -> None:
    given = {"use_cache": asked, "input_ids": ids(2, 5)} | ({"decoder_input_ids": ids(2, 3)} if name == "t5" else {})
    seen, expected = adapted(name)(**given), base(name)(**given)
    assert seen.keys() == expected.keys()
    assert len(adapted(name)(**given, return_dict=False)) == len(base(name)(**given, return_dict=False))


@pytest.mark.parametrize("name", ["gpt2", "bloom"])  # the second looks at how far its keys are away
def test_two_of_them_are_one_longer_prefix(name: str) -> None:
    model, tokens = adapted(name), ids(2, 5)
    moved(inject(model, PrefixTuning(num_virtual_tokens=2, place="cache"), name="second"), seed=3)
    first, second = (adapter.prompt.table for _, _, adapter in adapters_of(model))
    one = inject(base(name), PrefixTuning(num_virtual_tokens=P + 2, place="cache"))
    adapters_of(one)[0][2].prompt.table.data = torch.cat([first, second]).detach()
    for given in ({}, {"attention_mask": MASK}, {"position_ids": torch.arange(5)[None]} if name == "gpt2" else {}):
        torch.testing.assert_close(model(tokens, **given).logits, one(tokens, **given).logits)
    made = [m.generate(tokens, attention_mask=MASK, **OPTIONS) for m in (model, one)]
    assert torch.equal(*made)


def test_a_prompt_stands_between_the_prefix_and_the_text() -> None:
    model, tokens = adapted("llama"), ids(2, 5)
    cache = filled(model, 1, 2)
    inject(model, PromptTuning(num_virtual_tokens=2), name="prompt")
    prompt = adapters_of(model, "prompt")[0][2].prompt.table
    embedded = torch.cat([prompt.expand(2, -1, -1), model.model.embed_tokens(tokens)], dim=1)
    expected = base("llama")(inputs_embeds=embedded, cache=cache).logits[:, 2:]
    torch.testing.assert_close(model(tokens).logits, expected)
    made = [model.generate(tokens, attention_mask=MASK, use_cache=use, **OPTIONS) for use in (True, False)]
    assert torch.equal(*made)


def test_a_prompt_below_it_is_refused() -> None:
    model = inject(base("llama"), PromptTuning(num_virtual_tokens=2))
    inject(model, PrefixTuning(num_virtual_tokens=P, place="cache"), name="prefix")
    with pytest.raises(AdapterError, match="Inject the prompt after the prefix"):
        model(ids(2, 5))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_cache_that_is_taken_away_is_an_error() -> None:
    model, tokens = adapted("llama"), ids(2, 5)
    expected = model(tokens).logits
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(tokens).logits, expected)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected)
    with pytest.raises(AdapterError, match="no token sees the prefix. Gradient checkpointing"):
        model(tokens)


def test_a_cache_that_is_not_used_is_an_error() -> None:
    import transformers as t

    model = t.T5EncoderModel(t.T5Config(d_ff=20, d_kv=4, num_layers=1, num_heads=3, **STACK, **SPECIAL))
    model = inject(model, PrefixTuning(num_virtual_tokens=P, place="cache"))
    with pytest.raises(AdapterError, match="the layers of T5Stack do not use the cache"):
        model(ids(2, 5))


def test_a_static_cache_is_refused() -> None:
    with pytest.raises(AdapterError, match="a static cache has room for the tokens without"):
        adapted("llama").generate(ids(2, 5), cache_implementation="static", **OPTIONS)


def test_a_text_that_is_too_long_is_refused() -> None:
    model = adapted("gpt2")
    model(ids(1, 16 - P))
    with pytest.raises(AdapterError, match="need more than the 16 positions"):
        model(ids(1, 17 - P))
    with pytest.raises(TargetError, match="has 16 positions for them and the text"):
        inject(base("gpt2"), PrefixTuning(num_virtual_tokens=16, place="cache"))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = base("llama"), base("gpt2")


def test_of_several_parts_one_is_named() -> None:
    cached = PrefixTuning(num_virtual_tokens=P, place="cache")
    with pytest.raises(
        TargetError, match=r"2 parts of Pair are meant. There are: 'student.model', 'teacher.transformer'"
    ):
        inject(Pair(), cached)
    named = PrefixTuning(num_virtual_tokens=P, place="cache", target_modules="teacher.transformer")
    assert [name for name, _, _ in adapters_of(inject(Pair(), named))] == ["teacher.transformer"]


@pytest.mark.parametrize("name", ["encoder", "vit"])
def test_a_model_without_a_cache_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="0 parts of .* are meant. There are: none. Name one .* place='attention'"):
        inject(backbone(name), CASES[0])


def test_the_count_is_that_of_the_formula() -> None:
    """Keys and values of 4 features (one head) in 2 layers; the network reads tables as wide as the model."""
    assert CASES[0].total_trainable(CASES[0].targets(base("llama"))) == 3 * 16
    assert CASES[1].total_trainable(CASES[1].targets(base("llama"))) == 16 * 6 + 2 * 12 + 5 * 13
