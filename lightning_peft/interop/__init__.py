"""Adapter files, ours and those of other libraries."""

from .combine import combine as combine
from .experts import load_experts as load_experts
from .files import load_adapter as load_adapter
from .files import read_adapter as read_adapter
from .files import save_adapter as save_adapter
from .hfpeft import HFPEFT as HFPEFT
from .hfpeft import task_ids as task_ids
