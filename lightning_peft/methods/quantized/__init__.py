"""Methods whose base is kept in few bits."""

from .qlora import QLoRA as QLoRA
