"""The types of HF PEFT that put trained tokens in front of a text, or their keys and values into its cache.

Their files hold what is put there alone, also where a small network made it, which is thrown away there: P-tuning is
read as a `PromptTuning`, and a `PTuning` writes its network beside it, under our own names; so does a `PrefixTuning`.
The prompt of HF PEFT stands in front of all tokens, so ``class_tokens=0`` here; its answers are longer by the prompt,
and ours are not.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.cached_prefix import CachedPrefix
from lightning_peft.adapters.prompts import TextTokens, Tokens
from lightning_peft.engine import AdapterFileError, Method
from lightning_peft.engine.slots import base_class
from lightning_peft.interop.hf_format import Found, NoCounterpart, Parts, Place, Row, State
from lightning_peft.methods import PrefixTuning, PromptTuning, PTuning
from lightning_peft.parts.caches import cache_target

PROMPT = "prompt_embeddings"
_SEEN = "prefix_as_seen"  # ours beside it, where HF PEFT deals the layers out in another order

# class of model -> what HF PEFT calls its task: how a prompt comes in depends on it
_TASKS = {
    r"ForCausalLM|LMHeadModel|ForConditionalGeneration": "CAUSAL_LM",  # of an encoder and a decoder the next
    r"EncoderDecoderModel": "SEQ_2_SEQ_LM",
    r"ForSequenceClassification": "SEQ_CLS",
    r"ForTokenClassification": "TOKEN_CLS",
    r"ForQuestionAnswering": "QUESTION_ANS",
    r"Model": "FEATURE_EXTRACTION",
}
# whose heads HF PEFT wants to find in the file
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def _prompt_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    if adapter.prompt is None:
        return {}
    if not isinstance(adapter, TextTokens):
        raise NoCounterpart("HF PEFT puts prompts in front of an embedded text, not of the tokens of a block.")
    if adapter.start:
        raise AdapterFileError(
            f"HF PEFT puts a prompt in front of all tokens, and {adapter.start} stay before this one (class_tokens)."
        )
    names = [name for name, _ in adapter.prompt.named_parameters()]
    return {"prompt.table": Place(PROMPT, tuple(adapter.prompt.table.shape))} if names == ["table"] else {}


def _made_prompt(found: Found, state: State) -> dict[str, Tensor]:
    path, _, adapter = next(one for one in found if one[2].prompt is not None)
    prompt = copy.deepcopy(adapter.prompt)
    for name, _ in list(prompt.named_parameters()):  # that of the adapter may be spread over ranks
        owner, _, last = name.rpartition(".")
        setattr(prompt.get_submodule(owner), last, nn.Parameter(state[f"{adapter.site.prefix(path)}prompt.{name}"]))
    return {PROMPT: prompt().detach()}


def _task(model: nn.Module, state: State) -> str:
    """What HF PEFT calls the task of ``model``.

    Raises:
        AdapterFileError: it knows none, or wants a head in the file that is not among what is saved.
    """
    task = next((task for kind, task in _TASKS.items() if re.search(f"({kind})$", base_class(model).__name__)), None)
    if task == "CAUSAL_LM" and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        task = "SEQ_2_SEQ_LM"
    if task is None:
        raise AdapterFileError(f"HF PEFT knows no task of {base_class(model).__name__} in which a prompt comes in.")
    heads = [name for name, _ in model.named_children() if name in _HEADS.get(task, ())]
    missing = [
        name for name in heads if any(f"{name}.{key}" not in state for key in model.get_submodule(name).state_dict())
    ]
    if missing:
        raise AdapterFileError(
            f"HF PEFT wants the head {missing[0]!r} in a file for {task}, and it is not trained here (modules_to_save)."
        )
    return task


def _write_prompt(method: PromptTuning | PTuning, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    config = {
        "task_type": _task(model, state),
        "num_virtual_tokens": method.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "token_dim": next(a.prompt.table.shape[1] for _, _, a in found if a.prompt is not None),
    }
    if isinstance(method, PromptTuning):
        return config | {"prompt_tuning_init": "RANDOM"}
    return config | {
        "encoder_reparameterization_type": method.encoder.upper(),
        "encoder_hidden_size": method.encoder_hidden_size,
        "encoder_num_layers": method.num_layers,
    }


def _read_prompt(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    p = config["num_virtual_tokens"]
    table = found.get("", {}).get(PROMPT)
    if table is None or table.dim() != 2 or len(table) < p:
        raise AdapterFileError(f"the file has no {PROMPT!r} of {p} tokens: it is torn or foreign.")
    # of an encoder and a decoder HF PEFT keeps a prompt for each, and uses the first
    return PromptTuning(num_virtual_tokens=p, class_tokens=0, modules_to_save=whole), {"": {PROMPT: table[:p]}}


# Of an encoder and a decoder HF PEFT hands out keys and values in fours, for the attention to the text and for that to
# what was read, and drops the latter: layer i of N sees the prefix of layer 2 i, counted round.


def _in_fours(decoder: Any) -> bool:
    return bool(decoder.config.is_encoder_decoder or getattr(decoder.config, "add_cross_attention", False))


def _as_handed_out(table: Tensor, n_theirs: int, n_ours: int, in_fours: bool) -> Tensor:
    """(p, 2 N D) as HF PEFT keeps it -> what the layers see of it."""
    seen = [2 * i % n_theirs if in_fours else i for i in range(n_ours)]
    return table.unflatten(1, (n_theirs, -1))[:, seen].flatten(1)


def _prefix_places(path: str, module: Any, adapter: Any, found: Found) -> dict[str, Place]:
    if adapter.prompt.trunk is not None:
        return {}
    key = _SEEN if _in_fours(module) else PROMPT
    return {"prompt.table": Place(key, tuple(adapter.prompt.table.shape))}


def _made_prefix(found: Found, state: State) -> dict[str, Tensor]:
    _, module, adapter = found[0]
    table = _made_prompt(found, state)[PROMPT]
    if not _in_fours(module):
        return {PROMPT: table}
    n, own = _number_of_layers(found), table.unflatten(1, (len(adapter.layers), -1))
    theirs = own.new_zeros(len(table), n, own.shape[2])
    theirs[:, [2 * i % n for i in range(own.shape[1])]] = own
    return {PROMPT: theirs.flatten(1)}


def _number_of_layers(found: Found) -> int:
    """As HF PEFT is to know it: of an even number, two layers of a decoder would see the same prefix."""
    _, module, adapter = found[0]
    return len(adapter.layers) + (_in_fours(module) and len(adapter.layers) % 2 == 0)


def _write_prefix(method: PrefixTuning, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
    kept = set(found[0][2].layers)
    (first,) = kept if len(kept) == 1 else (None,)
    if first is None or first.keys != first.values:
        raise AdapterFileError("HF PEFT has keys and values of one width for all layers, and this model has several.")
    task, fours = _task(model, state), _in_fours(found[0][1])
    if fours != (task == "SEQ_2_SEQ_LM"):
        raise AdapterFileError(f"HF PEFT does not know how {base_class(model).__name__} hands a cache to its decoder.")
    return {
        "task_type": task,
        "num_virtual_tokens": method.num_virtual_tokens,
        "num_transformer_submodules": 2 if fours else 1,
        "token_dim": first.keys,
        "num_attention_heads": first.heads,
        "num_layers": _number_of_layers(found),
        "prefix_projection": method.reparameterize is not None,
        "encoder_hidden_size": method.reparameterize,
    }


def _read_prefix(
    config: Mapping[str, Any], found: Parts, whole: tuple[str, ...], model: nn.Module
) -> tuple[Method, Parts]:
    p, n, table = config["num_virtual_tokens"], config["num_layers"], found.get("", {}).get(PROMPT)
    method = PrefixTuning(num_virtual_tokens=p, place="cache", modules_to_save=whole)
    target = cache_target(model, p, "PrefixTuning")
    in_fours, n_ours = config.get("num_transformer_submodules") == 2, len(target.layers)
    shape = None if table is None else tuple(table.shape)
    fits = isinstance(n, int) and (n >= n_ours if in_fours else n == n_ours)
    if table is None or not fits or shape != (p, target.width // n_ours * n):
        raise AdapterFileError(
            f"the file holds {shape} as {PROMPT!r} of {n} layers, and the cache of {base_class(model).__name__} has "
            f"{n_ours}, with {target.width} features of each of {p} tokens: it is torn, or for another model."
        )
    key = _SEEN if _in_fours(target.module) else PROMPT
    return method, {"": {key: _as_handed_out(table, n, n_ours, in_fours)}}


_PROMPTS: dict[str, Any] = {
    "names": (PROMPT,),
    "places": {Tokens: _prompt_places},
    "write": _write_prompt,
    "read": _read_prompt,
    "required": ("num_virtual_tokens",),
    "plain": {"task_type": tuple(_TASKS.values())},
    "prefix": "",
    "whole_prefix": "base_model.",
}
_PREFIXES = _PROMPTS | {
    "places": {CachedPrefix: _prefix_places},
    "write": _write_prefix,
    "read": _read_prefix,
    "required": ("num_virtual_tokens", "num_layers"),
}
_SIZES = "token_dim num_transformer_submodules num_attention_heads num_layers"

ROWS = {
    "PROMPT_TUNING": Row(
        **_PROMPTS,
        methods=(PromptTuning,),
        known=f"{_SIZES} prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs",
    ),
    "P_TUNING": Row(
        **_PROMPTS,
        methods=(PTuning,),
        derived=_made_prompt,
        known=f"{_SIZES} encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout",
    ),
    "PREFIX_TUNING": Row(
        **_PREFIXES,
        methods=(PrefixTuning,),
        derived=_made_prefix,
        known=f"{_SIZES} prefix_projection encoder_hidden_size init_weights",
    ),
    # the same, but for the first tokens, which do not train there
    "CARTRIDGE": Row(**_PREFIXES, training={"num_frozen_tokens": 0}, known=_SIZES),
}
