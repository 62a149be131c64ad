"""The types of HF PEFT that put trained tokens in front of a text.

Their files hold the embedded prompt alone, also of P-tuning, whose network is thrown away there: it is read as a
`PromptTuning`, and a `PTuning` writes its network beside it, under our own names. The prompt of HF PEFT stands in front
of all tokens, so ``class_tokens=0`` here; its answers are longer by the prompt, and ours are not.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.prompts import TextTokens, Tokens
from lightning_peft.engine import AdapterFileError, Method
from lightning_peft.engine.slots import base_class
from lightning_peft.interop.hf_format import Found, NoCounterpart, Parts, Place, Row, State
from lightning_peft.methods import PromptTuning, PTuning

PROMPT = "prompt_embeddings"

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


def _write_prompt(method: PromptTuning | PTuning, found: Found, model: nn.Module, state: State) -> dict[str, Any]:
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
    config = {
        "task_type": task,
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
        names=(),
        because="its prefix moves the positions of all tokens, and that of our PrefixTuning does not.",
    ),
}
